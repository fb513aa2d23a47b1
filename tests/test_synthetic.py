import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import synthetic, tomography

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
