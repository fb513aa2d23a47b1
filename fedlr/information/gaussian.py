"""Divergences and mutual informations of Gaussian distributions in closed form, in nats.

The divergences are losses for encoders with diagonal covariances. The informations are what an
estimate on Gaussian data ought to be: `gaussian_scores` is the best critic of correlated pairs,
`gaussian_information` and the others are the truth about them.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float

from fedlr import _checks, _precision

__all__ = [
    "channel_information",
    "correlation_club",
    "correlation_information",
    "gaussian_information",
    "gaussian_kl",
    "gaussian_scores",
    "symmetric_kl",
]


def gaussian_kl(
    mean_a: Float[Array, "... d"],
    log_var_a: Float[Array, "... d"],
    mean_b: Float[Array, "... d"],
    log_var_b: Float[Array, "... d"],
) -> Float[Array, "..."]:
    """Compute the Kullback-Leibler divergence KL(a || b) of diagonal Gaussians.

        sum_i 1/2 [exp(u_i - v_i) - 1 - (u_i - v_i) + (m_i - n_i)^2 exp(-v_i)]

    with means m, n and logarithms of variances u, v of a and b. Clip the logarithms in the encoder,
    to [-8, 4] for example, not here.

    Args:
        mean_a: Mean of a, shape (..., d), float32 or float64.
        log_var_a: Logarithms of the variances of a, shape (..., d).
        mean_b: Mean of b, shape (..., d).
        log_var_b: Logarithms of the variances of b, shape (..., d).

    Returns:
        The divergence, shape (...), summed over the last axis.

    Raises:
        ValueError: If a dtype is not floating, or shapes or dtypes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> zero, one = jnp.zeros(1), jnp.ones(1)
        >>> round(float(information.gaussian_kl(one, zero, zero, jnp.log(4 * one))), 4)
        0.4431

    Reference:
        Kingma and Welling 2014, arXiv 1312.6114, appendix B, for b standard normal.
    """
    mean_a, log_var_a, mean_b, log_var_b = _alike(
        "gaussian_kl", mean_a=mean_a, log_var_a=log_var_a, mean_b=mean_b, log_var_b=log_var_b
    )
    ratio = log_var_a - log_var_b
    terms = jnp.expm1(ratio) - ratio + (mean_a - mean_b) ** 2 * jnp.exp(-log_var_b)
    return jnp.sum(terms, axis=-1) / 2


def symmetric_kl(
    mean_a: Float[Array, "... d"],
    log_var_a: Float[Array, "... d"],
    mean_b: Float[Array, "... d"],
    log_var_b: Float[Array, "... d"],
) -> Float[Array, "..."]:
    """Compute ``KL(a || b) + KL(b || a)`` of diagonal Gaussians.

        sum_i 2 sinh((u_i - v_i) / 2)^2 + 1/2 (m_i - n_i)^2 (exp(-u_i) + exp(-v_i))

    with means m, n and logarithms of variances u, v of a and b. For a common variance s^2 it is
    ``|m - n|^2 / s^2``. This is the sum of both directions; some papers take the mean, which is
    half of it.

    Args:
        mean_a: Mean of a, shape (..., d), float32 or float64.
        log_var_a: Logarithms of the variances of a, shape (..., d).
        mean_b: Mean of b, shape (..., d).
        log_var_b: Logarithms of the variances of b, shape (..., d).

    Returns:
        The divergence, shape (...), summed over the last axis.

    Raises:
        ValueError: If a dtype is not floating, or shapes or dtypes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> zero, one = jnp.zeros(1), jnp.ones(1)
        >>> round(float(information.symmetric_kl(one, zero, zero, jnp.log(4 * one))), 4)
        1.75

    Reference:
        Kullback and Leibler 1951, On information and sufficiency, their J.
    """
    mean_a, log_var_a, mean_b, log_var_b = _alike(
        "symmetric_kl", mean_a=mean_a, log_var_a=log_var_a, mean_b=mean_b, log_var_b=log_var_b
    )
    by_variance = 2 * jnp.sinh((log_var_a - log_var_b) / 2) ** 2
    precisions = jnp.exp(-log_var_a) + jnp.exp(-log_var_b)
    return jnp.sum(by_variance + (mean_a - mean_b) ** 2 * precisions / 2, axis=-1)


@_precision.highest
def gaussian_information(covariance: Float[Array, "d d"], split: int) -> Float[Array, ""]:
    """Compute the mutual information of two parts of a Gaussian vector.

        1/2 [log det S_x + log det S_y - log det S_xy] = 1/2 [log det S_y - log det S_y|x]

    Invertible linear maps of either part change nothing.

    Args:
        covariance: Covariance S_xy of the whole vector, x first, shape (d, d), float32 or float64,
            positive definite.
        split: Number of variables in x, 1 to d - 1; *static*.

    Returns:
        The information in nats, shape (). NaN if the covariance is not positive definite.

    Raises:
        ValueError: If the covariance is not floating or not square, or `split` is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> covariance = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> round(float(information.gaussian_information(covariance, 1)), 4)
        0.8304

    Reference:
        Cover and Thomas 2006, Elements of Information Theory, example 8.5.1 and theorem 8.4.1.
    """
    _checks.check_floating("gaussian_information", covariance=covariance)
    _checks.check_ndim("gaussian_information", "covariance", covariance, 2)
    size = jnp.shape(covariance)[0]
    _checks.check_shape("gaussian_information", "covariance", covariance, (size, size))
    _checks.check_rank("gaussian_information", split, size - 1, "split")
    covariance = jnp.asarray(covariance)
    # the lower right block of the factor is that of the covariance of y given x
    given_x = jnp.diagonal(jnp.linalg.cholesky(covariance))[split:]
    alone = jnp.diagonal(jnp.linalg.cholesky(covariance[split:, split:]))
    return jnp.sum(jnp.log(alone) - jnp.log(given_x))


def correlation_information(correlation: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the mutual information of a bivariate normal: ``-1/2 log(1 - rho^2)``.

    Of d independent pairs it is the sum over the pairs, as it is over the canonical correlations of
    two Gaussian vectors.

    Args:
        correlation: rho, any shape, float32 or float64, between -1 and 1.

    Returns:
        The information in nats, of the same shape; Inf where rho is -1 or 1.

    Raises:
        ValueError: If the correlation is not floating, or concrete and not between -1 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> pairs = information.correlation_information(jnp.array([0.5, 0.75, 0.9]))
        >>> [round(float(pair), 4) for pair in pairs]
        [0.1438, 0.4133, 0.8304]

    Reference:
        Cover and Thomas 2006, Elements of Information Theory, example 8.5.1.
    """
    correlation = _correlation("correlation_information", correlation)
    return -jnp.log1p(-(correlation**2)) / 2


def correlation_club(correlation: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute what `club` expects of a bivariate normal with the true q: ``rho^2 / (1 - rho^2)``.

    Of d independent pairs it is the sum. It is far above the information for a large rho.

    Args:
        correlation: rho, any shape, float32 or float64, between -1 and 1.

    Returns:
        The upper bound in nats, of the same shape; Inf where rho is -1 or 1.

    Raises:
        ValueError: If the correlation is not floating, or concrete and not between -1 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.correlation_club(jnp.array(0.9))), 3)
        4.263

    Reference:
        Cheng et al. 2020, arXiv 2006.12013, I_CLUB, of Gaussian densities.
    """
    correlation = _correlation("correlation_club", correlation)
    return correlation**2 / ((1 - correlation) * (1 + correlation))


def channel_information(
    signal: Float[Array, "..."], noise: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Compute the information that a noisy measurement bears: ``1/2 log(1 + Var s / Var e)``.

    The measurement is y = s + e with a Gaussian signal s = a . x and independent Gaussian noise e;
    it is the information about s and about x alike.

    Args:
        signal: Variance of s, any shape, float32 or float64, non-negative.
        noise: Variance of e, positive, of the same shape and dtype.

    Returns:
        The information in nats, of the same shape.

    Raises:
        ValueError: If a dtype is not floating, shapes or dtypes differ, or a concrete variance is
            negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> round(float(information.channel_information(jnp.array(3.0), jnp.array(1.0))), 4)
        0.6931

    Reference:
        Shannon 1948, A mathematical theory of communication, theorem 17, of one sample.
    """
    for name, value in (("signal", signal), ("noise", noise)):
        _checks.check_non_negative("channel_information", name, value)
    signal, noise = _alike("channel_information", minimum=0, signal=signal, noise=noise)
    return jnp.log1p(signal / noise) / 2


@_precision.highest
def gaussian_scores(
    x: Float[Array, "n d"], y: Float[Array, "m d"], correlation: float | Float[Array, ""]
) -> Float[Array, "n m"]:
    """Score pairs by the best critic of d independent pairs of standard normals.

        T(x, y) = log N(y; rho x, (1 - rho^2) I) - log N(y; 0, I)

    `club` of it is that of log N(y; rho x, (1 - rho^2) I), since the second term cancels.

    Args:
        x: Samples, shape (n, d), float32 or float64.
        y: Samples, shape (m, d), of the dtype of `x`.
        correlation: rho, between -1 and 1, shape ().

    Returns:
        The log ratios of joint and product density, shape (n, m).

    Raises:
        ValueError: If a dtype is not floating, dtypes or the number of features differ, or the
            correlation is concrete and not between -1 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import information
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0]])
        >>> [round(float(score), 4) for score in information.gaussian_scores(x, y, 0.6)[:, 0]]
        [-0.0581, 0.5981]

    Reference:
        Belghazi et al. 2018, arXiv 1801.04062, section 4.1, has the data.
    """
    _checks.check_floating("gaussian_scores", x=x, y=y)
    _checks.check_ndim("gaussian_scores", "x", x, 2)
    _checks.check_ndim("gaussian_scores", "y", y, 2)
    _checks.check_shape("gaussian_scores", "y", y, (jnp.shape(y)[0], jnp.shape(x)[1]))
    x, y = _one_dtype("gaussian_scores", x=x, y=y)
    rho = _correlation("gaussian_scores", jnp.asarray(correlation, x.dtype))
    _checks.check_ndim("gaussian_scores", "correlation", rho, 0)
    remaining = (1 - rho) * (1 + rho)
    squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
    exponents = (2 * rho * (x @ y.T) - rho**2 * squares) / (2 * remaining)
    return exponents - x.shape[1] * jnp.log(remaining) / 2


def _alike(function: str, minimum: int = 1, **arrays: Array) -> list[Array]:
    """Refuse arrays that differ in shape or dtype or have fewer than `minimum` axes."""
    _checks.check_floating(function, **arrays)
    shape = jnp.shape(next(iter(arrays.values())))
    for name, array in arrays.items():
        if jnp.ndim(array) < minimum:
            raise _checks.fail(function, f"{name} of shape ()", f"{minimum} axes or more")
        _checks.check_shape(function, name, array, shape)
    return _one_dtype(function, **arrays)


def _one_dtype(function: str, **arrays: Array) -> list[Array]:
    dtypes = sorted({jnp.result_type(array).name for array in arrays.values()})
    if len(dtypes) > 1:
        raise _checks.fail(
            function, f"{', '.join(arrays)} of dtypes {' and '.join(dtypes)}", "one dtype"
        )
    return [jnp.asarray(array) for array in arrays.values()]


def _correlation(function: str, correlation: Any) -> Array:
    """Refuse what is not floating, and concrete numbers outside -1 and 1."""
    _checks.check_floating(function, correlation=correlation)
    if not isinstance(correlation, core.Tracer) and not np.all(np.abs(correlation) <= 1):
        raise _checks.fail(function, f"correlation {correlation}", "numbers from -1 to 1")
    return jnp.asarray(correlation)
