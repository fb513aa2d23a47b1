"""Simulated scans of coupled phantoms, and images tied by their channels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, Key

from fedlr import _checks, ellipsoids, noise, phantoms, tomography

__all__ = [
    "MultimodalScans",
    "coupled_channels",
    "multimodal_scans",
    "multimodal_volumes",
    "scan_phantoms",
    "uniform_angles",
]


class MultimodalScans(NamedTuple):
    """Tomographic scans of several images that are tied by ``w_N = sum_{i<N} c_i w_i``.

    Scans of volumes have an axis of slices after that of the clients.

    Attributes:
        images: Truth, non-negative, shape (clients, n, n) or (clients, slices, n, n).
        angles: Viewing angles in radians, shape (clients, views).
        sinograms: Noisy sinograms in pixel units, shape (clients, views, bins) or (clients, slices,
            views, bins).
        clean: The same without noise.
        noise_levels: Standard deviation of the noise of every client, shape (clients,).
        coefficients: Coupling coefficients c_1 .. c_(N-1), shape (clients - 1,).
    """

    images: Float[Array, "clients *slices n n"]
    angles: Float[Array, "clients views"]
    sinograms: Float[Array, "clients *slices views bins"]
    clean: Float[Array, "clients *slices views bins"]
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


def _check_scan(function, geometry, angles, sigma):
    """Refuse a scan that is none of square images; return the angles as an array."""
    rows, columns = geometry.shape
    if rows != columns:
        raise _checks.fail(function, f"image shape {geometry.shape}", "a square image")
    angles = jnp.asarray(angles)
    _checks.check_floating(function, angles=angles)
    _checks.check_ndim(function, "angles", angles, 1, 2)
    _checks.check_non_negative(function, "sigma", sigma)
    return angles


def _every_client(function, angles, num_clients):
    """Give every client its angles: (clients, views)."""
    if angles.ndim == 1:
        return jnp.broadcast_to(angles, (num_clients, *angles.shape))
    _checks.check_shape(function, "angles", angles, (num_clients, angles.shape[1]))
    return angles


def _independent(coupled):
    """Return the phantoms w_1 .. w_(N-1) without the zero amplitudes that pad them to w_N's."""
    others = jax.tree.map(lambda field: field[:-1], coupled)
    if isinstance(others.amplitude, core.Tracer):
        return others
    used = np.flatnonzero(np.asarray(others.amplitude).any(axis=0))
    size = used[-1] + 1 if used.size else 1
    return jax.tree.map(lambda field: field[:, :size], others)


def _scan(geometry, ellipses, coefficients, angles):
    """Return images and clean sinograms of w_1 .. w_(N-1) and of w_N = sum_i c_i w_i."""
    size = geometry.shape[0]

    def view(ellipses, angles):
        return phantoms.sinogram(ellipses, angles, geometry.num_bins, size)

    images = jax.vmap(lambda e: phantoms.rasterize(e, size))(ellipses)
    mixed = jnp.tensordot(coefficients, images, axes=1, precision="highest")
    clean = jax.vmap(view)(ellipses, angles[:-1])
    last = view(phantoms.combine(ellipses, coefficients), angles[-1])
    return tuple(jnp.concatenate(pair) for pair in ((images, mixed[None]), (clean, last[None])))


def _measure(images, clean, angles, coefficients, sigma, key):
    """Add the noise of every client."""
    level = jnp.asarray(sigma, clean.dtype)
    scans = jax.vmap(lambda scan, key: noise.gaussian(scan, level, key=key))(
        clean, jax.random.split(key, clean.shape[0])
    )
    return MultimodalScans(images, angles, scans.noisy, clean, scans.deviation, coefficients)


def scan_phantoms(
    geometry: tomography.ParallelBeam,
    ellipses: phantoms.Ellipses,
    coefficients: Float[Array, " coefficients"],
    angles: Float[Array, " views"] | Float[Array, "clients views"],
    *,
    sigma: float | Array,
    key: Key[Array, ""],
) -> MultimodalScans:
    """Scan a coupled set of ellipse phantoms, one per client, and add noise.

    The sinograms are closed-form line integrals of the ellipses, averaged over the width of a
    bin, and the images are antialiased: no discrete projector is used on either side, so a
    reconstruction from these data commits no inverse crime. Noise of client i is
    ``sigma * max(clean_i) * N(0, 1)``, independent for every measurement.

    Args:
        geometry: Sizes of the scan; its image must be square. *Static.*
        ellipses: Phantoms w_1 .. w_N with w_N = sum_i c_i w_i, every field of shape (N, ellipses),
            as of `phantoms.coupled_phantoms` or `phantoms.append_combination`. float32 or float64;
            their dtype is that of the result. What is scanned as w_N is made of the others.
        coefficients: Coefficients c_1 .. c_(N-1) by which they are tied, shape (N - 1,), of the
            phantoms' dtype.
        angles: Viewing angles in radians, the same for all clients, shape (views,), or each
            client's own, shape (N, views); of the phantoms' dtype.
        sigma: Noise level relative to the largest clean value of a client, a scalar from 0; traced,
            and then its sign is not checked.
        key: Random key of the noise.

    Returns:
        The scans of N clients.

    Raises:
        ValueError: If the image is not square, a shape or dtype does not fit, or a concrete `sigma`
            is negative or NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import phantoms, synthetic, tomography
        >>> phantom_key, noise_key = jax.random.split(jax.random.key(0))
        >>> coefficients = jnp.array([0.6, 0.4])
        >>> ellipses = phantoms.coupled_phantoms(coefficients, key=phantom_key)
        >>> geometry = tomography.ParallelBeam(shape=(16, 16), num_bins=23)
        >>> angles = jnp.array([[0.0, 1.5], [0.5, 2.0], [1.0, 2.5]])
        >>> scans = synthetic.scan_phantoms(
        ...     geometry, ellipses, coefficients, angles, sigma=0.05, key=noise_key
        ... )
        >>> scans.images.shape, scans.sinograms.shape
        ((3, 16, 16), (3, 2, 23))
    """
    angles = _check_scan("scan_phantoms", geometry, angles, sigma)
    coefficients = jnp.asarray(coefficients)
    _checks.check_ndim("scan_phantoms", "amplitude", ellipses.amplitude, 2)
    num_clients = ellipses.amplitude.shape[0]
    _checks.check_shape("scan_phantoms", "coefficients", coefficients, (num_clients - 1,))
    _checks.check_floating("scan_phantoms", amplitude=ellipses.amplitude)
    for name, array in (("coefficients", coefficients), ("angles", angles)):
        if array.dtype != ellipses.amplitude.dtype:
            got, dtype = f"{name} of dtype {array.dtype}", ellipses.amplitude.dtype
            raise _checks.fail("scan_phantoms", got, f"the phantoms' dtype {dtype}")
    angles = _every_client("scan_phantoms", angles, num_clients)
    images, clean = _scan(geometry, _independent(ellipses), coefficients, angles)
    return _measure(images, clean, angles, coefficients, sigma, key)


def multimodal_scans(
    geometry: tomography.ParallelBeam,
    angles: Float[Array, " views"] | Float[Array, "clients views"],
    *,
    sigma: float | Array,
    key: Key[Array, ""],
) -> MultimodalScans:
    """Scan the four coupled images of `phantoms.reference_set` and add noise.

    `scan_phantoms`, where the manner of the scan is described, on that set.

    Args:
        geometry: Sizes of the scan; its image must be square. *Static.*
        angles: Viewing angles in radians, the same for all clients, shape (views,), or each
            client's own, shape (4, views). Their dtype is that of the result.
        sigma: Noise level relative to the largest clean value of a client, a scalar from 0; traced,
            and then its sign is not checked.
        key: Random key of the noise.

    Returns:
        The scans of N = 4 clients with c = (0.5, 0.3, 0.2).

    Raises:
        ValueError: If the image is not square, the angles are not floating or of another shape, or
            a concrete `sigma` is negative or NaN.

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
    angles = _check_scan("multimodal_scans", geometry, angles, sigma)
    angles = _every_client("multimodal_scans", angles, 4)
    ellipses = phantoms.reference_set(dtype=angles.dtype)
    coefficients = jnp.asarray([0.5, 0.3, 0.2], angles.dtype)
    return scan_phantoms(geometry, ellipses, coefficients, angles, sigma=sigma, key=key)


def multimodal_volumes(
    geometry: tomography.ParallelBeam,
    angles: Float[Array, " views"] | Float[Array, "clients views"],
    *,
    num_slices: int,
    coefficients: Float[Array, " coefficients"],
    sigma: float | Array,
    key: Key[Array, ""],
) -> MultimodalScans:
    """Draw coupled volumes, scan them slice by slice and add noise.

    The volumes are those of `ellipsoids.coupled_ellipsoids`, cut at `ellipsoids.heights`; every
    slice is scanned as in `scan_phantoms`, along the same angles. Noise of client i is ``sigma *
    max(clean_i) * N(0, 1)`` with the largest value of its whole volume.

    Args:
        geometry: Sizes of the scan of a slice; its image must be square. *Static.*
        angles: Viewing angles in radians, the same for all clients, shape (views,), or each
            client's own, shape (clients, views). Their dtype is that of the result.
        num_slices: Slices of a volume; *static*.
        coefficients: c_1 .. c_(N-1), shape (N - 1,), of the angles' dtype.
        sigma: Noise level relative to the largest clean value of a client, a scalar from 0; traced,
            and then its sign is not checked.
        key: Random key of the volumes and the noise.

    Returns:
        The scans of N clients: images (N, num_slices, n, n), sinograms (N, num_slices, views,
        bins).

    Raises:
        ValueError: If the image is not square, a shape, dtype or count does not fit, or a concrete
            `sigma` is negative or NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import synthetic, tomography
        >>> scans = synthetic.multimodal_volumes(
        ...     tomography.ParallelBeam(shape=(16, 16), num_bins=23),
        ...     synthetic.uniform_angles(5),
        ...     num_slices=3,
        ...     coefficients=jnp.array([0.6, 0.4]),
        ...     sigma=0.05,
        ...     key=jax.random.key(0),
        ... )
        >>> scans.images.shape, scans.sinograms.shape
        ((3, 3, 16, 16), (3, 3, 5, 23))
    """
    angles = _check_scan("multimodal_volumes", geometry, angles, sigma)
    _checks.check_count("multimodal_volumes", "num_slices", num_slices)
    coefficients = jnp.asarray(coefficients)
    _checks.check_ndim("multimodal_volumes", "coefficients", coefficients, 1)
    _checks.check_count("multimodal_volumes", "number of coefficients", coefficients.shape[0])
    if coefficients.dtype != angles.dtype:
        got = f"coefficients of dtype {coefficients.dtype}"
        raise _checks.fail("multimodal_volumes", got, f"the angles' dtype {angles.dtype}")
    angles = _every_client("multimodal_volumes", angles, coefficients.shape[0] + 1)
    volume_key, noise_key = jax.random.split(key)
    volumes = _independent(ellipsoids.coupled_ellipsoids(coefficients, key=volume_key))

    def scan_slice(height):
        ellipses = ellipsoids.cross_section(volumes, height)
        return _scan(geometry, ellipses, coefficients, angles)

    slices = jax.lax.map(scan_slice, ellipsoids.heights(num_slices, dtype=angles.dtype))
    images, clean = (jnp.moveaxis(stack, 0, 1) for stack in slices)
    return _measure(images, clean, angles, coefficients, sigma, noise_key)


def coupled_channels(
    image: Float[Array, "... channels"], weights: Float[Array, " channels"]
) -> tuple[Float[Array, "clients ..."], Float[Array, " channels"]]:
    """Make the images of coupled clients of the channels of one image.

    Client j < N has channel j, and the last one ``sum_j weights_j channel_j``, as the luminance of
    a photograph: real images that obey ``w_N = sum_{i<N} c_i w_i``.

    Args:
        image: Image with its channels last, e.g. (rows, columns, 3), float32 or float64.
        weights: Weight of every channel, shape (channels,). Those of the luminance are (.2126,
            .7152, .0722).

    Returns:
        The stack, shape (channels + 1, rows, columns), and the coefficients c = weights in the
        image's dtype, shape (channels,).

    Raises:
        ValueError: If the image is not floating or has no axis, or there are not as many weights as
            channels.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import synthetic
        >>> photograph = jnp.ones((4, 5, 3))
        >>> weights = jnp.array([0.2126, 0.7152, 0.0722])
        >>> stack, coefficients = synthetic.coupled_channels(photograph, weights)
        >>> stack.shape, round(float(stack[-1, 0, 0]), 4)
        ((4, 4, 5), 1.0)

    Reference:
        Recommendation ITU-R BT.709, section 3, for the weights of the luminance.
    """
    image = jnp.asarray(image)
    _checks.check_floating("coupled_channels", image=image)
    if image.ndim < 1:
        raise _checks.fail("coupled_channels", "image of shape ()", "a last axis of channels")
    coefficients = jnp.asarray(weights, image.dtype)
    _checks.check_shape("coupled_channels", "weights", coefficients, image.shape[-1:])
    channels = jnp.moveaxis(image, -1, 0)
    combined = jnp.tensordot(coefficients, channels, axes=1, precision="highest")
    return jnp.concatenate([channels, combined[None]]), coefficients
