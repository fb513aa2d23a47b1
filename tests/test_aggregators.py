import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fedlr.federated import aggregators, clients, compressors, protocol, rounds, servers


def double(message):
    return jax.tree.map(lambda leaf: 2 * leaf, message)


@pytest.fixture
def messages(rng):
    return {"a": rng.normal(size=(3, 4, 5)), "b": rng.normal(size=3)}


def test_mean_weighs_the_decompressed_updates(messages):
    mean, weights = aggregators.weighted_mean(), jnp.array([1.0, 0.0, 3.0])
    update, state = mean.aggregate(messages, weights, mean.init(messages), decompress=double)
    for name, leaf in messages.items():
        np.testing.assert_allclose(update[name], 2 * (leaf[0] + 3 * leaf[2]) / 4, rtol=1e-14)
    assert state == ()


def test_folding_chunk_by_chunk_gives_the_aggregate(messages):
    mean, weights = aggregators.weighted_mean(), jnp.array([1.0, 0.5, 3.0])
    whole, _ = mean.aggregate(messages, weights, (), decompress=double)
    carry = mean.fold.init(jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), messages))
    for chunk in (slice(0, 2), slice(2, 3)):
        rows = jax.tree.map(lambda leaf: leaf[chunk], messages)  # noqa: B023
        carry = mean.fold.add(carry, rows, weights[chunk], decompress=double)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), mean.fold.finish(carry), whole
    )


def test_no_weight_at_all_gives_zeros_whatever_was_sent():
    mean = aggregators.weighted_mean()
    messages = jnp.array([jnp.nan, jnp.inf])
    update, _ = mean.aggregate(messages, jnp.zeros(2), (), decompress=double)
    assert update == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_mean_keeps_the_dtype(dtype):
    mean = aggregators.weighted_mean()
    update, _ = mean.aggregate(jnp.ones((2, 3), dtype), jnp.ones(2), (), decompress=double)
    assert update.dtype == dtype


# Weights of seven members: all, some, four, one, none.
WEIGHTS = np.array(
    [
        [1.0, 2.0, 0.5, 3.0, 1.0, 9.0, 0.1],
        [1.0, 0.0, 0.5, 3.0, 1.0, 9.0, 0.0],
        [0.0, 2.0, 0.5, 0.0, 1.0, 0.0, 0.1],
        [0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
ROBUST = {
    "median": (aggregators.coordinate_median(), lambda rows: np.median(rows, axis=0)),
    "trimmed_0.25": (
        aggregators.trimmed_mean(0.25),
        lambda rows: scipy.stats.trim_mean(rows, 0.25, axis=0),
    ),
    "trimmed_0.45": (
        aggregators.trimmed_mean(0.45),
        lambda rows: scipy.stats.trim_mean(rows, 0.45, axis=0),
    ),
    "trimmed_0": (aggregators.trimmed_mean(0), lambda rows: np.mean(rows, axis=0)),
}


@functools.partial(jax.jit, static_argnums=0)
def join_doubled(name, messages, weights):
    return ROBUST[name][0].aggregate(messages, weights, (), decompress=double)[0]


@functools.partial(jax.jit, static_argnums=0)
def join_cohorts(name, messages, weights):
    """Join the same messages with the weights of every cohort."""
    return jax.vmap(lambda weights: join_doubled(name, messages, weights))(weights)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_robust_aggregators_join_those_that_arrived(rng, name, dtype):
    """Whatever the absent hold, under jit and vmap, with traced weights."""
    messages = {"a": rng.normal(size=(7, 4, 5)), "b": rng.normal(size=7)}
    messages = {key: np.asarray(leaf, dtype) for key, leaf in messages.items()}
    together = join_cohorts(name, messages, WEIGHTS)
    for i, weights in enumerate(WEIGHTS):
        present, spoilt = weights > 0, {}
        for key, leaf in messages.items():
            spoilt[key] = leaf.copy()
            spoilt[key][~present] = [np.nan, np.inf, -np.inf, 1e30][i - 1]
        update = join_doubled(name, spoilt, weights)
        for key, leaf in messages.items():
            rows = 2 * leaf[present].astype(np.float64)
            expected = ROBUST[name][1](rows) if present.any() else np.zeros(leaf.shape[1:])
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(update[key], expected, rtol=8 * eps, atol=16 * eps)
            np.testing.assert_array_equal(together[key][i], update[key])
            assert update[key].dtype == dtype


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "num_bad"), [("median", 3), ("trimmed_0.45", 3), ("trimmed_0.25", 1)]
)
@pytest.mark.parametrize("bad", [1e30, -1e30, np.inf, -np.inf, np.nan])
def test_few_bad_messages_cannot_leave_the_range_of_the_good_ones(name, num_bad, bad, seed):
    rng = np.random.default_rng(seed)
    messages = {"a": rng.normal(size=(7, 4, 5)), "b": rng.normal(size=7)}
    liars = rng.permutation(7)[:num_bad]
    good = {key: np.delete(leaf, liars, axis=0) for key, leaf in messages.items()}
    for leaf in messages.values():
        leaf[liars] = bad * rng.choice([1, 2], size=leaf[liars].shape)
    update = join_doubled(name, messages, WEIGHTS[0])
    for key, leaf in good.items():
        assert (update[key] >= 2 * leaf.min(axis=0) - 1e-14).all()
        assert (update[key] <= 2 * leaf.max(axis=0) + 1e-14).all()


@pytest.mark.parametrize(
    ("name", "num_bad"), [("median", 4), ("trimmed_0.25", 2), ("trimmed_0", 1)]
)
def test_more_bad_messages_are_not_hidden(rng, name, num_bad):
    messages = {"a": rng.normal(size=(7, 4, 5)), "b": rng.normal(size=7)}
    for leaf in messages.values():
        leaf[:num_bad] = np.nan
    for absent in ([], [6]):
        weights = WEIGHTS[0].copy()
        weights[absent] = 0
        update = join_doubled(name, messages, weights)
        assert all(np.isnan(leaf).all() for leaf in update.values())


@pytest.mark.parametrize("name", ROBUST)
def test_robust_aggregators_know_no_order_of_members(rng, name):
    messages = {"a": rng.normal(size=(7, 4, 5)), "b": rng.normal(size=7)}
    order = rng.permutation(7)
    mixed = {key: leaf[order] for key, leaf in messages.items()}
    for weights in WEIGHTS[:3]:
        jax.tree.map(
            np.testing.assert_array_equal,
            join_doubled(name, messages, weights),
            join_doubled(name, mixed, weights[order]),
        )


@pytest.mark.parametrize(
    ("fraction", "size", "trim"), [(0.29, 100, 29), (0.3, 10, 3), (0.3, 9, 2), (0.4999, 6, 2)]
)
def test_trimming_rounds_down_the_true_product(fraction, size, trim):
    """Of the squares, so that every number of trimmed values has a mean of its own."""
    squares = jnp.arange(size, dtype=jnp.float64) ** 2
    trimmed = aggregators.trimmed_mean(fraction)
    aggregate = jax.jit(functools.partial(trimmed.aggregate, decompress=lambda leaf: leaf))
    update, _ = aggregate(squares, jnp.ones(size), ())
    np.testing.assert_allclose(update, np.mean(squares[trim : size - trim]), rtol=1e-14)


def test_robust_aggregators_take_part_in_a_round(rng):
    """They get the messages whole, here compressed, and the weights of the arrived."""
    targets = rng.normal(size=(5, 4, 3))
    mask = np.ones((5, 4, 3), bool)
    mask[2] = False
    data = protocol.ClientData((), jnp.asarray(targets), jnp.asarray(mask))

    def local_update(params, state, data, *, key):
        del key
        return data.targets - params, state, {"loss": jnp.sum(params)}

    for name in ("median", "trimmed_0.25"):
        aggregator, expected = ROBUST[name]
        assert aggregator.fold is None
        algorithm = rounds.compose(
            local_update,
            compressor=compressors.csr(12),
            aggregator=aggregator,
            server=servers.from_optax(optax.sgd(1.0)),
        )
        state = algorithm.init(jnp.ones((4, 3)), data, key=jax.random.key(0))
        state, _ = jax.jit(algorithm.round)(state, data, jnp.arange(5), key=jax.random.key(1))
        arrived = np.delete(targets, 2, axis=0)
        np.testing.assert_allclose(state.params, expected(arrived), rtol=1e-12)


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1, float("nan")])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match=rf"trimmed_mean: got fraction {fraction}, expected a fr"):
        aggregators.trimmed_mean(fraction)


def test_the_weighted_sum_is_unbiased_over_all_cohorts_and_losses():
    """Enumerated: every cohort of two of four, every way to lose members of it."""
    updates = np.random.default_rng(2).normal(size=(4, 3))
    counts, lost = np.array([5.0, 1.0, 2.0, 4.0]), np.array([0.0, 0.3, 0.5, 0.9])
    mask = jnp.asarray(np.arange(5) < counts[:, None])
    data = protocol.ClientData(jnp.zeros((4, 5)), jnp.zeros((4, 5)), mask)
    weights = clients.horvitz_thompson(jnp.asarray(0.5 * (1 - lost)))(data)
    means = {"sum": np.zeros(3), "mean": np.zeros(3)}
    rules = {"sum": aggregators.weighted_sum(), "mean": aggregators.weighted_mean()}
    for cohort in itertools.combinations(range(4), 2):
        rows = np.array(cohort)
        for here in itertools.product([False, True], repeat=2):
            chance = np.prod(np.where(here, 1 - lost[rows], lost[rows])) / 6
            # What has weight zero may hold anything.
            messages = jnp.where(np.array(here)[:, None], updates[rows], jnp.nan)
            for name, rule in rules.items():
                own = weights[rows] if name == "sum" else counts[rows]
                args = (messages, jnp.where(np.array(here), own, 0.0), ())
                means[name] += chance * rule.aggregate(*args, decompress=lambda leaf: leaf)[0]
    full = counts @ updates / counts.sum()
    np.testing.assert_allclose(means["sum"], full, rtol=1e-12)
    assert np.abs(means["mean"] - full).max() > 0.05


def test_the_weighted_sum_takes_part_in_a_round():
    targets = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, 3)))
    mask = jnp.array([[True, True], [True, False], [True, True], [True, False]])
    data = protocol.ClientData((), targets[:, :, 0], mask)

    def local_update(params, state, data, *, key):
        del key
        return jnp.sum(data.targets) - params, state, {"loss": jnp.sum(params)}

    algorithm = rounds.compose(
        local_update,
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_sum(),
        server=servers.from_optax(optax.sgd(1.0)),
        client_weights=clients.horvitz_thompson(0.5),
    )
    state = algorithm.init(jnp.zeros(()), data, key=jax.random.key(0))
    state, infos = jax.jit(algorithm.round)(state, data, jnp.array([2, 1]), key=jax.random.key(1))
    sums = np.sum(targets[:, :, 0], axis=1)
    np.testing.assert_allclose(infos.weights, [2 / 3, 1 / 3])
    np.testing.assert_allclose(state.params, 2 / 3 * sums[2] + 1 / 3 * sums[1], rtol=1e-12)


@pytest.mark.parametrize(
    "inclusion", [0, 1.5, -0.1, float("nan"), np.float32(2), jnp.array([0.5, 0.0])]
)
def test_impossible_inclusions_are_refused(inclusion):
    with pytest.raises(ValueError, match=r"horvitz_thompson: got inclusion .* numbers in \(0, 1\]"):
        clients.horvitz_thompson(inclusion)


def test_without_examples_all_weights_are_zero():
    nobody = protocol.ClientData((), jnp.zeros((2, 3)), jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(clients.horvitz_thompson(0.5)(nobody), [0, 0])


def test_an_inclusion_per_client_is_needed():
    with pytest.raises(ValueError, match=r"got inclusion of shape \(3,\), expected \(\) or \(2,\)"):
        clients.horvitz_thompson(jnp.ones(3))(jnp.zeros((2, 3)))
