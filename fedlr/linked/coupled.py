"""Tensors coupled along several modes: CP models that share a factor wherever they share a mode.

Every tensor names its modes, for example

    modes = (("subject", "gene", "time"), ("subject", "voxel"), ("gene", "pathway")),

and there is one factor A_g for every distinct name g, in the order of first appearance:

    X_k ~ [[A_g : g in modes[k]]],  k = 1 .. K,

with R components common to all. Component r has the weight ``lam_kr = prod_{g in k} |a_gr|`` in
tensor k. Names are hashable and static. With one common name, in the first mode of every tensor,
this is the linked model.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from fedlr import _alternating, _checks, _cholesky, _precision, iteration
from fedlr.cp import tensor
from fedlr.linked import model

__all__ = [
    "CoupledCP",
    "balance_coupled",
    "coupled_als",
    "mode_ids",
    "random_coupled_init",
    "to_dense",
    "weights",
]

_NEWTON_STEPS = 60


class CoupledCP(NamedTuple):
    """Factors of coupled tensors; all leaves may have leading batch axes.

    Attributes:
        factors: One factor A_g of shape (size, R) for every distinct mode id, in the order of
            `mode_ids`.
    """

    factors: tuple[Float[Array, "size rank"], ...]

    @property
    def rank(self) -> int:
        """Number R of components."""
        return self.factors[0].shape[-1]


def mode_ids(modes: Sequence[Sequence[Hashable]]) -> tuple[Hashable, ...]:
    """Return the distinct mode ids in the order of first appearance, which is that of the factors.

    Args:
        modes: For every tensor the ids of its modes; *static*.

    Returns:
        Tuple of the ids.

    Raises:
        ValueError: If there is no tensor, an id is not hashable, or one is twice in a tensor.

    Example:
        >>> from fedlr.linked import coupled
        >>> coupled.mode_ids((("subject", "gene"), ("gene", "pathway")))
        ('subject', 'gene', 'pathway')
    """
    return _check_modes("mode_ids", modes)[0]


def random_coupled_init(
    tensors: Sequence[Float[Array, "..."]],
    modes: Sequence[Sequence[Hashable]],
    rank: int,
    *,
    key: Key[Array, ""],
) -> CoupledCP:
    """Draw a start with independent N(0, 1) entries in all factors.

    Args:
        tensors: Tensors X_1 .. X_K; only shapes and dtype are used.
        modes: For every tensor the ids of its modes; *static*.
        rank: Number R >= 1 of components; *static*.
        key: Random key; every factor has a draw of its own.

    Returns:
        CoupledCP of the tensors' sizes and dtype.

    Raises:
        ValueError: If tensors and modes do not fit together, or the rank is no positive integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr.linked import coupled
        >>> tensors, modes = (jnp.ones((6, 4, 3)), jnp.ones((4, 5))), ("ijk", "jl")
        >>> start = coupled.random_coupled_init(tensors, modes, 2, key=jax.random.key(0))
        >>> [factor.shape for factor in start.factors]
        [(6, 2), (4, 2), (3, 2), (5, 2)]
    """
    tensors, _, sizes = _check_tensors("random_coupled_init", tensors, modes)
    _checks.check_count("random_coupled_init", "rank", rank)
    keys = jax.random.split(key, len(sizes))
    dtype = tensors[0].dtype
    return CoupledCP(
        tuple(
            jax.random.normal(k, (size, rank), dtype) for k, size in zip(keys, sizes, strict=True)
        )
    )


@_precision.highest
def coupled_als(
    tensors: Sequence[Float[Array, "..."]],
    modes: Sequence[Sequence[Hashable]],
    *,
    init: CoupledCP,
    penalty: float | Float[Array, ""],
    masks: Sequence[Bool[Array, "..."] | None] | None = None,
    max_iters: int = 300,
    tol: float = 1e-8,
    extrapolate: bool = False,
) -> tuple[CoupledCP, iteration.IterationInfo]:
    """Factorize tensors that share modes, by alternating least squares.

    Minimize

        ``sum_k |W_k * (X_k - [[A_g : g in k]])|^2 + penalty sum_g |A_g|^2``

    over one factor after another in the order of `mode_ids`. Every factor counts once in the
    penalty, in however many tensors it is. Its normal equations add up over the tensors that have
    it, ``A_g (sum_k H_kg + penalty I) = sum_k M_kg`` with the MTTKRP M_kg and the Hadamard product
    H_kg of the Gram matrices of the other modes of tensor k. As for the linked model, a large
    penalty makes components vanish from a tensor of three modes or more.

    **Missing data** are left out: under masks W_k every row of a factor has normal equations of its
    own, over the observed entries alone. The objective is that of the observed data and never rises
    but by rounding. `linked.multifac` instead imputes, and holds a hidden sample of a tensor to the
    components that other tensors share with it; here such a sample simply drops out of the
    equations of its row. A row of which nothing at all is observed is zero if there is a penalty
    and keeps its start if not. Imputing is cheaper per sweep where R is large: the work of a masked
    tensor grows with R^2.

    Args:
        tensors: K >= 1 tensors X_k of two modes or more, float32 or float64. Hidden entries may
            hold anything, also NaN.
        modes: For every tensor the ids of its modes, tuples of any hashable values; modes of the
            same id have the same size; *static*.
        init: Start, `CoupledCP` of the tensors' sizes and dtype; its rank R is that of the fit. A
            column that is zero in a factor stays zero, so a pattern of shared and individual
            components is kept. Beyond that the first factor does not matter: it is overwritten.
        penalty: Weight of the squared factors, from 0, without a factor 1/2; traced.
        masks: True = observed, a bool array for every tensor, or None for one that is complete;
            all complete if None.
        max_iters: Largest number of sweeps, at least 1; *static*.
        tol: Relative decrease of the objective at which to stop; *static*; at least 1e-6 in
            float32. 0 runs all sweeps in a scan, which has a reverse-mode derivative.
        extrapolate: Whether to extrapolate with restart, see `iteration.iterate`; *static*.

    Returns:
        The fit as the sweeps leave it, and the record of the objective after every sweep, that of
        the start not included.

    Raises:
        ValueError: If there is no tensor, one has fewer than two modes, ids do not fit the tensors
            (a wrong number, one twice in a tensor, two sizes for one), dtypes, the shapes of
            `init` or the masks do not fit, or a concrete penalty is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr.linked import coupled
        >>> modes = (("subject", "gene", "time"), ("gene", "pathway"))
        >>> tensors = (jnp.ones((6, 4, 3)), -jnp.ones((4, 5)))
        >>> start = coupled.random_coupled_init(tensors, modes, 2, key=jax.random.key(0))
        >>> fit, info = coupled.coupled_als(tensors, modes, init=start, penalty=0.01, tol=1e-6)
        >>> round(float(coupled.to_dense(fit, modes)[1][0, 0]), 1)
        -1.0

    Reference: Acar, Kolda and Dunlavy 2011, "All-at-once optimization for coupled matrix and
        tensor factorizations", arXiv 1105.3422, for the model, which is fitted there by gradients;
        Kang, Rao and Lock 2025, arXiv 2502.20286, for the penalty, with one shared mode.
    """
    tensors, places, _ = _check_fit("coupled_als", init, tensors, modes)
    _checks.check_non_negative("coupled_als", "penalty", penalty)
    penalty = jnp.asarray(penalty, tensors[0].dtype)
    tensors, observed = _check_masks("coupled_als", tensors, masks)
    order = tuple(range(len(init.factors)))
    nonzero = [jnp.any(factor != 0, axis=0) for factor in init.factors]
    in_tensor = [jnp.all(jnp.stack([nonzero[g] for g in ids]), axis=0) for ids in places]
    active = [
        jnp.any(
            jnp.stack([in_tensor[k] for k, ids in enumerate(places) if g in ids]),
            axis=0,
        )
        for g in order
    ]
    factors = tuple(
        jnp.where(keep[None], factor, 0) for keep, factor in zip(active, init.factors, strict=True)
    )
    norms = [_alternating.squares(x) for x in tensors]

    def step(factors: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        after, fit = _alternating.sweep(
            tensors, observed, places, factors, order=order, ridge=penalty, active=active
        )
        objective = penalty * _alternating.penalty(after)
        for k, ids in enumerate(places):
            pair = (fit.inner[k], fit.energy[k])
            objective = objective + _alternating.residual(
                tensors[k], observed[k], [after[g] for g in ids], norms[k], pair
            )
        return tuple(after), objective

    factors, info = iteration.iterate(
        step, factors, max_iters=max_iters, tol=tol, extrapolate=extrapolate
    )
    return CoupledCP(factors), info


@_precision.highest
def to_dense(
    fit: CoupledCP, modes: Sequence[Sequence[Hashable]]
) -> tuple[Float[Array, "..."], ...]:
    """Form the dense tensors ``[[A_g : g in k]]``.

    Args:
        fit: Coupled model.
        modes: For every tensor the ids of its modes; *static*.

    Returns:
        Tuple of K tensors.

    Raises:
        ValueError: If the factors do not fit together, or are not those of the ids.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.linked import coupled
        >>> fit = coupled.CoupledCP((jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones((5, 3))))
        >>> [x.shape for x in coupled.to_dense(fit, ("ij", "jk"))]
        [(2, 4), (4, 5)]
    """
    _, places = _check_coupled("to_dense", fit, modes)
    own = [[fit.factors[g] for g in ids] for ids in places]
    return tuple(model.dense_rows(first, others) for first, *others in own)


def weights(fit: CoupledCP, modes: Sequence[Sequence[Hashable]]) -> Float[Array, "tensors rank"]:
    """Compute the weight ``lam_kr = prod_{g in k} |a_gr|`` of every component in every tensor.

    Args:
        fit: Coupled model.
        modes: For every tensor the ids of its modes; *static*.

    Returns:
        Weights, shape (K, R).

    Raises:
        ValueError: If the factors do not fit together, or are not those of the ids.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.linked import coupled
        >>> fit = coupled.CoupledCP((jnp.ones((4, 1)), jnp.ones((9, 1)), jnp.zeros((5, 1))))
        >>> coupled.weights(fit, ("ij", "jk"))[:, 0].tolist()
        [6.0, 0.0]
    """
    _, places = _check_coupled("weights", fit, modes)
    lengths = jnp.stack([tensor.column_norms(factor) for factor in fit.factors])
    return jnp.stack([jnp.prod(lengths[jnp.array(ids)], axis=0) for ids in places])


@_precision.highest
def balance_coupled(fit: CoupledCP, modes: Sequence[Sequence[Hashable]]) -> CoupledCP:
    """Scale the columns so that the penalty is least while every dense tensor stays.

    Per component, with ``x_g = log |a_g|``,

        ``min sum_g exp(2 x_g)  subject to  sum_{g in k} x_g = log lam_k``

    for every tensor k in which the component is not zero. The minimum is unique, and there
    ``|a_g|^2 = sum_{k with g} nu_k``: each tensor has a number, and the squared norm of a column is
    the sum over its tensors. A factor that is in no tensor with the component gets a zero column.

    Args:
        fit: Coupled model.
        modes: For every tensor the ids of its modes; *static*.

    Returns:
        The balanced model; balancing it again changes nothing.

    Raises:
        ValueError: If the factors do not fit together, or are not those of the ids.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.linked import coupled
        >>> fit = coupled.CoupledCP((jnp.ones((1, 1)), jnp.full((1, 1), 16.0)))
        >>> even = coupled.balance_coupled(fit, (("row", "column"),))
        >>> [round(float(factor[0, 0]), 4) for factor in even.factors]
        [4.0, 4.0]

    Reference: derived here; with one shared mode it is `linked.balance`. Damped Newton steps in
        the null space of the constraints, so that these hold at any time, from the point of least
        ``sum_g x_g^2`` or, if the penalty is lower there, from the columns as they are. The step
        length of Sun and Tran-Dinh 2017, "Generalized self-concordant functions", arXiv
        1703.04599, ``log(1 + d) / d`` with ``d = 2 max_g |dx_g|``, makes every step descend.
    """
    _, places = _check_coupled("balance_coupled", fit, modes)
    lengths = jnp.stack([tensor.column_norms(factor) for factor in fit.factors])
    logs = jnp.log(jnp.where(lengths > 0, lengths, 1))
    rows = [jnp.zeros(len(fit.factors), lengths.dtype).at[jnp.array(ids)].set(1) for ids in places]
    in_tensor = jnp.stack([jnp.all(lengths[jnp.array(ids)] > 0, axis=0) for ids in places])
    constraints = jnp.where(in_tensor.T[:, :, None], jnp.stack(rows)[None], 0)
    found = jax.vmap(_balanced_logs)(logs.T, constraints).T
    scales = jnp.where(jnp.any(constraints > 0, axis=1).T, jnp.exp(found - logs), 0)
    return CoupledCP(
        tuple(factor * scale[None] for factor, scale in zip(fit.factors, scales, strict=True))
    )


def _balanced_logs(logs: Array, constraints: Array) -> Array:
    """Minimize ``sum_g exp(2 x_g)`` under ``C x = C logs``, over the columns that C has."""
    eps = jnp.finfo(logs.dtype).eps
    inverse = jnp.linalg.pinv(constraints)
    identity = jnp.eye(logs.shape[0], dtype=logs.dtype)
    null = identity - inverse @ constraints
    used = jnp.any(constraints > 0, axis=0)

    def measure(x: Array) -> tuple[Array, Array]:
        """Return the squared lengths over the largest one, and the logarithm of their sum."""
        top = jnp.max(jnp.where(used, x, jnp.finfo(x.dtype).min))
        squares = jnp.where(used, jnp.exp(2 * (x - top)), 0)
        return squares, 2 * top + jnp.log(jnp.sum(squares))

    def newton(_: int, x: Array) -> Array:
        squares, total = measure(x)
        # Half the gradient and the Hessian, regular in all directions and beyond its rounding.
        hessian = 2 * (null * squares[None]) @ null + (1 + 16 * eps) * identity - null
        inverse = _cholesky.inverse_factor(hessian)
        step = -(null @ (inverse.T @ (inverse @ (null @ squares))))
        reach = 2 * jnp.max(jnp.abs(step))
        damping = jnp.where(reach > 0, jnp.log1p(reach) / jnp.where(reach > 0, reach, 1), 1)
        after = x + damping * step
        # Descent is certain but for rounding; a step that was lost to it is not taken.
        return jnp.where(measure(after)[1] <= total + 8 * eps, after, x)

    least = inverse @ (constraints @ logs)
    start = jnp.where(measure(least)[1] < measure(logs)[1], least, logs)
    return lax.fori_loop(0, _NEWTON_STEPS, newton, start)


def _check_modes(
    function: str, modes: Sequence[Sequence[Hashable]]
) -> tuple[tuple[Hashable, ...], tuple[tuple[int, ...], ...]]:
    """Refuse ids that name no modes; return the distinct ones and the places of all in them."""
    if not modes:
        raise _checks.fail(function, f"modes {modes!r}", "the mode ids of one tensor or more")
    numbers: dict[Hashable, int] = {}
    places = []
    for k, ids in enumerate(modes):
        try:
            place = tuple(numbers.setdefault(name, len(numbers)) for name in ids)
        except TypeError:
            got = f"mode ids {ids!r} of tensor {k}"
            raise _checks.fail(function, got, "a tuple of hashable ids") from None
        if len(set(place)) != len(place) or not place:
            raise _checks.fail(function, f"mode ids {ids!r} of tensor {k}", "distinct ones")
        places.append(place)
    return tuple(numbers), tuple(places)


def _check_tensors(
    function: str, tensors: Sequence[Array], modes: Sequence[Sequence[Hashable]]
) -> tuple[tuple[Array, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Refuse tensors that the ids do not fit; return them, their places, and the sizes by id."""
    ids, places = _check_modes(function, modes)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != len(places):
        got = f"tensors of type {type(tensors).__name__}"
        raise _checks.fail(function, got, f"a tuple of {len(places)}, one for every tuple of ids")
    for k, x in enumerate(tensors):
        _checks.check_floating(function, **{f"tensor {k}": x})
    found = tuple(jnp.asarray(x) for x in tensors)
    sizes: dict[int, int] = {}
    for k, (x, place) in enumerate(zip(found, places, strict=True)):
        _checks.check_ndim(function, f"tensor {k}", x, 2, max(2, x.ndim))
        if x.ndim != len(place):
            got = f"tensor {k} of shape {x.shape}"
            raise _checks.fail(function, got, f"{len(place)} axes as it has mode ids")
        if x.dtype != found[0].dtype:
            got = f"tensor {k} of dtype {x.dtype}"
            raise _checks.fail(function, got, f"{found[0].dtype} as tensor 0")
        for g, size in zip(place, x.shape, strict=True):
            if sizes.setdefault(g, size) != size:
                got = f"size {size} of mode {ids[g]!r} in tensor {k}"
                raise _checks.fail(function, got, f"{sizes[g]} as in the tensors before")
    return found, places, tuple(sizes[g] for g in range(len(ids)))


def _check_coupled(
    function: str, fit: CoupledCP, modes: Sequence[Sequence[Hashable]]
) -> tuple[tuple[Hashable, ...], tuple[tuple[int, ...], ...]]:
    """Refuse a model whose factors are not those of the ids; return these and their places."""
    ids, places = _check_modes(function, modes)
    if len(fit.factors) != len(ids):
        got = f"a model of {len(fit.factors)} factors"
        raise _checks.fail(function, got, f"{len(ids)}, one for every mode id")
    first = fit.factors[0]
    for name, factor in zip(ids, fit.factors, strict=True):
        label = f"factor of mode {name!r}"
        _checks.check_floating(function, **{label: factor})
        _checks.check_ndim(function, label, factor, 2)
        if factor.shape[1] != first.shape[1] or factor.dtype != first.dtype:
            got = f"{label} of shape {factor.shape} and dtype {factor.dtype}"
            wanted = f"{first.shape[1]} columns of {first.dtype} as the first"
            raise _checks.fail(function, got, wanted)
    _checks.check_count(function, "rank", fit.rank)
    return ids, places


def _check_fit(
    function: str,
    fit: CoupledCP,
    tensors: Sequence[Array],
    modes: Sequence[Sequence[Hashable]],
) -> tuple[tuple[Array, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Refuse tensors that a model does not fit; return what `_check_tensors` does."""
    found, places, sizes = _check_tensors(function, tensors, modes)
    _check_coupled(function, fit, modes)
    got_sizes = tuple(factor.shape[0] for factor in fit.factors)
    if got_sizes != sizes:
        raise _checks.fail(function, f"a model of sizes {got_sizes}", f"{sizes} as the tensors")
    if fit.factors[0].dtype != found[0].dtype:
        got = f"a model of dtype {fit.factors[0].dtype}"
        raise _checks.fail(function, got, f"{found[0].dtype} as the tensors")
    return found, places, sizes


def _check_masks(
    function: str, tensors: tuple[Array, ...], masks: Sequence[Array | None] | None
) -> tuple[tuple[Array, ...], tuple[Array | None, ...]]:
    """Refuse masks that do not fit; return the tensors without hidden values, and the weights."""
    if masks is None:
        return tensors, (None,) * len(tensors)
    if not isinstance(masks, (tuple, list)) or len(masks) != len(tensors):
        got = f"masks of type {type(masks).__name__}"
        raise _checks.fail(function, got, f"a tuple of {len(tensors)}, one for every tensor")
    data, observed = [], []
    for x, mask in zip(tensors, masks, strict=True):
        if mask is not None:
            _checks.check_mask(function, mask, x.shape)
            x, mask = jnp.where(mask, x, 0), jnp.asarray(mask).astype(x.dtype)
        data.append(x)
        observed.append(mask)
    return tuple(data), tuple(observed)
