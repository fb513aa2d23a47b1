"""The penalty that noise alone would call for, and the level of the noise: no cross-validation."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedlr import _checks, _precision, multilinear

__all__ = ["noise_scale", "theory_grid", "theory_penalty"]


def theory_penalty(
    shapes: Sequence[Sequence[int]], noise: float | Float[Array, " tensors"] = 1.0
) -> Float[Array, ""]:
    """Compute the penalty at which a component of pure noise stops paying.

    A component of strength d (inner product of the residual with a unit rank-1 tensor) lowers the
    penalized objective only above ``d = ((N-1)/(N-2)) (sigma (N-2))^{N/(2N-2)}``, for matrices
    above sigma. The largest d of Gaussian noise is about ``tau sum_n sqrt(I_n)``. So

        ``sigma = (1/(N-2)) ((N-2)/(N-1) tau sum_n sqrt(I_n))^{(2N-2)/N}``,  and
        ``sigma = tau (sqrt(I_0) + sqrt(I_1))`` for N = 2.

    One penalty serves all tensors, so that of several is the mean of theirs. Where their noise
    differs, divide every tensor by its own level first and leave `noise` at 1.

    Args:
        shapes: Shape of every tensor, two modes or more; *static*.
        noise: Standard deviation tau of the noise, one for all tensors or one for each, shape (K,).

    Returns:
        The penalty, a scalar.

    Raises:
        ValueError: If there is no shape, one has fewer than two modes, or `noise` is neither a
            scalar nor one number for every tensor.

    Example:
        >>> from fedlr import linked
        >>> round(float(linked.theory_penalty([(10, 10, 8)])), 2)
        7.6

    Reference: derived here from the stationary points of the objective of Kang, Rao and Lock 2025,
        arXiv 2502.20286; the norm of a Gaussian tensor as by Tomioka and Suzuki 2014, arXiv
        1407.1870, without their logarithmic factor.
    """
    noise = jnp.asarray(noise)
    if not len(shapes):
        raise _checks.fail("theory_penalty", "no shapes", "one or more")
    if noise.shape not in ((), (len(shapes),)):
        got = f"noise of shape {noise.shape}"
        raise _checks.fail("theory_penalty", got, f"a scalar or shape ({len(shapes)},)")
    if not jnp.issubdtype(noise.dtype, jnp.floating):
        noise = noise.astype(jnp.result_type(float))
    levels = jnp.broadcast_to(noise, (len(shapes),))
    return jnp.mean(
        jnp.stack([_of_one(shape, level) for shape, level in zip(shapes, levels, strict=True)])
    )


def theory_grid(
    shapes: Sequence[Sequence[int]],
    noise: float | Float[Array, " tensors"] = 1.0,
    *,
    num_penalties: int = 9,
) -> Float[Array, " penalties"]:
    """Spread penalties around the one from theory: 0.1 to 10 times `theory_penalty`, log-spaced.

    Args:
        shapes: Shape of every tensor; *static*.
        noise: Standard deviation of the noise, a scalar or shape (K,).
        num_penalties: Number of penalties, at least 1; *static*. An odd one has the centre in it.

    Returns:
        Increasing penalties, shape (num_penalties,).

    Raises:
        ValueError: As for `theory_penalty`, or if `num_penalties` is no positive integer.

    Example:
        >>> from fedlr import linked
        >>> [round(float(p), 1) for p in linked.theory_grid([(10, 10, 8)], num_penalties=3)]
        [0.8, 7.6, 76.0]
    """
    _checks.check_count("theory_grid", "num_penalties", num_penalties)
    centre = theory_penalty(shapes, noise)
    exponents = np.linspace(-1, 1, num_penalties) if num_penalties > 1 else np.zeros(1)
    return centre * jnp.asarray(10.0**exponents, centre.dtype)


@_precision.highest
def noise_scale(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Estimate the standard deviation of white noise under a signal of low rank.

    The median singular value of an unfolding, divided by what it is for unit noise (the square root
    of the median of the Marchenko-Pastur law times the larger size). The signal can only raise it,
    so the smallest over the unfoldings is taken. At high signal-to-noise ratios and small sizes it
    is up to 30 % too high.

    Args:
        x: Complete tensor of two modes or more, float32 or float64.

    Returns:
        The standard deviation, a scalar.

    Raises:
        ValueError: If `x` has fewer than two modes or is not floating.

    Example:
        >>> import jax
        >>> from fedlr import linked
        >>> noise = 3 * jax.random.normal(jax.random.key(0), (30, 20, 10))
        >>> round(float(linked.noise_scale(noise)), 1)
        3.0

    Reference: Gavish and Donoho 2014, "The optimal hard threshold for singular values is
        4/sqrt(3)", arXiv 1305.5870, section III.E, for one matrix.
    """
    _checks.check_floating("noise_scale", x=x)
    x = jnp.asarray(x)
    _checks.check_ndim("noise_scale", "x", x, 2, max(2, x.ndim))
    levels = []
    for mode in range(x.ndim):
        flat = multilinear.unfold(x, mode)
        small, large = sorted(flat.shape)
        gram = flat @ flat.T if flat.shape[0] == small else flat.T @ flat
        median = jnp.median(jnp.maximum(jnp.linalg.eigvalsh(gram), 0))
        levels.append(jnp.sqrt(median / (large * _marchenko_pastur_median(small / large))))
    return jnp.min(jnp.stack(levels))


def _of_one(shape: Sequence[int], noise: Array) -> Array:
    """Return the penalty of one tensor."""
    order = len(shape)
    if order < 2:
        raise _checks.fail("theory_penalty", f"shape {tuple(shape)}", "two modes or more")
    norm = noise * sum(math.sqrt(size) for size in shape)
    if order == 2:
        return norm
    return ((order - 2) / (order - 1) * norm) ** ((2 * order - 2) / order) / (order - 2)


def _marchenko_pastur_median(ratio: float) -> float:
    """Find the median of the Marchenko-Pastur law of unit variance by quadrature."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # With x on a cosine grid the density, which has roots at both ends, is smooth.
    angle = (np.arange(4000) + 0.5) * np.pi / 4000
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    mass = np.sin(angle) ** 2 / x
    share = (np.cumsum(mass) - mass / 2) / np.sum(mass)
    return float(np.interp(0.5, share, x))
