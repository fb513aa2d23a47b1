import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import phantoms
from tests.reference import blobs

ANGLES = jnp.array([0.0, 0.3, 1.1, np.pi / 2, 2.0])

draw_coupled = jax.jit(phantoms.coupled_phantoms, static_argnames=("num_inner", "common"))


def one_ellipse(amplitude, a, b, x0, y0, rotation, dtype=jnp.float64):
    return phantoms.Ellipses(*(jnp.array([v], dtype) for v in (amplitude, a, b, x0, y0, rotation)))


@pytest.fixture(scope="module")
def reference_images():
    draw = jax.jit(jax.vmap(lambda e: phantoms.rasterize(e, 100, subsamples=1)))
    return np.asarray(draw(phantoms.reference_set(dtype=jnp.float64)))


def test_reference_set_has_the_stated_check_values(reference_images):
    flat = reference_images.reshape(4, -1)
    np.testing.assert_allclose(flat.sum(1), [1231.80, 1586.41, 1499.10, 1391.64], atol=5e-3)
    norms = [24.670, 24.753, 28.245, 21.314]
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), norms, atol=5e-4)
    np.testing.assert_allclose(flat.max(1), [1, 1, 1, 0.5776], atol=5e-5)


def test_reference_set_needs_no_clipping(reference_images):
    assert reference_images.min() > -1e-14


def test_reference_images_have_the_stated_spectrum(reference_images):
    values = np.linalg.svd(reference_images[0], compute_uv=False)
    psnr = [-10 * np.log10((values[rank:] ** 2).sum() / 100**2) for rank in (10, 20, 30, 41)]
    np.testing.assert_allclose(psnr, [21.1, 28.7, 37.8, 46.9], atol=0.05)


def test_last_reference_image_is_the_combination(reference_images):
    combined = np.einsum("c,cij->ij", [0.5, 0.3, 0.2], reference_images[:3])
    np.testing.assert_allclose(reference_images[3], combined, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_modified_shepp_logan_has_the_stated_check_values(dtype):
    draw = jax.jit(lambda ellipses: phantoms.rasterize(ellipses, 256))
    image = draw(phantoms.modified_shepp_logan(dtype=dtype))
    assert image.dtype == dtype
    image = np.asarray(image, np.float64)
    np.testing.assert_allclose(image.sum(), 8115.0889, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(image), 61.92751, rtol=1e-6)
    np.testing.assert_allclose(image.max(), 1, rtol=1e-6)


def test_original_and_modified_shepp_logan_share_their_geometry():
    original, modified = phantoms.shepp_logan(), phantoms.modified_shepp_logan()
    for a, b in zip(original[1:], modified[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(original.amplitude[:4], [1, -0.98, -0.02, -0.02])


def test_rasterized_ellipse_equals_a_loop_over_points():
    a, b, x0, y0, rotation, size = 0.5, 0.2, 0.1, -0.3, 0.4, 7
    image = phantoms.rasterize(one_ellipse(2.0, a, b, x0, y0, rotation), size, subsamples=3)
    expected = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            for u in (-1 / 3, 0, 1 / 3):
                for v in (-1 / 3, 0, 1 / 3):
                    dx = (j + u - (size - 1) / 2) / (size / 2) - x0
                    dy = ((size - 1) / 2 - i - v) / (size / 2) - y0
                    along = (dx * np.cos(rotation) + dy * np.sin(rotation)) / a
                    across = (-dx * np.sin(rotation) + dy * np.cos(rotation)) / b
                    expected[i, j] += 2.0 / 9 * (along**2 + across**2 <= 1)
    assert expected.sum() > 0
    np.testing.assert_allclose(image, expected, atol=1e-14)


def test_disc_has_the_sinogram_of_its_chords():
    radius, size, num_bins = 0.43, 10, 13
    disc = one_ellipse(3.0, radius, radius, 0.0, 0.0, 0.0)
    t = (np.arange(num_bins) - 6) / 5
    chord = 2 * np.sqrt(np.maximum(radius**2 - t**2, 0)) * size / 2
    result = phantoms.sinogram(disc, ANGLES, num_bins, size, samples=1)
    np.testing.assert_allclose(result, np.tile(3.0 * chord, (5, 1)), atol=1e-13)


def test_sinogram_equals_quadrature_along_the_rays():
    a, b, x0, y0, rotation = 0.5, 0.2, 0.1, -0.3, 0.4
    result = phantoms.sinogram(one_ellipse(1.0, a, b, x0, y0, rotation), ANGLES, 9, 8, samples=1)
    step = 2e-4
    along = np.arange(-1.5, 1.5, step)
    for view, theta in zip(result, np.asarray(ANGLES), strict=True):
        t = (np.arange(9) - 4)[:, None] / 4
        dx = t * np.cos(theta) - along * np.sin(theta) - x0
        dy = t * np.sin(theta) + along * np.cos(theta) - y0
        u = (dx * np.cos(rotation) + dy * np.sin(rotation)) / a
        v = (-dx * np.sin(rotation) + dy * np.cos(rotation)) / b
        inside = (u**2 + v**2 <= 1).sum(1)
        np.testing.assert_allclose(view, inside * step * 8 / 2, atol=4 * 2 * step)


def test_bin_average_is_the_mean_of_finer_bins():
    ellipses = phantoms.modified_shepp_logan(dtype=jnp.float64)
    averaged = phantoms.sinogram(ellipses, ANGLES, 9, 8, samples=4)
    fine = phantoms.sinogram(ellipses, ANGLES, 36, 32, samples=1)
    np.testing.assert_allclose(averaged, fine.reshape(5, 9, 4).mean(2) / 4, rtol=1e-12, atol=1e-13)


def test_every_view_holds_the_mass_of_the_ellipse():
    ellipse = one_ellipse(2.0, 0.5, 0.2, 0.1, -0.3, 0.4)
    mass = phantoms.sinogram(ellipse, ANGLES, 64, 40, samples=64).sum(1)
    # the midpoint rule errs by the power 3/2 of the step where the chord's length ends in a root
    step = 1 / (64 * 20 * 0.2)
    np.testing.assert_allclose(mass, 2.0 * np.pi * 0.5 * 0.2 * 20**2, rtol=step**1.5)


def test_rotating_a_phantom_shifts_its_angles():
    turn = 0.7
    ellipse = one_ellipse(1.0, 0.5, 0.2, 0.3, -0.1, 0.4)
    x, y = 0.3, -0.1
    turned = one_ellipse(
        1.0,
        0.5,
        0.2,
        x * np.cos(turn) - y * np.sin(turn),
        x * np.sin(turn) + y * np.cos(turn),
        0.4 + turn,
    )
    expected = phantoms.sinogram(ellipse, ANGLES, 11, 8)
    np.testing.assert_allclose(
        phantoms.sinogram(turned, ANGLES + turn, 11, 8), expected, atol=1e-13
    )


def test_sinogram_gradient_is_finite_where_a_ray_touches_the_ellipse():
    disc = one_ellipse(1.0, 0.5, 0.5, 0.0, 0.0, 0.0)

    def total(ellipses, angles):
        return phantoms.sinogram(ellipses, angles, 9, 8, samples=1).sum()

    for gradient in jax.tree.leaves(jax.grad(total, (0, 1))(disc, ANGLES)):
        assert np.isfinite(gradient).all()


def test_combination_of_phantoms_combines_their_sinograms():
    phantom = phantoms.coupled_phantoms(jnp.array([0.6, -0.4]), num_inner=3, key=jax.random.key(1))
    w = jax.vmap(lambda e: phantoms.sinogram(e, ANGLES, 9, 8))(phantom)
    np.testing.assert_allclose(w[2], 0.6 * w[0] - 0.4 * w[1], atol=1e-13)


@pytest.mark.parametrize(("common", "shared"), [(0.0, 1), (0.5, 3), (1.0, 5)])
def test_common_geometry_is_the_fraction_asked_for(common, shared):
    phantom = draw_coupled(jnp.array([0.5, 0.5]), num_inner=4, common=common, key=jax.random.key(0))
    same = np.all([field[0, :5] == field[1, :5] for field in phantom[1:]], axis=0)
    np.testing.assert_array_equal(same, np.arange(5) < shared)
    assert (phantom.amplitude[0, 1:5] != phantom.amplitude[1, 1:5]).all()


def test_coupled_images_are_scaled_to_largest_value_one():
    coefficients = jnp.array([0.7, 0.3], jnp.float32)
    phantom = draw_coupled(coefficients, num_inner=9, common=1.0, key=jax.random.key(2))
    assert {field.dtype for field in phantom} == {jnp.dtype("float32")}
    draw = jax.jit(jax.vmap(lambda e: phantoms.rasterize(e, 128, subsamples=1)))
    images = draw(phantom)
    np.testing.assert_allclose(images[:2].max((1, 2)), 1, rtol=1e-6)
    assert images.min() >= 0


def test_a_coupled_set_is_made_of_images_of_any_kind():
    keys = jax.random.split(jax.random.key(0), 2)
    draw = jax.vmap(lambda key: phantoms.random_ellipses(3, key=key, dtype=jnp.float64))
    images = draw(keys)
    coefficients = jnp.array([0.25, 0.5])
    coupled = phantoms.couple(images, coefficients, lambda e: e.amplitude.sum(), common=0.0)
    assert {field.shape for field in coupled} == {(3, 8)}
    np.testing.assert_allclose(coupled.amplitude[:2].sum(1), 1, rtol=1e-14)
    np.testing.assert_array_equal(coupled.amplitude[:2, 4:], 0)
    expected = np.outer([0.25, 0.5], np.ones(4)).ravel() * np.ravel(coupled.amplitude[:2, :4])
    np.testing.assert_allclose(coupled.amplitude[2], expected, rtol=1e-14)
    np.testing.assert_array_equal(coupled.center_x[2], np.ravel(coupled.center_x[:2, :4]))


def test_random_phantoms_are_their_keys():
    a, b, c = (phantoms.random_ellipses(3, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(a.center_x, b.center_x)
    assert (a.center_x[1:] != c.center_x[1:]).all()


def test_blob_reference_integrates_the_blobs():
    image = blobs.rasterize(blobs.STANDARD, 64)
    views = blobs.sinogram(blobs.STANDARD, ANGLES, 96, 64)
    np.testing.assert_allclose(views.sum(1), image.sum(), rtol=1e-6)
    np.testing.assert_allclose(views[0], np.pad(image.sum(0), 16), atol=2e-3)
    np.testing.assert_allclose(views[3], np.pad(image[::-1].sum(1), 16), atol=2e-3)


HEAD = phantoms.modified_shepp_logan(dtype=jnp.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: phantoms.rasterize(HEAD, 0), "rasterize: got size 0, expected an integer from 1"),
        (lambda: phantoms.rasterize(HEAD, 2.5), "rasterize: got size 2.5, expected an integer"),
        (lambda: phantoms.rasterize(HEAD, 4, subsamples=0), "rasterize: got subsamples 0"),
        (lambda: phantoms.sinogram(HEAD, ANGLES, 0, 8), "sinogram: got num_bins 0"),
        (lambda: phantoms.sinogram(HEAD, ANGLES[None], 8, 8), r"angles of shape \(1, 5\)"),
        (
            lambda: phantoms.sinogram(HEAD, ANGLES.astype(jnp.float32), 8, 8),
            "sinogram: got angles of dtype float32, expected the phantom's dtype float64",
        ),
        (
            lambda: phantoms.sinogram(HEAD, jnp.arange(3), 8, 8),
            "sinogram: got angles of dtype int64, expected float32 or float64",
        ),
        (lambda: phantoms.combine(HEAD, jnp.ones(2)), r"combine: got amplitude of shape \(10,\)"),
        (
            lambda: phantoms.combine(phantoms.reference_set(), jnp.ones(3)),
            r"combine: got coefficients of shape \(3,\), expected shape \(4,\)",
        ),
        (
            lambda: phantoms.append_combination(phantoms.reference_set(), jnp.ones(3)),
            r"combine: got coefficients of shape \(3,\), expected shape \(4,\)",
        ),
        (
            lambda: phantoms.append_combination(
                phantoms.Ellipses(*[jnp.ones((2, 0))] * 6), jnp.ones(2)
            ),
            r"append_combination: got amplitude of shape \(2, 0\), expected at least one ellipse",
        ),
        (
            lambda: phantoms.couple(phantoms.reference_set(), jnp.ones(3), jnp.max),
            r"couple: got coefficients of shape \(3,\), expected shape \(4,\)",
        ),
        (
            lambda: phantoms.couple(phantoms.reference_set(), jnp.ones(4), jnp.max, common=-0.5),
            "couple: got common -0.5, expected a fraction from 0 to 1",
        ),
        (
            lambda: phantoms.coupled_phantoms(jnp.ones(0), key=jax.random.key(0)),
            r"coupled_phantoms: got number of coefficients 0, expected an integer from 1",
        ),
        (
            lambda: phantoms.coupled_phantoms(jnp.ones(2), common=1.5, key=jax.random.key(0)),
            "coupled_phantoms: got common 1.5, expected a fraction from 0 to 1",
        ),
        (
            lambda: phantoms.random_ellipses(-1, key=jax.random.key(0)),
            "random_ellipses: got num_inner -1, expected an integer from 0",
        ),
        (
            lambda: phantoms.random_ellipses(2.5, key=jax.random.key(0)),
            "random_ellipses: got num_inner 2.5, expected an integer from 0",
        ),
        (
            lambda: phantoms.rings_and_discs(num_discs=-1),
            "rings_and_discs: got num_discs -1, expected an integer from 0",
        ),
        (
            lambda: phantoms.coupled_phantoms(jnp.ones(2), num_inner=-1, key=jax.random.key(0)),
            "coupled_phantoms: got num_inner -1, expected an integer from 0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, int])
@pytest.mark.parametrize(
    "draw",
    [
        phantoms.shepp_logan,
        phantoms.modified_shepp_logan,
        phantoms.rings_and_discs,
        phantoms.reference_set,
        functools.partial(phantoms.random_ellipses, 2, key=jax.random.key(0)),
    ],
)
def test_other_dtypes_are_refused(draw, dtype):
    name = getattr(draw, "func", draw).__name__
    message = f"^{name}: got dtype {jnp.dtype(dtype)}, expected float32 or float64"
    with pytest.raises(ValueError, match=message):
        draw(dtype=dtype)
