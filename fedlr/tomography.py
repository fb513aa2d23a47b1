"""Parallel-beam tomography in 2-D: projector, exact transpose, filtered backprojection, noise.

Image of shape (rows, columns) with unit pixels: column j at X = j - (columns-1)/2 (right), row i at
Y = (rows-1)/2 - i (up). Angle theta in radians, detector coordinate t = X cos theta + Y sin theta,
bin b at t = b - (num_bins-1)/2 with unit pitch. A sinogram holds line integrals in pixel units, one
row per view. Functions take one image; `jax.vmap` makes slices, clients and seeds, with angles
shared or each client's own. Missing views are the caller's: multiply the sinogram by a 0/1 mask.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from fedlr import _checks, _joseph

__all__ = ["ParallelBeam", "backproject", "project"]


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


def _batch_last(kernel):
    """Give `kernel(geometry, stack, angles)` a vmap rule.

    `stack` is (groups, ..., batch) and `angles` (groups, views). Mapping over arrays with common
    angles makes the batch longer, so that one computation of positions serves all; mapping over
    angles makes more groups.
    """
    kernel = custom_vmap(kernel)

    @kernel.def_vmap
    def _rule(axis_size, in_batched, geometry, stack, angles):
        _, stack_batched, angles_batched = in_batched
        if not angles_batched:
            *outer, batch = stack.shape[1:]
            folded = jnp.moveaxis(stack, 0, -2).reshape(*outer, axis_size * batch)
            result = kernel(geometry, folded, angles)
            result = result.reshape(*result.shape[:-1], axis_size, batch)
            return jnp.moveaxis(result, -2, 0), True
        if not stack_batched:
            stack = jnp.broadcast_to(stack, (axis_size, *stack.shape))
        groups = stack.shape[1]
        result = kernel(
            geometry,
            stack.reshape(axis_size * groups, *stack.shape[2:]),
            angles.reshape(axis_size * groups, *angles.shape[2:]),
        )
        return result.reshape(axis_size, groups, *result.shape[1:]), True

    return kernel


@_batch_last
def _joseph_project(geometry, images, angles):
    return _joseph.project(images, angles, geometry.num_bins, geometry.chunk)


@_batch_last
def _joseph_backproject(geometry, sinograms, angles):
    length = _joseph.lengths(angles)
    return _joseph.backproject(sinograms, angles, length, geometry.shape, geometry.chunk)


def _one(kernel, geometry, array, angles):
    """Call a kernel for stacks with one array."""
    return kernel(geometry, array[None, ..., None], angles[None])[0, ..., 0]


def _joseph_definition(geometry, image, angles):
    """Project view by view, differentiably in the angles and with little memory."""

    @jax.checkpoint
    def view(angle):
        return _joseph.project_view(image, angle, geometry.num_bins)

    return jax.lax.map(view, angles)


def _with_transpose(forward, transpose, definition, image, views):
    """Compute y = A x such that JAX knows A's transpose and the derivative of A.

    (x, y) solves the unit triangular system (x, y - A x) = (x, 0), whose solution and transposed
    solution cost one forward and one transposed projection. JAX derives jvp, vjp, transpose and
    vmap from these, and takes the derivative of A in its parameters from `definition`. The unknowns
    are one vector, so that they are transposed together; the compiler removes the joining.
    """
    sizes = image.size, math.prod(views)

    def split(vector):
        return vector[: sizes[0]].reshape(image.shape), vector[sizes[0] :].reshape(views)

    def join(x, y):
        return jnp.concatenate([x.ravel(), y.ravel()])

    def system(unknown):
        x, y = split(unknown)
        return join(x, y - definition(x))

    def solve(_, right_side):
        x, y = split(right_side)
        return join(x, y + forward(x))

    def solve_transposed(_, right_side):
        x, y = split(right_side)
        return join(x + transpose(y), y)

    right_side = jnp.pad(image.ravel(), (0, sizes[1]))
    return split(jax.lax.custom_linear_solve(system, right_side, solve, solve_transposed))[1]


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
    return _with_transpose(
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
