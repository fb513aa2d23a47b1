"""Noise of measured sinograms: models that add it, and an estimate of its size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fedlr import _checks

__all__ = [
    "GaussianNoise",
    "Transmission",
    "background_deviation",
    "gaussian",
    "poisson_transmission",
]


class GaussianNoise(NamedTuple):
    """A sinogram with Gaussian noise.

    Attributes:
        noisy: Sinogram with noise, shape (num_angles, num_bins).
        clean: Sinogram without.
        deviation: Standard deviation of the noise, scalar.
    """

    noisy: Float[Array, "angles num_bins"]
    clean: Float[Array, "angles num_bins"]
    deviation: Float[Array, ""]


def gaussian(
    sinogram: Float[Array, "angles num_bins"], level: Float[Array, ""], *, key: Key[Array, ""]
) -> GaussianNoise:
    """Add white Gaussian noise of standard deviation `level` times the sinogram's largest value.

    Args:
        sinogram: Clean sinogram, float32 or float64.
        level: Relative noise level sigma, scalar; traced.
        key: Random key.

    Returns:
        The noisy sinogram beside the clean one and the standard deviation.

    Raises:
        ValueError: If `sinogram` is not floating or `level` no scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import noise
        >>> scan = noise.gaussian(jnp.full((3, 4), 2.0), 0.05, key=jax.random.key(0))
        >>> round(float(scan.deviation), 6)
        0.1
    """
    sinogram = jnp.asarray(sinogram)
    _checks.check_floating("gaussian", sinogram=sinogram)
    _checks.check_ndim("gaussian", "level", level, 0)
    deviation = jnp.asarray(level, sinogram.dtype) * sinogram.max()
    noise = jax.random.normal(key, sinogram.shape, sinogram.dtype)
    return GaussianNoise(sinogram + deviation * noise, sinogram, deviation)


class Transmission(NamedTuple):
    """A sinogram measured by counting transmitted photons.

    Attributes:
        noisy: Sinogram estimated from the counts, shape (num_angles, num_bins).
        clean: Sinogram without noise.
        counts: Photons counted per bin, whole numbers in the sinogram's dtype; the weights of a
            weighted fit.
        num_zero: Number of bins without a photon, which were set to one photon; int32 scalar.
    """

    noisy: Float[Array, "angles num_bins"]
    clean: Float[Array, "angles num_bins"]
    counts: Float[Array, "angles num_bins"]
    num_zero: Int[Array, ""]


def poisson_transmission(
    sinogram: Float[Array, "angles num_bins"],
    incident: Float[Array, ""],
    pixel_size: Float[Array, ""],
    *,
    key: Key[Array, ""],
) -> Transmission:
    """Count photons behind an absorbing object and turn the counts into a sinogram again.

    counts ~ Poisson(I0 exp(-pixel_size * sinogram)), noisy = -log(max(counts, 1)/I0) / pixel_size.
    From a mean of 2^24 on, where float32 no longer tells neighbouring counts apart, the counts are
    rounded normal numbers of that mean and variance. A bin whose mean is NaN, infinite or negative,
    as with a negative `incident`, has NaN as its count and in the noisy sinogram.

    Args:
        sinogram: Clean sinogram in pixel units, float32 or float64.
        incident: Photons I0 > 0 sent into every bin, scalar; traced, so its sign is not checked.
        pixel_size: Width of a pixel in the unit of the attenuation, 2/n for the square [-1, 1]^2,
            scalar; traced.
        key: Random key.

    Returns:
        The noisy sinogram beside the clean one, the counts and the number of empty bins.

    Raises:
        ValueError: If `sinogram` is not floating, or `incident` or `pixel_size` no scalar.
    """
    sinogram = jnp.asarray(sinogram)
    _checks.check_floating("poisson_transmission", sinogram=sinogram)
    _checks.check_ndim("poisson_transmission", "incident", incident, 0)
    _checks.check_ndim("poisson_transmission", "pixel_size", pixel_size, 0)
    incident, pixel_size = (jnp.asarray(value, sinogram.dtype) for value in (incident, pixel_size))
    mean = incident * jnp.exp(-pixel_size * sinogram)
    few_key, many_key = jax.random.split(key)
    few = mean < 2.0**24
    few_counts = jax.random.poisson(few_key, jnp.where(few, mean, 0), dtype=jnp.int32)
    normal = jax.random.normal(many_key, mean.shape, mean.dtype)
    many_counts = jnp.round(mean + jnp.sqrt(jnp.where(few, 0, mean)) * normal)
    counts = jnp.where(few, few_counts.astype(mean.dtype), many_counts)
    counts = jnp.where((mean >= 0) & (mean < jnp.inf), counts, jnp.nan)
    transmitted = jnp.maximum(counts, 1) / incident
    num_zero = (counts == 0).sum(dtype=jnp.int32)
    return Transmission(-jnp.log(transmitted) / pixel_size, sinogram, counts, num_zero)


def background_deviation(
    sinogram: Float[Array, "angles num_bins"], background: Bool[Array, "angles num_bins"]
) -> Float[Array, ""]:
    """Estimate the noise's standard deviation from bins that see nothing of the object.

    1.4826 times the median absolute deviation from the median, which is right for Gaussian noise
    and is not led astray by a few bins of the object.

    Args:
        sinogram: Noisy sinogram, float32 or float64.
        background: Bool, True where a bin lies outside the object's support.

    Returns:
        Standard deviation, scalar; NaN if no bin is marked.

    Raises:
        ValueError: If `sinogram` is not floating or `background` no mask of its shape.
    """
    sinogram = jnp.asarray(sinogram)
    _checks.check_floating("background_deviation", sinogram=sinogram)
    _checks.check_mask("background_deviation", background, sinogram.shape)
    values = jnp.where(background, sinogram, jnp.nan)
    return 1.4826 * jnp.nanmedian(jnp.abs(values - jnp.nanmedian(values)))
