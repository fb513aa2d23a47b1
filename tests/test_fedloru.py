import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import federated, lowrank
from fedlr.algorithms import fedloru
from fedlr.federated import aggregators, local, protocol, servers, traffic

NUM_CLIENTS, SAMPLES = 5, 6
PAIR, WHOLE, REST = 2 * (8 + 12), 8 * 12, 8  # numbers


def loss(params, inputs, target):
    return jnp.mean((params["matrix"] @ inputs + params["bias"] - target) ** 2)


@functools.cache
def data(dtype="float64"):
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (NUM_CLIENTS, SAMPLES, 12), dtype)
    targets = jax.random.normal(keys[1], (NUM_CLIENTS, SAMPLES, 8), dtype)
    counts = jnp.array([6, 3, 4, 6, 2])
    return protocol.ClientData(inputs, targets, jnp.arange(SAMPLES)[None] < counts[:, None])


def model(dtype="float64"):
    return {
        "matrix": jax.random.normal(jax.random.key(9), (8, 12), dtype) / 4,
        "bias": jnp.zeros(8, dtype),
    }


def settings(every, **options):
    return fedloru.Settings(2, every, **options)


@functools.cache
def algorithm(every, restart=servers.reinit, start=lowrank.zero_up, form=lowrank.merge):
    training = local.Training(optax.sgd(0.2, momentum=0.5), 3, 4)
    return fedloru.assemble(
        loss, training, settings(every, restart=restart, start=start), form=form
    )


@functools.cache
def runner(*args, num_rounds=1, cohort_size=None, **options):
    built = algorithm(*args, **options)

    def run(state, key):
        return federated.run(
            built, state, data(), num_rounds=num_rounds, cohort_size=cohort_size, key=key
        )

    return jax.jit(run)


def start_of(built):
    return built.init(model(), data(), key=jax.random.key(3))


def matrix(state):
    return np.asarray(fedloru.merged_params(state)["matrix"])


RESTARTS = [
    (servers.reinit, lowrank.zero_up),
    (servers.keep, lowrank.zero_up),
    (servers.reinit_subtract, lowrank.both_random),
]


@pytest.mark.parametrize(("restart", "start"), RESTARTS)
def test_an_accumulation_keeps_the_model_unless_it_keeps_the_factors(restart, start):
    key = jax.random.key(4)
    accumulating, plain = (runner(every, restart, start) for every in (1, None))
    begun = start_of(algorithm(1, restart, start))
    merged, _ = accumulating(begun, key)
    waiting, _ = plain(begun, key)
    jump = lowrank.dense_delta(waiting.params.factors)["matrix"] if restart is servers.keep else 0
    np.testing.assert_allclose(matrix(merged), matrix(waiting) + jump, rtol=1e-12, atol=1e-13)
    same = np.array_equal(
        merged.params.factors["matrix"].down, waiting.params.factors["matrix"].down
    )
    assert same == (restart is servers.keep)


@pytest.mark.parametrize(
    ("restart", "start", "ranks"),
    [
        (servers.reinit, lowrank.zero_up, (2, 4, 6)),
        (servers.keep, lowrank.zero_up, (2, 4, 6)),
        (servers.reinit_subtract, lowrank.both_random, (4, 8, 8)),
    ],
)
def test_the_rank_of_the_update_grows_within_its_bound(restart, start, ranks):
    state = start_of(algorithm(1, restart, start))
    first, found = matrix(state), []
    for t in range(3):
        state, _ = runner(1, restart, start)(state, jax.random.key(t))
        # After t + 1 accumulations the fresh pair has not moved yet.
        found.append(np.linalg.matrix_rank(matrix(state) - first, tol=1e-8))
    assert all(rank <= bound for rank, bound in zip(found, ranks, strict=True))
    assert found[2] > 2


def test_without_accumulation_base_matrices_stay_frozen():
    state = start_of(algorithm(None))
    moved, infos = runner(None, num_rounds=4)(state, jax.random.key(4))
    np.testing.assert_array_equal(moved.params.base["matrix"], state.params.base["matrix"])
    assert np.abs(moved.params.base["bias"]).max() > 1e-3
    assert np.linalg.matrix_rank(matrix(moved) - matrix(state), tol=1e-10) == 2
    assert infos.losses[-1].mean() < infos.losses[0].mean()


def test_one_round_is_the_mean_of_factors():
    built = algorithm(None)
    state = start_of(built)
    moved, _ = runner(None)(state, jax.random.key(4))
    own, weights = [], np.asarray(federated.clients.num_examples(data()))
    round_key = jax.random.split(jax.random.fold_in(jax.random.key(4), 0))[1]
    client_key = jax.random.split(round_key)[0]
    training = local.Training(optax.sgd(0.2, momentum=0.5), 3, 4)
    update = jax.jit(local.local_low_rank(loss, training))
    for k in range(NUM_CLIENTS):
        key = jax.random.split(jax.random.fold_in(client_key, k))[0]
        one = jax.tree.map(lambda leaf, k=k: leaf[k], data())
        own.append(update(state.params, (), one, key=key)[0])
    mean = jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *own)
    expected = jax.tree.map(jnp.add, lowrank.trainable(state.params), mean)
    found = lowrank.trainable(moved.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_measured_mean_of_values_is_the_mean_of_differences():
    state = start_of(algorithm(2))
    expected, _ = runner(2, num_rounds=3)(state, jax.random.key(4))
    training = local.Training(optax.sgd(0.2, momentum=0.5), 3, 4)
    measured = aggregators.measured_factor_mean()
    built = fedloru.assemble(loss, training, settings(2), aggregator=measured)
    run = jax.jit(lambda state: federated.run(built, state, data(), num_rounds=3, key=key)[0])
    key = jax.random.key(4)
    found = run(start_of(built))
    np.testing.assert_allclose(matrix(found), matrix(expected), rtol=1e-10, atol=1e-13)
    assert 0 < found.server.aggregator["matrix"] < 1


def test_factored_and_merged_forms_agree():
    state = start_of(algorithm(2))
    merged, _ = runner(2, num_rounds=3)(state, jax.random.key(4))
    applied, _ = runner(2, form=lowrank.apply, num_rounds=3)(state, jax.random.key(4))
    np.testing.assert_allclose(matrix(applied), matrix(merged), rtol=1e-10, atol=1e-12)


def test_fresh_factors_do_not_depend_on_the_cohort():
    state = start_of(algorithm(1))
    drawn = [
        runner(1, cohort_size=size)(state, jax.random.key(4))[0].params.factors["matrix"].down
        for size in (1, 3, None)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("every", [1, 3, None])
def test_bytes_are_those_of_factors_rest_and_missed_pairs(every):
    """Against a simulation that remembers which accumulations every client holds."""
    state, rng = start_of(algorithm(every)), np.random.default_rng(0)
    rounds, held, numbers = 12, np.zeros(NUM_CLIENTS, int), 8
    for t in range(rounds):
        cohort = rng.choice(NUM_CLIENTS, 2, replace=False).astype(np.int32)
        state, info = one_round(every)(state, cohort)
        done = 0 if every is None else t // every
        for place, k in enumerate(cohort):
            missed = done - held[k]
            present = PAIR if every is None or t % every or t == 0 else 0
            # Pairs, or the matrix; the round after an accumulation the present pair is a seed.
            sent = present + REST + min(missed * PAIR, WHOLE)
            assert int(info.downlink_bytes[place]) == numbers * sent
            assert int(info.metrics.catch_up[place]) == numbers * (sent - PAIR - REST)
            held[k] = done
        assert info.uplink_bytes.tolist() == [numbers * (PAIR + REST)] * 2
    assert every is None or state.round == rounds


@functools.cache
def one_round(every):
    built = algorithm(every)
    return jax.jit(lambda state, cohort: built.round(state, data(), cohort, key=jax.random.key(0)))


def test_expected_catch_up_is_the_formula():
    """r (m + n) (1 + (1 - C) / (C tau)), as long as W is not the smaller message."""
    every, share, rounds, count = 5, 0.5, 20_000, 40
    rng = np.random.default_rng(0)
    params = lowrank.adapt(jnp.zeros((400, 400)), 2, key=jax.random.key(0))
    bytes_of = jax.jit(
        jax.vmap(
            lambda t, last: traffic.accumulated(params._replace(round=t), last, every),
            in_axes=(0, 0),
        )
    )
    times = [np.sort(rng.choice(rounds, int(share * rounds), replace=False)) for _ in range(count)]
    received = [bytes_of(jnp.asarray(t[1:], "int32"), jnp.asarray(t[:-1], "int32")) for t in times]
    pair = lowrank.num_bytes(params.factors)
    expected = 1 + (1 - share) / (share * every)
    assert abs(np.mean(received) / pair + 1 - expected) < 2e-3


def test_one_trace_serves_all_rounds_seeds_and_cohorts():
    built = algorithm(2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, cohort, key):
        return built.round(state, data(), cohort, key=key)

    state = start_of(built)
    for t in range(3):
        state, _ = step(state, jnp.array([t, t + 1]), jax.random.key(t))
    keys = jax.random.split(jax.random.key(5), 3)
    many, _ = jax.vmap(lambda key: runner(2, num_rounds=3)(start_of(built), key))(keys)
    alone, _ = runner(2, num_rounds=3)(start_of(built), keys[1])
    np.testing.assert_allclose(
        many.params.base["matrix"][1], alone.params.base["matrix"], rtol=1e-11
    )


def test_order_of_the_clients_does_not_matter():
    state = start_of(algorithm(2))
    forward, _ = one_round(2)(state, jnp.array([0, 2, 3]))
    backward, _ = one_round(2)(state, jnp.array([3, 0, 2]))
    np.testing.assert_allclose(matrix(forward), matrix(backward), rtol=1e-12)


def test_published_code_begins_at_zero_and_clips():
    built = fedloru.paper_code(loss, rank=2, local_steps=2, accumulate_every=2, batch_size=4)
    state = built.init(model("float32"), data("float32"), key=jax.random.key(0))
    assert not state.params.base["matrix"].any()
    update = state.params.factors["matrix"]
    assert update.scale == 0.5
    assert update.up.any()
    state, _ = jax.jit(built.round)(state, data("float32"), jnp.arange(5), key=jax.random.key(1))
    # Two steps of learning rate 0.2 and gradient norm 0.1 with momentum 0.9, and a little decay.
    assert jnp.abs(state.params.base["bias"]).max() <= 0.2 * 0.1 * (1 + 1.9) + 1e-6
    assert state.params.factors["matrix"].up.dtype == jnp.float32


def test_models_without_matrices_are_refused():
    def init(params, rank=2):
        built = fedloru.build(loss, optax.sgd(0.1), rank=rank, local_steps=1, accumulate_every=1)
        return built.init(params, data(), key=jax.random.key(0))

    with pytest.raises(ValueError, match=r"init: got rank 2 and leaves of shapes \[\(8,\)\]"):
        init({"bias": jnp.zeros(8)})
    with pytest.raises(ValueError, match=r"init: got rank 9 and leaves"):
        init(model(), rank=9)
    with pytest.raises(ValueError, match=r"accumulate_low_rank: got every 0"):
        fedloru.build(loss, optax.sgd(0.1), rank=1, local_steps=1, accumulate_every=0)
