import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import ellipsoids, phantoms, tomography

draw_coupled = jax.jit(ellipsoids.coupled_ellipsoids, static_argnames=("num_inner", "common"))


def one_ellipsoid(amplitude, a, b, c, x0, y0, z0, rotation, dtype=jnp.float64):
    values = (amplitude, a, b, c, x0, y0, z0, rotation)
    return ellipsoids.Ellipsoids(*(jnp.array([v], dtype) for v in values))


def ball(radius):
    return one_ellipsoid(1.0, radius, radius, radius, 0.0, 0.0, 0.0, 0.0)


TILTED = one_ellipsoid(2.0, 0.5, 0.2, 0.6, 0.1, -0.3, 0.15, 0.4)


def rasterize_volume(shapes, num_slices, size, subsamples=1):
    def draw(height):
        ellipses = ellipsoids.cross_section(shapes, height)
        return phantoms.rasterize(ellipses, size, subsamples=subsamples)

    return jax.jit(jax.vmap(draw))(ellipsoids.heights(num_slices, dtype=jnp.float64))


def test_heights_are_the_centres_of_equal_parts():
    for num_slices in (1, 4, 5):
        edges = np.linspace(-1, 1, num_slices + 1)
        found = ellipsoids.heights(num_slices, dtype=jnp.float64)
        np.testing.assert_allclose(found, (edges[1:] + edges[:-1]) / 2, atol=1e-15)


def test_planes_cut_a_ball_in_discs():
    radius = 0.6
    for height in (-0.5, 0.0, 0.3):
        disc = ellipsoids.cross_section(ball(radius), height)
        expected = np.sqrt(radius**2 - height**2)
        np.testing.assert_allclose(disc.semi_axis_a, expected, rtol=1e-14)
        np.testing.assert_allclose(disc.semi_axis_b, expected, rtol=1e-14)
        np.testing.assert_array_equal(disc.amplitude, 1)
    for height in (-0.7, 0.6, 0.61):
        disc = ellipsoids.cross_section(ball(radius), height)
        np.testing.assert_array_equal(disc.amplitude, 0)
        np.testing.assert_array_equal(disc.semi_axis_a, radius)


@pytest.mark.parametrize("num_slices", [20, 80])
def test_slices_hold_the_volume_of_an_ellipsoid(num_slices):
    z = ellipsoids.heights(num_slices, dtype=jnp.float64)
    ellipses = jax.vmap(lambda height: ellipsoids.cross_section(TILTED, height))(z)
    areas = ellipses.amplitude * np.pi * ellipses.semi_axis_a * ellipses.semi_axis_b
    step = 2 / num_slices
    expected = 2.0 * 4 / 3 * np.pi * 0.5 * 0.2 * 0.6
    # the midpoint rule for a parabola that ends within a slice
    np.testing.assert_allclose(areas.sum() * step, expected, rtol=(step / 0.6) ** 2)


def test_rasterized_volume_equals_the_points_inside():
    num_slices, size = 6, 8
    z, y, x = np.meshgrid(
        (np.arange(num_slices) - 2.5) / 3,
        (3.5 - np.arange(size)) / 4,
        (np.arange(size) - 3.5) / 4,
        indexing="ij",
    )
    dx, dy, dz = x - 0.1, y + 0.3, z - 0.15
    along = (dx * np.cos(0.4) + dy * np.sin(0.4)) / 0.5
    across = (-dx * np.sin(0.4) + dy * np.cos(0.4)) / 0.2
    inside = along**2 + across**2 + (dz / 0.6) ** 2 <= 1
    assert 5 < inside.sum() < 50
    np.testing.assert_array_equal(rasterize_volume(TILTED, num_slices, size), 2.0 * inside)


def test_sinogram_of_a_slice_is_the_projection_of_its_image():
    head = ellipsoids.random_ellipsoids(6, key=jax.random.key(0), dtype=jnp.float64)
    angles = jnp.linspace(0.1, np.pi, 7, endpoint=False)
    geometry = tomography.ParallelBeam(shape=(64, 64), num_bins=92)

    @jax.jit
    def both(height):
        ellipses = ellipsoids.cross_section(head, height)
        image = phantoms.rasterize(ellipses, 64)
        projected = tomography.project(geometry, image, angles)
        return phantoms.sinogram(ellipses, angles, 92, 64), projected

    for height in (-0.2, 0.0, 0.35):
        closed_form, projected = both(height)
        error = np.linalg.norm(closed_form - projected) / np.linalg.norm(closed_form)
        assert error < 0.01


@pytest.mark.parametrize("height", [0.0, 0.5, 0.6, -0.6, 0.9])
def test_derivatives_are_finite_where_a_plane_touches(height):
    angles = jnp.array([0.3, 1.1])

    def mass(shapes, height):
        ellipses = ellipsoids.cross_section(shapes, height)
        return phantoms.sinogram(ellipses, angles, 9, 8, samples=2).sum()

    for gradient in jax.tree.leaves(jax.grad(mass, (0, 1))(ball(0.6), height)):
        assert np.isfinite(gradient).all()


def test_derivative_in_the_height_is_that_of_the_area():
    def area(height):
        ellipse = ellipsoids.cross_section(TILTED, height)
        return jnp.pi * jnp.sum(ellipse.semi_axis_a * ellipse.semi_axis_b)

    slope = -2 * np.pi * 0.5 * 0.2 * (0.3 - 0.15) / 0.6**2
    np.testing.assert_allclose(jax.grad(area)(0.3), slope, rtol=1e-13)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_last_volume_is_the_combination(seed):
    coefficients = jnp.array([0.6, -0.4])
    shapes = draw_coupled(coefficients, num_inner=4, key=jax.random.key(seed))
    volumes = jax.vmap(lambda e: rasterize_volume(e, 5, 12))(shapes)
    combined = np.tensordot(coefficients, volumes[:2], axes=1)
    np.testing.assert_allclose(volumes[2], combined, atol=1e-14)


def test_coupled_volumes_are_non_negative_with_largest_value_one():
    coefficients = jnp.array([0.7, 0.3])
    for common in (0.5, 1.0):
        shapes = draw_coupled(coefficients, num_inner=9, common=common, key=jax.random.key(2))
        volumes = np.array(jax.vmap(lambda e: rasterize_volume(e, 64, 64))(shapes))
        np.testing.assert_allclose(volumes[:2].max((1, 2, 3)), 1, rtol=1e-12)
        assert volumes.min() >= 0
        finer = np.array(jax.vmap(lambda e: rasterize_volume(e, 51, 90))(shapes))
        np.testing.assert_allclose(finer[:2].max((1, 2, 3)), 1, atol=0.2)


@pytest.mark.parametrize(("common", "shared"), [(0.0, 1), (0.5, 3), (1.0, 5)])
def test_common_geometry_is_the_fraction_asked_for(common, shared):
    shapes = draw_coupled(jnp.array([0.5, 0.5]), num_inner=4, common=common, key=jax.random.key(0))
    same = np.all([field[0, :5] == field[1, :5] for field in shapes[1:]], axis=0)
    np.testing.assert_array_equal(same, np.arange(5) < shared)
    assert (shapes.amplitude[0, 1:5] != shapes.amplitude[1, 1:5]).all()


def test_inner_ellipsoids_have_the_stated_ranges():
    head = ellipsoids.random_ellipsoids(200, key=jax.random.key(0), dtype=jnp.float64)
    assert head.semi_axis_c[0] == 0.81
    assert head.center_z[0] == 0
    for field, low, high in ((head.semi_axis_c, 0.1, 0.4), (head.center_z, -0.4, 0.4)):
        inner = np.asarray(field[1:])
        assert low <= inner.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < inner.max() <= high


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_that_asked_for(dtype):
    shapes = jax.eval_shape(
        lambda c, key: ellipsoids.coupled_ellipsoids(c, num_inner=3, key=key),
        jnp.array([0.5, 0.5], dtype),
        jax.random.key(0),
    )
    assert {field.dtype for field in shapes} == {jnp.dtype(dtype)}
    assert {field.shape for field in shapes} == {(3, 8)}
    head = ellipsoids.random_ellipsoids(3, key=jax.random.key(0), dtype=dtype)
    ellipses = ellipsoids.cross_section(head, 0.1)
    assert {field.dtype for field in ellipses} == {jnp.dtype(dtype)}
    assert ellipsoids.heights(3, dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ellipsoids.heights(0), "heights: got num_slices 0, expected an integer from 1"),
        (
            lambda: ellipsoids.cross_section(TILTED, jnp.zeros(3)),
            r"cross_section: got height of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: ellipsoids.cross_section(jax.tree.map(lambda f: f.astype(int), TILTED), 0.0),
            "cross_section: got amplitude of dtype int64",
        ),
        (
            lambda: ellipsoids.random_ellipsoids(-1, key=jax.random.key(0)),
            "random_ellipsoids: got num_inner -1, expected an integer from 0",
        ),
        (
            lambda: ellipsoids.random_ellipsoids(2, key=jax.random.key(0), dtype=jnp.float16),
            "random_ellipsoids: got dtype float16, expected float32 or float64",
        ),
        (
            lambda: ellipsoids.coupled_ellipsoids(jnp.ones(2), common=1.5, key=jax.random.key(0)),
            "coupled_ellipsoids: got common 1.5, expected a fraction from 0 to 1",
        ),
        (
            lambda: ellipsoids.coupled_ellipsoids(jnp.ones(0), key=jax.random.key(0)),
            r"coupled_ellipsoids: got number of coefficients 0, expected an integer from 1",
        ),
        (
            lambda: ellipsoids.coupled_ellipsoids(jnp.ones((2, 1)), key=jax.random.key(0)),
            r"coupled_ellipsoids: got coefficients of shape \(2, 1\), expected 1 axes",
        ),
        (
            lambda: ellipsoids.coupled_ellipsoids(jnp.ones(2, int), key=jax.random.key(0)),
            "coupled_ellipsoids: got coefficients of dtype int64",
        ),
        (
            lambda: ellipsoids.coupled_ellipsoids(jnp.ones(2), num_inner=-1, key=jax.random.key(0)),
            "coupled_ellipsoids: got num_inner -1, expected an integer from 0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
