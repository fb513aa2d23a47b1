import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats

from fedlr import lowrank
from fedlr.federated import aggregators, compressors, privacy, protocol, rounds, servers
from fedlr.federated import clients as clients_

# Clients of a round; the one at index 2 has no examples.
NUM_CLIENTS, EMPTY = 5, 2
POISSON = functools.partial(privacy.poisson_epsilon, rate=0.01)
FIXED_SIZE = functools.partial(privacy.fixed_size_epsilon, cohort_size=10, num_clients=1000)


def norm(update):
    return math.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(update)))


def naive_clip(update, max_norm):
    length = norm(update)
    factor = 1.0 if length <= max_norm else max_norm / length
    return jax.tree.map(lambda leaf: factor * np.float64(leaf), update)


def row(tree, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def add(*updates):
    return jax.tree.map(lambda *leaves: sum(np.float64(leaf) for leaf in leaves), *updates)


def assert_close(tree, expected, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), tree, expected)


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


# Clipping.

clip_rows = jax.jit(lambda rows: jax.vmap(lambda update: privacy.clip(update, 0.7))(rows))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_clipped_norms_are_at_most_the_limit(rng, dtype):
    """From sizes whose squares are zero to those whose squares are infinite."""
    sizes = np.float64(10.0) ** np.array([-36, -20, -2, -1, 0, 1, 2, 20, 37])
    rows = {"a": rng.normal(size=(9, 3, 4)), "b": rng.normal(size=9)}
    rows = {key: (leaf.T * sizes).T.astype(dtype) for key, leaf in rows.items()}
    clipped = clip_rows(rows)
    eps = float(jnp.finfo(dtype).eps)
    for i in range(len(sizes)):
        update, result = row(rows, i), row(clipped, i)
        assert norm(result) <= 0.7 * (1 + 4 * eps)
        assert_close(result, naive_clip(update, 0.7), rtol=4 * eps)
        if norm(update) < 0.7:
            assert_equal(result, update)
    assert clipped["a"].dtype == dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_becomes_zero(rng, bad):
    rows = {"a": rng.normal(size=(9, 3, 4)), "b": rng.normal(size=9)}
    expected = [naive_clip(row(rows, i), 0.7) for i in range(9)]
    for i in (4, 7):
        expected[i] = jax.tree.map(np.zeros_like, expected[i])
    rows["a"][4, 1, 2] = bad
    rows["b"][7] = bad
    clipped = clip_rows(rows)
    for i in range(9):
        assert_close(row(clipped, i), expected[i], rtol=1e-14)


def test_updates_of_two_dtypes_are_clipped_together(rng):
    update = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "b": jnp.asarray(rng.normal())}
    clipped = jax.jit(privacy.clip)(update, 0.5)
    assert clipped["a"].dtype == jnp.float32
    assert clipped["b"].dtype == jnp.float64
    assert_close(clipped, naive_clip(update, 0.5), rtol=1e-6)


def test_derivatives_of_clipping_are_those_of_its_formula(rng):
    """d for ||d|| < C, C d / ||d|| beyond, and finite where a norm or a NaN has none."""
    direction = rng.normal(size=4)
    points = np.stack([0.1 * direction, 3 * direction, np.zeros(4), np.full(4, np.nan)])
    length = np.linalg.norm(3 * direction)
    unit = 3 * direction / length
    beyond = 0.7 * (np.eye(4) - np.outer(unit, unit)) / length
    for derivative in (jax.jacfwd, jax.jacrev):
        jacobians = jax.jit(jax.vmap(derivative(lambda x: privacy.clip(x, 0.7))))(points)
        expected = [np.eye(4), beyond, np.eye(4), np.zeros((4, 4))]
        np.testing.assert_allclose(jacobians, expected, rtol=1e-13, atol=1e-15)


# The sum that the aggregator makes.

MECHANISM = privacy.gaussian_mechanism(0.5, 2.0, clients_per_round=NUM_CLIENTS)


@jax.jit
def clipped_total(messages, weights):
    """Sum updates that are decoded to ten times what was sent."""

    def decompress(message):
        return jax.tree.map(lambda leaf: 10 * leaf, message)

    summed, _ = MECHANISM.aggregator.aggregate(messages, weights, (), decompress=decompress)
    return summed.total


@pytest.fixture
def messages(rng):
    return {"a": rng.normal(size=(6, 3, 4)), "b": rng.normal(size=6)}


def test_what_is_clipped_is_what_the_server_decodes(messages):
    weights = np.array([1.0, 0, 1, 1, 0, 1])
    decoded = jax.tree.map(lambda leaf: 10 * leaf, messages)
    expected = add(*(naive_clip(row(decoded, i), 0.5) for i in range(6) if weights[i]))
    assert_close(clipped_total(messages, weights), expected, rtol=1e-13)


@pytest.mark.parametrize("replacement", [0.0, 1e-3, 1.0, -1e200, np.nan, np.inf])
def test_one_client_changes_the_sum_by_no_more_than_its_share(messages, replacement):
    """By C if its update is taken away, by 2 C if it is replaced."""
    weights = np.ones(6)
    total = clipped_total(messages, weights)
    for i in range(6):
        others = {key: leaf.copy() for key, leaf in messages.items()}
        for leaf in others.values():
            leaf[i] = replacement * leaf[i]
        change = norm(jax.tree.map(np.subtract, total, clipped_total(others, weights)))
        taken = replacement == 0 or not math.isfinite(replacement)
        assert change <= (0.5 if taken else 1.0) * (1 + 1e-13)
        absent = np.where(np.arange(6) == i, 0.0, 1.0)
        change = norm(jax.tree.map(np.subtract, total, clipped_total(messages, absent)))
        np.testing.assert_allclose(change, 0.5, rtol=1e-13)


def test_weights_say_only_who_is_there(messages):
    weights = np.array([3.0, 0.0, 1e9, 1e-9, 0.5, 7.0])
    assert_equal(clipped_total(messages, weights), clipped_total(messages, np.sign(weights)))


def test_what_the_absent_hold_is_ignored(messages):
    weights = np.array([1.0, 0, 1, 1, 0, 1])
    total = clipped_total(messages, weights)
    for leaf in messages.values():
        leaf[1], leaf[4] = np.nan, 1e300
    assert_equal(clipped_total(messages, weights), total)


# The noise that the server adds.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_noise_is_gaussian_and_of_the_stated_deviation(dtype):
    like = {"a": jnp.zeros((2, 3), dtype), "b": jnp.ones((), dtype)}

    def draw(key):
        summed = privacy.ClippedSum(jax.tree.map(lambda leaf: 10 * leaf, like))
        return MECHANISM.server.apply(like, summed, MECHANISM.server.init(like), key=key)[0]

    params = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), 2000))
    assert params["a"].dtype == params["b"].dtype == dtype
    # Of the sum: z C = 1; of the mean: a fifth. Params and mean of "b" are 1 and 10 / 5.
    noise = np.concatenate([params["a"].reshape(2000, 6), params["b"][:, None] - 3], axis=1)
    np.testing.assert_allclose(np.std(noise, axis=0), 0.2, rtol=0.05)
    # Means and correlations of 2000 draws have a deviation of 2000^-1/2; four of these.
    np.testing.assert_allclose(np.mean(noise, axis=0), 0, atol=4 * 0.2 / math.sqrt(2000))
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(7), atol=4 / math.sqrt(2000))
    assert scipy.stats.kstest(noise.ravel() / 0.2, "norm").pvalue > 0.01


@jax.jit
def noise_and_other_draws(key):
    """Return the noise of a server, and draws with the other keys of the round and their like."""

    def apply(params, update, state, *, key):
        return params + update, key

    def children(keys):
        folded = [jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i) for i in range(4)]
        return jnp.concatenate(
            [jax.vmap(lambda key: jax.random.split(key, 4))(keys).ravel(), *folded]
        )

    inner = protocol.ServerUpdate(lambda _: (), apply)
    server = privacy.gaussian_mechanism(1.0, 1.0, clients_per_round=1, server=inner).server
    client_key, server_key, arrival_key = jax.random.split(key, 3)  # as `compose` does
    total = privacy.ClippedSum(jnp.zeros(3))
    noise, inner_key = server.apply(jnp.zeros(3), total, (), key=server_key)
    keys = [jnp.stack([inner_key, arrival_key, client_key])]
    for _ in range(3):
        keys.append(children(keys[-1]))
    draws = jax.vmap(lambda key: jax.random.normal(key, 3))(jnp.concatenate(keys))
    return noise[None], draws


def test_no_other_key_of_the_round_gives_the_noise(key):
    """Whoever sees what the inner server draws, e.g. fresh factors, must not know the noise."""
    noise, draws = noise_and_other_draws(key)
    assert len(draws) == 3 * (1 + 8 + 8**2 + 8**3)
    assert np.abs(draws - noise).max(axis=1).min() > 1e-3
    # With two keys the same, no draw of the inner server would be free of the others.
    assert len(np.unique(draws[:3], axis=0)) == 3


# Whole rounds.


def arrivals(cohort, clients, *, key):
    return clients.inputs[cohort]


def local_update(params, state, data, *, key):
    seen = jnp.where(data.mask, data.targets, 0.0)
    return {"b": jnp.sum(seen), "w": seen}, state, {"loss": jnp.sum(params["w"])}


def build(parts, *, compressor=None, **options):
    compressor = compressors.identity() if compressor is None else compressor
    return rounds.compose(local_update, compressor=compressor, **parts._asdict(), **options)


@functools.partial(jax.jit, static_argnums=0)
def do_round(algorithm, state, data, cohort, key):
    return algorithm.round(state, data, cohort, key=key)


@pytest.fixture
def data(rng):
    mask = rng.random((NUM_CLIENTS, 4, 3)) < 0.7
    mask[EMPTY] = False
    targets, here = jnp.asarray(rng.normal(size=mask.shape)), jnp.ones(NUM_CLIENTS, bool)
    return protocol.ClientData(here, targets, jnp.asarray(mask))


@pytest.fixture
def updates(data):
    seen = np.where(data.mask, data.targets, 0)
    return [{"b": update.sum(), "w": update} for update in seen]


def start(algorithm, data):
    params = {"b": jnp.zeros(()), "w": jnp.zeros((4, 3))}
    return algorithm.init(params, data, key=jax.random.key(0))


EVERYONE = np.arange(NUM_CLIENTS, dtype=np.int32)
NOISY = build(MECHANISM, arrivals=arrivals)


def test_without_noise_and_limit_it_is_the_unweighted_average(data):
    """With any server, here one with a memory."""
    server = servers.from_optax(optax.sgd(1.0, momentum=0.9))
    private = build(
        privacy.gaussian_mechanism(1e6, 0.0, clients_per_round=NUM_CLIENTS, server=server)
    )
    average = rounds.compose(
        local_update,
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=server,
        client_weights=lambda clients: jnp.ones(clients_.num_clients(clients)),
    )
    states = [start(algorithm, data) for algorithm in (private, average)]
    for t in range(2):
        key = jax.random.key(t)
        states = [
            do_round(algorithm, state, data, EVERYONE, key)[0]
            for algorithm, state in zip((private, average), states, strict=True)
        ]
    assert_close(states[0].params, states[1].params, rtol=1e-13)
    assert_close(states[0].server.server, states[1].server.server, rtol=1e-13)
    assert norm(states[0].params) > 0


def test_a_round_adds_the_noise_to_the_sum_of_clipped_updates(data, updates, key):
    first, info = do_round(NOISY, start(NOISY, data), data, EVERYONE, key)
    empty = data._replace(mask=jnp.zeros_like(data.mask))
    noise, _ = do_round(NOISY, start(NOISY, empty), empty, EVERYONE, key)
    mean = jax.tree.map(lambda leaf: leaf / 5, add(*(naive_clip(each, 0.5) for each in updates)))
    assert_close(first.params, add(noise.params, mean), rtol=1e-12, atol=1e-14)
    assert norm(noise.params) > 0.1
    # The client without examples counts as the others do.
    np.testing.assert_array_equal(info.weights, np.ones(NUM_CLIENTS))
    np.testing.assert_array_equal(info.uplink_bytes, np.full(NUM_CLIENTS, 13 * 8))


def test_the_order_of_the_clients_changes_nothing(data, key):
    state, _ = do_round(NOISY, start(NOISY, data), data, EVERYONE, key)
    order = np.array([3, 1, 4, 0, 2], np.int32)
    mixed, _ = do_round(NOISY, start(NOISY, data), data, order, key)
    assert_close(mixed.params, state.params, rtol=1e-12, atol=1e-14)


def test_a_lost_message_takes_away_its_update_and_leaves_the_scale(data, updates, key):
    """Noise and denominator stay those of five."""
    state, _ = do_round(NOISY, start(NOISY, data), data, EVERYONE, key)
    without = data._replace(inputs=data.inputs.at[1].set(False))
    lost, info = do_round(NOISY, start(NOISY, data), without, EVERYONE, key)
    np.testing.assert_array_equal(info.weights, [1, 0, 1, 1, 1])
    share = jax.tree.map(lambda leaf: leaf / 5, naive_clip(updates[1], 0.5))
    assert_close(add(lost.params, share), state.params, rtol=1e-12, atol=1e-14)


def test_a_round_in_which_nobody_arrives_has_the_noise_of_any_other(data, updates, key):
    state = start(NOISY, data)
    nobody = data._replace(inputs=jnp.zeros_like(data.inputs))
    noise, info = do_round(NOISY, state, nobody, EVERYONE, key)
    np.testing.assert_array_equal(info.weights, 0)
    after, _ = do_round(NOISY, state, data, EVERYONE, key)
    mean = jax.tree.map(lambda leaf: leaf / 5, add(*(naive_clip(each, 0.5) for each in updates)))
    assert_close(add(noise.params, mean), after.params, rtol=1e-12, atol=1e-14)


def test_a_round_in_which_nobody_arrives_is_one_of_the_inner_server(data, key):
    server = servers.from_optax(optax.adam(0.1))
    private = privacy.gaussian_mechanism(0.5, 2.0, clients_per_round=5, server=server)
    stacked = private._replace(aggregator=private.aggregator._replace(fold=None))
    nobody = data._replace(inputs=jnp.zeros_like(data.inputs))
    for mechanism in (private, stacked):
        algorithm = build(mechanism)
        state, _ = do_round(algorithm, start(algorithm, data), nobody, EVERYONE, key)
        # The first step of Adam has the size of the rate.
        steps = jax.tree.map(lambda leaf: jnp.abs(leaf) - 0.1, state.params)
        assert_close(steps, jax.tree.map(jnp.zeros_like, steps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_program_serves_several_budgets(data, key, dtype):
    """Traced numbers of either dtype give what plain ones do."""

    def params_after_a_round(norm, multiplier, count):
        algorithm = build(privacy.gaussian_mechanism(norm, multiplier, clients_per_round=count))
        state, _ = algorithm.round(start(algorithm, data), data, EVERYONE, key=key)
        return state.params

    numbers = np.array([[0.5, 0.0, 5.0], [0.5, 2.0, 5.0], [0.25, 1.0, 3.0]])
    found = jax.jit(jax.vmap(params_after_a_round))(*jnp.asarray(numbers.T, dtype))
    plain = jax.jit(params_after_a_round, static_argnums=(0, 1, 2))
    for i, own in enumerate(numbers.tolist()):
        assert_close(row(found, i), plain(*own), rtol=1e-12, atol=1e-14)


def test_it_goes_with_a_lossy_compressor_and_error_feedback(data, updates, key):
    """The residual holds what the compressor left out, not what clipping did."""
    private = privacy.gaussian_mechanism(0.5, 0.0, clients_per_round=NUM_CLIENTS)
    patient = compressors.error_feedback(compressors.top_k(3))
    algorithm = build(private, compressor=patient)
    state, _ = do_round(algorithm, start(algorithm, data), data, EVERYONE, key)
    decoded, residuals = [], []
    for update in updates:
        largest = np.abs(update["w"]) >= np.sort(np.abs(update["w"]), axis=None)[-3]
        decoded.append({"b": update["b"], "w": np.where(largest, update["w"], 0)})
        residuals.append(np.where(largest, 0, update["w"]))
    mean = jax.tree.map(lambda leaf: leaf / 5, add(*(naive_clip(each, 0.5) for each in decoded)))
    assert_close(state.params, mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(state.clients.compressor.residual["w"], residuals)


def test_it_goes_with_the_server_of_low_rank_updates(data, key):
    server = servers.accumulate_low_rank(1)

    def update_factors(params, state, data, *, key):
        ones = jax.tree.map(jnp.ones_like, lowrank.trainable(params))
        return ones, state, {"loss": jnp.sum(data.targets)}

    private = privacy.gaussian_mechanism(1.0, 1.0, clients_per_round=5, server=server)
    algorithm = rounds.compose(
        update_factors, compressor=compressors.identity(), **private._asdict()
    )
    model = lowrank.adapt({"w": jnp.zeros((8, 6)), "b": jnp.zeros(3)}, 1, key=key)
    state = jax.eval_shape(functools.partial(algorithm.init, key=key), model, data)
    after, _ = jax.eval_shape(
        functools.partial(algorithm.round, cohort=EVERYONE, key=key), state, data
    )
    assert after == state


def test_the_parts_only_work_together(data, key):
    wrong = [MECHANISM._replace(aggregator=aggregators.weighted_mean())]
    wrong += [MECHANISM._replace(server=servers.from_optax(optax.sgd(1.0)))]
    for parts, message in zip(wrong, ["own aggregator", "ClippedSum"], strict=True):
        algorithm = build(parts)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                functools.partial(algorithm.round, cohort=EVERYONE, key=key),
                start(algorithm, data),
                data,
            )


# Accounting.


def convert(divergence, order, delta):
    """Canonne et al. 2020, Proposition 12."""
    return (
        divergence
        + math.log((order - 1) / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
    )


def exact_epsilon(noise_multiplier, num_rounds, delta):
    """Balle and Wang 2018, arXiv 1805.06530, Theorem 8."""
    mu = math.sqrt(num_rounds) / noise_multiplier
    normal = scipy.stats.norm

    def excess(epsilon):
        low = math.exp(epsilon + normal.logcdf(-mu / 2 - epsilon / mu))
        return normal.cdf(mu / 2 - epsilon / mu) - low - delta

    return scipy.optimize.brentq(excess, 0, 1e4)


RUNS = [(5.0, 50, 1e-3), (1.0, 1, 1e-5), (0.3, 2, 1e-6), (20.0, 7, 1e-5), (100.0, 10_000, 1e-8)]


@pytest.mark.parametrize(("noise_multiplier", "num_rounds", "delta"), RUNS)
def test_epsilon_is_the_least_of_all_orders_and_above_the_exact_one(
    noise_multiplier, num_rounds, delta
):
    epsilon = privacy.gaussian_epsilon(noise_multiplier, num_rounds, delta)
    slope = num_rounds / (2 * noise_multiplier**2)
    least = scipy.optimize.minimize_scalar(
        lambda t: convert(slope * (1 + math.exp(t)), 1 + math.exp(t), delta),
        bounds=(-8, 8),
        method="bounded",
        options={"xatol": 1e-10},
    ).fun
    # The grid has steps of 0.05 %, and an error quadratic in them.
    np.testing.assert_allclose(epsilon, least, rtol=1e-6)
    classical = slope + math.sqrt(4 * slope * math.log(1 / delta))
    assert exact_epsilon(noise_multiplier, num_rounds, delta) < epsilon < classical


def test_published_epsilons_of_full_participation():
    """With integer orders only they were 5.499 and 4.753."""
    assert privacy.gaussian_epsilon(5.0, 50, 1e-3) == pytest.approx(5.420, abs=1e-3)
    assert privacy.gaussian_epsilon(1.0, 1, 1e-5) == pytest.approx(4.728, abs=1e-3)


def test_no_noise_costs_everything_and_much_noise_nothing():
    for accountant in (privacy.gaussian_epsilon, POISSON, FIXED_SIZE):
        assert accountant(0.0, 3, 1e-5) == math.inf
    assert privacy.gaussian_epsilon(1e9, 3, 1e-5) == 0


def naive_poisson(noise_multiplier, num_rounds, delta, rate, orders):
    """Mironov et al. 2019, equation 3.1 for integer orders."""
    epsilons = []
    for order in orders:
        moment = sum(
            math.comb(order, k)
            * (1 - rate) ** (order - k)
            * rate**k
            * math.exp((k * k - k) / (2 * noise_multiplier**2))
            for k in range(order + 1)
        )
        epsilons.append(convert(num_rounds * math.log(moment) / (order - 1), order, delta))
    return min(epsilons)


def naive_fixed_size(noise_multiplier, num_rounds, delta, rate, orders):
    """Wang et al. 2019, Theorem 9; replacing a client moves the sum by 2 C."""
    slope = 2 / noise_multiplier**2
    epsilons = []
    for order in orders:
        moment = 1 + rate**2 * math.comb(order, 2) * min(
            4 * math.expm1(2 * slope), 2 * math.exp(2 * slope)
        )
        moment += sum(
            2 * rate**j * math.comb(order, j) * math.exp((j - 1) * j * slope)
            for j in range(3, order + 1)
        )
        epsilons.append(convert(num_rounds * math.log(moment) / (order - 1), order, delta))
    return min(epsilons)


def test_epsilon_of_clients_that_join_by_chance():
    pytest.importorskip("dp_accounting")
    epsilon = privacy.poisson_epsilon(1.1, 10_000, 1e-5, rate=0.01)
    assert epsilon == pytest.approx(5.632, abs=1e-3)
    # The accountant has more orders, with a step of a tenth.
    whole = naive_poisson(1.1, 10_000, 1e-5, 0.01, range(2, 20))
    assert 0.98 * whole < epsilon <= whole * (1 + 1e-12)
    everyone = privacy.gaussian_epsilon(5.0, 50, 1e-3)
    values = [privacy.poisson_epsilon(5.0, 50, 1e-3, rate=q) for q in (0.1, 0.5, 0.999, 1.0)]
    assert sorted(values) == values
    assert values[-1] == everyone


@pytest.mark.parametrize(
    ("noise_multiplier", "num_rounds", "delta", "cohort_size", "num_clients"),
    [(4.0, 10_000, 1e-5, 10, 1000), (2.0, 1, 1e-3, 1, 10)],
)
def test_epsilon_of_cohorts_of_fixed_size(
    noise_multiplier, num_rounds, delta, cohort_size, num_clients
):
    """Without the 2 of 2 C, that of the second run would be below what such a run tells."""
    accounting = pytest.importorskip("dp_accounting")
    epsilon = privacy.fixed_size_epsilon(
        noise_multiplier, num_rounds, delta, cohort_size=cohort_size, num_clients=num_clients
    )
    rate = cohort_size / num_clients
    upper = naive_fixed_size(noise_multiplier, num_rounds, delta, rate, range(2, 20))
    # If all others send -C, a client that sends C or -C is told apart by these two distributions:
    # (1 - rate) N(-C, (z C)^2) + rate N(C, (z C)^2) and N(-C, (z C)^2).
    gaussian = accounting.GaussianDpEvent(noise_multiplier / 2)
    pair = accounting.PoissonSampledDpEvent(rate, gaussian)
    lower = accounting.pld.PLDAccountant().compose(pair, num_rounds).get_epsilon(delta)
    assert lower < epsilon < upper


def test_sampling_never_costs_more_than_everyone():
    pytest.importorskip("dp_accounting")
    everyone = privacy.gaussian_epsilon(2.5, 50, 1e-3)
    for cohort_size in (49, 50):
        epsilon = privacy.fixed_size_epsilon(5.0, 50, 1e-3, cohort_size=cohort_size, num_clients=50)
        assert epsilon == everyone
    small = privacy.fixed_size_epsilon(5.0, 50, 1e-3, cohort_size=5, num_clients=50)
    assert small < everyone


@pytest.mark.parametrize("accountant", [POISSON, FIXED_SIZE])
def test_a_missing_accountant_says_how_to_install_it(monkeypatch, accountant):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"epsilon: got no dp-accounting.*fedlr\[privacy\]"):
        accountant(1.0, 3, 1e-5)


# Calibration and budget.


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 50.0])
def test_the_noise_multiplier_is_the_smallest_that_suffices(epsilon):
    z = privacy.noise_multiplier(epsilon=epsilon, delta=1e-5, num_rounds=30)
    assert privacy.gaussian_epsilon(z, 30, 1e-5) <= epsilon
    assert privacy.gaussian_epsilon(z * (1 - 2e-6), 30, 1e-5) > epsilon


def test_the_noise_multiplier_of_an_accountant():
    pytest.importorskip("dp_accounting")
    z = privacy.noise_multiplier(epsilon=5.632, delta=1e-5, num_rounds=10_000, accountant=POISSON)
    assert z == pytest.approx(1.1, abs=1e-4)


@pytest.mark.parametrize("rounds_done", [0, 20])
def test_the_rounds_left_are_all_that_the_budget_allows(rounds_done):
    budget = privacy.Budget(5.0, 1e-5)
    left = privacy.rounds_left(budget, 5.0, rounds_done=rounds_done)
    privacy.check_rounds(budget, 5.0, left, rounds_done=rounds_done)
    assert privacy.gaussian_epsilon(5.0, rounds_done + left, 1e-5) <= 5
    assert privacy.gaussian_epsilon(5.0, rounds_done + left + 1, 1e-5) > 5
    message = rf"got {left + 1} rounds after {rounds_done}, expected at most {left} for epsilon 5.0"
    with pytest.raises(ValueError, match=message):
        privacy.check_rounds(budget, 5.0, left + 1, rounds_done=rounds_done)


def test_a_budget_that_is_spent_allows_no_round():
    budget = privacy.Budget(1.0, 1e-5)
    assert privacy.rounds_left(budget, 0.5) == 0
    assert privacy.rounds_left(budget, 5.0, rounds_done=1000) == 0
    assert privacy.rounds_left(budget, 0.0) == 0
    with pytest.raises(ValueError, match="1 rounds after 1000, expected at most 0"):
        privacy.check_rounds(budget, 5.0, 1, rounds_done=1000)


def test_a_budget_with_next_to_no_cost_ends_with_the_round_numbers():
    assert privacy.rounds_left(privacy.Budget(1.0, 1e-5), 1e9) == 2**31 - 1


# Errors.

BUDGET = privacy.Budget(1.0, 1e-5)
WRONG = {
    "max_norm 0": lambda: privacy.gaussian_mechanism(0, 1.0, clients_per_round=5),
    "max_norm inf": lambda: privacy.gaussian_mechanism(math.inf, 1.0, clients_per_round=5),
    "noise_multiplier -1": lambda: privacy.gaussian_mechanism(1.0, -1, clients_per_round=5),
    "noise_multiplier nan": lambda: privacy.gaussian_epsilon(math.nan, 1, 1e-5),
    "clients_per_round 0": lambda: privacy.gaussian_mechanism(1.0, 1.0, clients_per_round=0),
    "update of dtype int": lambda: privacy.clip(jnp.arange(3), 1.0),
    "num_rounds 0": lambda: privacy.gaussian_epsilon(1.0, 0, 1e-5),
    "num_rounds 2.5": lambda: privacy.noise_multiplier(epsilon=1.0, delta=0.1, num_rounds=2.5),
    "delta 0": lambda: privacy.gaussian_epsilon(1.0, 1, 0),
    "delta 1": lambda: privacy.poisson_epsilon(1.0, 1, 1, rate=0.1),
    "delta nan": lambda: privacy.rounds_left(privacy.Budget(1.0, math.nan), 1.0),
    "rate 0": lambda: privacy.poisson_epsilon(1.0, 1, 1e-5, rate=0),
    "rate 1.1": lambda: privacy.poisson_epsilon(1.0, 1, 1e-5, rate=1.1),
    "cohort_size 6": lambda: privacy.fixed_size_epsilon(1.0, 1, 1e-5, cohort_size=6, num_clients=5),
    "num_clients 0": lambda: privacy.fixed_size_epsilon(1.0, 1, 1e-5, cohort_size=1, num_clients=0),
    "epsilon 0": lambda: privacy.noise_multiplier(epsilon=0, delta=0.1, num_rounds=2),
    "epsilon inf": lambda: privacy.check_rounds(privacy.Budget(math.inf, 0.1), 1.0, 1),
    "rounds_done -1": lambda: privacy.rounds_left(BUDGET, 1.0, rounds_done=-1),
}


@pytest.mark.parametrize("got", WRONG)
def test_impossible_numbers_are_refused(got):
    with pytest.raises(ValueError, match=f"^[a-z_]+: got {got}.*, expected "):
        WRONG[got]()
