"""Methods that differ from FedAvg in the local step or in what is averaged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import federated
from fedlr.algorithms import fedavg, fednova, scaffold
from fedlr.federated import availability, local, protocol, servers
from tests.reference import training as reference

SIZES = (4, 2, 3, 5)
RATE = 0.1


def squared_error(weights, inputs, target):
    return (jnp.sum(weights * inputs) - target) ** 2 / 2


@functools.cache
def problem():
    """Ragged clients as arrays, and the same as lists of NumPy arrays."""
    rng = np.random.default_rng(0)
    clients = [(rng.normal(size=(n, 3)), rng.normal(size=n)) for n in SIZES]
    inputs, targets = np.full((4, 5, 3), np.nan), np.full((4, 5), 1e30)
    for k, (x, y) in enumerate(clients):
        inputs[k, : len(y)], targets[k, : len(y)] = x, y
    mask = np.arange(5) < np.array(SIZES)[:, None]
    return protocol.ClientData(*map(jnp.asarray, (inputs, targets, mask))), clients


WEIGHTS = np.array([0.3, -0.2, 0.5])


def do_round(algorithm, state=None, cohort=(0, 1, 2, 3), key=0):
    data, _ = problem()
    if state is None:
        state = algorithm.init(jnp.asarray(WEIGHTS), data, key=jax.random.key(0))
    return jax.jit(algorithm.round)(state, data, jnp.array(cohort), key=jax.random.key(key))


def plan(num_steps, **options):
    return local.Training(optax.sgd(RATE, **options), num_steps)


def test_proximal_steps_are_those_of_the_formula():
    update = local.local_proximal(squared_error, optax.sgd(RATE, 0.9), strength=0.7, num_steps=4)
    state, _ = do_round(fedavg.build(update))
    _, clients = problem()
    options = {"rate": RATE, "num_steps": 4, "strength": 0.7, "momentum": 0.9}
    moved = [reference.descend(WEIGHTS, x, y, **options) for x, y in clients]
    expected = np.average(moved, axis=0, weights=SIZES)
    np.testing.assert_allclose(state.params, expected, rtol=1e-12)


def test_proximal_strength_zero_is_fedavg_and_its_loss_is_that_of_the_data():
    plain = local.local_sgd(squared_error, optax.sgd(RATE), num_steps=3)
    held = functools.partial(local.local_proximal, squared_error, optax.sgd(RATE), num_steps=3)
    expected, info = do_round(fedavg.build(plain))
    same, _ = do_round(fedavg.build(held(strength=0.0)))
    np.testing.assert_array_equal(same.params, expected.params)
    _, other = do_round(fedavg.build(held(strength=5.0)))
    np.testing.assert_allclose(other.losses, info.losses, rtol=1e-12)


def test_scaffold_is_its_algorithm_over_three_rounds():
    algorithm = scaffold.build(squared_error, RATE, num_steps=3)
    _, clients = problem()
    model, control, controls = WEIGHTS, np.zeros(3), np.zeros((4, 3))
    state = None
    for cohort in ((0, 2), (1, 2), (3, 0)):
        state, info = do_round(algorithm, state, cohort)
        model, control, controls = reference.scaffold_round(
            model, control, controls, clients, cohort, rate=RATE, num_steps=3
        )
        np.testing.assert_allclose(state.params.model, model, rtol=1e-11)
        np.testing.assert_allclose(state.params.control, control, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(state.clients.local, controls, rtol=1e-11, atol=1e-13)
        # The server's variate is the mean of the clients', whoever took part.
        np.testing.assert_allclose(control, controls.mean(axis=0), atol=1e-13)
    assert info.uplink_bytes.tolist() == info.downlink_bytes.tolist() == [2 * 3 * 8] * 2


def test_scaffold_finds_the_optimum_of_the_mean_where_fedavg_stops_short():
    data, clients = problem()
    hessian = np.mean([x.T @ x / len(y) for x, y in clients], axis=0)
    slope = np.mean([x.T @ y / len(y) for x, y in clients], axis=0)
    optimum = np.linalg.solve(hessian, slope)
    options = {"num_steps": 10}

    def distance(algorithm, params):
        state = algorithm.init(jnp.asarray(WEIGHTS), data, key=jax.random.key(0))
        run = jax.jit(lambda s: federated.run(algorithm, s, data, num_rounds=400, key=key)[0])
        return np.abs(params(run(state).params) - optimum).max()

    key = jax.random.key(1)
    weighting = local.local_sgd(squared_error, optax.sgd(RATE), **options)
    average = federated.compose(
        weighting,
        compressor=federated.compressors.identity(),
        aggregator=federated.aggregators.weighted_mean(),
        server=servers.from_optax(optax.sgd(1.0)),
        client_weights=lambda _: jnp.ones(4),
    )
    assert distance(scaffold.build(squared_error, RATE, **options), lambda p: p.model) < 1e-6
    assert distance(average, lambda p: p) > 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fednova_is_its_formula(momentum):
    training = plan(6, momentum=momentum)._replace(
        active_steps=lambda count: count + 1, batch_size=None
    )
    algorithm = fednova.build(squared_error, training, momentum=momentum)
    state, info = do_round(algorithm)
    _, clients = problem()
    steps = [n + 1 for n in SIZES]
    expected = reference.fednova_round(WEIGHTS, clients, steps, rate=RATE, momentum=momentum)
    np.testing.assert_allclose(state.params, expected, rtol=1e-12)
    assert info.metrics.num_steps.tolist() == steps
    assert info.uplink_bytes.tolist() == [32] * 4


def test_fednova_with_equal_steps_is_fedavg():
    average = fedavg.build(local.local_sgd(squared_error, optax.sgd(RATE), num_steps=3))
    expected, _ = do_round(average)
    state, _ = do_round(fednova.build(squared_error, plan(3)))
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-13)


def test_fedadam_of_optax_is_its_formula():
    average = fedavg.build(local.local_sgd(squared_error, optax.sgd(RATE), num_steps=3))
    change = do_round(average)[0].params - WEIGHTS
    adam = optax.adam(0.01, b1=0.9, b2=0.99, eps=1e-3)
    update = local.local_sgd(squared_error, optax.sgd(RATE), num_steps=3)
    state, _ = do_round(fedavg.build(update, server=servers.from_optax(adam)))
    # The corrected moments of the first round are the update and its square.
    expected = WEIGHTS + 0.01 * change / (np.abs(change) + 1e-3)
    np.testing.assert_allclose(state.params, expected, rtol=1e-10)


def test_epochs_count_the_passes_over_the_clients_own_data():
    training = local.Training(optax.sgd(RATE), 6, 2, local.epochs(2, batch_size=2))
    data, _ = problem()
    update = jax.jit(
        lambda one: local.train(
            local.mean_loss(squared_error), jnp.asarray(WEIGHTS), one, training,
            key=jax.random.key(3),
        )
    )  # fmt: skip
    done = [int(update(jax.tree.map(lambda a, k=k: a[k], data))[1].num_steps) for k in range(4)]
    assert done == [4, 2, 4, 6]
    short = local.Training(optax.sgd(RATE), 2, 2)
    one = jax.tree.map(lambda a: a[1], data)
    expected, _ = local.train(
        local.mean_loss(squared_error), jnp.asarray(WEIGHTS), one, short, key=jax.random.key(3)
    )
    np.testing.assert_allclose(update(one)[0], expected, rtol=1e-13)


def test_lost_messages_count_nowhere_and_leave_their_clients_alone():
    update = local.local_sgd(squared_error, optax.sgd(RATE), num_steps=2)

    def counting(params, client_state, data, *, key):
        change, _, metrics = update(params, (), data, key=key)
        return change, client_state + 1, metrics

    def build(arrivals):
        return federated.compose(
            counting,
            compressor=federated.compressors.identity(),
            aggregator=federated.aggregators.weighted_mean(),
            server=servers.from_optax(optax.sgd(1.0)),
            client_state=lambda _: jnp.zeros((), jnp.int32),
            arrivals=arrivals,
        )

    lost = build(availability.dropout(jnp.array([0.0, 1.0, 0.0, 1.0])))
    state, info = do_round(lost)
    expected, _ = do_round(fedavg.build(update), cohort=(0, 2))
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-13)
    assert state.clients.local.tolist() == [1, 0, 1, 0]
    assert info.uplink_bytes.tolist() == [24, 0, 24, 0]
    assert info.downlink_bytes.tolist() == [24] * 4
    assert info.weights.tolist() == [4, 0, 3, 0]
    state, _ = do_round(build(availability.dropout(1.0)))
    np.testing.assert_array_equal(state.params, WEIGHTS)


def test_dropout_has_its_probability_and_depends_on_the_client_alone():
    rule = availability.dropout(0.3)
    cohort = jnp.arange(4)
    keys = jax.random.split(jax.random.key(0), 4000)
    here = jax.vmap(lambda key: rule(cohort, (), key=key))(keys)
    error = 4 * np.sqrt(0.3 * 0.7 / here.size)
    assert abs(float(here.mean()) - 0.7) < error
    reverse = jax.vmap(lambda key: rule(cohort[::-1], (), key=key))(keys)
    np.testing.assert_array_equal(reverse[:, ::-1], here)


def test_stragglers_are_those_beyond_the_deadline_or_the_count():
    times = availability.round_times(
        jnp.array([1.0, 2.0, 3.0, 0.5]), num_steps=2, bytes_moved=100, bytes_per_second=50.0
    )
    np.testing.assert_allclose(times, [4, 6, 8, 3])
    cohort, key = jnp.array([3, 2, 0]), jax.random.key(0)
    assert availability.deadline(times, 4.0)(cohort, (), key=key).tolist() == [True, False, True]
    first = availability.first_arrivals(times, 1)
    assert first(cohort, (), key=key).tolist() == [True, False, False]


def test_what_is_no_number_in_range_is_refused():
    with pytest.raises(ValueError, match=r"build: got learning_rate 0, expected a positive number"):
        scaffold.build(squared_error, 0, num_steps=1)
    with pytest.raises(ValueError, match=r"momentum_weight: got momentum 1.0, expected"):
        fednova.build(squared_error, plan(1), momentum=1.0)
    with pytest.raises(ValueError, match=r"local_proximal: got strength"):
        local.local_proximal(squared_error, optax.sgd(0.1), strength=-1.0, num_steps=1)
    with pytest.raises(ValueError, match=r"dropout: got probability 1.5"):
        availability.dropout(1.5)
    with pytest.raises(ValueError, match=r"first_arrivals: got count 0"):
        availability.first_arrivals(jnp.ones(3), 0)
    with pytest.raises(ValueError, match=r"epochs: got batch_size 0"):
        local.epochs(1, batch_size=0)
