import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import noise, phantoms, synthetic, tomography
from fedlr.federated import protocol, stopping


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


difference_deviation = jax.jit(noise.difference_deviation)


def naive_difference_deviation(measurements, mask):
    """Collect the triples one by one."""
    found = []
    for row, seen in zip(measurements, mask, strict=True):
        for i in range(3, len(row) - 3):
            if seen[i - 3 : i + 4].all():
                around = row[[i - 3, i - 2, i + 2, i + 3]]
                second = abs(row[i - 1] - 2 * row[i] + row[i + 1])
                found.append((np.ptp(around), second))
    roughness, second = np.array(found).T
    smooth = roughness <= np.median(roughness)
    return 1.4826 * np.median(second[smooth]) / np.sqrt(6)


def test_difference_deviation_equals_a_loop_over_triples(rng):
    values = rng.standard_normal((6, 20))
    mask = rng.random((6, 20)) < 0.9
    everything = np.ones_like(mask)
    for seen in (everything, mask):
        expected = naive_difference_deviation(values, seen)
        np.testing.assert_allclose(difference_deviation(values, seen), expected, rtol=1e-12)
    np.testing.assert_array_equal(
        difference_deviation(values), difference_deviation(values, everything)
    )
    views = np.arange(6) % 2 == 0
    np.testing.assert_allclose(
        difference_deviation(values, views), difference_deviation(values[views]), rtol=1e-12
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_difference_deviation_of_white_noise_is_unbiased(seed):
    values = np.random.default_rng(seed).standard_normal((200, 150))
    # Half the triples; the median absolute deviation has 1.65 times the relative error of the
    # sample's, and second differences overlap: sum of squared correlations 1.94.
    error = 1.65 * np.sqrt(1.94 / values.size)
    assert difference_deviation(values) == pytest.approx(1, abs=4 * error)


def test_difference_deviation_scales_and_ignores_what_is_smooth(rng):
    values = rng.standard_normal((5, 40))
    slope = np.linspace(-1, 1, 40)[None] * np.arange(5)[:, None] + 3.0
    expected = difference_deviation(values)
    np.testing.assert_allclose(difference_deviation(-2.0 * values), 2.0 * expected, rtol=1e-12)
    np.testing.assert_allclose(difference_deviation(slope), 0, atol=1e-14)
    # the slope changes which triples are taken, hardly what they say
    assert difference_deviation(values + slope) == pytest.approx(float(expected), rel=0.2)


def test_difference_deviation_finds_the_noise_of_scans():
    geometry = tomography.ParallelBeam(shape=(100, 100), num_bins=142)
    angles = synthetic.uniform_angles(40, dtype=jnp.float64)

    @jax.jit
    def relative_errors(sigma, key):
        scans = synthetic.multimodal_scans(geometry, angles, sigma=sigma, key=key)
        mask = jnp.ones(scans.sinograms.shape[:2], bool)
        edges = stopping.edge_noise_levels(protocol.ClientData((), scans.sinograms, mask))
        found = jax.vmap(noise.difference_deviation)(scans.sinograms)
        return found / scans.noise_levels - 1, edges / scans.noise_levels - 1

    for sigma, mean, largest in ((0.01, 0.04, 0.1), (0.05, 0.02, 0.08)):
        runs = [relative_errors(sigma, jax.random.key(seed)) for seed in range(3)]
        errors, edges = np.moveaxis(np.array(runs), 1, 0)
        assert abs(errors.mean()) <= mean
        assert np.abs(errors).max() <= largest
        assert np.sqrt((errors**2).mean()) <= np.sqrt((edges**2).mean())


def test_difference_deviation_ignores_hidden_values_and_shows_others(rng):
    values = rng.standard_normal((6, 30))
    mask = np.ones((6, 30), bool)
    mask[2, 4] = False
    expected = difference_deviation(values, mask)
    for garbage in (np.nan, np.inf, 1e9):
        values[2, 4] = garbage
        np.testing.assert_array_equal(difference_deviation(values, mask), expected)
    values[2, 4] = np.nan
    assert np.isnan(difference_deviation(values))


def test_difference_deviation_needs_seven_measurements_in_a_row():
    values = np.arange(14.0).reshape(2, 7) ** 3
    alternating = np.arange(7) % 4 != 3
    assert np.isfinite(difference_deviation(values))
    assert np.isfinite(difference_deviation(values[0]))
    assert np.isnan(difference_deviation(values, np.tile(alternating, (2, 1))))
    assert np.isnan(difference_deviation(values, np.zeros(2, bool)))
    assert np.isnan(difference_deviation(values[:, :6]))
    assert np.isnan(difference_deviation(values[:0]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_difference_deviation_keeps_dtype_and_maps_over_clients(rng, dtype):
    values = rng.standard_normal((3, 4, 5, 20)).astype(dtype)
    mask = rng.random((3, 4, 5)) < 0.7
    batch = jax.jit(jax.vmap(noise.difference_deviation))(values, mask)
    assert batch.dtype == dtype
    expected = [difference_deviation(v, m) for v, m in zip(values, mask, strict=True)]
    np.testing.assert_array_equal(batch, expected)
    assert difference_deviation(values[..., :3]).dtype == dtype


def test_a_traced_negative_level_passes():
    clean = jnp.full((3, 4), 2.0)
    draw = jax.jit(noise.gaussian)
    assert draw(clean, -0.1, key=jax.random.key(0)).deviation == pytest.approx(-0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: noise.gaussian(np.ones((4, 3), int), 0.1, key=jax.random.key(0)),
            "gaussian: got sinogram of dtype int64",
        ),
        (
            lambda: noise.gaussian(np.ones((4, 3)), -0.1, key=jax.random.key(0)),
            "gaussian: got level -0.1, expected a non-negative number",
        ),
        (
            lambda: noise.gaussian(np.ones((4, 3)), np.nan, key=jax.random.key(0)),
            "gaussian: got level nan, expected a non-negative number",
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
        (
            lambda: noise.difference_deviation(np.ones((4, 9)), np.ones((9, 4), bool)),
            r"difference_deviation: got mask of shape \(9, 4\), expected shape \(4, 9\)",
        ),
        (
            lambda: noise.difference_deviation(np.ones((4, 9)), np.ones(4)),
            "difference_deviation: got mask of dtype float64, expected bool",
        ),
        (
            lambda: noise.difference_deviation(np.ones((4, 9), complex)),
            "difference_deviation: got measurements of dtype complex128",
        ),
        (
            lambda: noise.difference_deviation(np.array(1.0)),
            r"difference_deviation: got measurements of shape \(\), expected at least one axis",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
