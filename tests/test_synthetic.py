import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import ellipsoids, phantoms, synthetic, tomography

GEOMETRY = tomography.ParallelBeam(shape=(20, 20), num_bins=29)


@jax.jit
def compiled(angles, sigma, key):
    return synthetic.multimodal_scans(GEOMETRY, angles, sigma=sigma, key=key)


def scan(sigma, key=0):
    return compiled(synthetic.uniform_angles(7, dtype=jnp.float64), sigma, jax.random.key(key))


def test_images_and_clean_sinograms_obey_the_coupling():
    scans = scan(0.1)
    for stack in (scans.images, scans.clean):
        combined = jnp.tensordot(scans.coefficients, stack[:-1], axes=1)
        np.testing.assert_allclose(stack[-1], combined, rtol=1e-12, atol=1e-12)
    assert float(scans.images.min()) >= -1e-12


def test_clean_sinograms_carry_the_mass_of_the_images():
    scans = scan(0.0)
    mass = scans.images.sum(axis=(1, 2))
    np.testing.assert_allclose(scans.clean.sum(axis=2).T, np.tile(mass, (7, 1)), rtol=0.03)


@pytest.mark.parametrize("key", [0, 1, 2])
def test_noise_has_the_level_that_is_returned(key):
    sigma = 0.1
    scans = scan(sigma, key)
    np.testing.assert_allclose(scans.noise_levels, sigma * scans.clean.max(axis=(1, 2)), rtol=1e-12)
    noise = (scans.sinograms - scans.clean) / scans.noise_levels[:, None, None]
    count = noise[0].size
    # The standard deviation of a sample standard deviation is 1 / sqrt(2 count).
    assert np.abs(noise.std(axis=(1, 2)) - 1.0).max() < 4 / np.sqrt(2 * count)
    assert np.abs(noise.mean(axis=(1, 2))).max() < 4 / np.sqrt(count)


def test_key_decides_the_noise_and_sigma_zero_has_none():
    np.testing.assert_array_equal(scan(0.1).sinograms, scan(0.1).sinograms)
    assert float(jnp.abs(scan(0.1).sinograms - scan(0.1, 1).sinograms).max()) > 0.0
    np.testing.assert_array_equal(scan(0.0).sinograms, scan(0.0).clean)


def test_dtype_is_that_of_the_angles():
    angles = synthetic.uniform_angles(7, dtype=jnp.float32)
    scans = jax.eval_shape(compiled, angles, 0.1, jax.random.key(0))
    assert {leaf.dtype for leaf in scans} == {jnp.dtype(jnp.float32)}


ANGLES = synthetic.uniform_angles(7, dtype=jnp.float64)
OWN_ANGLES = ANGLES[None] + jnp.linspace(0.0, 0.3, 4)[:, None]


def test_numbers_of_a_key_stay_what_they_are():
    geometry = tomography.ParallelBeam(shape=(8, 8), num_bins=12)
    angles = synthetic.uniform_angles(3, dtype=jnp.float64)
    key = jax.random.key(0)
    scans = synthetic.multimodal_scans(geometry, angles, sigma=0.1, key=key)
    draws = jax.vmap(lambda k: jax.random.normal(k, (3, 12)))(jax.random.split(key, 4))
    expected = scans.clean + scans.noise_levels[:, None, None] * draws
    np.testing.assert_allclose(scans.sinograms, expected, rtol=1e-13, atol=1e-13)


def test_every_client_may_have_its_own_angles():
    scans = jax.jit(compiled)(OWN_ANGLES, 0.1, jax.random.key(0))
    np.testing.assert_array_equal(scans.angles, OWN_ANGLES)
    for i in range(4):
        alone = compiled(OWN_ANGLES[i], 0.1, jax.random.key(0))
        for ours, theirs in zip(scans[:-1], alone[:-1], strict=True):
            np.testing.assert_allclose(ours[i], theirs[i], rtol=1e-13, atol=1e-13)


def test_any_coupled_set_is_scanned():
    coefficients = jnp.array([0.6, -0.4])
    ellipses = phantoms.coupled_phantoms(coefficients, num_inner=3, key=jax.random.key(1))

    @jax.jit
    def scan(sigma, key):
        return synthetic.scan_phantoms(
            GEOMETRY, ellipses, coefficients, ANGLES, sigma=sigma, key=key
        )

    scans = scan(0.1, jax.random.key(0))
    for stack in (scans.images, scans.clean):
        combined = jnp.tensordot(coefficients, stack[:-1], axes=1)
        np.testing.assert_allclose(stack[-1], combined, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(scans.coefficients, coefficients)
    for i, clean in enumerate(scans.clean):
        one = jax.tree.map(lambda field, i=i: field[i], ellipses)
        np.testing.assert_allclose(
            clean, phantoms.sinogram(one, ANGLES, 29, 20), rtol=1e-12, atol=1e-12
        )


@jax.jit
def volumes(coefficients, angles, sigma, key):
    return synthetic.multimodal_volumes(
        GEOMETRY, angles, num_slices=6, coefficients=coefficients, sigma=sigma, key=key
    )


def test_volumes_and_their_sinograms_obey_the_coupling():
    coefficients = jnp.array([0.6, 0.4])
    scans = volumes(coefficients, ANGLES, 0.1, jax.random.key(0))
    assert scans.images.shape == (3, 6, 20, 20)
    assert scans.sinograms.shape == (3, 6, 7, 29)
    assert scans.angles.shape == (3, 7)
    for stack in (scans.images, scans.clean):
        combined = jnp.tensordot(coefficients, stack[:-1], axes=1)
        np.testing.assert_allclose(stack[-1], combined, rtol=1e-12, atol=1e-12)
    assert float(scans.images.min()) >= 0
    # slices differ, and the outermost still hold the object
    sums = np.asarray(scans.images.sum(axis=(2, 3)))
    assert (sums > 0).sum() >= 3 * 4
    assert (np.diff(sums, axis=1) != 0).all()
    np.testing.assert_allclose(
        scans.clean.sum(axis=3), np.tile(sums[..., None], (1, 1, 7)), rtol=0.05, atol=0.3
    )


def test_a_volume_has_one_noise_level():
    coefficients = jnp.array([0.6, 0.4])
    for seed in range(3):
        scans = volumes(coefficients, ANGLES, 0.1, jax.random.key(seed))
        expected = 0.1 * scans.clean.max(axis=(1, 2, 3))
        np.testing.assert_allclose(scans.noise_levels, expected, rtol=1e-12)
        noise = (scans.sinograms - scans.clean) / scans.noise_levels[:, None, None, None]
        count = noise[0].size
        assert np.abs(noise.std(axis=(1, 2, 3)) - 1.0).max() < 4 / np.sqrt(2 * count)


def test_slices_of_a_volume_are_cross_sections():
    key, coefficients = jax.random.key(2), jnp.array([1.0])
    angles = OWN_ANGLES[:2]
    scans = volumes(coefficients, angles, 0.0, key)
    np.testing.assert_array_equal(scans.sinograms, scans.clean)
    draw = jax.jit(ellipsoids.coupled_ellipsoids)
    shapes = draw(coefficients, key=jax.random.split(key)[0])
    cut = ellipsoids.cross_section(shapes, ellipsoids.heights(6, dtype=jnp.float64)[3])
    for i in range(2):
        one = jax.tree.map(lambda field, i=i: field[i], cut)
        expected = phantoms.sinogram(one, angles[i], 29, 20)
        np.testing.assert_allclose(scans.clean[i, 3], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_volumes_have_the_dtype_of_the_angles(dtype):
    scans = jax.eval_shape(
        volumes, jnp.ones(2, dtype), ANGLES.astype(dtype), 0.1, jax.random.key(0)
    )
    assert {leaf.dtype for leaf in scans} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), ()])
def test_the_last_channel_is_the_weighted_sum(shape, dtype, rng):
    image = rng.random((*shape, 3)).astype(dtype)
    weights = np.array([0.2126, 0.7152, 0.0722])
    stack, coefficients = synthetic.coupled_channels(image, weights)
    assert stack.dtype == coefficients.dtype == dtype
    assert stack.shape == (4, *shape)
    np.testing.assert_array_equal(np.moveaxis(stack[:3], 0, -1), image)
    error = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(stack[3], (image.astype(np.float64) @ weights), rtol=error)


def test_a_traced_negative_sigma_passes():
    scans = jax.eval_shape(compiled, ANGLES, -0.1, jax.random.key(0))
    assert scans.sinograms.shape == (4, 7, 29)


def test_bad_input_is_refused():
    angles, key = synthetic.uniform_angles(3), jax.random.key(0)
    with pytest.raises(ValueError, match=r"multimodal_scans: got image shape .4, 5., expected a"):
        synthetic.multimodal_scans(
            tomography.ParallelBeam(shape=(4, 5), num_bins=7), angles, sigma=0.1, key=key
        )
    with pytest.raises(ValueError, match="multimodal_scans: got angles of dtype int"):
        synthetic.multimodal_scans(GEOMETRY, jnp.arange(3), sigma=0.1, key=key)
    with pytest.raises(ValueError, match="uniform_angles: got num_angles 0"):
        synthetic.uniform_angles(0)
    with pytest.raises(ValueError, match=r"multimodal_scans: got sigma -0.1, expected a non-neg"):
        synthetic.multimodal_scans(GEOMETRY, ANGLES, sigma=-0.1, key=key)
    with pytest.raises(ValueError, match=r"multimodal_scans: got angles of shape \(3, 7\), expect"):
        synthetic.multimodal_scans(GEOMETRY, OWN_ANGLES[:3], sigma=0.1, key=key)
    with pytest.raises(ValueError, match=r"multimodal_scans: got angles of shape \(\), expected 1"):
        synthetic.multimodal_scans(GEOMETRY, jnp.ones(()), sigma=0.1, key=key)


def test_bad_sets_are_refused():
    key, ellipses = jax.random.key(0), phantoms.reference_set(dtype=jnp.float64)
    weights = jnp.ones(3)
    with pytest.raises(ValueError, match=r"scan_phantoms: got coefficients of shape \(2,\), exp"):
        synthetic.scan_phantoms(GEOMETRY, ellipses, weights[:2], ANGLES, sigma=0.1, key=key)
    with pytest.raises(ValueError, match=r"scan_phantoms: got sigma nan, expected a non-negative"):
        synthetic.scan_phantoms(GEOMETRY, ellipses, weights, ANGLES, sigma=jnp.nan, key=key)
    one = jax.tree.map(lambda field: field[0], ellipses)
    with pytest.raises(ValueError, match=r"scan_phantoms: got amplitude of shape \(30,\)"):
        synthetic.scan_phantoms(GEOMETRY, one, weights, ANGLES, sigma=0.1, key=key)
    with pytest.raises(ValueError, match=r"scan_phantoms: got angles of shape \(2, 7\), expected"):
        synthetic.scan_phantoms(GEOMETRY, ellipses, weights, OWN_ANGLES[:2], sigma=0.1, key=key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slices": 0}, "got num_slices 0, expected an integer from 1"),
        ({"sigma": -1.0}, "got sigma -1.0, expected a non-negative number"),
        (
            {"coefficients": jnp.ones((2, 2))},
            r"got coefficients of shape \(2, 2\), expected 1 axes",
        ),
        ({"coefficients": jnp.ones(2, jnp.float32)}, "got coefficients of dtype float32, expected"),
        ({"coefficients": jnp.ones(2)}, r"got angles of shape \(4, 7\), expected shape \(3, 7\)"),
    ],
)
def test_bad_volumes_are_refused(changes, message):
    options = {"num_slices": 2, "coefficients": jnp.ones(3), "sigma": 0.1} | changes
    with pytest.raises(ValueError, match=f"^multimodal_volumes: {message}"):
        synthetic.multimodal_volumes(GEOMETRY, OWN_ANGLES, key=jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("image", "weights", "message"),
    [
        (np.ones((4, 5, 3), np.uint8), np.ones(3), "got image of dtype uint8"),
        (np.ones((4, 5, 3)), np.ones(4), r"got weights of shape \(4,\), expected shape \(3,\)"),
        (np.array(1.0), np.ones(1), r"got image of shape \(\), expected a last axis of channels"),
    ],
)
def test_bad_channels_are_refused(image, weights, message):
    with pytest.raises(ValueError, match=f"^coupled_channels: {message}"):
        synthetic.coupled_channels(image, weights)
