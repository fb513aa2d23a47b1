"""Standard errors of CP factors: from the curvature of the fit, or by leaving slices out."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jaxtyping import Array, Bool, Float

from fedlr import _alternating, _checks, _precision
from fedlr.cp import diagnostics, fitting, tensor

__all__ = ["JackknifeErrors", "StandardErrors", "jackknife", "standard_errors"]


class StandardErrors(NamedTuple):
    """A CP fit and the standard errors of its numbers.

    Attributes:
        fit: The fit in the form of `normalize`, which the errors belong to.
        weights: Standard errors of its weights, shape (R,).
        factors: Standard errors of its factors, one (I_n, R) for every mode.
        noise: Estimated standard deviation of the noise of an entry, a scalar.
    """

    fit: tensor.CPTensor
    weights: Float[Array, " rank"]
    factors: tuple[Float[Array, "size rank"], ...]
    noise: Float[Array, ""]


class JackknifeErrors(NamedTuple):
    """A CP fit and the jackknife standard errors of all its factors but one.

    Attributes:
        fit: The fit in the form of `normalize`, which the errors belong to.
        factors: Standard errors of its factors, one (I_n, R) for every mode that stayed whole.
    """

    fit: tensor.CPTensor
    factors: tuple[Float[Array, "size rank"], ...]


@_precision.highest
def standard_errors(
    x: Float[Array, "..."], t: tensor.CPTensor, *, mask: Bool[Array, "..."] | None = None
) -> StandardErrors:
    """Estimate the standard errors of a least-squares CP fit from its curvature.

    The covariance of weights and factors is the Laplace approximation ``s^2 (J^T W J)^+``, with J
    the derivative of the entries of Xhat, W the mask, and the R (N - 1) directions of scale taken
    out by unit columns. The variance of the noise, equal and independent for all entries, is

        s^2 = RSS / (number of observed entries - R (sum_n I_n - N + 1)).

    ``J^T W J`` is formed from Gram matrices of the factors, or under a mask from contractions of
    it, never from J. It has R sum_n I_n rows: its Cholesky factorization is the work to expect.

    Valid for a converged fit without ridge whose noise is small against its components. A bias of
    the model is not seen. Where the data do not determine the factors, errors are huge, infinite
    or NaN: a component of norm 0, a row with fewer observed entries than components.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64; of N >= 3 if the rank exceeds 1, as the
            factors of a matrix are not unique. Hidden entries may hold anything, also NaN.
        t: The fit, CP tensor of the same shape and dtype.
        mask: True = observed, the shape of `x`; all if None.

    Returns:
        The normalized fit, the standard errors of its weights and factors, and that of the noise.
        With a traced mask that leaves no more entries than unknowns, NaN.

    Raises:
        ValueError: If shapes or dtypes do not fit, `x` is a matrix and the rank above 1, or the
            tensor has no more entries than the fit has unknowns.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> truth = cp.random_init((5, 6, 7), 2, key=jax.random.key(0))
        >>> x = cp.to_dense(truth)
        >>> x = x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
        >>> fit, _ = cp.als(x, init=truth, tol=1e-6)
        >>> found = cp.standard_errors(x, fit)
        >>> [factor.shape for factor in found.factors], round(float(found.noise), 1)
        ([(5, 2), (6, 2), (7, 2)], 0.1)

    Reference: Tichavsky, Phan and Koldovsky 2013, "Cramer-Rao-induced bounds for CANDECOMP/
        PARAFAC tensor decomposition", arXiv 1209.3215, for ``J^T W J`` by blocks and the bound;
        here the estimated noise takes the place of the known one.
    """
    x = tensor.check_against("standard_errors", x, t, mask)
    if x.ndim == 2 and t.rank > 1:
        got = f"a matrix and a fit of rank {t.rank}"
        raise _checks.fail("standard_errors", got, "three modes or more, or rank 1")
    num_unknowns = t.rank * (sum(x.shape) - x.ndim + 1)
    if x.size <= num_unknowns:
        got = f"{x.size} entries"
        raise _checks.fail("standard_errors", got, f"more than the {num_unknowns} unknowns")
    t = tensor.normalize(t)
    if mask is None:
        weight, num_observed = None, jnp.asarray(x.size, x.dtype)
        sums = functools.partial(_gram_sums, t.factors)
    else:
        x, weight = jnp.where(mask, x, 0), mask.astype(x.dtype)
        num_observed = jnp.sum(weight)
        sums = functools.partial(_masked_sums, weight, t.factors)
    scaled = (t.factors[0] * t.weights[None], *t.factors[1:])
    squares = _alternating.residual_squares(x, weight, scaled)
    freedom = num_observed - num_unknowns
    noise = jnp.sqrt(jnp.where(freedom > 0, squares / freedom, jnp.nan))
    weights, factors = _errors(t, _curvature(t.factors, sums))
    return StandardErrors(t, noise * weights, tuple(noise * each for each in factors), noise)


def jackknife(
    x: Float[Array, "..."],
    t: tensor.CPTensor,
    mode: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    ridge: float | Float[Array, ""] = 0.0,
    max_iters: int = 200,
    tol: float = 1e-8,
) -> JackknifeErrors:
    """Estimate standard errors by leaving out the slices of one mode in turn.

    With b_i an entry of a factor of another mode in the fit without slice i, and I the size of
    the mode, its standard error is

        sqrt((I - 1) / I sum_i (b_i - mean of b)^2).

    Nothing is assumed of the noise but that the slices are a sample: independent, and of one
    distribution. It is the check of `standard_errors`, whose noise is equal in all entries.
    Every fit starts at `t`, and its components get the order and the signs of `t` as by
    `permute_to_match`. All I fits run side by side, so x is held I times.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64. Hidden entries may hold anything, also NaN.
        t: The fit of all of `x`, CP tensor of the same shape and dtype.
        mode: Mode whose slices are left out, of size I >= 2; *static*.
        mask: True = observed, the shape of `x`; all if None.
        ridge: Penalty that `t` was fitted with; a number from 0, traced.
        max_iters: Largest number of sweeps of every fit, at least 1; *static*.
        tol: Relative decrease of the objective at which to stop; *static*, see `als`. Steps that
            are left undone make the errors too small.

    Returns:
        The normalized fit, and the standard errors of its factors of the other modes.

    Raises:
        ValueError: As for `als`, or if the mode is absent or of size 1.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> truth = cp.random_init((5, 6, 7), 2, key=jax.random.key(0))
        >>> x = cp.to_dense(truth)
        >>> x = x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
        >>> fit, _ = cp.als(x, init=truth, tol=1e-6)
        >>> [factor.shape for factor in cp.jackknife(x, fit, 0, tol=1e-6).factors]
        [(6, 2), (7, 2)]

    Reference: Riu and Bro 2003, "Jack-knife technique for outlier detection and estimation of
        standard errors in PARAFAC models". They leave out samples as here; scores of the mode
        itself have no jackknife error.
    """
    x = tensor.check_against("jackknife", x, t, mask)
    _checks.check_mode("jackknife", mode, x.ndim)
    size = x.shape[mode]
    if size < 2:
        raise _checks.fail("jackknife", f"mode {mode} of size {size}", "two slices or more")
    t = tensor.normalize(t)

    def refit(kept: Array) -> list[Array]:
        rows = tuple(f[kept] if n == mode else f for n, f in enumerate(t.factors))
        start = t._replace(factors=rows)
        fit, _ = fitting.als(
            jnp.take(x, kept, axis=mode),
            init=start,
            mask=None if mask is None else jnp.take(mask, kept, axis=mode),
            ridge=ridge,
            max_iters=max_iters,
            tol=tol,
        )
        matched = diagnostics.permute_to_match(fit, start)
        return [factor for n, factor in enumerate(matched.factors) if n != mode]

    kept = [np.delete(np.arange(size, dtype=np.int32), i) for i in range(size)]
    estimates = jax.vmap(refit)(jnp.asarray(np.stack(kept)))
    factor = np.sqrt(size - 1).astype(x.dtype)
    return JackknifeErrors(t, tuple(factor * jnp.std(each, axis=0) for each in estimates))


def _gram_sums(factors: tuple[Array, ...], n: int, m: int) -> Array:
    """Sum ``prod_k a_r a_s`` over the rows of the modes k other than n and m: (1, 1, R, R)."""
    rank = factors[0].shape[1]
    grams = [factor.T @ factor for k, factor in enumerate(factors) if k not in (n, m)]
    return functools.reduce(jnp.multiply, grams, jnp.ones((rank, rank), factors[0].dtype))[
        None, None
    ]


def _masked_sums(weight: Array, factors: tuple[Array, ...], n: int, m: int) -> Array:
    """Sum over the observed entries with row i in mode n and j in mode m: (I_n, I_m, R, R)."""
    ndim, rank = weight.ndim, factors[0].shape[1]
    # The pairs of components share the last index of the sum.
    operands: list = [weight, [*range(ndim)], jnp.ones(rank * rank, weight.dtype), [ndim]]
    for k, factor in enumerate(factors):
        if k not in (n, m):
            operands += [_pairs(factor).reshape(-1, rank * rank), [k, ndim]]
    sums = jnp.einsum(*operands, [n, m, ndim])
    return sums.reshape(*sums.shape[:2], rank, rank)


def _curvature(factors: tuple[Array, ...], sums: Callable[[int, int], Array]) -> Array:
    """Form ``J^T W J`` for J with the columns ``e_i`` in the place of a_r of mode n, by n, i, r.

    With the sum T over the other modes, the entry of the modes n < m is ``a_is b_jr T_ijrs``, and
    that of n with itself the sum of ``b_jr b_js T_ijrs`` over the rows j of any other mode.
    """
    blocks: dict[tuple[int, int], Array] = {}
    for n, m in itertools.combinations(range(len(factors)), 2):
        total, a, b = sums(n, m), factors[n], factors[m]
        cross = total * a[:, None, None, :] * b[None, :, :, None]
        blocks[n, m] = jnp.moveaxis(cross, 1, 2).reshape(a.size, b.size)
        blocks[m, n] = blocks[n, m].T
        if n == 0:
            blocks[m, m] = _diagonal(jnp.sum(total * _pairs(a)[:, None], axis=0), len(b))
        if (n, m) == (0, 1):
            blocks[0, 0] = _diagonal(jnp.sum(total * _pairs(b)[None], axis=1), len(a))
    modes = range(len(factors))
    return jnp.block([[blocks[n, m] for m in modes] for n in modes])


def _pairs(factor: Array) -> Array:
    """Multiply any two columns: (rows, R, R)."""
    return factor[:, :, None] * factor[:, None, :]


def _diagonal(rows: Array, size: int) -> Array:
    """Put the matrix of every row, or the one of all rows, on the diagonal: (size R, size R)."""
    rank = rows.shape[-1]
    identity = jnp.eye(size, dtype=rows.dtype)
    return (identity[:, None, :, None] * rows[:, :, None, :]).reshape(size * rank, size * rank)


def _errors(t: tensor.CPTensor, curvature: Array) -> tuple[Array, tuple[Array, ...]]:
    """Return the standard errors of weights and factors for noise of variance 1.

    Directions of scale are taken out by ``G^T v = 0``, which keeps the columns of all modes but
    the last at norm 1; there they carry the weights. With the projector ``P = I - G G^T`` and
    ``P F P + G G^T = L L^T``, the covariance is ``P L^{-T} L^{-1} P``, so that of a functional h is
    the square of ``|L^{-1} P h|``: no difference is taken.
    """
    gauge = [jnp.eye(t.rank, dtype=f.dtype)[None] * f[:, :, None] for f in t.factors]
    gauge[-1] = jnp.zeros_like(gauge[-1])
    normals = jax.scipy.linalg.block_diag(*(each.reshape(-1, t.rank) for each in gauge))
    normal = normals @ normals.T
    projector = jnp.eye(len(curvature), dtype=curvature.dtype) - normal
    lower = jnp.linalg.cholesky(projector @ curvature @ projector + normal)
    roots = jax.scipy.linalg.solve_triangular(lower, projector, lower=True)
    ends = np.cumsum([factor.size for factor in t.factors])[:-1]
    roots = [
        root.reshape(-1, *factor.shape)
        for root, factor in zip(jnp.split(roots, ends, axis=1), t.factors, strict=True)
    ]
    last = t.factors[-1][None]
    along = jnp.sum(roots[-1] * last, axis=1)
    roots[-1] = roots[-1] - along[:, None] * last
    return _norms(along), tuple(_norms(root) / t.weights[None] for root in roots)


def _norms(roots: Array) -> Array:
    """Take norms along the first axis."""
    return jnp.sqrt(jnp.sum(roots * roots, axis=0))
