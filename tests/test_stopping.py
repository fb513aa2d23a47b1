import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr.federated import coupling, local, protocol, stopping


def record(residual_norms):
    residual_norms = jnp.asarray(residual_norms)
    zeros = jnp.zeros(residual_norms.shape, jnp.int32)
    metrics = local.ReconstructionMetrics(residual_norms**2 / 2, residual_norms)
    return protocol.RoundInfo(metrics.loss, jnp.ones(zeros.shape), zeros, zeros, metrics)


def play(rule, history):
    """Feed a history of residual norms to a rule and list its answers."""
    memory, answers = rule.init(), []
    for residual_norms in history:
        (stop, _), memory = rule.update(record(residual_norms), memory)
        answers.append(bool(stop))
    return answers


def test_pooled_rule_compares_sums_of_squares():
    noise, counts = jnp.array([0.1, 0.2]), jnp.array([100.0, 50.0])
    limit = 100 * 0.1**2 + 50 * 0.2**2
    stop = stopping.discrepancy(noise, counts)
    # One client above its own level is made good by the other.
    assert bool(stop(record([np.sqrt(limit - 1e-6), 0.0])))
    assert not bool(stop(record([np.sqrt(limit - 0.5), 0.8])))
    safer = stopping.discrepancy(noise, counts, kappa=1.1)
    assert bool(safer(record([np.sqrt(1.2 * limit), 0.0])))
    assert not bool(safer(record([np.sqrt(1.22 * limit), 0.0])))


def test_every_client_has_to_be_below_its_own_level():
    stop = stopping.every_client(jnp.array([1.0, 2.0]))
    assert bool(stop(record([1.0, 2.0])))
    assert not bool(stop(record([0.5, 2.1])))


def test_noise_at_its_true_level_is_accepted(rng):
    noise, targets = np.array([0.1, 0.3]), np.zeros((2, 40, 30))
    residuals = noise[:, None, None] * rng.normal(size=targets.shape)
    data = protocol.ClientData((), jnp.asarray(targets), jnp.ones((2, 40), bool))
    counts = stopping.num_measurements(data)
    info = record(np.sqrt((residuals**2).sum(axis=(1, 2))))
    assert bool(stopping.discrepancy(noise, counts, kappa=1.05)(info))
    assert bool(stopping.every_client(stopping.noise_thresholds(noise, counts))(info))
    low = stopping.noise_thresholds(noise, counts, factor=0.9)
    assert not bool(stopping.every_client(low)(info))


def test_measurements_are_counted_and_levels_taken_where_the_mask_shows_them():
    mask = jnp.array([[True, True, False], [True, False, False]])
    targets = jnp.arange(30.0).reshape(2, 3, 5)
    data = protocol.ClientData((), targets, mask)
    np.testing.assert_array_equal(stopping.num_measurements(data), [10, 5])
    expected = 0.1 * np.array([9 * np.sqrt(10), 19 * np.sqrt(5)])
    np.testing.assert_allclose(stopping.noisy_maximum_thresholds(data, 0.1), expected, rtol=1e-14)


def test_background_bins_show_the_noise_through_mask_and_offset(rng):
    levels = np.array([0.1, 0.5])
    sinogram = 3.0 + levels[:, None, None] * rng.normal(size=(2, 300, 40))
    sinogram[:, :, 12:-12] += 100.0
    mask = rng.uniform(size=(2, 300)) < 0.8
    sinogram[~mask] = np.nan
    found = stopping.edge_noise_levels(protocol.ClientData((), sinogram, mask))
    # The standard error of the scaled MAD of n normal numbers is about 1.17 s / sqrt(n).
    np.testing.assert_allclose(found, levels, rtol=5 * 1.17 / np.sqrt(0.8 * 300 * 24))
    with pytest.raises(ValueError, match=r"edge_noise_levels: got num_bins 21, expected"):
        stopping.edge_noise_levels(protocol.ClientData((), sinogram, mask), num_bins=21)


def test_clients_without_data_keep_no_rule_from_firing(rng):
    targets = jnp.asarray(rng.normal(size=(2, 30, 40)))
    data = protocol.ClientData((), targets, jnp.ones((2, 30), bool).at[1].set(False))
    levels = stopping.edge_noise_levels(data)
    thresholds = stopping.noisy_maximum_thresholds(data, 1.0)
    assert levels[1] == thresholds[1] == 0
    info = record([1.0, 0.0])
    assert bool(stopping.discrepancy(levels, stopping.num_measurements(data))(info))
    assert bool(stopping.every_client(thresholds)(info))


def test_stagnation_waits_for_rounds_without_progress():
    rule = stopping.stagnation(tolerance=0.1, patience=2)
    history = [[4.0], [2.0], [1.99], [1.5], [1.49], [1.48], [1.0]]
    assert play(rule, history) == [False, False, False, False, False, True, False]


@pytest.mark.parametrize("patience", [0, -1, 2.5, True])
def test_patience_is_a_positive_integer(patience):
    message = f"got patience {patience}, expected an integer from 1"
    with pytest.raises(ValueError, match=f"^stagnation: {message}"):
        stopping.stagnation(patience=patience)
    with pytest.raises(ValueError, match=f"^corrected: {message}"):
        stopping.corrected(jnp.ones(1), jnp.ones(1), patience=patience)


def test_any_rule_of_several_stops():
    rule = stopping.any_of(stopping.every_client(jnp.array([1.0])), stopping.stagnation(patience=1))
    assert play(rule, [[4.0], [3.0], [0.5]]) == [False, False, True]
    assert play(rule, [[4.0], [4.0]]) == [False, True]
    with pytest.raises(ValueError, match=r"any_of: got no rule"):
        stopping.any_of()


def test_rules_read_the_metrics_of_coupled_rounds_too():
    info = record([1.0, 2.0])
    coupled = info._replace(
        metrics=coupling.CoupledMetrics(jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.zeros(2))
    )
    stop = jax.jit(stopping.every_client(jnp.array([1.5, 2.5])))
    assert bool(stop(coupled))
    assert bool(stop(info))


def test_records_that_do_not_fit_are_refused():
    stop = stopping.every_client(jnp.ones(3))
    with pytest.raises(ValueError, match=r"every_client: got residual_norm of shape \(2,\)"):
        stop(record([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"discrepancy: got metrics of type tuple"):
        stopping.discrepancy(jnp.ones(2), jnp.ones(2))(record([1.0, 2.0])._replace(metrics=()))
    for name in ("discrepancy", "noise_thresholds", "corrected"):
        with pytest.raises(ValueError, match=rf"^{name}: got measurements of shape \(3,\)"):
            getattr(stopping, name)(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"num_measurements: got mask of shape \(2, 4\)"):
        stopping.num_measurements(
            protocol.ClientData((), jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
        )


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], (True, 3, 3)),  # reaches its level
        ([5.0, 4.0, 6.0, 7.0, 1.0], (True, 3, 1)),  # turns round before
        ([9.0, 8.0, 7.0, 6.0, 5.0], (False, 4, 4)),  # neither
    ],
)
def test_replaying_a_rule_tells_where_it_stops_and_what_it_returns(norms, expected):
    infos = record(jnp.array(norms)[:, None])
    rule = stopping.any_of(stopping.every_client(jnp.array([2.0])), stopping.stagnation(patience=2))
    outcome = jax.jit(lambda infos: stopping.replay(rule, infos))(infos)
    assert tuple(np.asarray(outcome).tolist()) == expected


@pytest.mark.parametrize("bad", [-0.2, np.nan])
@pytest.mark.parametrize("name", ["discrepancy", "noise_thresholds", "corrected"])
def test_noise_levels_below_zero_are_refused(name, bad):
    message = rf"^{name}: got noise_levels .*, expected a non-negative number"
    with pytest.raises(ValueError, match=message):
        getattr(stopping, name)(jnp.array([0.1, bad]), jnp.ones(2))
    data = protocol.ClientData((), jnp.ones((1, 3)), jnp.ones((1, 3), bool))
    with pytest.raises(
        ValueError, match=r"noisy_maximum_thresholds: got relative_noise (-0.2|nan)"
    ):
        stopping.noisy_maximum_thresholds(data, bad)


def test_corrected_rule_stops_when_every_client_reaches_its_noise():
    levels, counts = jnp.array([0.1, 0.2]), jnp.array([100.0, 25.0])
    # 1.05 sqrt(m) s is 1.05 for both.
    rule = stopping.corrected(levels, counts)
    assert play(rule, [[4.0, 4.0], [1.04, 1.06], [1.04, 1.04]]) == [False, False, True]
    strict = stopping.corrected(levels, counts, factor=1.0)
    assert play(strict, [[4.0, 4.0], [1.04, 1.04], [0.99, 0.99]]) == [False, False, True]


def test_corrected_rule_stops_at_stagnation_above_the_noise():
    rule = stopping.corrected(jnp.array([0.1]), jnp.array([100.0]), tolerance=0.1, patience=3)
    history = [[4.0], [3.0], [2.99], [2.98], [2.97], [2.96]]
    assert play(rule, history) == [False, False, False, False, True, True]


def verdicts(rule, history):
    memory, answers = rule.init(), []
    for residual_norms in history:
        verdict, memory = rule.update(record(residual_norms), memory)
        answers.append((bool(verdict.stop), bool(verdict.best)))
    return answers


def test_best_state_is_the_smallest_residual_or_that_of_the_rule_that_fired():
    falling_then_rising = [[3.0], [2.0], [2.5], [2.6], [1.9]]
    stagnation = stopping.stagnation(tolerance=0.01, patience=2)
    assert verdicts(stagnation, falling_then_rising) == [
        (False, True),
        (False, True),
        (False, False),
        (True, False),
        (False, True),
    ]
    level = stopping.every_client(jnp.array([2.55]))
    assert verdicts(stopping.as_rule(level), falling_then_rising)[:3] == [
        (False, False),
        (True, True),
        (True, True),
    ]
    # Together: whichever calls a round its best, and whichever stops.
    both = stopping.any_of(stagnation, stopping.every_client(jnp.array([1.95])))
    assert verdicts(both, falling_then_rising) == [
        (False, True),
        (False, True),
        (False, False),
        (True, False),
        (True, True),
    ]


def test_rules_stay_rules_and_their_memory_is_a_pytree_for_scan():
    rule = stopping.corrected(jnp.array([0.1]), jnp.array([100.0]), patience=2)
    assert stopping.as_rule(rule) is rule

    @jax.jit
    def stops(norms):
        def step(memory, norm):
            verdict, memory = rule.update(record(norm[None]), memory)
            return memory, verdict.stop

        return jax.lax.scan(step, rule.init(), norms)[1]

    np.testing.assert_array_equal(
        stops(jnp.array([3.0, 2.0, 2.0, 2.0, 1.0])), [False, False, False, True, True]
    )


def test_settled_needs_every_image_at_rest():
    def changing(change):
        zeros = jnp.zeros(len(change))
        return record(zeros)._replace(metrics=coupling.CoupledMetrics(zeros, zeros, change))

    stop = stopping.settled(tolerance=1e-3)
    assert bool(stop(changing(jnp.array([1e-3, 0.0]))))
    assert not bool(stop(changing(jnp.array([1.1e-3, 0.0]))))
    assert not bool(stop(changing(jnp.array([jnp.nan, 0.0]))))
    with pytest.raises(ValueError, match=r"settled: got metrics .*, expected a field change"):
        stop(record([1.0, 2.0]))
