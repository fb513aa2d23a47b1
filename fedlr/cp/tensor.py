"""The CP tensor, a sum of rank-1 tensors: ``Xhat = sum_r w_r a_r^(0) o a_r^(1) o ...``."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from fedlr import _alternating, _checks, _partials, _precision

__all__ = ["CPTensor", "check_cp", "normalize", "relative_error", "to_dense"]


class CPTensor(NamedTuple):
    """A tensor in CP form; all leaves may have leading batch axes.

    Attributes:
        weights: w, one number per component, shape (R,).
        factors: Tuple of the N factors A_n, shape (I_n, R), float32 or float64 as the weights.
    """

    weights: Float[Array, " rank"]
    factors: tuple[Float[Array, "size rank"], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (I_0, ..., I_{N-1}) of the dense tensor, without batch axes."""
        return tuple(factor.shape[-2] for factor in self.factors)

    @property
    def rank(self) -> int:
        """Number R of components."""
        return self.weights.shape[-1]


@_precision.highest
def to_dense(t: CPTensor) -> Float[Array, "..."]:
    """Form the dense tensor ``sum_r w_r a_r^(0) o a_r^(1) o ...``.

    Args:
        t: CP tensor of N >= 1 modes.

    Returns:
        Tensor of shape (I_0, ..., I_{N-1}).

    Raises:
        ValueError: If the weights or factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import cp
        >>> t = cp.CPTensor(jnp.array([2.0]), (jnp.ones((3, 1)), jnp.ones((4, 1))))
        >>> cp.to_dense(t)[0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    check_cp("to_dense", t)
    first, *others = t.factors
    scaled = first * t.weights[None]
    if not others:
        return jnp.sum(scaled, axis=1)
    return (scaled @ _partials.khatri_rao(others).T).reshape(t.shape)


def normalize(t: CPTensor) -> CPTensor:
    """Put a CP tensor into its canonical form, which leaves the dense tensor as it is.

    Columns have norm 1 and the weights hold the rest, in decreasing order of their modulus. The
    entry of largest modulus of every column is positive in all modes but the last, whose columns
    take the signs that make the weights non-negative. A component of norm 0 keeps zero columns
    and gets weight 0.

    Args:
        t: CP tensor of N >= 1 modes.

    Returns:
        CPTensor with the same dense tensor up to rounding.

    Raises:
        ValueError: If the weights or factors do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import cp
        >>> factors = (jnp.array([[-3.0], [0.0]]), jnp.array([[0.0], [4.0]]))
        >>> t = cp.normalize(cp.CPTensor(jnp.ones(1), factors))
        >>> t.weights.tolist(), [factor[:, 0].tolist() for factor in t.factors]
        ([12.0], [[1.0, -0.0], [-0.0, -1.0]])
    """
    check_cp("normalize", t)
    weights, factors = t.weights, []
    for factor in t.factors:
        peak = jnp.max(jnp.abs(factor), axis=0)
        scaled = factor / jnp.where(peak == 0, 1, peak)[None]
        lengths = jnp.sqrt(jnp.sum(scaled * scaled, axis=0))
        weights = weights * lengths * peak
        factors.append(scaled / jnp.where(lengths == 0, 1, lengths)[None])
    signs = [column_signs(factor) for factor in factors[:-1]]
    factors = [factor * sign[None] for factor, sign in zip(factors, signs, strict=False)] + [
        factors[-1]
    ]
    for sign in signs:
        weights = weights * sign
    factors[-1] = factors[-1] * jnp.where(weights < 0, -1, 1).astype(weights.dtype)[None]
    order = jnp.argsort(-jnp.abs(weights), stable=True)
    return CPTensor(jnp.abs(weights)[order], tuple(factor[:, order] for factor in factors))


@_precision.highest
def relative_error(
    x: Float[Array, "..."], t: CPTensor, *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
    """Compute ``|X - Xhat| / |X|`` from the residual itself, on the observed entries.

    The residual is summed block by block, so no dense model is stored, and small errors are right:
    the formula by norms and an inner product is good to about ``sqrt(eps)`` only.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64.
        t: CP tensor of the same shape and dtype.
        mask: True = observed, the shape of `x`; all if None.

    Returns:
        The relative error, a scalar; 0 where both norms are 0, inf where only that of `x` is.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import cp
        >>> t = cp.CPTensor(jnp.ones(1), (jnp.ones((3, 1)), jnp.ones((4, 1))))
        >>> float(cp.relative_error(2 * jnp.ones((3, 4)), t))
        0.5
    """
    x = check_against("relative_error", x, t, mask)
    weight = None
    if mask is not None:
        x, weight = jnp.where(mask, x, 0), mask.astype(x.dtype)
    # Squares of very large or small numbers would overflow or vanish.
    peak = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    peak = jnp.where(peak == 0, 1, peak)
    factors = (t.factors[0] * (t.weights / peak)[None], *t.factors[1:])
    error = _root(_alternating.residual_squares(x / peak, weight, factors))
    return jnp.where(error == 0, 0, error / _root(_alternating.squares(x / peak)))


def _root(squares: Array) -> Array:
    """Take the square root; the gradient at 0 is 0."""
    is_zero = squares == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def check_cp(function: str, t: CPTensor) -> None:
    """Refuse a CP tensor whose weights and factors do not fit together.

    Args:
        function: Name of the caller, for the message.
        t: CP tensor.

    Returns:
        Nothing.

    Raises:
        ValueError: If weights or factors have the wrong number of axes, no factor is there, ranks
            or dtypes differ, or the rank is 0.
    """
    _checks.check_floating(function, weights=t.weights)
    _checks.check_ndim(function, "weights", t.weights, 1)
    if not t.factors:
        raise _checks.fail(function, "no factors", "one for every mode")
    rank = t.weights.shape[0]
    _checks.check_count(function, "rank", rank)
    for mode, factor in enumerate(t.factors):
        name = f"factor {mode}"
        _checks.check_ndim(function, name, factor, 2)
        if factor.shape[1] != rank:
            got = f"{name} of shape {jnp.shape(factor)}"
            raise _checks.fail(function, got, f"{rank} columns as there are weights")
        if factor.dtype != t.weights.dtype:
            got = f"{name} of dtype {factor.dtype}"
            raise _checks.fail(function, got, f"{t.weights.dtype} as the weights")


def check_against(
    function: str, x: Array, t: CPTensor, mask: Array | None = None, *, same_dtype: bool = True
) -> Array:
    """Refuse a tensor of two modes or more that a CP tensor or a mask does not fit; return it."""
    _checks.check_floating(function, x=x)
    x = jnp.asarray(x)
    _checks.check_ndim(function, "x", x, 2, max(2, x.ndim))
    check_cp(function, t)
    if t.shape != x.shape:
        raise _checks.fail(function, f"a CP tensor of shape {t.shape}", f"{x.shape} as x")
    if same_dtype and t.weights.dtype != x.dtype:
        raise _checks.fail(function, f"a CP tensor of dtype {t.weights.dtype}", f"{x.dtype} as x")
    if mask is not None:
        _checks.check_mask(function, mask, x.shape)
    return x


def draw_factors(
    sizes: Sequence[int], rank: int, key: Array, dtype: jnp.dtype
) -> tuple[Array, ...]:
    """Draw N(0, 1) matrices (size, rank) as one vector, which compiles in a fifth of the time."""
    flat = jax.random.normal(key, (sum(sizes) * rank,), dtype)
    parts = jnp.split(flat, np.cumsum([size * rank for size in sizes])[:-1])
    return tuple(part.reshape(size, rank) for part, size in zip(parts, sizes, strict=True))


def column_norms(factor: Array) -> Array:
    """Take the Euclidean norms of the columns; the gradient at 0 is 0."""
    return _root(jnp.sum(factor * factor, axis=0))


def column_signs(factor: Array) -> Array:
    """Return the sign of the entry of largest modulus of every column, 1 for zero columns."""
    peak = jnp.argmax(jnp.abs(factor), axis=0)
    largest = jnp.take_along_axis(factor, peak[None], axis=0)[0]
    return jnp.where(largest < 0, -1, 1).astype(factor.dtype)
