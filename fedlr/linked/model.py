"""The linked CP model: tensors that share the factor of their first mode, and what it is made of.

    X_k ~ [[A_0, A_1^k, .., A_{N_k-1}^k]],  k = 1 .. K,

with R components common to all. Component r has the weight ``lam_kr = prod_n |a_nr^k|`` in tensor
k, A_0 included. It is active in k if that exceeds a small threshold, *shared* if it is active in
every tensor, *individual* if it is active in one of several, and partially shared in between.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from fedlr import _checks, _partials, _precision
from fedlr.cp import tensor

__all__ = [
    "LinkedCP",
    "active_components",
    "balance",
    "individual_part",
    "normalize",
    "random_init",
    "selected_part",
    "shared_part",
    "to_dense",
    "weights",
]

_THRESHOLD = 1e-5
_NEWTON_STEPS = 12


class LinkedCP(NamedTuple):
    """Tensors in CP form with one common factor; all leaves may have leading batch axes.

    Attributes:
        shared: Factor A_0 of the mode that all tensors share, shape (n, R).
        factors: For every tensor the tuple of its other factors A_1 .. A_{N-1}, shape (I, R) each.
    """

    shared: Float[Array, "samples rank"]
    factors: tuple[tuple[Float[Array, "size rank"], ...], ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the dense tensors, without batch axes."""
        samples = self.shared.shape[-2]
        return tuple((samples, *(factor.shape[-2] for factor in own)) for own in self.factors)

    @property
    def rank(self) -> int:
        """Number R of components."""
        return self.shared.shape[-1]


def random_init(
    tensors: Sequence[Float[Array, "samples ..."]], rank: int, *, key: Key[Array, ""]
) -> LinkedCP:
    """Draw a start with independent N(0, 1) entries in all factors.

    Args:
        tensors: Tensors X_1 .. X_K with a common first mode; only shapes and dtype are used.
        rank: Number R >= 1 of components; *static*.
        key: Random key.

    Returns:
        LinkedCP of the tensors' shapes and dtype.

    Raises:
        ValueError: If there is no tensor, one has fewer than two modes, first modes or dtypes
            differ, or the rank is no positive integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> tensors = (jnp.ones((6, 4, 3)), jnp.ones((6, 5)))
        >>> start = linked.random_init(tensors, 2, key=jax.random.key(0))
        >>> start.shapes, start.rank
        (((6, 4, 3), (6, 5)), 2)

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, and its published implementation.
    """
    tensors = check_tensors("random_init", tensors)
    _checks.check_count("random_init", "rank", rank)
    sizes = [tensors[0].shape[0], *(size for x in tensors for size in x.shape[1:])]
    shared, *rest = tensor.draw_factors(sizes, rank, key, tensors[0].dtype)
    drawn = iter(rest)
    return LinkedCP(shared, tuple(tuple(next(drawn) for _ in x.shape[1:]) for x in tensors))


def weights(fit: LinkedCP) -> Float[Array, "tensors rank"]:
    """Compute the weight ``lam_kr = prod_n |a_nr^k|`` of every component in every tensor.

    Args:
        fit: Linked model of K tensors.

    Returns:
        Weights, shape (K, R).

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((4, 1)), ((jnp.ones((9, 1)),), (jnp.zeros((5, 1)),)))
        >>> linked.weights(fit)[:, 0].tolist()
        [6.0, 0.0]
    """
    check_linked("weights", fit)
    return tensor.column_norms(fit.shared)[None] * own_weights(fit)


def active_components(
    fit: LinkedCP, *, threshold: float = _THRESHOLD
) -> Bool[Array, "tensors rank"]:
    """Tell in which tensors a component is active: ``lam_kr > threshold``.

    Args:
        fit: Linked model of K tensors.
        threshold: Weight that counts as none; that of the published implementation.

    Returns:
        Table, bool (K, R): a component is shared if its column is all True, and individual if it
        has one True of several.

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((4, 1)), ((jnp.ones((9, 1)),), (jnp.zeros((5, 1)),)))
        >>> linked.active_components(fit)[:, 0].tolist()
        [True, False]
    """
    return weights(fit) > threshold


@_precision.highest
def to_dense(fit: LinkedCP) -> tuple[Float[Array, "samples ..."], ...]:
    """Form the dense tensors ``[[A_0, A_1^k, ..]]``.

    Args:
        fit: Linked model of K tensors.

    Returns:
        Tuple of K tensors.

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 3)), ((jnp.ones((4, 3)),),))
        >>> linked.to_dense(fit)[0][0].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    check_linked("to_dense", fit)
    return tuple(dense_rows(fit.shared, own) for own in fit.factors)


def selected_part(
    fit: LinkedCP, chosen: Bool[Array, "tensors rank"]
) -> tuple[Float[Array, "samples ..."], ...]:
    """Form the dense tensors of some components only.

    Args:
        fit: Linked model of K tensors.
        chosen: Which components to add up in which tensor, bool (K, R).

    Returns:
        Tuple of K tensors.

    Raises:
        ValueError: If the factors do not fit together, or `chosen` is not bool (K, R).

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 3)), ((jnp.ones((4, 3)),),))
        >>> linked.selected_part(fit, jnp.array([[True, False, True]]))[0][0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    check_linked("selected_part", fit)
    _checks.check_mask("selected_part", chosen, (len(fit.factors), fit.rank))
    with jax.default_matmul_precision("highest"):
        return tuple(
            dense_rows(jnp.where(chosen[k][None], fit.shared, 0), own)
            for k, own in enumerate(fit.factors)
        )


def shared_part(
    fit: LinkedCP, *, threshold: float = _THRESHOLD
) -> tuple[Float[Array, "samples ..."], ...]:
    """Form the part of every tensor whose components are active in all tensors.

    For a single tensor that is every active component.

    Args:
        fit: Linked model of K tensors.
        threshold: Weight that counts as none.

    Returns:
        Tuple of K tensors.

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 1)), ((jnp.ones((3, 1)),), (jnp.ones((4, 1)),)))
        >>> [part.shape for part in linked.shared_part(fit)]
        [(2, 3), (2, 4)]
    """
    active = active_components(fit, threshold=threshold)
    return selected_part(fit, active & jnp.all(active, axis=0)[None])


def individual_part(
    fit: LinkedCP, *, threshold: float = _THRESHOLD
) -> tuple[Float[Array, "samples ..."], ...]:
    """Form the part of every tensor whose components are active in no other tensor.

    Zero for a single tensor. With three tensors or more, components active in some but not all are
    in neither this part nor the shared one; `selected_part` forms any choice.

    Args:
        fit: Linked model of K tensors.
        threshold: Weight that counts as none.

    Returns:
        Tuple of K tensors.

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 1)), ((jnp.ones((3, 1)),), (jnp.zeros((4, 1)),)))
        >>> [float(part[0, 0]) for part in linked.individual_part(fit)]
        [1.0, 0.0]
    """
    active = active_components(fit, threshold=threshold)
    alone = jnp.sum(active, axis=0, dtype=jnp.int32) == 1
    return selected_part(fit, active & alone[None] & (len(fit.factors) > 1))


def balance(fit: LinkedCP) -> LinkedCP:
    """Scale the columns so that the penalty is least while every dense tensor stays.

    Per component, with ``s = |a_0|`` and t_k the squared norm of its other columns in tensor k,

        ``t_k = (lam_k / s)^{2 / (N_k - 1)}``  and  ``s^2 = sum_k t_k``,

    which is what a minimum of the penalized objective fulfils. A component that is zero in a tensor
    gets zero columns there, and one that is zero in all of them a zero column in A_0.

    Args:
        fit: Linked model of K tensors.

    Returns:
        The balanced model; balancing it again changes nothing.

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((1, 1)), ((jnp.full((1, 1), 16.0),),))
        >>> even = linked.balance(fit)
        >>> round(float(even.shared[0, 0]), 5), round(float(even.factors[0][0][0, 0]), 5)
        (4.0, 4.0)

    Reference: the AM-GM argument of Kang, Rao and Lock 2025, arXiv 2502.20286, for one tensor;
        the balance over linked tensors is derived here. ``2 log s = log sum_k t_k(s)`` is solved
        by Newton steps: the difference of its sides is concave and increasing in log s.
    """
    check_linked("balance", fit)
    lengths = tensor.column_norms(fit.shared)
    alive = (lengths > 0)[None] & (own_weights(fit) > 0)
    logs = jnp.log(jnp.where(alive, weights(fit), 1))
    power = jnp.array([2 / len(own) for own in fit.factors], fit.shared.dtype)[:, None]

    def exponents(u: Array) -> Array:
        return jnp.where(alive, power * (logs - u[None]), -jnp.inf)

    any_alive = jnp.any(alive, axis=0)

    def newton(_: int, u: Array) -> Array:
        terms = exponents(u)
        top = jnp.where(any_alive, jnp.max(terms, axis=0), 0)
        shares = jnp.exp(terms - top[None])
        total = jnp.where(any_alive, jnp.sum(shares, axis=0), 1)
        slope = 2 + jnp.sum(power * shares, axis=0) / total
        return u - (2 * u - (jnp.log(total) + top)) / slope

    u = lax.fori_loop(0, _NEWTON_STEPS, newton, jnp.log(jnp.where(lengths > 0, lengths, 1)))
    squares = jnp.where(alive, jnp.exp(exponents(u)), 0)
    new_length = jnp.where(any_alive, jnp.exp(u), 0)
    shared = _rescale(fit.shared, new_length)
    own = [
        tuple(_rescale(factor, jnp.sqrt(squares[k])) for factor in factors)
        for k, factors in enumerate(fit.factors)
    ]
    return LinkedCP(shared, tuple(own))


def normalize(fit: LinkedCP) -> LinkedCP:
    """Balance a model, sort its components and fix their signs; every dense tensor stays.

    Components come in decreasing order of ``sum_k lam_kr^2``. The entry of largest modulus of
    every column is positive in the shared mode and in all but the last mode of every tensor, whose
    columns take up the signs.

    Args:
        fit: Linked model of K tensors.

    Returns:
        The same model in canonical form.

    Raises:
        ValueError: If the factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.array([[-1.0]]), ((jnp.array([[-16.0]]),),))
        >>> round(float(linked.normalize(fit).shared[0, 0]), 5)
        4.0
    """
    fit = balance(fit)
    order = jnp.argsort(-jnp.sum(weights(fit) ** 2, axis=0), stable=True)
    fit = jax.tree.map(lambda factor: factor[:, order], fit)
    sign = tensor.column_signs(fit.shared)
    shared, factors = fit.shared * sign[None], []
    for own in fit.factors:
        turned, total = [], sign
        for factor in own[:-1]:
            turn = tensor.column_signs(factor)
            turned.append(factor * turn[None])
            total = total * turn
        factors.append((*turned, own[-1] * total[None]))
    return LinkedCP(shared, tuple(factors))


def check_tensors(function: str, tensors: Sequence[Array]) -> tuple[Array, ...]:
    """Refuse tensors that share no first mode or dtype; return them as a tuple."""
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise _checks.fail(function, f"tensors of type {type(tensors).__name__}", "one or more")
    for k, x in enumerate(tensors):
        _checks.check_floating(function, **{f"tensor {k}": x})
    found = tuple(jnp.asarray(x) for x in tensors)
    for k, x in enumerate(found):
        _checks.check_ndim(function, f"tensor {k}", x, 2, max(2, x.ndim))
        if x.shape[0] != found[0].shape[0]:
            wanted = f"{found[0].shape[0]} samples in mode 0 as tensor 0"
            raise _checks.fail(function, f"tensor {k} of shape {x.shape}", wanted)
        if x.dtype != found[0].dtype:
            got = f"tensor {k} of dtype {x.dtype}"
            raise _checks.fail(function, got, f"{found[0].dtype} as tensor 0")
    return found


def check_linked(function: str, fit: LinkedCP) -> None:
    """Refuse a model whose factors do not fit together."""
    if not fit.factors or any(not own for own in fit.factors):
        raise _checks.fail(function, "a tensor without factors", "one or more for every tensor")
    leaves = {"shared": fit.shared} | {
        f"factor {n} of tensor {k}": factor
        for k, own in enumerate(fit.factors)
        for n, factor in enumerate(own, start=1)
    }
    for name, factor in leaves.items():
        _checks.check_floating(function, **{name: factor})
        _checks.check_ndim(function, name, factor, 2)
        if factor.shape[1] != fit.shared.shape[1] or factor.dtype != fit.shared.dtype:
            got = f"{name} of shape {factor.shape} and dtype {factor.dtype}"
            wanted = f"{fit.shared.shape[1]} columns of {fit.shared.dtype} as shared"
            raise _checks.fail(function, got, wanted)
    _checks.check_count(function, "rank", fit.shared.shape[1])


def check_fit(
    function: str, fit: LinkedCP, tensors: Sequence[Array], masks: Sequence[Array] | None
) -> tuple[tuple[Array, ...], tuple[Array, ...] | None]:
    """Refuse tensors or masks that a model does not fit; return tuples of both."""
    found = check_tensors(function, tensors)
    check_linked(function, fit)
    shapes = tuple(x.shape for x in found)
    if fit.shapes != shapes:
        raise _checks.fail(function, f"a model of shapes {fit.shapes}", f"{shapes} as the tensors")
    if fit.shared.dtype != found[0].dtype:
        got = f"a model of dtype {fit.shared.dtype}"
        raise _checks.fail(function, got, f"{found[0].dtype} as the tensors")
    if masks is None:
        return found, None
    return found, check_masks(function, found, masks)


def check_masks(
    function: str, tensors: Sequence[Array], masks: Sequence[Array]
) -> tuple[Array, ...]:
    """Refuse masks that are not one bool array for every tensor; return them as a tuple."""
    if not isinstance(masks, (tuple, list)) or len(masks) != len(tensors):
        got = f"masks of type {type(masks).__name__}"
        raise _checks.fail(function, got, f"a tuple of {len(tensors)}, one for every tensor")
    for mask, x in zip(masks, tensors, strict=True):
        _checks.check_mask(function, mask, x.shape)
    return tuple(jnp.asarray(mask) for mask in masks)


def own_weights(fit: LinkedCP) -> Array:
    """Multiply the norms of the columns of every tensor's own factors: (K, R)."""
    rows = []
    for own in fit.factors:
        product = tensor.column_norms(own[0])
        for factor in own[1:]:
            product = product * tensor.column_norms(factor)
        rows.append(product)
    return jnp.stack(rows)


def used_columns(own: Sequence[Array]) -> Array:
    """Tell which columns are zero in none of a tensor's own factors: bool (R,)."""
    return functools.reduce(jnp.logical_and, [jnp.any(factor != 0, axis=0) for factor in own])


def dense_rows(shared: Array, own: Sequence[Array]) -> Array:
    """Form ``[[A_0, A_1, ..]]`` for some or all rows of A_0."""
    shape = (shared.shape[0], *(factor.shape[0] for factor in own))
    return (shared @ _partials.khatri_rao(own).T).reshape(shape)


def _rescale(factor: Array, length: Array) -> Array:
    """Give the columns new norms; zero columns stay."""
    old = tensor.column_norms(factor)
    return factor * jnp.where(old > 0, length / jnp.where(old > 0, old, 1), 0)[None]
