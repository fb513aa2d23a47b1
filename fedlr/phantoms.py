"""Ellipse phantoms with closed-form sinograms, alone and in correlated multimodal sets.

A phantom lives in the square [-1, 1]^2, x to the right and y up. Rasterized on `size` pixels
across, column j has its centre at x = (j - (size-1)/2) / (size/2) and row i at
y = ((size-1)/2 - i) / (size/2): the grid of `tomography`, whose unit is one pixel. Sinograms are
line integrals in that unit too, so a rasterized phantom and its closed-form sinogram belong
together. The sum of ellipse phantoms is an ellipse phantom, so a linear combination of images has a
closed-form sinogram as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fedlr import _checks

__all__ = [
    "Ellipses",
    "append_combination",
    "combine",
    "couple",
    "coupled_phantoms",
    "modified_shepp_logan",
    "random_ellipses",
    "rasterize",
    "reference_set",
    "rings_and_discs",
    "shepp_logan",
    "sinogram",
]


class Ellipses(NamedTuple):
    """Ellipses that add up to a phantom, one entry per ellipse in every field.

    Attributes:
        amplitude: What an ellipse adds inside itself.
        semi_axis_a: Semi-axis along x before the rotation, in half widths of the square.
        semi_axis_b: Semi-axis along y before the rotation.
        center_x: Centre, positive to the right.
        center_y: Centre, positive upwards.
        rotation: Counter-clockwise rotation in radians.
    """

    amplitude: Float[Array, " ellipses"]
    semi_axis_a: Float[Array, " ellipses"]
    semi_axis_b: Float[Array, " ellipses"]
    center_x: Float[Array, " ellipses"]
    center_y: Float[Array, " ellipses"]
    rotation: Float[Array, " ellipses"]


class _Shapes(Protocol):
    """Named fields of shape (ellipses,), or with a leading axis of images, an amplitude first."""

    @property
    def amplitude(self) -> Array: ...
    def _replace(self, /, **fields: Any) -> Self: ...


Shapes = TypeVar("Shapes", bound=_Shapes)


# A, B, x0, y0, rotation in degrees; the amplitudes are the two functions' own.
_SHEPP_LOGAN_GEOMETRY = (
    (0.69, 0.92, 0.0, 0.0, 0.0),
    (0.6624, 0.874, 0.0, -0.0184, 0.0),
    (0.11, 0.31, 0.22, 0.0, -18.0),
    (0.16, 0.41, -0.22, 0.0, 18.0),
    (0.21, 0.25, 0.0, 0.35, 0.0),
    (0.046, 0.046, 0.0, 0.1, 0.0),
    (0.046, 0.046, 0.0, -0.1, 0.0),
    (0.046, 0.023, -0.08, -0.605, 0.0),
    (0.023, 0.023, 0.0, -0.606, 0.0),
    (0.023, 0.046, 0.06, -0.605, 0.0),
)

# The second image of the reference set: amplitude, A, B, x0, y0, rotation in degrees.
_REFERENCE_ELLIPSES = (
    (0.3, 0.69, 0.92, 0.0, 0.0, 0.0),
    (0.400038, 0.147666, 0.195137, -0.219834, -0.159867, 157.239620),
    (0.152106, 0.138547, 0.199414, -0.025652, -0.157574, 50.116610),
    (0.251948, 0.093409, 0.140910, 0.042798, 0.396400, 142.679145),
    (0.398872, 0.158675, 0.083062, -0.271830, 0.090032, 7.909561),
    (0.164272, 0.101787, 0.133241, 0.333734, 0.103381, 92.541176),
    (0.348749, 0.069702, 0.042359, -0.246078, 0.153626, 36.109210),
    (0.297815, 0.040448, 0.206010, -0.276431, -0.185921, 158.459788),
    (0.353916, 0.141658, 0.167943, 0.193417, -0.326804, 97.405888),
    (0.353109, 0.144561, 0.112253, 0.078547, -0.352599, 69.773724),
)
# Its largest value, where the ellipses 1, 3, 9 and 10 overlap.
_REFERENCE_MAXIMUM = 0.3 + 0.152106 + 0.353916 + 0.353109


def _check_dtype(function: str, dtype: DTypeLike) -> None:
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise _checks.fail(function, f"dtype {jnp.dtype(dtype)}", "float32 or float64")


def _from_rows(rows, dtype: DTypeLike) -> Ellipses:
    """Build ellipses from rows (amplitude, A, B, x0, y0, rotation in degrees)."""
    columns = np.array(rows, dtype=np.float64).T.copy()
    columns[-1] = np.deg2rad(columns[-1])
    return Ellipses(*(jnp.array(column, dtype=dtype) for column in columns))


def shepp_logan(*, dtype: DTypeLike = float) -> Ellipses:
    """Return the original Shepp-Logan head phantom (low contrast, largest value 1).

    The literature's tables differ in single entries; the fields of the result are the one used
    here, in the geometry that `modified_shepp_logan` shares.

    Args:
        dtype: float32 or float64; *static*. JAX's default float when left out.

    Returns:
        Ten ellipses.

    Raises:
        ValueError: If `dtype` is neither float32 nor float64.

    Reference:
        L. A. Shepp and B. F. Logan, "The Fourier reconstruction of a head section", IEEE
        Transactions on Nuclear Science 21(3), 1974.
    """
    _check_dtype("shepp_logan", dtype)
    amplitudes = (1.0, -0.98, -0.02, -0.02, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01)
    rows = [(a, *g) for a, g in zip(amplitudes, _SHEPP_LOGAN_GEOMETRY, strict=True)]
    return _from_rows(rows, dtype)


def modified_shepp_logan(*, dtype: DTypeLike = float) -> Ellipses:
    """Return the Shepp-Logan phantom in its high-contrast version (values from 0 to 1).

    The geometry is that of `shepp_logan`; the amplitudes are 1, -.8, -.2, -.2 and six times .1.

    Args:
        dtype: float32 or float64; *static*. JAX's default float when left out.

    Returns:
        Ten ellipses.

    Raises:
        ValueError: If `dtype` is neither float32 nor float64.

    Example:
        >>> from fedlr import phantoms
        >>> image = phantoms.rasterize(phantoms.modified_shepp_logan(), 64)
        >>> image.shape
        (64, 64)

    Reference:
        P. Toft, "The Radon transform: theory and implementation", PhD thesis, Technical University
        of Denmark, 1996, for the amplitudes.
    """
    _check_dtype("modified_shepp_logan", dtype)
    amplitudes = (1.0, -0.8, -0.2, -0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    rows = [(a, *g) for a, g in zip(amplitudes, _SHEPP_LOGAN_GEOMETRY, strict=True)]
    return _from_rows(rows, dtype)


def random_ellipses(num_inner: int, *, key: Key[Array, ""], dtype: DTypeLike = float) -> Ellipses:
    """Draw a head-like phantom: an outer ellipse of amplitude .3 and `num_inner` ones inside.

    Inner amplitudes are uniform in [.15, .55], semi-axes in [.04, .16] and [.04, .24], centres in
    [-.4, .4]^2, rotations in [0, pi).

    Args:
        num_inner: Number of inner ellipses; *static*.
        key: Random key.
        dtype: float32 or float64; *static*.

    Returns:
        ``1 + num_inner`` ellipses with non-negative amplitudes.

    Raises:
        ValueError: If `num_inner` is not an integer from 0, or `dtype` is neither float32 nor
            float64.

    Example:
        >>> import jax
        >>> from fedlr import phantoms
        >>> phantoms.random_ellipses(4, key=jax.random.key(0)).amplitude.shape
        (5,)
    """
    _checks.check_count("random_ellipses", "num_inner", num_inner, 0)
    _check_dtype("random_ellipses", dtype)
    draws = jax.random.uniform(key, (6, num_inner), dtype=dtype)
    inner = Ellipses(
        amplitude=0.15 + 0.4 * draws[0],
        semi_axis_a=0.04 + 0.12 * draws[1],
        semi_axis_b=0.04 + 0.2 * draws[2],
        center_x=-0.4 + 0.8 * draws[3],
        center_y=-0.4 + 0.8 * draws[4],
        rotation=jnp.pi * draws[5],
    )
    return _join(_from_rows([(0.3, 0.69, 0.92, 0.0, 0.0, 0.0)], inner.amplitude.dtype), inner)


def rings_and_discs(*, num_discs: int = 8, dtype: DTypeLike = float) -> Ellipses:
    """Return an elliptical ring, tilted by 15 degrees, with discs around it (values from 0 to 1).

    Ring: (.5; A .60, B .80) minus (.3; .45, .60), both rotated by 15 degrees. Disc m has amplitude
    .5, radius .09 and centre (.45 cos t, .6 sin t), t = 2 pi m / `num_discs`.

    Args:
        num_discs: Number of discs; *static*.
        dtype: float32 or float64; *static*.

    Returns:
        ``2 + num_discs`` ellipses.

    Raises:
        ValueError: If `num_discs` is not an integer from 0, or `dtype` is neither float32 nor
            float64.
    """
    _checks.check_count("rings_and_discs", "num_discs", num_discs, 0)
    _check_dtype("rings_and_discs", dtype)
    ring = [(0.5, 0.60, 0.80, 0.0, 0.0, 15.0), (-0.3, 0.45, 0.60, 0.0, 0.0, 15.0)]
    turns = 2.0 * np.pi * np.arange(num_discs) / max(num_discs, 1)
    discs = [(0.5, 0.09, 0.09, 0.45 * np.cos(t), 0.6 * np.sin(t), 0.0) for t in turns]
    return _from_rows(ring + discs, dtype)


def _join(*parts: Ellipses) -> Ellipses:
    """Put the ellipses of several phantoms into one phantom, their sum."""
    return jax.tree.map(lambda *fields: jnp.concatenate(fields), *parts)


def combine(phantoms: Shapes, coefficients: Float[Array, " images"]) -> Shapes:
    """Return the phantom of the linear combination sum_i c_i w_i.

    Args:
        phantoms: Images w_i, every field of shape (images, ellipses). `Ellipses`, or anything else
            with an amplitude, as `ellipsoids.Ellipsoids`.
        coefficients: Coefficients c_i, shape (images,), of the fields' dtype.

    Returns:
        ``images * ellipses`` ellipses with scaled amplitudes.

    Raises:
        ValueError: If the number of coefficients is not the number of images.
    """
    _checks.check_ndim("combine", "amplitude", phantoms.amplitude, 2)
    _checks.check_shape("combine", "coefficients", coefficients, phantoms.amplitude.shape[:1])
    scaled = phantoms._replace(amplitude=coefficients[:, None] * phantoms.amplitude)
    return jax.tree.map(jnp.ravel, scaled)


def append_combination(phantoms: Shapes, coefficients: Float[Array, " images"]) -> Shapes:
    """Append the combination w_N = sum_i c_i w_i to images w_1 .. w_(N-1).

    Args:
        phantoms: Images w_i as for `combine`, every field of shape (N - 1, ellipses).
        coefficients: Coefficients c_i, shape (N - 1,), of the fields' dtype.

    Returns:
        Fields of shape (N, (N - 1) * ellipses); the images w_i are padded with copies of their last
        ellipse that have amplitude zero.

    Raises:
        ValueError: If the number of coefficients is not the number of images, or an image has no
            ellipse.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import phantoms
        >>> draw = lambda key: phantoms.random_ellipses(4, key=key)
        >>> images = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2))
        >>> phantoms.append_combination(images, jnp.array([0.6, 0.4])).amplitude.shape
        (3, 10)
    """
    last = combine(phantoms, coefficients)
    num_ellipses = phantoms.amplitude.shape[1]
    if num_ellipses < 1:
        got = f"amplitude of shape {phantoms.amplitude.shape}"
        raise _checks.fail("append_combination", got, "at least one ellipse")
    missing = ((0, 0), (0, last.amplitude.shape[0] - num_ellipses))
    padded = jax.tree.map(lambda field: jnp.pad(field, missing, mode="edge"), phantoms)
    padded = padded._replace(amplitude=jnp.pad(phantoms.amplitude, missing))
    return jax.tree.map(lambda f, combined: jnp.concatenate([f, combined[None]]), padded, last)


def reference_set(*, dtype: DTypeLike = float) -> Ellipses:
    """Return the reference multimodal set of four images tied by w_4 = .5 w_1 + .3 w_2 + .2 w_3.

    w_1 is the modified Shepp-Logan phantom, w_2 nine fixed ellipses in the same head, w_3
    `rings_and_discs`; each has largest value 1 and no negative value, so nothing is clipped and w_4
    is an ellipse phantom too. Point-sampled on 100 x 100 pixels in float64
    (``rasterize(..., 100, subsamples=1)``) the sums are 1231.80, 1586.41, 1499.10, 1391.64, the
    Frobenius norms 24.670, 24.753, 28.245, 21.314 and the largest values 1, 1, 1, .5776.

    Args:
        dtype: float32 or float64; *static*.

    Returns:
        Ellipses with fields of shape (4, 30); the first three images are padded with ellipses of
        amplitude zero. Map over the leading axis with `jax.vmap`.

    Raises:
        ValueError: If `dtype` is neither float32 nor float64.

    Example:
        >>> import jax
        >>> from fedlr import phantoms
        >>> images = jax.vmap(lambda e: phantoms.rasterize(e, 32))(phantoms.reference_set())
        >>> images.shape
        (4, 32, 32)
    """
    _check_dtype("reference_set", dtype)
    ellipses = [(row[0] / _REFERENCE_MAXIMUM, *row[1:]) for row in _REFERENCE_ELLIPSES]
    images = (modified_shepp_logan(dtype=dtype), _from_rows(ellipses, dtype))
    stacked = jax.tree.map(lambda *f: jnp.stack(f), *images, rings_and_discs(dtype=dtype))
    return append_combination(stacked, jnp.array([0.5, 0.3, 0.2], dtype=dtype))


def couple(
    images: Shapes,
    coefficients: Float[Array, " images"],
    largest_value: Callable[[Any], Float[Array, ""]],
    *,
    common: float = 1.0,
) -> Shapes:
    """Make a multimodal set w_1 .. w_N of images that were drawn independently.

    Three steps: of the ellipses after the first, which always does, a fraction `common` gets the
    geometry it has in the first image, keeping each image's own amplitudes; every image is divided
    by its largest value; the combination w_N = sum_i c_i w_i is appended.

    Args:
        images: Images as for `combine`, every field of shape (N - 1, ellipses).
        coefficients: c_1 .. c_(N-1), shape (N - 1,), of the fields' dtype.
        largest_value: Function of one image, fields of shape (ellipses,), that returns its largest
            value, a positive scalar; *static*.
        common: Fraction of ellipses with common geometry, from 0 to 1; *static*.

    Returns:
        Fields of shape (N, (N - 1) * ellipses).

    Raises:
        ValueError: If `common` is not within 0 and 1, or the number of coefficients is not the
            number of images.
    """
    _checks.check_ndim("couple", "amplitude", images.amplitude, 2)
    _checks.check_shape("couple", "coefficients", coefficients, images.amplitude.shape[:1])
    _checks.check_fraction("couple", "common", common)
    num_ellipses = images.amplitude.shape[1]
    shared = jnp.arange(num_ellipses) < 1 + round(common * (num_ellipses - 1))
    aligned = jax.tree.map(lambda field: jnp.where(shared[None, :], field[:1], field), images)
    aligned = aligned._replace(amplitude=images.amplitude)
    peaks = jax.vmap(largest_value)(aligned)
    scaled = aligned._replace(amplitude=aligned.amplitude / peaks[:, None])
    return append_combination(scaled, coefficients)


def coupled_phantoms(
    coefficients: Float[Array, " images"],
    *,
    num_inner: int = 9,
    common: float = 1.0,
    key: Key[Array, ""],
) -> Ellipses:
    """Draw a multimodal set w_1 .. w_(N-1) and its combination w_N = sum_i c_i w_i.

    All images share the outer ellipse of `random_ellipses`. Of the inner ellipses a fraction
    `common` has one geometry in all images, with each image's own amplitudes: at 1 all modalities
    have the same edges, at 0 they are unrelated. Every w_i with i < N is divided by its largest
    value on 128 x 128 points and no amplitude is negative, so nothing needs clipping.

    Args:
        coefficients: c_1 .. c_(N-1), shape (N - 1,); their dtype is the result's.
        num_inner: Inner ellipses per image; *static*.
        common: Fraction of inner ellipses with common geometry, from 0 to 1; *static*.
        key: Random key.

    Returns:
        Ellipses with fields of shape (N, (N - 1) * (1 + num_inner)).

    Raises:
        ValueError: If `common` is not within 0 and 1, `num_inner` not an integer from 0, or
            `coefficients` not a floating vector of at least one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import phantoms
        >>> clients = phantoms.coupled_phantoms(jnp.array([0.6, 0.4]), key=jax.random.key(0))
        >>> clients.amplitude.shape
        (3, 20)
    """
    coefficients = jnp.asarray(coefficients)
    _checks.check_floating("coupled_phantoms", coefficients=coefficients)
    _checks.check_ndim("coupled_phantoms", "coefficients", coefficients, 1)
    _checks.check_count("coupled_phantoms", "number of coefficients", coefficients.shape[0])
    _checks.check_count("coupled_phantoms", "num_inner", num_inner, 0)
    _checks.check_fraction("coupled_phantoms", "common", common)

    def draw(key):
        return random_ellipses(num_inner, key=key, dtype=coefficients.dtype)

    def largest_value(image):
        return rasterize(image, 128, subsamples=1).max()

    images = jax.vmap(draw)(jax.random.split(key, coefficients.shape[0]))
    return couple(images, coefficients, largest_value, common=common)


def _centers(size: int, dtype: DTypeLike) -> Float[Array, " size"]:
    """Pixel centres across the square, in half widths."""
    return (jnp.arange(size, dtype=dtype) - (size - 1) / 2) / (size / 2)


def rasterize(ellipses: Ellipses, size: int, *, subsamples: int = 8) -> Float[Array, "size size"]:
    """Sample ellipses on a square image, averaging `subsamples` x `subsamples` points per pixel.

    An ellipse adds its amplitude where
    ((dx cos p + dy sin p)/A)^2 + ((-dx sin p + dy cos p)/B)^2 <= 1, with dx = x - x0, dy = y - y0
    and p its rotation.

    Args:
        ellipses: Fields of shape (ellipses,).
        size: Pixels across; *static*.
        subsamples: Points per pixel and axis; *static*. 1 samples the pixel's centre.

    Returns:
        Image of shape (size, size) in the dtype of the ellipses; row 0 is the top.

    Raises:
        ValueError: If `size` or `subsamples` is not a positive integer, or the ellipses are not
            floating.
    """
    _checks.check_floating("rasterize", amplitude=ellipses.amplitude)
    _checks.check_ndim("rasterize", "amplitude", ellipses.amplitude, 1)
    _checks.check_count("rasterize", "size", size)
    _checks.check_count("rasterize", "subsamples", subsamples)
    dtype = ellipses.amplitude.dtype
    centers = _centers(size, dtype)
    offsets = _centers(subsamples, dtype) / size
    shift_x, shift_y = (grid.ravel() for grid in jnp.meshgrid(offsets, offsets))

    def add_ellipse(image, ellipse):
        cos, sin = jnp.cos(ellipse.rotation), jnp.sin(ellipse.rotation)

        def coverage(shift):
            x = (centers + shift[0] - ellipse.center_x)[None, :]
            y = (-centers + shift[1] - ellipse.center_y)[:, None]
            along_a = (x * cos + y * sin) / ellipse.semi_axis_a
            along_b = (y * cos - x * sin) / ellipse.semi_axis_b
            return (along_a**2 + along_b**2 <= 1).astype(dtype)

        inside = jax.lax.map(coverage, (shift_x, shift_y), batch_size=subsamples).mean(0)
        return image + ellipse.amplitude * inside, None

    return jax.lax.scan(add_ellipse, jnp.zeros((size, size), dtype), ellipses)[0]


def _bin_points(num_bins: int, size: int, samples: int, dtype: DTypeLike) -> Array:
    """Detector coordinates of the points of every bin in half widths, (num_bins, samples)."""
    bins = jnp.arange(num_bins, dtype=dtype) - (num_bins - 1) / 2
    points = _centers(samples, dtype) / 2
    return (bins[:, None] + points[None, :]) / (size / 2)


def sinogram(
    ellipses: Ellipses,
    angles: Float[Array, " angles"],
    num_bins: int,
    size: int,
    *,
    samples: int = 16,
) -> Float[Array, "angles num_bins"]:
    """Compute the parallel-beam sinogram of ellipses in closed form.

    With t the detector coordinate in half widths, alpha the angle minus the ellipse's rotation,
    rho^2 = A^2 cos^2 alpha + B^2 sin^2 alpha and s = t - (x0 cos theta + y0 sin theta), an ellipse
    contributes (size/2) 2 a A B sqrt(max(rho^2 - s^2, 0)) / rho^2. Bins have the width of a pixel
    and bin b its centre at t = (b - (num_bins-1)/2) / (size/2), as in `tomography.project`.

    Args:
        ellipses: Fields of shape (ellipses,).
        angles: Viewing angles theta in radians, shape (num_angles,), of the ellipses' dtype.
        num_bins: Detector bins; *static*.
        size: Pixels across the square, which sets the unit; *static*.
        samples: Points averaged per bin; *static*. 1 takes the line through the bin's centre.

    Returns:
        Sinogram of shape (num_angles, num_bins) in pixel units. Its gradient is finite everywhere.

    Raises:
        ValueError: If the dtypes differ or are not floating, `angles` is not a vector, or a count
            is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import phantoms
        >>> angles = jnp.linspace(0.0, jnp.pi, 5, endpoint=False)
        >>> phantoms.sinogram(phantoms.modified_shepp_logan(), angles, 46, 32).shape
        (5, 46)
    """
    angles = jnp.asarray(angles)
    dtype = ellipses.amplitude.dtype
    _checks.check_floating("sinogram", amplitude=ellipses.amplitude, angles=angles)
    _checks.check_ndim("sinogram", "angles", angles, 1)
    _checks.check_ndim("sinogram", "amplitude", ellipses.amplitude, 1)
    if angles.dtype != dtype:
        got, expected = f"angles of dtype {angles.dtype}", f"the phantom's dtype {dtype}"
        raise _checks.fail("sinogram", got, expected)
    for name, count in (("num_bins", num_bins), ("size", size), ("samples", samples)):
        _checks.check_count("sinogram", name, count)
    points = _bin_points(num_bins, size, samples, angles.dtype)

    def add_ellipse(total, ellipse):
        alpha = angles - ellipse.rotation
        rho2 = (ellipse.semi_axis_a * jnp.cos(alpha)) ** 2
        rho2 = (rho2 + (ellipse.semi_axis_b * jnp.sin(alpha)) ** 2)[:, None, None]
        center = ellipse.center_x * jnp.cos(angles) + ellipse.center_y * jnp.sin(angles)
        chord2 = rho2 - (points[None] - center[:, None, None]) ** 2
        inside = chord2 > 0
        chord = jnp.where(inside, jnp.sqrt(jnp.where(inside, chord2, 1)), 0)
        height = size * ellipse.amplitude * ellipse.semi_axis_a * ellipse.semi_axis_b
        return total + height * (chord / rho2).mean(-1), None

    zeros = jnp.zeros((angles.shape[0], num_bins), angles.dtype)
    return jax.lax.scan(add_ellipse, zeros, ellipses)[0]
