"""Seeded data sets for tests, benchmarks and notebooks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fedlr import _checks, noise, phantoms, tomography

__all__ = ["MultimodalScans", "multimodal_scans", "uniform_angles"]


class MultimodalScans(NamedTuple):
    """Tomographic scans of several images that are tied by ``w_N = sum_{i<N} c_i w_i``.

    Attributes:
        images: Truth, non-negative, shape (clients, n, n).
        angles: Viewing angles in radians, shape (clients, views).
        sinograms: Noisy sinograms in pixel units, shape (clients, views, bins).
        clean: The same without noise.
        noise_levels: Standard deviation of the noise of every client, shape (clients,).
        coefficients: Coupling coefficients c_1 .. c_(N-1), shape (clients - 1,).
    """

    images: Float[Array, "clients n n"]
    angles: Float[Array, "clients views"]
    sinograms: Float[Array, "clients views bins"]
    clean: Float[Array, "clients views bins"]
    noise_levels: Float[Array, " clients"]
    coefficients: Float[Array, " coefficients"]


def uniform_angles(num_angles: int, *, dtype=jnp.float32) -> Float[Array, " angles"]:
    """Return `num_angles` viewing angles spread evenly over [0, pi), in radians.

    Args:
        num_angles: Number of angles, at least 1. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The angles ``k pi / num_angles``, shape (num_angles,).

    Raises:
        ValueError: If `num_angles` is not a positive integer.

    Example:
        >>> from fedlr import synthetic
        >>> synthetic.uniform_angles(4).shape
        (4,)
    """
    _checks.check_count("uniform_angles", "num_angles", num_angles)
    return jnp.linspace(0.0, jnp.pi, num_angles, endpoint=False, dtype=dtype)


def multimodal_scans(
    geometry: tomography.ParallelBeam,
    angles: Float[Array, " views"],
    *,
    sigma: float | Array,
    key: Key[Array, ""],
) -> MultimodalScans:
    """Scan the four coupled images of `phantoms.reference_set` and add noise.

    The sinograms are closed-form line integrals of the ellipses, averaged over the width of a
    bin, and the images are antialiased: no discrete projector is used on either side, so a
    reconstruction from these data commits no inverse crime. Noise of client i is
    ``sigma * max(clean_i) * N(0, 1)``, independent for every measurement.

    Args:
        geometry: Sizes of the scan; its image must be square. *Static.*
        angles: Viewing angles in radians, the same for all clients, shape (views,). Their dtype
            is that of the result.
        sigma: Noise level relative to the largest clean value of a client.
        key: Random key of the noise.

    Returns:
        The scans of N = 4 clients with c = (0.5, 0.3, 0.2).

    Raises:
        ValueError: If the image is not square or the angles are not a floating vector.

    Example:
        >>> import jax
        >>> from fedlr import synthetic, tomography
        >>> geometry = tomography.ParallelBeam(shape=(16, 16), num_bins=23)
        >>> scans = synthetic.multimodal_scans(
        ...     geometry, synthetic.uniform_angles(5), sigma=0.05, key=jax.random.key(0)
        ... )
        >>> scans.images.shape, scans.sinograms.shape
        ((4, 16, 16), (4, 5, 23))
    """
    rows, columns = geometry.shape
    if rows != columns:
        raise _checks.fail("multimodal_scans", f"image shape {geometry.shape}", "a square image")
    _checks.check_floating("multimodal_scans", angles=angles)
    _checks.check_ndim("multimodal_scans", "angles", angles, 1)
    ellipses = phantoms.reference_set(dtype=angles.dtype)
    images = jax.vmap(lambda e: phantoms.rasterize(e, rows))(ellipses)
    clean = jax.vmap(lambda e: phantoms.sinogram(e, angles, geometry.num_bins, rows))(ellipses)
    level = jnp.asarray(sigma, angles.dtype)
    scans = jax.vmap(lambda scan, key: noise.gaussian(scan, level, key=key))(
        clean, jax.random.split(key, clean.shape[0])
    )
    return MultimodalScans(
        images=images,
        angles=jnp.broadcast_to(angles, (clean.shape[0], angles.shape[0])),
        sinograms=scans.noisy,
        clean=clean,
        noise_levels=scans.deviation,
        coefficients=jnp.asarray([0.5, 0.3, 0.2], angles.dtype),
    )
