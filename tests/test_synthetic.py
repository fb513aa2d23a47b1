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
    for dtype in (jnp.float32, int):
        message = (
            rf"scan_phantoms: got coefficients of dtype {jnp.dtype(dtype)}, expected .*float64"
        )
        with pytest.raises(ValueError, match=message):
            synthetic.scan_phantoms(
                GEOMETRY, ellipses, weights.astype(dtype), ANGLES, sigma=0.1, key=key
            )
    with pytest.raises(ValueError, match=r"scan_phantoms: got angles of dtype float32, expected"):
        synthetic.scan_phantoms(
            GEOMETRY, ellipses, weights, ANGLES.astype(jnp.float32), sigma=0.1, key=key
        )
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
        (
            {"coefficients": jnp.ones(0)},
            r"got number of coefficients 0, expected an integer from 1",
        ),
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


LINKED_SHAPES, LINKED_RANKS = ((10, 6, 4), (10, 5), (10, 3, 2, 2)), (1, 0, 2)


def drawn(snr, key, *, dtype=jnp.float64):
    return synthetic.linked_tensors(
        LINKED_SHAPES,
        shared_rank=2,
        individual_ranks=LINKED_RANKS,
        snr=snr,
        key=key,
        dtype=dtype,
    )


draw_linked = jax.jit(drawn, static_argnames="dtype")


def ratio(noisy, clean):
    return float(jnp.var(clean) / jnp.var(noisy - clean))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linked_tensors_have_the_signal_to_noise_ratio(seed):
    data = draw_linked(3.0, jax.random.key(seed))
    assert tuple(x.shape for x in data.tensors) == LINKED_SHAPES
    for x, signal in zip(data.tensors, data.signals, strict=True):
        np.testing.assert_allclose(ratio(x, signal), 3.0, rtol=1e-12)
    data = draw_linked(jnp.inf, jax.random.key(seed))
    for x, signal in zip(data.tensors, data.signals, strict=True):
        np.testing.assert_array_equal(x, signal)


def test_signals_of_linked_tensors_are_those_of_the_model():
    data = draw_linked(1.0, jax.random.key(0))
    first, own = data.truth
    assert first.shape == (10, 2 + sum(LINKED_RANKS))
    columns = [np.array([0, 1]), np.array([2]), np.array([], int), np.array([3, 4])]
    for k, factors in enumerate(own):
        modes = "bcd"[: len(factors)]
        formula = f"ar,{','.join(mode + 'r' for mode in modes)}->a{modes}"

        def part(chosen, factors=factors, formula=formula):
            return np.einsum(formula, first[:, chosen], *(factor[:, chosen] for factor in factors))

        for found, chosen in (
            (data.shared[k], columns[0]),
            (data.individual[k], columns[1 + k]),
            (data.signals[k], np.arange(5)),
        ):
            np.testing.assert_allclose(found, part(chosen), rtol=0, atol=1e-12)
        others = np.setdiff1d(np.arange(5), [*columns[0], *columns[1 + k]])
        for factor in factors:
            np.testing.assert_array_equal(factor[:, others], 0)


def test_factors_of_linked_tensors_are_standard_normal_draws():
    """Mean and variance of all numbers, within four standard deviations of theirs."""
    truths = [draw_linked(1.0, jax.random.key(seed)).truth for seed in range(30)]
    first, own = jax.tree.map(lambda *leaves: np.stack(leaves), *truths)
    for draws in (first, own[0][1][..., :3], own[2][0][..., [0, 1, 3, 4]]):
        assert abs(draws.mean()) < 4 / np.sqrt(draws.size)
        assert abs(draws.var() - 1) < 4 * np.sqrt(2 / draws.size)


def test_the_key_decides_linked_tensors():
    data, again = (draw_linked(1.0, jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, data, again)
    other = draw_linked(1.0, jax.random.key(1))
    for a, b in zip(jax.tree.leaves(data), jax.tree.leaves(other), strict=True):
        assert (a != b).any() or not (a.any() or b.any())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_tensors_have_the_dtype_that_is_asked_for(dtype):
    data = jax.eval_shape(lambda key: drawn(1.0, key, dtype=dtype), jax.random.key(0))
    one = jax.eval_shape(
        lambda key: synthetic.cp_tensor((4, 3), 2, snr=1.0, key=key, dtype=dtype),
        jax.random.key(0),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((data, one))} == {jnp.dtype(dtype)}


def test_a_cp_tensor_is_its_model_with_the_noise_asked_for():
    draw = jax.jit(
        lambda snr, key: synthetic.cp_tensor((6, 5, 4), 2, snr=snr, key=key, dtype=jnp.float64)
    )
    for seed in range(3):
        data = draw(0.5, jax.random.key(seed))
        expected = np.einsum("r,ar,br,cr->abc", data.truth.weights, *data.truth.factors)
        np.testing.assert_allclose(data.signal, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(ratio(data.tensor, data.signal), 0.5, rtol=1e-12)
    np.testing.assert_array_equal(data.tensor, draw(0.5, jax.random.key(2)).tensor)
    assert (data.tensor != draw(0.5, jax.random.key(1)).tensor).all()


@pytest.mark.parametrize(
    ("shapes", "samples", "entries", "num_samples", "worth"),
    [
        (((21, 6, 5), (21, 7)), 0.05, 0.05, 2, 2),
        (((10, 4), (10, 2, 3), (10, 5)), 0.5, 0.3, 5, 3),
        # 0.07 * 100 is 7 and a little more.
        (((100, 3), (100, 4)), 0.07, 0.0, 7, 0),
        (((9, 4, 3),), 0.0, 0.1, 0, 1),
    ],
)
def test_masks_hide_what_they_are_asked_to(shapes, samples, entries, num_samples, worth):
    @jax.jit
    @jax.vmap
    def draw(key):
        return synthetic.missing_masks(
            shapes, sample_fraction=samples, entry_fraction=entries, key=key
        )

    keys = jax.random.split(jax.random.key(0), 20)
    masks = [np.asarray(mask) for mask in draw(keys)]
    gone = []
    for mask, shape in zip(masks, shapes, strict=True):
        assert mask.dtype == bool
        assert mask.shape[1:] == shape
        cells = int(np.prod(shape[1:]))
        gone.append(~mask.reshape(20, shape[0], cells).any(axis=2))
        np.testing.assert_array_equal(gone[-1].sum(axis=1), num_samples)
        np.testing.assert_array_equal(
            (~mask).reshape(20, -1).sum(axis=1), (num_samples + worth) * cells
        )
    assert not np.logical_and.reduce(gone).any()
    # Every key draws its own; where a half is hidden, every sample is at times.
    assert len({row.tobytes() for row in masks[0]}) > 10
    if 2 * num_samples == shapes[0][0]:
        assert all(rows.any(axis=0).all() for rows in gone)
    for ours, theirs in zip(masks, draw(keys), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ()}, r"got shapes \(\), expected one or more"),
        ({"shapes": ((4, 3), (4,))}, r"got shape \(4,\), expected two modes"),
        ({"shapes": ((4, 3), (4, 0))}, r"got shape \(4, 0\), expected two modes"),
        ({"shapes": ((4, 3), (4, 2.5))}, "got size 2.5, expected an integer from 1"),
        ({"shapes": ((4, 3), (5, 3))}, r"got shape \(5, 3\), expected 4 samples in mode 0"),
        ({"individual_ranks": (1,)}, r"got individual_ranks \(1,\), expected 2, one for every"),
        ({"shared_rank": 0}, "got individual rank 0, expected an integer from 1"),
        ({"shared_rank": -1}, "got shared_rank -1, expected an integer from 0"),
        ({"snr": 0.0}, "got snr 0.0, expected a positive number"),
        ({"snr": jnp.ones(2)}, r"got snr of shape \(2,\), expected 0 axes"),
        ({"dtype": int}, "got dtype .*, expected float32 or float64"),
    ],
)
def test_bad_linked_designs_are_refused(changes, message):
    options = {
        "shapes": ((4, 3), (4, 2, 2)),
        "shared_rank": 1,
        "individual_ranks": (0, 1),
        "snr": 1.0,
        "key": jax.random.key(0),
    } | changes
    with pytest.raises(ValueError, match=f"^linked_tensors: {message}"):
        synthetic.linked_tensors(options.pop("shapes"), **options)


def test_bad_masks_and_cp_tensors_are_refused():
    key, shapes = jax.random.key(0), ((4, 3), (4, 2))
    for options, message in (
        ({"sample_fraction": 1.5}, "got sample_fraction 1.5, expected a fraction"),
        ({"entry_fraction": -0.5}, "got entry_fraction -0.5, expected a fraction"),
        ({"sample_fraction": 0.6}, "got 3 of 4 samples to hide in each of 2 tensors"),
        ({"entry_fraction": 0.5}, r"got 4 entries to hide beside 1 samples of shape \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"^missing_masks: {message}"):
            synthetic.missing_masks(shapes, key=key, **options)
    with pytest.raises(ValueError, match="got 1 of 4 samples to hide in each of 1 tensors"):
        synthetic.missing_masks(shapes[:1], key=key)
    for shape, rank, message in (((4,), 1, r"got shape \(4,\)"), ((4, 3), 0, "got rank 0")):
        with pytest.raises(ValueError, match=f"^cp_tensor: {message}"):
            synthetic.cp_tensor(shape, rank, snr=1.0, key=key)
