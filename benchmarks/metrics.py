"""How good reconstructed images are: mean PSNR and SSIM over clients."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

__all__ = ["psnr", "ssim"]

_WINDOW = 7
_COUNT = _WINDOW**2


def psnr(
    images: Float[Array, "clients ..."], truth: Float[Array, "clients ..."]
) -> Float[Array, ""]:
    """Compute the mean PSNR over clients in dB, each with the largest truth value as its range.

    Args:
        images: Reconstructions, images or volumes.
        truth: Truth of the same shape.

    Returns:
        Scalar.
    """
    axes = tuple(range(1, truth.ndim))
    error = jnp.mean((images - truth) ** 2, axis=axes)
    return jnp.mean(10.0 * jnp.log10(jnp.max(truth, axis=axes) ** 2 / error))


def ssim(
    images: Float[Array, "clients ..."], truth: Float[Array, "clients ..."]
) -> Float[Array, ""]:
    """Compute the mean SSIM over clients: 7 x 7 uniform window, range of each client's truth.

    Args:
        images: Reconstructions; of volumes every slice is an image.
        truth: Truth of the same shape.

    Returns:
        Scalar, that of `skimage.metrics.structural_similarity` averaged over the clients.
    """
    return jnp.mean(jax.vmap(_ssim)(jnp.asarray(images), jnp.asarray(truth)))


def _ssim(image, truth):
    span = jnp.max(truth) - jnp.min(truth)
    small, large = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean, other_mean = _local_mean(image), _local_mean(truth)
    unbiased = _COUNT / (_COUNT - 1)
    variance = unbiased * (_local_mean(image**2) - mean**2)
    other_variance = unbiased * (_local_mean(truth**2) - other_mean**2)
    covariance = unbiased * (_local_mean(image * truth) - mean * other_mean)
    light = (2 * mean * other_mean + small) / (mean**2 + other_mean**2 + small)
    return jnp.mean(light * (2 * covariance + large) / (variance + other_variance + large))


def _local_mean(image):
    """Average over the windows of the last two axes that lie inside the image."""

    def total(image, *window):
        window = (1,) * (image.ndim - 2) + window
        zero = jnp.zeros((), image.dtype)
        return lax.reduce_window(image, zero, lax.add, window, (1,) * image.ndim, "VALID")

    return total(total(image, _WINDOW, 1), 1, _WINDOW) / _COUNT
