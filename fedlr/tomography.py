"""Parallel-beam tomography in 2-D: projector, exact transpose and filtered backprojection.

Image of shape (rows, columns) with unit pixels: column j at X = j - (columns-1)/2 (right), row i at
Y = (rows-1)/2 - i (up). Angle theta in radians, detector coordinate t = X cos theta + Y sin theta,
bin b at t = b - (num_bins-1)/2 with unit pitch. A sinogram holds line integrals in pixel units, one
row per view. Functions take one image; `jax.vmap` makes slices, clients and seeds, with angles
shared or each client's own. Missing views are the caller's: multiply the sinogram by a 0/1 mask.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedlr import _checks, _fourier, _joseph, _transpose

__all__ = [
    "ParallelBeam",
    "backproject",
    "filtered_backprojection",
    "fourier_project",
    "hann",
    "interpolating_backproject",
    "project",
    "project_volume",
    "rectangular",
    "stack_slices",
]


class ParallelBeam(eqx.Module):
    """Sizes of a parallel-beam scan, all *static*; an instance is a pytree without leaves.

    Attributes:
        shape: Rows and columns of the image.
        num_bins: Detector bins of unit pitch.
        chunk: How many image lines (forward) or views (transpose) a step of the loop sums. 1 is the
            fastest on a CPU; larger values give an accelerator more work per step. It does not
            change the result.
    """

    shape: tuple[int, int] = eqx.field(static=True)
    num_bins: int = eqx.field(static=True)
    chunk: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        """Refuse sizes that are not positive integers."""
        if not isinstance(self.shape, tuple) or len(self.shape) != 2:
            raise _checks.fail("ParallelBeam", f"shape {self.shape!r}", "a tuple (rows, columns)")
        for name, sizes in (
            ("shape", self.shape),
            ("num_bins", (self.num_bins,)),
            ("chunk", (self.chunk,)),
        ):
            if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
                raise _checks.fail("ParallelBeam", f"{name} {sizes}", "integers of at least 1")


@_transpose.batch_last
def _joseph_project(geometry, images, angles):
    return _joseph.project(images, angles, geometry.num_bins, geometry.chunk)


@_transpose.batch_last
def _joseph_backproject(geometry, sinograms, angles):
    return _joseph.backproject(sinograms, angles, geometry.shape, geometry.chunk)


@_transpose.batch_last
def _fourier_project(geometry, images, angles):
    return _fourier.project(images, angles, geometry.num_bins)


@_transpose.batch_last
def _fourier_backproject(geometry, sinograms, angles):
    groups, _, _, batch = sinograms.shape
    images = jax.ShapeDtypeStruct((groups, *geometry.shape, batch), sinograms.dtype)

    def forward(x):
        return _fourier.project(x, angles, geometry.num_bins)

    return jax.linear_transpose(forward, images)(sinograms)[0]


@_transpose.batch_last
def _interpolating_backproject(geometry, sinograms, angles):
    return _joseph.interpolate(sinograms, angles, geometry.shape, geometry.chunk)


@_transpose.batch_last
def _interpolating_transpose(geometry, images, angles):
    groups, *_, batch = images.shape
    shape = (groups, angles.shape[1], geometry.num_bins, batch)

    def forward(x):
        return _joseph.interpolate(x, angles, geometry.shape, geometry.chunk)

    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(shape, images.dtype))(images)[0]


def _one(kernel, geometry, array, angles):
    """Call a kernel for stacks with one array."""
    return kernel(geometry, array[None, ..., None], angles[None])[0, ..., 0]


def _joseph_definition(geometry, image, angles):
    """Project view by view, differentiably in the angles and with little memory."""

    @jax.checkpoint
    def view(angle):
        return _joseph.project_view(image, angle, geometry.num_bins)

    return jax.lax.map(view, angles)


def _interpolating_definition(geometry, sinogram, angles):
    """Sum view by view, differentiably in the angles and with little memory."""

    @jax.checkpoint
    def interpolate(view, angle):
        return _joseph.interpolate_view(view, angle, geometry.shape)

    def add_view(total, view):
        return total + interpolate(*view), None

    zeros = jnp.zeros(geometry.shape, sinogram.dtype)
    return jax.lax.scan(add_view, zeros, (sinogram, angles))[0]


def _check(function, name, array, shape, angles):
    _checks.check_floating(function, **{name: array, "angles": angles})
    _checks.check_ndim(function, "angles", angles, 1)
    if angles.dtype != array.dtype:
        got, expected = f"angles of dtype {angles.dtype}", f"the {name}'s dtype {array.dtype}"
        raise _checks.fail(function, got, expected)
    _checks.check_shape(function, name, array, shape)


def project(
    geometry: ParallelBeam, image: Float[Array, "rows columns"], angles: Float[Array, " angles"]
) -> Float[Array, "angles num_bins"]:
    """Project an image along every angle with linear interpolation (Joseph's method).

    With c = cos theta, s = sin theta, p the one of larger modulus, a ray meets row k at
    X = (t + k s)/c if p = c and column k at Y = (t - k c)/s if p = s; the sum of the linearly
    interpolated values over all rows or columns is divided by |p|. The image is zero outside.

    Linear in `image`. The transpose is `backproject`, also for `jax.grad` and
    `jax.linear_transpose`: no scatter is generated. The derivative in the angles is that of the
    interpolation, finite everywhere and right where no ray passes through a pixel's centre line.

    Args:
        geometry: Sizes; *static*.
        image: Image, shape `geometry.shape`, float32 or float64.
        angles: Viewing angles in radians, shape (num_angles,), of the image's dtype; traced.

    Returns:
        Sinogram of shape (num_angles, num_bins) in pixel units.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tomography
        >>> geometry = tomography.ParallelBeam(shape=(4, 4), num_bins=4)
        >>> sinogram = tomography.project(geometry, jnp.ones((4, 4)), jnp.zeros(1))
        >>> [float(value) for value in sinogram[0]]
        [4.0, 4.0, 4.0, 4.0]

    Reference:
        P. M. Joseph, "An improved algorithm for reprojecting rays through pixel images", IEEE
        Transactions on Medical Imaging 1(3), 1982.
    """
    image, angles = jnp.asarray(image), jnp.asarray(angles)
    _check("project", "image", image, geometry.shape, angles)
    return _transpose.with_transpose(
        lambda x: _one(_joseph_project, geometry, x, angles),
        lambda y: _one(_joseph_backproject, geometry, y, angles),
        lambda x: _joseph_definition(geometry, x, angles),
        image,
        (angles.shape[0], geometry.num_bins),
    )


def backproject(
    geometry: ParallelBeam,
    sinogram: Float[Array, "angles num_bins"],
    angles: Float[Array, " angles"],
) -> Float[Array, "rows columns"]:
    """Apply the exact transpose of `project`.

    Args:
        geometry: Sizes; *static*.
        sinogram: Sinogram, shape (num_angles, num_bins), float32 or float64.
        angles: Viewing angles in radians, shape (num_angles,), of the sinogram's dtype; traced.

    Returns:
        Image of shape `geometry.shape`: <project(x), y> = <x, backproject(y)>.

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    sinogram, angles = jnp.asarray(sinogram), jnp.asarray(angles)
    _check("backproject", "sinogram", sinogram, (angles.size, geometry.num_bins), angles)
    image = jax.ShapeDtypeStruct(geometry.shape, sinogram.dtype)
    (result,) = jax.linear_transpose(lambda x: project(geometry, x, angles), image)(sinogram)
    return result


def stack_slices(
    slices: Sequence[Float[Array, "rows columns"]],
) -> Float[Array, "slices rows columns"]:
    """Stack the slices of a volume.

    Args:
        slices: At least one 2-D slice, all of one shape and dtype.

    Returns:
        Volume of shape (slices, rows, columns).

    Raises:
        ValueError: If there is no slice, the first is not 2-D, or another differs from it in shape
            or dtype; the message names the first that does.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tomography
        >>> tomography.stack_slices([jnp.ones((3, 4)), jnp.zeros((3, 4))]).shape
        (2, 3, 4)
    """
    arrays = [jnp.asarray(array) for array in slices]
    if not arrays:
        raise _checks.fail("stack_slices", "no slices", "at least 1")
    shape, dtype = arrays[0].shape, arrays[0].dtype
    _checks.check_ndim("stack_slices", "slice 0", arrays[0], 2)
    for number, array in enumerate(arrays):
        _checks.check_shape("stack_slices", f"slice {number}", array, shape)
        if array.dtype != dtype:
            raise _checks.fail("stack_slices", f"slice {number} of dtype {array.dtype}", f"{dtype}")
    return jnp.stack(arrays)


def project_volume(
    geometry: ParallelBeam,
    volume: Float[Array, "slices rows columns"] | Sequence[Float[Array, "rows columns"]],
    angles: Float[Array, " angles"],
) -> Float[Array, "slices angles num_bins"]:
    """Project a volume slice by slice, the rotation axis being the first: `project` of every slice.

    Positions are computed once for all slices. The transpose is `backproject` of every slice.

    Args:
        geometry: Sizes of one slice; *static*.
        volume: Volume, shape (slices, *geometry.shape), float32 or float64; a list or tuple of
            slices goes through `stack_slices`.
        angles: Viewing angles in radians, shape (num_angles,), of the volume's dtype; traced.

    Returns:
        Sinograms of shape (slices, num_angles, num_bins) in pixel units.

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    volume = stack_slices(volume) if isinstance(volume, (list, tuple)) else jnp.asarray(volume)
    angles = jnp.asarray(angles)
    _checks.check_ndim("project_volume", "volume", volume, 3)
    _check("project_volume", "volume", volume, (volume.shape[0], *geometry.shape), angles)
    return jax.vmap(lambda image: project(geometry, image, angles))(volume)


def fourier_project(
    geometry: ParallelBeam, image: Float[Array, "rows columns"], angles: Float[Array, " angles"]
) -> Float[Array, "angles num_bins"]:
    """Project an image along every angle by the Fourier slice theorem.

    A second model of the scan, independent of `project`: pixels are sinc functions. It serves to
    make data that are not the reconstruction's own, and it is the more accurate one on smooth
    images. Linear in `image`; `jax.linear_transpose`, `jax.vjp`, `jax.jvp` and `jax.vmap` work, and
    the derivative in the angles is finite.

    Args:
        geometry: Sizes; *static*. `chunk` has no meaning here.
        image: Image, shape `geometry.shape`, float32 or float64.
        angles: Viewing angles in radians, shape (num_angles,), of the image's dtype; traced.

    Returns:
        Sinogram of shape (num_angles, num_bins) in pixel units.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Reference:
        A. H. Barnett, J. Magland and L. af Klinteberg, "A parallel nonuniform fast Fourier
        transform library based on an exponential of semicircle kernel", SIAM Journal on Scientific
        Computing 41(5), 2019, eq. (1.8), for the interpolation.
    """
    image, angles = jnp.asarray(image), jnp.asarray(angles)
    _check("fourier_project", "image", image, geometry.shape, angles)
    return _transpose.with_transpose(
        lambda x: _one(_fourier_project, geometry, x, angles),
        lambda y: _one(_fourier_backproject, geometry, y, angles),
        lambda x: _one(lambda g, s, a: _fourier.project(s, a, g.num_bins), geometry, x, angles),
        image,
        (angles.shape[0], geometry.num_bins),
    )


def interpolating_backproject(
    geometry: ParallelBeam,
    sinogram: Float[Array, "angles num_bins"],
    angles: Float[Array, " angles"],
) -> Float[Array, "rows columns"]:
    """Sum over the views the sinogram's linear interpolation at every pixel's centre.

    The back-projector of filtered backprojection; no projector's transpose. Off the detector a view
    counts as zero. Linear in `sinogram`, with the derivatives of `project`; its transpose is the
    forward computation transposed, which spreads pixels over bins by a scatter and is slower.

    Args:
        geometry: Sizes; *static*.
        sinogram: Sinogram, shape (num_angles, num_bins), float32 or float64.
        angles: Viewing angles in radians, shape (num_angles,), of the sinogram's dtype; traced.

    Returns:
        Image of shape `geometry.shape`.

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    sinogram, angles = jnp.asarray(sinogram), jnp.asarray(angles)
    shape = (angles.size, geometry.num_bins)
    _check("interpolating_backproject", "sinogram", sinogram, shape, angles)
    return _transpose.with_transpose(
        lambda x: _one(_interpolating_backproject, geometry, x, angles),
        lambda y: _one(_interpolating_transpose, geometry, y, angles),
        lambda x: _interpolating_definition(geometry, x, angles),
        sinogram,
        geometry.shape,
    )


def rectangular(frequencies: Float[Array, " frequencies"]) -> Float[Array, " frequencies"]:
    """Leave the ramp filter as it is.

    Args:
        frequencies: Cycles per bin, from 0 to 1/2.

    Returns:
        Ones.
    """
    return jnp.ones_like(frequencies)


def hann(frequencies: Float[Array, " frequencies"]) -> Float[Array, " frequencies"]:
    """Damp the ramp filter by the Hann window .5 + .5 cos(2 pi f).

    Args:
        frequencies: Cycles per bin f, from 0 to 1/2.

    Returns:
        Factors from 1 at f = 0 to 0 at f = 1/2.
    """
    return 0.5 + 0.5 * jnp.cos(2 * jnp.pi * frequencies)


def filtered_backprojection(
    geometry: ParallelBeam,
    sinogram: Float[Array, "angles num_bins"],
    angles: Float[Array, " angles"],
    *,
    window: Callable[[Array], Array] = rectangular,
    backprojector: Callable[[ParallelBeam, Array, Array], Array] = interpolating_backproject,
) -> Float[Array, "rows columns"]:
    """Reconstruct an image by filtered backprojection, with the ramp filter by default.

    Views are padded with zeros to max(64, the power of two from 2 num_bins on) and convolved with
    h(0) = 1/4, h(k odd) = -1/(pi k)^2, h(k even) = 0: a ramp without the bias at frequency zero
    that sampling |f| would have. The result is pi/num_angles times the back-projection, which is
    right for angles spread evenly over half a turn.

    Args:
        geometry: Sizes; *static*.
        sinogram: Sinogram, shape (num_angles, num_bins), float32 or float64.
        angles: Viewing angles in radians, shape (num_angles,), of the sinogram's dtype; traced.
        window: Function of the frequencies in cycles per bin which multiplies the ramp:
            `rectangular`, `hann` or one's own; *static*.
        backprojector: `interpolating_backproject`, or `backproject` for the transpose; *static*.

    Returns:
        Image of shape `geometry.shape`.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import phantoms, tomography
        >>> angles = jnp.linspace(0.0, jnp.pi, 60, endpoint=False)
        >>> disc = phantoms.rings_and_discs(num_discs=0)
        >>> geometry = tomography.ParallelBeam(shape=(64, 64), num_bins=92)
        >>> sinogram = phantoms.sinogram(disc, angles, 92, 64)
        >>> image = tomography.filtered_backprojection(geometry, sinogram, angles)
        >>> print(f"{float(image[32, 32]):.1f}")
        0.2

    Reference:
        A. C. Kak and M. Slaney, "Principles of computerized tomographic imaging", 1988, eq. (61) of
        chapter 3.
    """
    sinogram, angles = jnp.asarray(sinogram), jnp.asarray(angles)
    shape = (angles.size, geometry.num_bins)
    _check("filtered_backprojection", "sinogram", sinogram, shape, angles)
    length = max(64, 2 ** (2 * geometry.num_bins - 1).bit_length())
    lag = np.minimum(np.arange(length), length - np.arange(length))
    ramp = np.where(lag % 2 == 1, -1 / (np.pi * np.maximum(lag, 1)) ** 2, 0.0)
    ramp[0] = 0.25
    response = jnp.asarray(np.fft.rfft(ramp).real, sinogram.dtype)
    response = response * window(jnp.asarray(np.fft.rfftfreq(length), sinogram.dtype))
    spectrum = jnp.fft.rfft(sinogram, length, axis=1)
    filtered = jnp.fft.irfft(spectrum * response[None, :].astype(spectrum.dtype), length, axis=1)
    image = backprojector(geometry, filtered[:, : geometry.num_bins], angles)
    return jnp.pi / angles.size * image
