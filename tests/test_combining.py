import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedlr.algorithms import fedavg
from fedlr.federated import local, protocol, rounds, servers

COHORT = jnp.array([2, 0])


def clients():
    keys = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(keys[0], (3, 4, 2), "float64")
    targets = jax.random.normal(keys[1], (3, 4), "float64")
    return protocol.ClientData(inputs, targets, jnp.ones((3, 4), bool))


def averaging(rate, **options):
    def loss(weights, inputs, target):
        return (inputs @ weights - target) ** 2 / 2

    return fedavg.build(
        local.local_sgd(loss, optax.sgd(rate), num_steps=1, batch_size=2), **options
    )


def test_two_algorithms_in_turn_are_two_rounds_with_their_own_states():
    server = servers.from_optax(optax.sgd(0.5, momentum=0.9))
    parts = averaging(0.3, server=server), averaging(0.1)
    both = rounds.in_turn(*parts)
    state, *own = (
        algorithm.init(jnp.ones(2), clients(), key=jax.random.key(0))
        for algorithm in (both, *parts)
    )
    step, *steps = (jax.jit(one.round) for one in (both, *parts))
    params = jnp.ones(2)
    for t in range(2):
        key, infos = jax.random.key(t), []
        for place, part in enumerate(steps):
            start = own[place]._replace(params=params)
            one_key = jax.random.fold_in(key, place)
            own[place], info = part(start, clients(), COHORT, key=one_key)
            params = own[place].params
            infos.append(info)
        state, info = step(state, clients(), COHORT, key=key)
        np.testing.assert_allclose(state.params, params, rtol=1e-14)
        np.testing.assert_allclose(info.losses, infos[0].losses, rtol=1e-14)
        np.testing.assert_array_equal(info.weights, infos[1].weights)
        np.testing.assert_array_equal(info.uplink_bytes, [32, 32])
        np.testing.assert_array_equal(info.downlink_bytes, [32, 32])
        np.testing.assert_allclose(info.metrics[1].loss, infos[1].losses, rtol=1e-14)
    assert state.round == 2


def test_prepared_params_reach_the_algorithm_with_the_key():
    algorithm = rounds.prepared(
        averaging(0.1), lambda params, *, key: params + jax.random.normal(key, (2,), "float64")
    )
    key = jax.random.key(4)
    state = algorithm.init(np.ones(2), clients(), key=key)
    np.testing.assert_array_equal(state.params, 1 + jax.random.normal(key, (2,), "float64"))


def test_an_algorithm_for_cohorts_sees_the_cohort_of_every_round():
    algorithm = rounds.for_cohorts(lambda _, cohort: averaging(1.0 / len(cohort)))
    state = algorithm.init(jnp.ones(2), clients(), key=jax.random.key(0))
    for size in (1, 2):
        found, expected = (
            jax.jit(one.round)(state, clients(), COHORT[:size], key=jax.random.key(1))[0]
            for one in (algorithm, averaging(1.0 / size))
        )
        np.testing.assert_allclose(found.params, expected.params, rtol=1e-14)
