import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import noise, phantoms


def test_gaussian_has_the_deviation_it_states():
    clean = jnp.full((40, 50), 2.0).at[0, 0].set(8.0)
    for seed in range(3):
        result = noise.gaussian(clean, 0.05, key=jax.random.key(seed))
        assert result.deviation == pytest.approx(0.4)
        drawn = np.asarray(result.noisy - result.clean) / 0.4
        # five standard deviations of the mean and of the variance
        assert abs(drawn.mean()) <= 5 / np.sqrt(drawn.size)
        assert abs(drawn.var() - 1) <= 5 * np.sqrt(2 / drawn.size)
        np.testing.assert_array_equal(result.clean, clean)


def test_noise_is_its_key():
    clean = jnp.linspace(0.0, 3.0, 20).reshape(4, 5)
    draws = [noise.gaussian(clean, 0.1, key=jax.random.key(k)).noisy for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).all()


def test_transmission_counts_are_poisson():
    clean = jnp.full((60, 50), 1.5)
    draw = jax.jit(noise.poisson_transmission)
    for seed in range(3):
        result = draw(clean, 200.0, 0.5, key=jax.random.key(seed))
        mean = 200.0 * np.exp(-0.75)
        counts = np.asarray(result.counts, np.float64)
        assert abs(counts.mean() - mean) <= 5 * np.sqrt(mean / counts.size)
        # the variance of a Poisson sample's variance is (mean + 2 mean^2)/size
        assert abs(counts.var() - mean) <= 5 * np.sqrt((mean + 2 * mean**2) / counts.size)
        np.testing.assert_allclose(result.noisy, -np.log(counts / 200.0) / 0.5, rtol=1e-10)
        assert result.num_zero == 0


def test_empty_bins_are_counted_and_stay_finite():
    clean = jnp.full((3, 4), 1e3, jnp.float32)
    result = noise.poisson_transmission(clean, 50.0, 1.0, key=jax.random.key(0))
    assert result.num_zero == 12
    assert result.noisy.dtype == jnp.float32
    np.testing.assert_allclose(result.noisy, np.log(50.0), rtol=1e-6)


def test_counts_without_a_mean_are_nan():
    draw = jax.jit(noise.poisson_transmission)
    clean = jnp.array([[jnp.nan, 1.0, 2.0]])
    result = draw(clean, 50.0, 1.0, key=jax.random.key(0))
    np.testing.assert_array_equal(np.isnan(result.counts), [[True, False, False]])
    np.testing.assert_array_equal(np.isnan(result.noisy), [[True, False, False]])
    for incident, pixel_size in ((-50.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (50.0, np.nan)):
        result = draw(clean, incident, pixel_size, key=jax.random.key(0))
        assert np.isnan(result.counts).all()
        assert np.isnan(result.noisy).all()
        assert result.num_zero == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("incident", [1e8, 1e10, 1e12])
def test_many_photons_are_counted_without_saturation(incident, dtype):
    clean = np.full((60, 50), 0.5, dtype)
    result = jax.jit(noise.poisson_transmission)(clean, incident, 1.0, key=jax.random.key(0))
    assert result.counts.dtype == dtype
    # the mean as the dtype has it, known to a few roundings beside the sampling error
    mean = incident * np.exp(-0.5)
    error = 5 * np.sqrt(mean / clean.size) + 4 * np.finfo(dtype).eps * mean
    counts = np.asarray(result.counts, np.float64)
    assert abs(counts.mean() - mean) <= error
    rounding = (np.finfo(dtype).eps * mean) ** 2
    variance = 5 * mean * np.sqrt(2 / clean.size) + rounding
    assert abs(counts.var() - mean) <= variance
    np.testing.assert_array_equal(counts, np.round(counts))


def test_background_deviation_estimates_the_noise():
    disc = phantoms.rings_and_discs(num_discs=0)
    angles = jnp.linspace(0, jnp.pi, 30, endpoint=False)
    clean = phantoms.sinogram(disc, angles, 92, 64)
    outside = clean == 0
    for seed in range(3):
        scan = noise.gaussian(clean, 0.05, key=jax.random.key(seed))
        estimate = noise.background_deviation(scan.noisy, outside)
        # the median absolute deviation has 1.65 times the relative error of the sample's
        error = 1.65 / np.sqrt(2 * float(outside.sum()))
        assert estimate == pytest.approx(float(scan.deviation), rel=5 * error)
    assert np.isnan(noise.background_deviation(clean, jnp.zeros_like(outside)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: noise.gaussian(np.ones((4, 3), int), 0.1, key=jax.random.key(0)),
            "gaussian: got sinogram of dtype int64",
        ),
        (
            lambda: noise.gaussian(np.ones((4, 3)), np.ones(3), key=jax.random.key(0)),
            r"gaussian: got level of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: noise.poisson_transmission(
                np.ones((4, 3)), np.ones(3), 0.1, key=jax.random.key(0)
            ),
            r"poisson_transmission: got incident of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: noise.poisson_transmission(
                np.ones((4, 3)), 9.0, np.ones(3), key=jax.random.key(0)
            ),
            r"poisson_transmission: got pixel_size of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: noise.poisson_transmission(
                np.ones((4, 3), int), 9.0, 0.1, key=jax.random.key(0)
            ),
            "poisson_transmission: got sinogram of dtype int64",
        ),
        (
            lambda: noise.background_deviation(np.ones((4, 3)), np.ones((3, 4), bool)),
            r"background_deviation: got mask of shape \(3, 4\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
