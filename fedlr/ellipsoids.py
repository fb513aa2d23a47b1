"""Ellipsoid phantoms of volumes, whose slices are ellipse phantoms in closed form.

A phantom lives in the cube [-1, 1]^3: a slice is a plane of constant height z in the coordinates x
and y of `phantoms`. `cross_section` gives its ellipses, so `phantoms.rasterize` and
`phantoms.sinogram` serve for every slice, and `jax.vmap` over `heights` makes the volume. A slice
is infinitely thin.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fedlr import _checks, phantoms

__all__ = ["Ellipsoids", "coupled_ellipsoids", "cross_section", "heights", "random_ellipsoids"]

# The outer ellipsoid along z; along x and y it is that of `phantoms.random_ellipses`.
_OUTER_SEMI_AXIS_C = 0.81


class Ellipsoids(NamedTuple):
    """Ellipsoids that add up to a phantom, one entry per ellipsoid in every field.

    Attributes:
        amplitude: What an ellipsoid adds inside itself.
        semi_axis_a: Semi-axis along x before the rotation, in half widths of the cube.
        semi_axis_b: Semi-axis along y before the rotation.
        semi_axis_c: Semi-axis along z.
        center_x: Centre, positive to the right.
        center_y: Centre, positive upwards in a slice.
        center_z: Centre, positive towards the last slice.
        rotation: Counter-clockwise rotation about z in radians.
    """

    amplitude: Float[Array, " ellipsoids"]
    semi_axis_a: Float[Array, " ellipsoids"]
    semi_axis_b: Float[Array, " ellipsoids"]
    semi_axis_c: Float[Array, " ellipsoids"]
    center_x: Float[Array, " ellipsoids"]
    center_y: Float[Array, " ellipsoids"]
    center_z: Float[Array, " ellipsoids"]
    rotation: Float[Array, " ellipsoids"]


def heights(num_slices: int, *, dtype: DTypeLike = float) -> Float[Array, " slices"]:
    """Return the heights of the centres of slices that fill [-1, 1].

    Args:
        num_slices: Number of slices; *static*.
        dtype: float32 or float64; *static*. JAX's default float when left out.

    Returns:
        ``(k - (num_slices - 1)/2) / (num_slices/2)`` for k = 0 .. num_slices - 1.

    Raises:
        ValueError: If `num_slices` is not a positive integer.

    Example:
        >>> from fedlr import ellipsoids
        >>> ellipsoids.heights(4).tolist()
        [-0.75, -0.25, 0.25, 0.75]
    """
    _checks.check_count("heights", "num_slices", num_slices)
    return (jnp.arange(num_slices, dtype=dtype) - (num_slices - 1) / 2) / (num_slices / 2)


def cross_section(ellipsoids: Ellipsoids, height: float | Float[Array, ""]) -> phantoms.Ellipses:
    """Cut a phantom by the plane at a height.

    The plane at z meets an ellipsoid in an ellipse of the same centre and rotation whose semi-axes
    are those along x and y times sqrt(1 - ((z - z0)/C)^2).

    Args:
        ellipsoids: Fields of shape (ellipsoids,), or any other.
        height: Height z of the plane, scalar; traced.

    Returns:
        Ellipses of the shape of the fields. One that the plane misses has amplitude zero, and its
        ellipsoid's own semi-axes. The derivatives are finite everywhere.

    Raises:
        ValueError: If the ellipsoids are not floating or the height is no scalar.

    Example:
        >>> import jax
        >>> from fedlr import ellipsoids, phantoms
        >>> head = ellipsoids.random_ellipsoids(4, key=jax.random.key(0))
        >>> draw = lambda z: phantoms.rasterize(ellipsoids.cross_section(head, z), 16)
        >>> jax.vmap(draw)(ellipsoids.heights(8)).shape
        (8, 16, 16)
    """
    _checks.check_floating("cross_section", amplitude=ellipsoids.amplitude)
    height = jnp.asarray(height, ellipsoids.amplitude.dtype)
    _checks.check_ndim("cross_section", "height", height, 0)
    squared = 1 - ((height - ellipsoids.center_z) / ellipsoids.semi_axis_c) ** 2
    met = squared > 0
    scale = jnp.sqrt(jnp.where(met, squared, 1))
    return phantoms.Ellipses(
        amplitude=jnp.where(met, ellipsoids.amplitude, 0),
        semi_axis_a=scale * ellipsoids.semi_axis_a,
        semi_axis_b=scale * ellipsoids.semi_axis_b,
        center_x=ellipsoids.center_x,
        center_y=ellipsoids.center_y,
        rotation=ellipsoids.rotation,
    )


def random_ellipsoids(
    num_inner: int, *, key: Key[Array, ""], dtype: DTypeLike = float
) -> Ellipsoids:
    """Draw a head-like phantom: an outer ellipsoid of amplitude .3 and `num_inner` ones inside.

    Along x and y `phantoms.random_ellipses`; along z the outer semi-axis is .81, the inner ones are
    uniform in [.1, .4] and the inner centres in [-.4, .4].

    Args:
        num_inner: Number of inner ellipsoids; *static*.
        key: Random key.
        dtype: float32 or float64; *static*. JAX's default float when left out.

    Returns:
        ``1 + num_inner`` ellipsoids with non-negative amplitudes.

    Raises:
        ValueError: If `num_inner` is not an integer from 0, or `dtype` is neither float32 nor
            float64.
    """
    _checks.check_count("random_ellipsoids", "num_inner", num_inner, 0)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise _checks.fail("random_ellipsoids", f"dtype {jnp.dtype(dtype)}", "float32 or float64")
    flat_key, height_key = jax.random.split(key)
    flat = phantoms.random_ellipses(num_inner, key=flat_key, dtype=dtype)
    draws = jax.random.uniform(height_key, (2, num_inner), flat.amplitude.dtype)
    outer = jnp.array([[_OUTER_SEMI_AXIS_C], [0.0]], flat.amplitude.dtype)
    inner = jnp.stack([0.1 + 0.3 * draws[0], -0.4 + 0.8 * draws[1]])
    semi_axis_c, center_z = jnp.concatenate([outer, inner], axis=1)
    return Ellipsoids(semi_axis_c=semi_axis_c, center_z=center_z, **flat._asdict())


def coupled_ellipsoids(
    coefficients: Float[Array, " images"],
    *,
    num_inner: int = 9,
    common: float = 1.0,
    key: Key[Array, ""],
) -> Ellipsoids:
    """Draw a multimodal set of volumes w_1 .. w_(N-1) and its combination w_N = sum_i c_i w_i.

    The counterpart of `phantoms.coupled_phantoms` for volumes: all share the outer ellipsoid of
    `random_ellipsoids`, and of the inner ones a fraction `common` has one geometry in all, with
    each volume's own amplitudes. Every w_i with i < N is divided by its largest value on 64 x 64 x
    64 points, and no amplitude is negative.

    Args:
        coefficients: c_1 .. c_(N-1), shape (N - 1,); their dtype is the result's.
        num_inner: Inner ellipsoids per volume; *static*.
        common: Fraction of inner ellipsoids with common geometry, from 0 to 1; *static*.
        key: Random key.

    Returns:
        Ellipsoids with fields of shape (N, (N - 1) * (1 + num_inner)).

    Raises:
        ValueError: If `common` is not within 0 and 1, `num_inner` not an integer from 0, or
            `coefficients` not a floating vector of at least one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import ellipsoids
        >>> clients = ellipsoids.coupled_ellipsoids(jnp.array([0.6, 0.4]), key=jax.random.key(0))
        >>> clients.amplitude.shape
        (3, 20)
    """
    coefficients = jnp.asarray(coefficients)
    _checks.check_floating("coupled_ellipsoids", coefficients=coefficients)
    _checks.check_ndim("coupled_ellipsoids", "coefficients", coefficients, 1)
    _checks.check_count("coupled_ellipsoids", "number of coefficients", coefficients.shape[0])
    _checks.check_count("coupled_ellipsoids", "num_inner", num_inner, 0)
    _checks.check_fraction("coupled_ellipsoids", "common", common)

    def draw(key):
        return random_ellipsoids(num_inner, key=key, dtype=coefficients.dtype)

    def largest_value(volume):
        def largest_in_slice(height):
            return phantoms.rasterize(cross_section(volume, height), 64, subsamples=1).max()

        return jax.lax.map(largest_in_slice, heights(64, dtype=coefficients.dtype)).max()

    volumes = jax.vmap(draw)(jax.random.split(key, coefficients.shape[0]))
    return phantoms.couple(volumes, coefficients, largest_value, common=common)
