"""Diagnostics of CP fits: agreement of two of them, core consistency, degeneracy."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fedlr import _checks, _precision, multilinear
from fedlr.cp import tensor

__all__ = ["Degeneracy", "core_consistency", "degeneracy", "factor_match_score", "permute_to_match"]

# The exact assignment visits all 2^R subsets of the components.
_EXACT_RANK = 8


class Degeneracy(NamedTuple):
    """The two components of a CP tensor that come nearest to cancelling each other.

    Attributes:
        congruence: Smallest ``prod_n cos(a_r^(n), a_s^(n))`` over all pairs, a scalar.
        weights: Norms of the two components, shape (2,).
    """

    congruence: Float[Array, ""]
    weights: Float[Array, "2"]


@_precision.highest
def factor_match_score(
    t: tensor.CPTensor, other: tensor.CPTensor, *, with_weights: bool = False
) -> Float[Array, ""]:
    """Measure how well the components of two CP tensors agree, from 0 to 1.

    The score is the mean over r of ``prod_n |cos(a_r^(n), b_p(r)^(n))|`` for the best one-to-one
    assignment p of components. Order, sign and scale of the columns are irrelevant. If the ranks
    differ, every component of the tensor of smaller rank is assigned, and the mean is over these.
    A component of norm 0 agrees with none.

    The assignment has the largest mean of all, found by dynamic programming over the subsets of
    the components, if the smaller rank is at most 8. Above, the best pair that is left is taken
    again and again, which may give a smaller score.

    Args:
        t: CP tensor.
        other: CP tensor of the same shape and dtype; its rank may differ.
        with_weights: Whether every term is multiplied by ``1 - |w - v| / max(w, v)`` with the
            norms w and v of the two components; *static*.

    Returns:
        The score, a scalar.

    Raises:
        ValueError: If the weights and factors of one tensor, or the shapes or dtypes of the two,
            do not fit together.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> t = cp.random_init((4, 5, 6), 3, key=jax.random.key(0))
        >>> turned = jax.tree.map(lambda leaf: -2 * leaf[..., ::-1], t)
        >>> round(float(cp.factor_match_score(t, turned)), 5)
        1.0

    Reference: Acar, Dunlavy, Kolda and Morup 2011, "Scalable tensor factorizations for incomplete
        data", section 4, for the score; Tomasi and Bro 2006, "A comparison of algorithms for
        fitting the PARAFAC model", for its use.
    """
    _check_pair("factor_match_score", t, other)
    t, other = sorted((tensor.normalize(t), tensor.normalize(other)), key=lambda each: each.rank)
    scores = _match(t, other)
    if with_weights:
        w, v = t.weights[:, None], other.weights[None, :]
        largest = jnp.maximum(w, v)
        scores = scores * (1 - jnp.abs(w - v) / jnp.where(largest == 0, 1, largest))
    chosen = _assign(scores)
    return jnp.mean(jnp.take_along_axis(scores, chosen[:, None], axis=1))


@_precision.highest
def permute_to_match(t: tensor.CPTensor, reference: tensor.CPTensor) -> tensor.CPTensor:
    """Normalize a CP tensor and give its components the order and the signs of a reference.

    Components are assigned as in `factor_match_score`, without weights. Every column takes the
    sign that makes its inner product with the reference's column non-negative. An even number of
    changed signs leaves the component as it is; an odd one makes its weight negative, so that the
    dense tensor never changes.

    Args:
        t: CP tensor.
        reference: CP tensor of the same shape, rank and dtype; need not be normalized.

    Returns:
        CPTensor with the dense tensor of `t` up to rounding, and unit columns; a component of
        norm 0 has zero columns.

    Raises:
        ValueError: If the weights and factors of one tensor, or the shapes, ranks or dtypes of
            the two, do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import cp
        >>> t = cp.normalize(cp.random_init((4, 5, 6), 3, key=jax.random.key(0)))
        >>> shuffled = jax.tree.map(lambda leaf: leaf[..., ::-1], t)
        >>> matched = cp.permute_to_match(shuffled, t)
        >>> bool(jnp.allclose(matched.factors[2], t.factors[2], atol=1e-6))
        True
    """
    _check_pair("permute_to_match", t, reference)
    if t.rank != reference.rank:
        got = f"a reference of rank {reference.rank}"
        raise _checks.fail("permute_to_match", got, f"{t.rank} as t")
    t = tensor.normalize(t)
    unit = reference._replace(factors=tuple(_unit_columns(b) for b in reference.factors))
    order = _assign(_match(unit, t))
    weights, factors = t.weights[order], []
    for a, b in zip(t.factors, unit.factors, strict=True):
        matched = a[:, order]
        sign = jnp.where(jnp.sum(matched * b, axis=0) < 0, -1, 1).astype(a.dtype)
        weights = weights * sign
        factors.append(matched * sign[None])
    return tensor.CPTensor(weights, tuple(factors))


@_precision.highest
def core_consistency(x: Float[Array, "..."], t: tensor.CPTensor) -> Float[Array, ""]:
    """Compute the core consistency of a CP fit, ``100 (1 - |G - I|^2 / R)``.

    ``G = X x_0 A_0^+ x_1 A_1^+ ...`` is the least-squares Tucker core of the data for the fitted
    factors, with unit columns and the weights in A_0, and I the superdiagonal tensor. Near 100
    the components explain the data without interactions; with one component too many the value
    is usually near 0 or below. G has R^N entries. Where the columns of a factor are linearly
    dependent, as for R > I_n, the core of smallest norm is taken; a component of norm 0 counts
    as one that is absent from the core.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64, complete.
        t: CP tensor of the same shape and dtype, the fit.

    Returns:
        The core consistency in percent, a scalar of at most 100; it has no lower bound.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> t = cp.random_init((4, 5, 6), 2, key=jax.random.key(0))
        >>> round(float(cp.core_consistency(cp.to_dense(t), t)), 3)
        100.0

    Reference: Bro and Kiers 2003, "A new efficient method for determining the number of
        components in PARAFAC models", Journal of Chemometrics 17.
    """
    x = tensor.check_against("core_consistency", x, t)
    t = tensor.normalize(t)
    factors = (t.factors[0] * t.weights[None], *t.factors[1:])
    core = multilinear.multi_mode_dot(x, [jnp.linalg.pinv(factor) for factor in factors])
    ideal = np.zeros(core.shape)
    ideal[(np.arange(t.rank),) * core.ndim] = 1
    return 100 * (1 - jnp.sum((core - jnp.asarray(ideal, x.dtype)) ** 2) / t.rank)


@_precision.highest
def degeneracy(t: tensor.CPTensor) -> Degeneracy:
    """Find the pair of components that come nearest to cancelling each other.

    A congruence near -1 between components whose norms grow with the iterations, and exceed that
    of the data, is the mark of a degenerate fit: no best approximation of that rank exists, or
    the iteration is in a swamp.

    Args:
        t: CP tensor.

    Returns:
        The smallest congruence, which is positive if all are, and the norms of its two
        components. For rank 1 the congruence is 0, and both norms are that of the component.

    Raises:
        ValueError: If the weights and factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import cp
        >>> a = jnp.array([[1.0, 1.0], [0.0, 0.1]])
        >>> t = cp.CPTensor(jnp.array([50.0, -50.0]), (a, a, a))
        >>> found = cp.degeneracy(t)
        >>> round(float(found.congruence), 3), [round(float(w), 1) for w in found.weights]
        (-0.985, [50.8, 50.0])

    Reference: Paatero 2000, "Construction and analysis of degenerate PARAFAC models"; Stegeman
        2006, "Degeneracy in CANDECOMP/PARAFAC explained for p x p x 2 arrays of rank p + 1 or
        higher".
    """
    tensor.check_cp("degeneracy", t)
    t = tensor.normalize(t)
    if t.rank == 1:
        return Degeneracy(jnp.zeros_like(t.weights[0]), jnp.tile(t.weights, 2))
    congruences = functools.reduce(jnp.multiply, [factor.T @ factor for factor in t.factors])
    pairs = jnp.asarray(np.stack(np.triu_indices(t.rank, 1)), jnp.int32)
    values = congruences[pairs[0], pairs[1]]
    worst = jnp.argmin(values)
    return Degeneracy(values[worst], t.weights[pairs[:, worst]])


def _check_pair(function: str, t: tensor.CPTensor, other: tensor.CPTensor) -> None:
    """Refuse two CP tensors that cannot be compared."""
    tensor.check_cp(function, t)
    tensor.check_cp(function, other)
    if t.shape != other.shape:
        raise _checks.fail(function, f"CP tensors of shapes {t.shape}, {other.shape}", "equal ones")
    if t.weights.dtype != other.weights.dtype:
        got = f"CP tensors of dtypes {t.weights.dtype}, {other.weights.dtype}"
        raise _checks.fail(function, got, "equal ones")


def _unit_columns(factor: Array) -> Array:
    """Scale columns to norm 1, without overflow of their squares; zero ones stay."""
    peak = jnp.max(jnp.abs(factor), axis=0)
    scaled = factor / jnp.where(peak == 0, 1, peak)[None]
    lengths = jnp.sqrt(jnp.sum(scaled * scaled, axis=0))
    return scaled / jnp.where(lengths == 0, 1, lengths)[None]


def _match(t: tensor.CPTensor, other: tensor.CPTensor) -> Array:
    """Return ``prod_n |a_r . b_s|`` for unit columns: (rank of t, rank of other)."""
    cosines = [jnp.abs(a.T @ b) for a, b in zip(t.factors, other.factors, strict=True)]
    return functools.reduce(jnp.multiply, cosines)


def _assign(scores: Array) -> Array:
    """Assign to every row a column of its own, to a large sum of scores; rows <= columns."""
    return (_assign_exactly if scores.shape[0] <= _EXACT_RANK else _assign_greedily)(scores)


def _assign_exactly(scores: Array) -> Array:
    """Visit the columns in turn, with the best sum for every subset of rows served so far."""
    rows = np.arange(scores.shape[0], dtype=np.int32)
    subsets = np.arange(2 ** len(rows), dtype=np.int32)
    serves = (subsets[None] >> rows[:, None]) % 2 == 1
    before = np.where(serves, subsets[None] ^ (1 << rows)[:, None], 0)

    def visit(best: Array, column: Array) -> tuple[Array, Array]:
        served = jnp.where(serves, best[before] + column[:, None], -jnp.inf)
        options = jnp.concatenate([best[None], served])
        return jnp.max(options, axis=0), jnp.argmax(options, axis=0).astype(jnp.int32) - 1

    start = jnp.where(jnp.asarray(subsets) == 0, 0, -jnp.inf).astype(scores.dtype)
    _, served = lax.scan(visit, start, scores.T)

    def retrace(subset: Array, served: Array) -> tuple[Array, Array]:
        row = served[subset]
        return jnp.where(row < 0, subset, jnp.asarray(before)[row, subset]), row

    # The row of every column, -1 for none.
    _, served = lax.scan(retrace, jnp.asarray(subsets[-1]), served, reverse=True)
    return jnp.argmax(served[None, :] == rows[:, None], axis=1).astype(jnp.int32)


def _assign_greedily(scores: Array) -> Array:
    """Take the best pair of a row and a column that are left, again and again."""
    rows, columns = scores.shape

    def take(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        left, chosen = carry
        row, column = jnp.unravel_index(jnp.argmax(left), left.shape)
        left = left.at[row].set(-jnp.inf).at[:, column].set(-jnp.inf)
        return (left, chosen.at[row].set(column.astype(jnp.int32))), None

    start = (scores, jnp.zeros(rows, jnp.int32))
    (_, chosen), _ = lax.scan(take, start, None, length=min(rows, columns))
    return chosen
