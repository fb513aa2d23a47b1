"""CP decompositions by alternating least squares: plain, masked, ridge, compressed, and starts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from numpy.typing import DTypeLike

from fedlr import (
    _alternating,
    _checks,
    _precision,
    iteration,
    multilinear,
    sketching,
    subspace,
    tucker,
)
from fedlr.cp import tensor

__all__ = ["als", "compressed_als", "random_init", "svd_init"]


def random_init(
    shape: Sequence[int], rank: int, *, key: Key[Array, ""], dtype: DTypeLike | None = None
) -> tensor.CPTensor:
    """Draw a start with independent N(0, 1) entries in all factors and weights 1.

    Args:
        shape: Shape (I_0, ..., I_{N-1}) of the tensor to fit; *static*.
        rank: Number R >= 1 of components; may exceed the sizes; *static*.
        key: Random key.
        dtype: float32 or float64, by default JAX's default float; *static*.

    Returns:
        CPTensor of the given shape and rank.

    Raises:
        ValueError: If the shape is empty, the rank is no positive integer, or the dtype is neither
            float32 nor float64.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> start = cp.random_init((3, 4, 5), 2, key=jax.random.key(0))
        >>> start.shape, start.rank
        ((3, 4, 5), 2)
    """
    shape, dtype = _check_start("random_init", shape, rank, dtype)
    factors = tensor.draw_factors(shape, rank, key, dtype)
    return tensor.CPTensor(jnp.ones(rank, dtype), factors)


def svd_init(x: Float[Array, "..."], rank: int, *, key: Key[Array, ""]) -> tensor.CPTensor:
    """Start from the leading left singular vectors of every unfolding.

    Where the rank exceeds the size of a mode, its further columns are N(0, 1) draws scaled to
    norm about 1. Every fit from this start is the same; `random_init` gives many.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64. Missing entries are to be filled.
        rank: Number R >= 1 of components; *static*.
        key: Random key of the further columns.

    Returns:
        CPTensor with weights 1 and the dtype of `x`.

    Raises:
        ValueError: If `x` is not floating or has no axes, or the rank is no positive integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import cp
        >>> start = cp.svd_init(jnp.eye(3, 4), 5, key=jax.random.key(0))
        >>> start.shape, start.rank
        ((3, 4), 5)
    """
    _checks.check_floating("svd_init", x=x)
    x = jnp.asarray(x)
    shape, dtype = _check_start("svd_init", x.shape, rank, x.dtype)
    find, factors = subspace.gram(), []
    for mode, size in enumerate(shape):
        leading = find(multilinear.unfold(x, mode), min(rank, size), mode=mode)
        more = jax.random.normal(jax.random.fold_in(key, mode), (size, max(rank - size, 0)), dtype)
        factors.append(jnp.concatenate([leading, more / np.sqrt(size).astype(dtype)], axis=1))
    return tensor.CPTensor(jnp.ones(rank, dtype), tuple(factors))


@_precision.highest
def als(
    x: Float[Array, "..."],
    *,
    init: tensor.CPTensor,
    mask: Bool[Array, "..."] | None = None,
    ridge: float | Float[Array, ""] = 0.0,
    fixed_modes: Sequence[int] = (),
    max_iters: int = 200,
    tol: float = 1e-8,
    extrapolate: bool = False,
) -> tuple[tensor.CPTensor, iteration.IterationInfo]:
    """Fit a CP tensor by alternating least squares.

    Minimize ``|W * (X - Xhat)|^2 + ridge sum_n |A_n|^2`` over one factor after another in the
    order of the modes, each exactly: ``A_n = M_n (H_n + ridge I)^{-1}`` with the MTTKRP M_n and
    the Hadamard product H_n of the Gram matrices of the other factors. Under a mask every row has
    its own normal equations, over the observed entries alone; nothing is imputed. A row without
    observed entries is zero if there is a ridge and keeps its start if not.

    Two contractions of the full tensor serve all modes of a sweep, whatever N, and give the same
    iterates as N of them. The objective never rises but by rounding. It is that of the residual
    itself where the cheap formula by norms has lost its digits (relative error below
    ``30 sqrt(eps)``: 1e-2 in float32, 4e-7 in float64), which costs another pass.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64. Hidden entries may hold anything, also NaN.
        init: Start, CPTensor of the shape of `x`; its rank is that of the fit, and it is cast to
            the dtype of `x`. Its weights are spread evenly over the modes that are not fixed, the
            sign into the last of them. A component that is zero in all factors stays zero.
        mask: True = observed, the shape of `x`; all if None. Work and memory grow with R^2: the
            largest array has ``max(prod of first sizes, prod of last sizes) R (R + 1) / 2``
            entries. Where R is large and little is hidden, `linked.multifac` of one tensor, which
            imputes, is cheaper.
        ridge: Penalty of ``sum_n |A_n|^2``, without a factor 1/2; a number from 0, traced.
        fixed_modes: Modes whose factors stay as in `init`; any subset; *static*.
        max_iters: Largest number of sweeps, at least 1; *static*.
        tol: Relative decrease of the objective at which to stop; *static*. With 0 all sweeps run
            in a scan, which has a reverse-mode derivative. In float32 values below 1e-6 are
            below the rounding of the objective.
        extrapolate: Whether to extrapolate with restart, see `iteration.iterate`; *static*.

    Returns:
        The fit with weights 1, and the record of the objective after every sweep.

    Raises:
        ValueError: If shapes do not fit, `x` has fewer than two modes or is not floating, the mask
            is not bool, a fixed mode is absent or repeated, a concrete `ridge` is negative, or
            `max_iters` or `tol` is out of range.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> truth = cp.random_init((5, 6, 7), 2, key=jax.random.key(0))
        >>> x = cp.to_dense(truth)
        >>> start = cp.random_init(x.shape, 2, key=jax.random.key(1))
        >>> fit, info = cp.als(x, init=start, max_iters=500, tol=1e-6)
        >>> bool(cp.relative_error(x, fit) < 1e-2)
        True

    Reference: Kolda and Bader 2009, "Tensor decompositions and applications", figure 3.3; Phan,
        Tichavsky and Cichocki 2013, "Fast alternating LS algorithms for high order CANDECOMP/
        PARAFAC tensor factorizations", for the shared contractions; Tomasi and Bro 2005, "PARAFAC
        and missing values", section 3.2, for the masked normal equations, solved here block by
        block. Columns are not normalized between sweeps: the objective has a ridge.
    """
    x = tensor.check_against("als", x, init, mask, same_dtype=False)
    _checks.check_non_negative("als", "ridge", ridge)
    fixed = tuple(fixed_modes)
    for mode in fixed:
        _checks.check_mode("als", mode, x.ndim)
    if len(set(fixed)) != len(fixed):
        raise _checks.fail("als", f"fixed_modes {fixed}", "distinct modes")
    order = tuple(mode for mode in range(x.ndim) if mode not in fixed)
    init = jax.tree.map(lambda leaf: leaf.astype(x.dtype), init)
    ridge, weight = jnp.asarray(ridge, x.dtype), None
    if mask is not None:
        x, weight = jnp.where(mask, x, 0), mask.astype(x.dtype)
    norm = _alternating.squares(x)

    def step(factors: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        factors, fit = _alternating.sweep(
            (x,), (weight,), (tuple(range(x.ndim)),), factors, order=order, ridge=ridge
        )
        squares = _alternating.residual(x, weight, factors, norm, (fit.inner[0], fit.energy[0]))
        return factors, squares + ridge * _alternating.penalty(factors)

    factors, info = iteration.iterate(
        step, _absorb(init, order), max_iters=max_iters, tol=tol, extrapolate=extrapolate
    )
    if not order:
        return init, info
    return tensor.CPTensor(jnp.ones_like(init.weights), factors), info


@_precision.highest
def compressed_als(
    x: Float[Array, "..."],
    *,
    init: tensor.CPTensor,
    key: Key[Array, ""],
    ridge: float | Float[Array, ""] = 0.0,
    oversampling: int = 5,
    max_iters: int = 200,
    polish_iters: int = 2,
    tol: float = 1e-8,
) -> tuple[tensor.CPTensor, iteration.IterationInfo]:
    """Fit a CP tensor on the core of a Tucker compression, then polish it on the full tensor.

    A randomized sequentially truncated HOSVD with one power iteration compresses every mode that is
    longer than ``R + oversampling`` to that size. ALS runs on the small core ``G``, whose CP
    factors a_n expand to ``A_n = U_n a_n``, and some sweeps of `als` on the full tensor follow. For
    orthonormal U_n the core problem has the same Gram matrices and, up to the constant
    ``|X|^2 - |G|^2``, the same objective, so where X lies in the compressed space the iterates are
    those of `als` from the projected start. From one start the two may end in different local
    minima where it does not.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64, complete.
        init: Start, as for `als`.
        key: Random key of the compression.
        ridge: Penalty of ``sum_n |A_n|^2``; a number from 0, traced.
        oversampling: Columns beyond the rank of the compressed modes, from 0; *static*.
        max_iters: Largest number of sweeps on the core, at least 1; *static*.
        polish_iters: Number of sweeps on the full tensor, at least 1; *static*.
        tol: Relative decrease of the core's objective at which to stop; *static*, see `als`.

    Returns:
        The fit with weights 1, and the record of the sweeps on the full tensor: the objective has
        shape (polish_iters,), and `converged` is that of the sweeps on the core.

    Raises:
        ValueError: As for `als`, or if a count is out of range.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> x = cp.to_dense(cp.random_init((15, 16, 17), 2, key=jax.random.key(0)))
        >>> start = cp.random_init(x.shape, 2, key=jax.random.key(1))
        >>> fit, info = cp.compressed_als(x, init=start, key=jax.random.key(2), tol=1e-6)
        >>> bool(cp.relative_error(x, fit) < 1e-2)
        True

    Reference: Carroll, Pruzansky and Kruskal 1980, "CANDELINC"; Bro and Andersson 1998, "Improving
        the speed of multiway algorithms, part II: compression".
    """
    x = tensor.check_against("compressed_als", x, init, same_dtype=False)
    _checks.check_non_negative("compressed_als", "ridge", ridge)
    _checks.check_count("compressed_als", "oversampling", oversampling, minimum=0)
    _checks.check_count("compressed_als", "polish_iters", polish_iters)
    init = jax.tree.map(lambda leaf: leaf.astype(x.dtype), init)
    basis = subspace.randomized(
        key=key, oversampling=oversampling, power_iters=1, test_matrix=sketching.sign
    )
    ranks = tuple(min(init.rank + oversampling, size) for size in x.shape)
    longer = [mode for mode, rank in enumerate(ranks) if rank < x.shape[mode]]
    compressed = tucker.sthosvd(x, ranks, basis=basis, modes=longer)
    start = init._replace(
        factors=tuple(u.T @ a for u, a in zip(compressed.factors, init.factors, strict=True))
    )
    small, info = als(compressed.core, init=start, ridge=ridge, max_iters=max_iters, tol=tol)
    expanded = small._replace(
        factors=tuple(u @ a for u, a in zip(compressed.factors, small.factors, strict=True))
    )
    fit, polished = als(x, init=expanded, ridge=ridge, max_iters=polish_iters, tol=0.0)
    return fit, polished._replace(converged=info.converged)


def _absorb(init: tensor.CPTensor, order: Sequence[int]) -> tuple[Array, ...]:
    """Spread the weights evenly over the modes of `order`, or over all if there are none."""
    free = tuple(order) or tuple(range(len(init.factors)))
    modulus = jnp.abs(init.weights)
    is_zero = modulus == 0
    share = jnp.where(is_zero, 0, jnp.where(is_zero, 1, modulus) ** (1 / len(free)))
    sign = jnp.where(init.weights < 0, -1, 1).astype(share.dtype)
    factors = list(init.factors)
    for mode in free:
        factors[mode] = factors[mode] * share[None]
    factors[free[-1]] = factors[free[-1]] * sign[None]
    return tuple(factors)


def _check_start(
    function: str, shape: Sequence[int], rank: int, dtype: DTypeLike | None
) -> tuple[tuple[int, ...], jnp.dtype]:
    """Refuse sizes or a dtype that no start can have; return them as they are used."""
    shape = tuple(shape)
    if not shape:
        raise _checks.fail(function, "shape ()", "one size or more")
    _checks.check_count(function, "rank", rank)
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise _checks.fail(function, f"dtype {dtype}", "float32 or float64")
    return shape, dtype
