import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fedlr.federated import aggregators, compressors, protocol, rounds, servers


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
