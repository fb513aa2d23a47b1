import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import phantoms, tomography
from tests.reference import blobs, projectors

PROJECTORS = (tomography.project, tomography.fourier_project)
SPECIAL = [0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]


@functools.cache
def compiled(function, geometry):
    """The jitted operator of one geometry, shared by the tests."""
    return jax.jit(functools.partial(function, geometry))


@functools.cache
def transposed(function, geometry):
    """The transpose of a projector as JAX derives it, jitted."""

    def transpose(sinogram, angles):
        image = jax.ShapeDtypeStruct(geometry.shape, sinogram.dtype)
        return jax.linear_transpose(lambda x: function(geometry, x, angles), image)(sinogram)[0]

    return jax.jit(transpose)


def random_angles(seed, count, dtype=np.float64):
    angles = np.random.default_rng(seed).uniform(-0.5, 2 * np.pi, count)
    return np.concatenate([SPECIAL, angles]).astype(dtype)


def relative(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "num_bins"), [((8, 8), 12), ((7, 7), 4), ((5, 9), 11)])
def test_operator_is_josephs_matrix_entry_by_entry(shape, num_bins, dtype):
    geometry = tomography.ParallelBeam(shape, num_bins)
    angles = random_angles(0, 5, dtype)
    views, pixels = len(angles), shape[0] * shape[1]
    matrix = projectors.joseph(shape, num_bins, angles.astype(np.float64))
    # a position is at most about sum(shape) + num_bins and is rounded a few times
    tolerance = 8 * np.finfo(dtype).eps * (sum(shape) + num_bins)

    images = np.eye(pixels, dtype=dtype).reshape(pixels, *shape)
    columns = jax.jit(
        jax.vmap(functools.partial(tomography.project, geometry), (0, None), out_axes=-1)
    )(images, angles)
    assert columns.dtype == dtype
    np.testing.assert_allclose(columns, matrix, atol=tolerance)

    sinograms = np.eye(views * num_bins, dtype=dtype).reshape(-1, views, num_bins)
    rows = jax.jit(jax.vmap(functools.partial(tomography.backproject, geometry), (0, None)))(
        sinograms, angles
    )
    assert rows.dtype == dtype
    np.testing.assert_allclose(rows.reshape(views, num_bins, pixels), matrix, atol=tolerance)


def mismatch(forward, adjoint, image, sinogram, angles):
    """|<Ax, y> - <x, A'y>| / (||Ax|| ||y||), the inner products in float64."""
    x, y = image.astype(np.float64), sinogram.astype(np.float64)
    ax = np.asarray(forward(image, angles), np.float64)
    aty = np.asarray(adjoint(sinogram, angles), np.float64)
    return abs((ax * y).sum() - (x * aty).sum()) / (np.linalg.norm(ax) * np.linalg.norm(y))


@pytest.mark.parametrize(("size", "num_bins"), [(64, 48), (33, 48)])
@pytest.mark.parametrize(
    ("dtype", "all_views", "one_view"), [(np.float32, 1e-7, 4e-6), (np.float64, 1e-13, 1e-13)]
)
def test_backproject_is_the_transpose_in_every_view(
    rng, size, num_bins, dtype, all_views, one_view
):
    geometry = tomography.ParallelBeam((size, size), num_bins)
    forward = compiled(tomography.project, geometry)
    adjoint = compiled(tomography.backproject, geometry)
    angles = random_angles(1, 60, dtype)
    image = rng.standard_normal((size, size)).astype(dtype)
    sinogram = rng.standard_normal((len(angles), num_bins)).astype(dtype)
    assert mismatch(forward, adjoint, image, sinogram, angles) <= all_views
    worst = max(
        mismatch(forward, adjoint, image, sinogram[[view]], angles[[view]])
        for view in range(len(angles))
    )
    assert worst <= one_view


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_fourier_projector_has_an_exact_transpose(rng, dtype, bound):
    geometry = tomography.ParallelBeam((8, 11), 14)
    forward = compiled(tomography.fourier_project, geometry)
    adjoint = transposed(tomography.fourier_project, geometry)
    angles = random_angles(2, 5, dtype)
    image = rng.standard_normal((8, 11)).astype(dtype)
    sinogram = rng.standard_normal((len(angles), 14)).astype(dtype)
    assert mismatch(forward, adjoint, image, sinogram, angles) <= bound


def projected_energy_gradient(geometry, image, angles):
    return jax.grad(lambda x: (tomography.project(geometry, x, angles) ** 2).sum())(image)


@pytest.mark.parametrize(
    ("function", "shape", "megabytes"),
    [
        (tomography.project, (256, 256), 20),
        (tomography.backproject, (180, 256), 20),
        (tomography.filtered_backprojection, (180, 256), 20),
        (projected_energy_gradient, (256, 256), 30),
    ],
)
def test_compiled_batches_need_little_memory(function, shape, megabytes):
    """Positions of all views and lines of 256 x 256 pixels and 180 views would be 47 MB."""
    geometry = tomography.ParallelBeam((256, 256), 256)
    batch = jax.ShapeDtypeStruct((8, *shape), np.float32)
    angles = jax.ShapeDtypeStruct((180,), np.float32)
    mapped = jax.jit(jax.vmap(functools.partial(function, geometry), (0, None)))
    memory = mapped.lower(batch, angles).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes <= megabytes * 10**6


GEOMETRY = tomography.ParallelBeam((9, 9), 13)
ANGLES = np.array([0.2, 0.9, 1.7, 2.6])


@pytest.mark.parametrize("project", PROJECTORS)
def test_projection_is_linear(rng, project):
    x, y = rng.standard_normal((2, 9, 9))
    forward = compiled(project, GEOMETRY)
    combined = forward(2.0 * x - 3.0 * y, ANGLES)
    expected = 2.0 * forward(x, ANGLES) - 3.0 * forward(y, ANGLES)
    np.testing.assert_allclose(combined, expected, atol=1e-12)


def test_projection_of_a_nonnegative_image_is_nonnegative(rng):
    assert compiled(tomography.project, GEOMETRY)(rng.random((9, 9)), ANGLES).min() >= 0


@pytest.mark.parametrize("shape", [(6, 6), (7, 5)])
def test_view_at_angle_zero_is_the_column_sums(rng, shape):
    geometry = tomography.ParallelBeam(shape, shape[1])
    image = rng.standard_normal(shape)
    view = compiled(tomography.project, geometry)(image, np.zeros(1))
    np.testing.assert_allclose(view[0], image.sum(0), rtol=1e-12)


def test_view_at_a_right_angle_is_the_row_sums_upwards(rng):
    geometry = tomography.ParallelBeam((7, 5), 7)
    image = rng.standard_normal((7, 5))
    view = compiled(tomography.project, geometry)(image, np.full(1, np.pi / 2))
    np.testing.assert_allclose(view[0], image.sum(1)[::-1], rtol=1e-12)


# Linear interpolation widens a blob of g pixels by a variance of 1/6 on average, which changes its
# profile by (1/12) ||f''||/||f|| = (1/12) sqrt(3/4)/g^2; the narrowest has g = .06 * 32 pixels.
SMOOTH = [(PROJECTORS[0], np.sqrt(0.75) / 12 / (0.06 * 32) ** 2), (PROJECTORS[1], 1e-4)]


@pytest.mark.parametrize(("project", "bound"), SMOOTH)
def test_smooth_phantom_has_its_closed_form_in_every_view(project, bound):
    size, num_bins = 64, 80
    angles = random_angles(3, 8)
    expected = blobs.sinogram(blobs.STANDARD, angles, num_bins, size)
    geometry = tomography.ParallelBeam((size, size), num_bins)
    result = compiled(project, geometry)(blobs.rasterize(blobs.STANDARD, size), angles)
    assert max(relative(a, b) for a, b in zip(result, expected, strict=True)) <= bound
    np.testing.assert_allclose(result.sum(1), expected.sum(1), rtol=bound)


@pytest.mark.parametrize(("project", "bound"), SMOOTH)
def test_rotating_the_object_shifts_the_angles(project, bound):
    size, turn = 64, 0.6
    turned = blobs.turned(blobs.STANDARD, turn)
    angles = random_angles(3, 8)
    forward = compiled(project, tomography.ParallelBeam((size, size), 80))
    straight = forward(blobs.rasterize(blobs.STANDARD, size), angles)
    shifted = forward(blobs.rasterize(turned, size), angles + turn)
    assert relative(shifted, np.asarray(straight)) <= 2 * bound


@pytest.fixture(scope="module")
def shepp_logan_scan():
    """Shepp-Logan, 256 x 256, 180 views: image, angles, sinograms (bin-averaged and point)."""
    ellipses = phantoms.modified_shepp_logan(dtype=jnp.float32)
    angles = jnp.linspace(0, jnp.pi, 180, endpoint=False, dtype=jnp.float32)

    def scan(ellipses):
        averaged = phantoms.sinogram(ellipses, angles, 256, 256)
        points = phantoms.sinogram(ellipses, angles, 256, 256, samples=1)
        return phantoms.rasterize(ellipses, 256), angles, averaged, points

    return jax.jit(scan)(ellipses)


FULL = tomography.ParallelBeam((256, 256), 256)


def test_both_projectors_err_as_stated_on_shepp_logan(shepp_logan_scan):
    image, angles, averaged, points = (np.asarray(array) for array in shepp_logan_scan)
    joseph, fourier = (compiled(project, FULL)(image, angles) for project in PROJECTORS)
    assert relative(joseph, averaged) <= 6.6e-3
    assert relative(joseph, points) == pytest.approx(1.34e-2, abs=5e-5)
    assert relative(fourier, averaged) <= 4.9e-3
    assert relative(fourier, points) == pytest.approx(1.13e-2, abs=5e-5)
    assert relative(joseph, np.asarray(fourier, np.float64)) <= 1.2e-2


@pytest.mark.parametrize(("project", "bound"), [(PROJECTORS[0], 3.5e-4), (PROJECTORS[1], 1e-5)])
def test_both_projectors_err_as_stated_on_blobs(shepp_logan_scan, project, bound):
    angles = shepp_logan_scan[1]
    expected = blobs.sinogram(blobs.STANDARD, angles, 256, 256)
    image = blobs.rasterize(blobs.STANDARD, 256).astype(np.float32)
    result = compiled(project, FULL)(image, angles)
    assert relative(result, expected) <= bound


@pytest.mark.parametrize(
    ("source", "options", "psnr"),
    [
        ("averaged", {}, 30.2747),
        ("averaged", {"backprojector": tomography.backproject}, 30.1933),
        ("averaged", {"window": tomography.hann}, 27.3445),
        ("points", {}, 29.5444),
        ("projected", {}, 29.7805),
    ],
)
def test_filtered_backprojection_reaches_the_stated_psnr(shepp_logan_scan, source, options, psnr):
    image, angles, averaged, points = shepp_logan_scan
    sinogram = {"averaged": averaged, "points": points}.get(source)
    if sinogram is None:
        sinogram = compiled(tomography.project, FULL)(image, angles)
    reconstruct = functools.partial(tomography.filtered_backprojection, FULL, **options)
    error = np.asarray(jax.jit(reconstruct)(sinogram, angles) - image, np.float64)
    assert -10 * np.log10((error**2).mean()) == pytest.approx(psnr, abs=0.05)


def misfit(project, image, sinogram, angles):
    residual = project(GEOMETRY, image, angles) - sinogram
    return 0.5 * jnp.sum(residual**2)


def test_gradient_of_the_misfit_is_the_backprojected_residual(rng):
    image, sinogram = rng.standard_normal((9, 9)), rng.standard_normal((4, 13))
    gradient = jax.jit(jax.grad(functools.partial(misfit, tomography.project)))
    residual = compiled(tomography.project, GEOMETRY)(image, ANGLES) - sinogram
    expected = compiled(tomography.backproject, GEOMETRY)(residual, ANGLES)
    np.testing.assert_allclose(gradient(image, sinogram, ANGLES), expected, atol=1e-12)


def test_gradients_are_gathers():
    arguments = jnp.ones((9, 9)), jnp.ones((4, 13)), jnp.asarray(ANGLES)
    for number in (0, 2):
        gradient = jax.grad(functools.partial(misfit, tomography.project), number)
        mapped = jax.vmap(gradient)
        lowered = jax.jit(gradient).lower(*arguments).as_text()
        assert "gather" in lowered
        assert "scatter" not in lowered
        batch = [jnp.stack([argument] * 2) for argument in arguments]
        assert "scatter" not in jax.jit(mapped).lower(*batch).as_text()


@pytest.mark.parametrize("project", PROJECTORS)
def test_forward_and_reverse_derivatives_are_the_operator(rng, project):
    image, tangent = rng.standard_normal((2, 9, 9))
    cotangent = rng.standard_normal((4, 13))

    def operator(x):
        return project(GEOMETRY, x, ANGLES)

    def derivatives(image, tangent, cotangent):
        jvp = jax.jvp(operator, (image,), (tangent,))[1]
        vjp = jax.vjp(operator, image)[1](cotangent)[0]
        of_jitted = jax.linear_transpose(jax.jit(operator), image)(cotangent)[0]
        twice = jax.jvp(jax.grad(lambda x: 0.5 * (operator(x) ** 2).sum()), (image,), (tangent,))
        return jvp, vjp, of_jitted, twice[1]

    jvp, vjp, of_jitted, twice = jax.jit(derivatives)(image, tangent, cotangent)
    expected = transposed(project, GEOMETRY)(cotangent, ANGLES)
    np.testing.assert_allclose(jvp, compiled(project, GEOMETRY)(tangent, ANGLES), atol=1e-12)
    np.testing.assert_allclose(vjp, expected, atol=1e-12)
    np.testing.assert_allclose(of_jitted, expected, atol=1e-12)
    np.testing.assert_allclose(twice, transposed(project, GEOMETRY)(jvp, ANGLES), atol=1e-12)


def test_filtered_backprojection_is_differentiable_in_the_sinogram(rng):
    sinogram, tangent = rng.standard_normal((2, 4, 13))
    cotangent = rng.standard_normal((9, 9))
    reconstruct = functools.partial(
        tomography.filtered_backprojection, GEOMETRY, angles=jnp.asarray(ANGLES)
    )

    def derivatives(sinogram, tangent, cotangent):
        image, jvp = jax.jvp(reconstruct, (sinogram,), (tangent,))
        gradient = jax.grad(lambda y: (reconstruct(y) * cotangent).sum())(sinogram)
        return image, jvp, gradient

    mapped = jax.jit(jax.vmap(derivatives))
    inputs = [np.stack([array, 2 * array]) for array in (sinogram, tangent, cotangent)]
    images, jvps, gradients = mapped(*inputs)
    plain = jax.jit(reconstruct)
    for image, jvp, gradient, y, direction, weight in zip(
        images, jvps, gradients, *inputs, strict=True
    ):
        np.testing.assert_allclose(image, plain(y), atol=1e-12)
        np.testing.assert_allclose(jvp, plain(direction), atol=1e-12)
        np.testing.assert_allclose((gradient * direction).sum(), (jvp * weight).sum(), rtol=1e-10)


@pytest.mark.parametrize("num_bins", [13, 5])
def test_interpolating_backproject_has_an_exact_transpose(rng, num_bins):
    """Also where pixels meet the ends of the detector, which the narrow one does at angle zero."""
    geometry = tomography.ParallelBeam((9, 9), num_bins)
    angles = random_angles(4, 3)

    def operator(sinogram):
        return tomography.interpolating_backproject(geometry, sinogram, angles)

    def products(sinogram, image):
        back = jax.linear_transpose(operator, sinogram)(image)[0]
        return (operator(sinogram) * image).sum(), (sinogram * back).sum()

    sinogram, image = rng.standard_normal((len(angles), num_bins)), rng.standard_normal((9, 9))
    forward, adjoint = jax.jit(products)(sinogram, image)
    np.testing.assert_allclose(forward, adjoint, rtol=1e-12)


def test_interpolating_backproject_has_an_angle_derivative(rng):
    sinogram, image = rng.standard_normal((4, 13)), rng.standard_normal((9, 9))

    def loss(angles):
        back = tomography.interpolating_backproject(GEOMETRY, jnp.asarray(sinogram), angles)
        return (back * image).sum()

    value, step = jax.jit(loss), 1e-6
    expected = [(value(ANGLES + e) - value(ANGLES - e)) / (2 * step) for e in step * np.eye(4)]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(ANGLES), expected, rtol=1e-6)


def test_backproject_differentiates_to_project(rng):
    sinogram, image = rng.standard_normal((4, 13)), rng.standard_normal((9, 9))
    operator = functools.partial(tomography.backproject, GEOMETRY, angles=jnp.asarray(ANGLES))
    back = jax.jit(lambda y, x: jax.vjp(operator, y)[1](x)[0])(sinogram, image)
    expected = compiled(tomography.project, GEOMETRY)(image, ANGLES)
    np.testing.assert_allclose(back, expected, atol=1e-12)


def test_operator_works_inside_scan(rng):
    images = rng.standard_normal((3, 9, 9))

    def step(total, image):
        sinogram = tomography.project(GEOMETRY, image, ANGLES)
        return total + tomography.backproject(GEOMETRY, sinogram, ANGLES), sinogram

    total, sinograms = jax.jit(lambda x: jax.lax.scan(step, jnp.zeros((9, 9)), x))(images)
    forward, adjoint = (compiled(f, GEOMETRY) for f in (tomography.project, tomography.backproject))
    expected = [forward(image, ANGLES) for image in images]
    np.testing.assert_allclose(sinograms, expected, atol=1e-12)
    np.testing.assert_allclose(total, sum(adjoint(y, ANGLES) for y in expected), atol=1e-12)


@pytest.mark.parametrize("project", PROJECTORS)
def test_clients_with_their_own_angles_equal_the_loop(rng, project):
    """Ragged views: three clients see 4, 2 and 0 views; the other angles are arbitrary."""
    images = rng.standard_normal((3, 9, 9))
    angles = rng.uniform(-9, 9, (3, 4))
    angles[0] = ANGLES
    mask = np.arange(4) < np.array([4, 2, 0])[:, None]
    sinograms = rng.standard_normal((3, 4, 13))

    def loss(image, sinogram, angles, mask):
        weight = mask[:, None].astype(image.dtype)
        predicted = project(GEOMETRY, image, angles) * weight
        return 0.5 * jnp.sum((predicted - sinogram * weight) ** 2)

    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))
    values, gradients = mapped(images, sinograms, angles, mask)
    forward, adjoint = compiled(project, GEOMETRY), transposed(project, GEOMETRY)
    for client, count in enumerate((4, 2, 0)):
        own = np.resize(angles[client, :count], 4) if count else np.zeros(4)
        seen = np.arange(4)[:, None] < count
        residual = np.where(seen, forward(images[client], own) - sinograms[client], 0)
        np.testing.assert_allclose(values[client], 0.5 * (residual**2).sum(), rtol=1e-12)
        np.testing.assert_allclose(gradients[client], adjoint(residual, own), atol=1e-11)
    assert not gradients[2].any()
    other = np.where(mask, angles, 1.234)
    np.testing.assert_array_equal(mapped(images, sinograms, other, mask)[1], gradients)


def test_any_nesting_of_vmap_equals_the_loop(rng):
    images, angles = rng.standard_normal((2, 3, 9, 9)), rng.uniform(0, 3, (2, 4))
    forward = compiled(tomography.project, GEOMETRY)
    expected = [
        [forward(slice_, a) for slice_ in image] for image, a in zip(images, angles, strict=True)
    ]

    def operator(image, angles):
        return tomography.project(GEOMETRY, image, angles)

    slices_inside = jax.vmap(jax.vmap(operator, (0, None)))
    clients_inside = jax.vmap(jax.vmap(operator), (1, None), out_axes=1)
    one_image = jax.vmap(operator, (None, 0))

    def nested(images, angles):
        inside, outside = slices_inside(images, angles), clients_inside(images, angles)
        return inside, outside, one_image(images[0, 0], angles)

    inside, outside, one = jax.jit(nested)(images, angles)
    np.testing.assert_allclose(inside, expected, atol=1e-12)
    np.testing.assert_allclose(outside, expected, atol=1e-12)
    np.testing.assert_allclose(one, [forward(images[0, 0], a) for a in angles], atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 5])
def test_chunk_does_not_change_the_result(rng, chunk):
    image, sinogram = rng.standard_normal((9, 9)), rng.standard_normal((4, 13))
    chunked = tomography.ParallelBeam((9, 9), 13, chunk=chunk)
    for function, array in ((tomography.project, image), (tomography.backproject, sinogram)):
        result = compiled(function, chunked)(array, ANGLES)
        np.testing.assert_allclose(result, compiled(function, GEOMETRY)(array, ANGLES), rtol=1e-12)


@pytest.mark.parametrize("project", PROJECTORS)
def test_angle_gradient_is_the_finite_difference(rng, project):
    image, sinogram = rng.standard_normal((9, 9)), rng.standard_normal((4, 13))
    loss = jax.jit(functools.partial(misfit, project))
    gradient = jax.jit(jax.grad(functools.partial(misfit, project), 2))
    step = 1e-6
    expected = [
        (loss(image, sinogram, ANGLES + e) - loss(image, sinogram, ANGLES - e)) / (2 * step)
        for e in step * np.eye(4)
    ]
    np.testing.assert_allclose(gradient(image, sinogram, ANGLES), expected, rtol=1e-5)
    kinks = np.array(SPECIAL)
    assert np.isfinite(gradient(image, sinogram, kinks)).all()


def test_gradient_follows_image_and_angles_together(rng):
    image, sinogram = rng.standard_normal((9, 9)), rng.standard_normal((4, 13))
    direction = rng.standard_normal((9, 9)), rng.standard_normal(4)

    def loss(scale):
        moved = image + scale * direction[0], ANGLES + scale * direction[1]
        return misfit(tomography.project, moved[0], sinogram, moved[1])

    slope = jax.jit(jax.grad(loss))(0.0)
    step, value = 1e-6, jax.jit(loss)
    np.testing.assert_allclose(slope, (value(step) - value(-step)) / (2 * step), rtol=1e-5)
    forward = jax.jit(lambda s: jax.jvp(loss, (s,), (1.0,))[1])(0.0)
    np.testing.assert_allclose(forward, slope, rtol=1e-10)


def test_backproject_has_an_angle_derivative(rng):
    sinogram, direction = rng.standard_normal((4, 13)), rng.standard_normal(4)
    adjoint = compiled(tomography.backproject, GEOMETRY)
    tangent = jax.jit(lambda a: jax.jvp(lambda b: adjoint(sinogram, b), (a,), (direction,))[1])
    step = 1e-6
    ahead, behind = (adjoint(sinogram, ANGLES + s * step * direction) for s in (1, -1))
    np.testing.assert_allclose(tangent(ANGLES), (ahead - behind) / (2 * step), atol=1e-7)


def test_volume_is_projected_slice_by_slice(rng):
    volume, cotangent = rng.standard_normal((3, 9, 9)), rng.standard_normal((3, 4, 13))

    def operator(volume):
        return tomography.project_volume(GEOMETRY, volume, ANGLES)

    def both(volume, cotangent):
        return operator(volume), jax.vjp(operator, volume)[1](cotangent)[0]

    sinograms, back = jax.jit(both)(volume, cotangent)
    forward, adjoint = (compiled(f, GEOMETRY) for f in (tomography.project, tomography.backproject))
    np.testing.assert_allclose(sinograms, [forward(x, ANGLES) for x in volume], atol=1e-12)
    np.testing.assert_allclose(back, [adjoint(y, ANGLES) for y in cotangent], atol=1e-12)
    of_slices = jax.jit(operator)(list(volume))
    np.testing.assert_allclose(of_slices, sinograms, atol=1e-12)


def test_volumes_of_clients_equal_the_loop(rng):
    volumes, angles = rng.standard_normal((2, 3, 9, 9)), rng.uniform(0, 3, (2, 4))
    project = jax.jit(jax.vmap(functools.partial(tomography.project_volume, GEOMETRY)))
    forward = compiled(tomography.project, GEOMETRY)
    expected = [[forward(x, a) for x in v] for v, a in zip(volumes, angles, strict=True)]
    np.testing.assert_allclose(project(volumes, angles), expected, atol=1e-12)


def test_stacked_slices_are_the_slices(rng):
    slices = rng.standard_normal((3, 4, 5)).astype(np.float32)
    volume = tomography.stack_slices(tuple(slices))
    assert volume.dtype == np.float32
    np.testing.assert_array_equal(volume, slices)


def test_nan_stays_visible(rng):
    image, angles = rng.standard_normal((9, 9)), ANGLES.copy()
    angles[2] = np.nan
    bad_views = np.isnan(compiled(tomography.project, GEOMETRY)(image, angles)).all(1)
    np.testing.assert_array_equal(bad_views, [False, False, True, False])
    image[4, 4] = np.nan
    assert np.isnan(compiled(tomography.project, GEOMETRY)(image, ANGLES)).any(1).all()


def test_pixel_driven_reference_is_its_matrix(rng):
    image = rng.standard_normal((5, 4))
    matrix = projectors.splatting((5, 4), 8, ANGLES)
    np.testing.assert_allclose(
        projectors.splat(image, 8, ANGLES), matrix @ image.ravel(), atol=1e-13
    )
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tomography.ParallelBeam([4, 4], 5),
            r"ParallelBeam: got shape \[4, 4\], expected a tuple",
        ),
        (
            lambda: tomography.ParallelBeam((4, 4), 0),
            r"ParallelBeam: got num_bins \(0,\), expected integers of at least 1",
        ),
        (lambda: tomography.ParallelBeam((4, 2.0), 5), "ParallelBeam: got shape"),
        (lambda: tomography.ParallelBeam((4, 4), 5, 0), "ParallelBeam: got chunk"),
        (
            lambda: tomography.project(GEOMETRY, np.ones((9, 8)), ANGLES),
            r"project: got image of shape \(9, 8\), expected shape \(9, 9\)",
        ),
        (
            lambda: tomography.project(GEOMETRY, np.ones((9, 9), int), ANGLES),
            "project: got image of dtype int64, expected float32 or float64",
        ),
        (
            lambda: tomography.project(GEOMETRY, np.ones((9, 9), np.float16), ANGLES),
            "project: got image of dtype float16",
        ),
        (
            lambda: tomography.project(GEOMETRY, np.ones((9, 9), np.float32), ANGLES),
            "got angles of dtype float64, expected the image's dtype float32",
        ),
        (
            lambda: tomography.project(GEOMETRY, np.ones((9, 9)), ANGLES[None]),
            r"project: got angles of shape \(1, 4\), expected 1 axes",
        ),
        (
            lambda: tomography.backproject(GEOMETRY, np.ones((3, 13)), ANGLES),
            r"backproject: got sinogram of shape \(3, 13\), expected shape \(4, 13\)",
        ),
        (
            lambda: tomography.fourier_project(GEOMETRY, np.ones((8, 9)), ANGLES),
            "fourier_project: got image of shape",
        ),
        (
            lambda: tomography.filtered_backprojection(GEOMETRY, np.ones((4, 12)), ANGLES),
            "filtered_backprojection: got sinogram of shape",
        ),
        (
            lambda: tomography.interpolating_backproject(GEOMETRY, np.ones((5, 13)), ANGLES),
            "interpolating_backproject: got sinogram of shape",
        ),
        (lambda: tomography.stack_slices([]), "stack_slices: got no slices, expected at least 1"),
        (
            lambda: tomography.stack_slices([np.ones((4, 4)), np.ones((4, 4)), np.ones((4, 5))]),
            r"stack_slices: got slice 2 of shape \(4, 5\), expected shape \(4, 4\)",
        ),
        (
            lambda: tomography.stack_slices([np.ones((4, 4)), np.ones((4, 4), np.float32)]),
            "stack_slices: got slice 1 of dtype float32, expected float64",
        ),
        (
            lambda: tomography.stack_slices([np.ones(4)]),
            r"stack_slices: got slice 0 of shape \(4,\), expected 2 axes",
        ),
        (
            lambda: tomography.project_volume(GEOMETRY, [np.eye(9), np.eye(8)], ANGLES),
            r"stack_slices: got slice 1 of shape \(8, 8\), expected shape \(9, 9\)",
        ),
        (
            lambda: tomography.project_volume(GEOMETRY, np.ones((9, 9)), ANGLES),
            r"project_volume: got volume of shape \(9, 9\), expected 3 axes",
        ),
        (
            lambda: tomography.project_volume(GEOMETRY, np.ones((2, 9, 8)), ANGLES),
            r"project_volume: got volume of shape \(2, 9, 8\), expected shape \(2, 9, 9\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
