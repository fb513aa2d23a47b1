import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import federated
from fedlr.algorithms import fedavg, local_only
from fedlr.federated import aggregators, compressors, local, protocol, servers, stopping
from fedlr.federated.rounds import simulation
from tests.reference import rounds as reference


def squared_error(weights, inputs, target):
    return (inputs @ weights - target) ** 2 / 2


def descent(num_steps=2, batch_size=None, step_size=0.1):
    return local.local_sgd(
        squared_error, optax.sgd(step_size), num_steps=num_steps, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    mask = np.arange(5) < np.array([5, 2, 0, 4])[:, None]
    return protocol.ClientData(
        *jax.tree.map(jnp.asarray, (rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5)), mask))
    )


@pytest.fixture(scope="module")
def weights():
    return jnp.array([0.3, -0.2, 0.5])


@pytest.fixture(scope="module")
def average():
    """FedAvg with mini-batches, and its start state and compiled run of six rounds."""
    return fedavg.build(descent(batch_size=2))


@pytest.fixture(scope="module")
def long_run(average, data, weights):
    start = average.init(weights, data, key=jax.random.key(0))
    run = jax.jit(functools.partial(federated.run, average, num_rounds=6, cohort_size=2))
    return start, run(start, data, key=jax.random.key(7))


def simulate(*args, **options):
    return federated.simulate(*args, key=jax.random.key(7), progress=False, **options)


def one_round(algorithm, params, data, cohort=None, key=None):
    key = jax.random.key(0) if key is None else key
    cohort = np.arange(len(data.mask)) if cohort is None else cohort
    state = algorithm.init(params, data, key=key)
    return advance(algorithm, state, data, cohort, key=key)


@functools.partial(jax.jit, static_argnames="algorithm")
def advance(algorithm, state, data, cohort, *, key):
    return algorithm.round(state, data, cohort, key=key)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-13), a, b)


def test_round_equals_the_loop_of_the_reference(data, weights):
    state, info = one_round(fedavg.build(descent(num_steps=3)), weights, data)
    expected = reference.fedavg_round(
        np.asarray(weights), jax.tree.map(np.asarray, data), step_size=0.1, num_steps=3
    )
    np.testing.assert_allclose(state.params, expected, rtol=1e-12)
    np.testing.assert_array_equal(info.weights, [5, 2, 0, 4])
    np.testing.assert_array_equal(info.uplink_bytes, np.full(4, weights.nbytes))
    np.testing.assert_array_equal(info.downlink_bytes, np.full(4, weights.nbytes))
    assert state.round == 1


def test_one_client_and_one_step_is_gradient_descent(data, weights):
    one = jax.tree.map(lambda leaf: leaf[:1], data)
    state, info = one_round(fedavg.build(descent(num_steps=1)), weights, one)

    def loss(w):
        return jnp.mean((data.inputs[0] @ w - data.targets[0]) ** 2) / 2

    value, gradient = jax.value_and_grad(loss)(weights)
    np.testing.assert_allclose(state.params, weights - 0.1 * gradient, rtol=1e-13)
    np.testing.assert_allclose(info.losses, [value], rtol=1e-13)


def test_one_full_batch_step_of_all_clients_is_a_central_step(data, weights):
    state, _ = one_round(fedavg.build(descent(num_steps=1)), weights, data)
    inputs, targets = data.inputs[data.mask], data.targets[data.mask]
    gradient = inputs.T @ (inputs @ weights - targets) / len(targets)
    np.testing.assert_allclose(state.params, weights - 0.1 * gradient, rtol=1e-12)


def test_identical_clients_are_one_client(data, weights):
    one = jax.tree.map(lambda leaf: leaf[:1], data)
    same = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), one)
    algorithm = fedavg.build(descent())
    assert_close(
        one_round(algorithm, weights, same)[0].params, one_round(algorithm, weights, one)[0].params
    )


def test_cohort_without_weight_changes_neither_params_nor_server(data, weights):
    server = servers.from_optax(optax.adam(0.1))
    algorithm = fedavg.build(descent(), server=server)
    start = algorithm.init(weights, data, key=jax.random.key(0))
    state, _ = advance(algorithm, start, data, np.array([2]), key=jax.random.key(0))
    assert_equal(state._replace(round=start.round), start)
    moved, _ = advance(algorithm, start, data, np.array([0]), key=jax.random.key(0))
    assert not np.array_equal(moved.params, weights)


def test_clients_are_keyed_by_their_index_not_by_their_place(data, weights):
    algorithm = local_only.build(descent(batch_size=2, num_steps=1))
    everyone, _ = one_round(algorithm, weights, data)
    some, info = one_round(algorithm, weights, data, cohort=jnp.array([3, 1]))
    assert_close(some.params[jnp.array([1, 3])], everyone.params[jnp.array([1, 3])])
    np.testing.assert_array_equal(some.params[0], weights)
    np.testing.assert_array_equal(info.weights, [4, 2])


def test_order_of_the_cohort_does_not_matter(average, data, weights):
    first, first_info = one_round(average, weights, data, cohort=jnp.array([0, 1, 3]))
    second, second_info = one_round(average, weights, data, cohort=jnp.array([3, 0, 1]))
    assert_close(first, second)
    order = np.array([2, 0, 1])
    assert_close(jax.tree.map(lambda leaf: leaf[order], first_info), second_info)


def counting_update(params, client_state, data, *, key):
    """Send the number of rounds the client has seen, and remember it."""
    del data, key
    seen = client_state + 1.0
    return jnp.broadcast_to(seen, params.shape), seen, {"loss": jnp.zeros(())}


def drawing_update(params, client_state, data, *, key):
    """Remember a random number."""
    del client_state, data
    return jnp.zeros_like(params), jax.random.normal(key), {"loss": jnp.zeros(())}


def test_every_client_and_round_has_randomness_of_its_own(data, weights):
    options = {"client_state": lambda _: jnp.zeros(())}
    alone = local_only.build(drawing_update, **options)
    together = federated.compose(
        drawing_update,
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.from_optax(optax.sgd(1.0)),
        **options,
    )
    for algorithm in (alone, together):
        state, drawn = algorithm.init(weights, data, key=jax.random.key(0)), []
        run = jax.jit(functools.partial(federated.run, algorithm, num_rounds=1))
        for _ in range(2):
            state, _ = run(state, data, key=jax.random.key(0))
            drawn += jax.tree.leaves(state.clients)
        assert len(np.unique(np.concatenate(drawn))) == 2 * len(data.mask)


def test_state_of_clients_outside_the_cohort_survives(data, weights):
    algorithm = federated.compose(
        counting_update,
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.from_optax(optax.sgd(1.0)),
        client_state=lambda params: jnp.zeros((), params.dtype),
        client_weights=lambda clients: jnp.ones(clients.mask.shape[0]),
    )
    state = algorithm.init(jnp.zeros_like(weights), data, key=jax.random.key(0))
    for cohort in ([0, 1], [1, 3]):
        state, _ = advance(algorithm, state, data, np.array(cohort), key=jax.random.key(0))
    np.testing.assert_array_equal(state.clients.local, [1, 2, 0, 1])
    np.testing.assert_array_equal(state.params, np.full(3, 1.0 + 1.5))


def test_effective_ranks_of_single_clients_count_in_their_bytes(data):
    def outer(params, client_state, data, *, key):
        del data
        noise = jax.random.normal(key, params.shape)
        return noise, client_state, {"loss": jnp.zeros(())}

    algorithm = fedavg.build(outer, compressor=compressors.truncated_tucker((3, 3)))
    state = algorithm.init(jnp.zeros((4, 5)), data, key=jax.random.key(0))
    ranks = jnp.array([[3, 3], [2, 3], [1, 1], [2, 2]], jnp.int32)
    state = state._replace(clients=state.clients._replace(compressor=ranks))
    state, info = advance(algorithm, state, data, np.arange(4), key=jax.random.key(0))
    expected = 8 * np.array([9 + 27, 6 + 8 + 15, 1 + 9, 4 + 18])
    np.testing.assert_array_equal(info.uplink_bytes, expected)
    np.testing.assert_array_equal(info.downlink_bytes, np.full(4, 8 * 20))
    np.testing.assert_array_equal(state.clients.compressor, ranks)


def median():
    """An aggregator that does not fold: it needs all messages at once."""

    def aggregate(messages, weights, state, *, decompress):
        del weights
        return jnp.median(jax.vmap(decompress)(messages), axis=0), state + 1

    return protocol.Aggregator(lambda _: jnp.zeros((), jnp.int32), aggregate)


def test_aggregators_that_do_not_fold_see_all_messages(data, weights):
    algorithm = federated.compose(
        descent(),
        compressor=compressors.identity(),
        aggregator=median(),
        server=servers.from_optax(optax.sgd(1.0)),
    )
    state, _ = one_round(algorithm, weights, data)
    alone, _ = one_round(local_only.build(descent()), weights, data)
    np.testing.assert_allclose(state.params, jnp.median(alone.params, axis=0), rtol=1e-12)
    assert state.server.aggregator == 1


def wrong_update(change):
    def update(params, client_state, data, *, key):
        good = (
            params,
            client_state,
            local.LocalMetrics(jnp.sum(params), jnp.int32(1), jnp.int32(1)),
        )
        return change(*good)

    return update


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, s, m: (u[:1], s, m), r"got update .*float64\[1\], expected .*\[3\]"),
        (lambda u, s, m: (u.astype("float32"), s, m), r"got update .*float32\[3\]"),
        (lambda u, _, m: (u, (u,), m), r"got client state"),
        (lambda u, s, _: (u, s, ()), r"got metrics of type tuple, expected .* `loss`"),
        (lambda u, s, _: (u, s, {"loss": u}), r"got metrics of type dict"),
    ],
)
def test_local_updates_of_another_shape_are_refused(change, message, data, weights):
    for name, build in {"compose": fedavg.build, "local_only": local_only.build}.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            one_round(build(wrong_update(change)), weights, data)


def test_parts_and_arguments_that_do_not_fit_are_refused(data, weights, average):
    key = jax.random.key(0)
    halving = compressors.identity()._replace(decompress=lambda message: message[:2])
    with pytest.raises(ValueError, match=r"compose: got decompressed update"):
        one_round(fedavg.build(descent(), compressor=halving), weights, data)
    with pytest.raises(ValueError, match=r"compose: got chunk_size 0, expected an integer"):
        fedavg.build(descent(), chunk_size=0)
    for algorithm in (average, local_only.build(descent())):
        with pytest.raises(ValueError, match=r"init: got params of dtype float16"):
            algorithm.init(weights.astype(jnp.float16), data, key=key)
        state = algorithm.init(weights, data, key=key)
        with pytest.raises(ValueError, match=r"round: got cohort with index 4, expected"):
            algorithm.round(state, data, np.array([4]), key=key)
    low_rank = fedavg.build(descent(), compressor=compressors.truncated_tucker((1,)))
    state = low_rank.init(weights, data, key=key)
    with pytest.raises(ValueError, match=r"round: got state of 4 clients, expected .* 3 clients"):
        low_rank.round(state, jax.tree.map(lambda leaf: leaf[:3], data), np.arange(3), key=key)


@pytest.mark.parametrize("drive", [federated.run, federated.simulate])
def test_numbers_of_rounds_and_clients_that_make_no_run_are_refused(drive, data, weights, average):
    name, key = drive.__name__, jax.random.key(0)
    state = average.init(weights, data, key=key)
    with pytest.raises(ValueError, match=rf"{name}: got num_rounds 0, expected an integer"):
        drive(average, state, data, num_rounds=0, key=key)
    with pytest.raises(ValueError, match=rf"{name}: got cohort_size 5, expected .* 1 to 4"):
        drive(average, state, data, num_rounds=1, cohort_size=5, key=key)


def test_run_is_a_scan_over_rounds_and_continues_bitwise(average, data, long_run):
    start, (end, infos) = long_run
    half = jax.jit(functools.partial(federated.run, average, num_rounds=3, cohort_size=2))
    key = jax.random.key(7)
    middle, first = half(start, data, key=key)
    again, second = half(middle, data, key=key)
    assert_equal(again, end)
    assert_equal(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), infos)
    assert infos.losses.shape == (6, 2)


@pytest.mark.parametrize("segment_rounds", [None, 4])
def test_simulation_gives_the_numbers_of_a_run(average, data, long_run, segment_rounds):
    start, expected = long_run
    results = simulate(
        average, start, data, num_rounds=6, cohort_size=2, segment_rounds=segment_rounds
    )
    assert_equal(results, expected)
    assert isinstance(results[1].losses, np.ndarray)


def test_simulation_shows_a_bar_unless_told_not_to(average, data, long_run, capsys):
    start, _ = long_run
    simulate(average, start, data, num_rounds=6, cohort_size=2)
    assert capsys.readouterr().err == ""
    federated.simulate(
        average, start, data, num_rounds=6, cohort_size=2, key=jax.random.key(7), progress=True
    )
    assert "6/6" in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone():
    """Clients that halve their distance to their targets in every round."""
    data = protocol.ClientData((), jnp.array([[1.0], [3.0]]), jnp.ones((2, 1), bool))
    update = local.projected_gradient(lambda image, _: image, step_size=0.5)
    algorithm = local_only.build(update)
    return algorithm, algorithm.init(jnp.zeros(1), data, key=jax.random.key(0)), data


@pytest.mark.parametrize("segment_rounds", [1, 3, 20])
def test_stopping_keeps_the_state_that_the_record_measures(alone, segment_rounds):
    algorithm, start, data = alone
    stop = stopping.every_client(jnp.array([1.0, 0.5]))
    state, infos = simulate(
        algorithm, start, data, num_rounds=20, stop=stop, segment_rounds=segment_rounds
    )
    # Residuals of the second client: 3, 1.5, 0.75, 0.375.
    np.testing.assert_array_equal(infos.metrics.residual_norm[:, 1], [3, 1.5, 0.75, 0.375])
    assert state.round == 3
    np.testing.assert_array_equal(
        np.abs(state.params - data.targets)[:, 0], infos.metrics.residual_norm[-1]
    )


def test_rules_remember_rounds_across_segments(alone):
    algorithm, start, data = alone
    still = protocol.FederatedAlgorithm(
        algorithm.init,
        lambda state, *args, **options: (
            state._replace(round=state.round + 1),
            algorithm.round(state, *args, **options)[1],
        ),
    )
    rule = stopping.stagnation(patience=5)
    state, infos = simulate(still, start, data, num_rounds=20, stop=rule, segment_rounds=2)
    assert len(infos.losses) == 6
    # No round improved on the first one, so its state is returned.
    assert state.round == 0


def test_a_run_that_diverges_ends_with_its_best_state(alone):
    algorithm, start, data = alone
    update = local.projected_gradient(lambda image, _: image, step_size=2.5, lower=None)
    diverging = local_only.build(update)

    def until_third(state, clients, cohort, *, key):
        good, info = algorithm.round(state, clients, cohort, key=key)
        bad, _ = diverging.round(state, clients, cohort, key=key)
        chosen = jax.tree.map(lambda a, b: jnp.where(state.round < 3, a, b), good, bad)
        return chosen, info

    turning = protocol.FederatedAlgorithm(algorithm.init, until_third)
    rule = stopping.any_of(stopping.every_client(jnp.zeros(2)), stopping.stagnation(patience=4))
    for segment_rounds in (1, 20):
        state, infos = simulate(
            turning, start, data, num_rounds=20, stop=rule, segment_rounds=segment_rounds
        )
        norms = infos.metrics.residual_norm[:, 1]
        np.testing.assert_allclose(norms[:6], [3, 1.5, 0.75, 0.375, 0.5625, 0.84375])
        assert len(norms) == 8
        assert state.round == 3
        np.testing.assert_array_equal(np.abs(state.params - data.targets)[1, 0], 0.375)


def test_three_rounds_cause_one_trace(alone):
    algorithm, start, data = alone
    traces = []

    def counted(*args, **options):
        traces.append(1)
        return algorithm.round(*args, **options)

    watched = protocol.FederatedAlgorithm(algorithm.init, counted)
    state, _ = simulate(watched, start, data, num_rounds=3, segment_rounds=1)
    simulate(watched, state, data, num_rounds=3, segment_rounds=1)
    assert len(traces) == 1


def test_evaluation_sees_the_state_that_enters(alone):
    algorithm, start, data = alone
    watched = federated.with_evaluation(algorithm, lambda state: state.params[1, 0])
    _, infos = simulate(watched, start, data, num_rounds=3)
    np.testing.assert_array_equal(infos.evaluation, [0, 1.5, 2.25])


def test_nan_in_visible_data_is_refused(alone, data, average, weights):
    algorithm, start, targets = alone
    spoilt = targets._replace(targets=targets.targets.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"simulate: got clients\.targets with 1 NaN or Inf"):
        simulate(algorithm, start, spoilt, num_rounds=1)
    state = average.init(weights, data, key=jax.random.key(0))
    visible = data._replace(inputs=data.inputs.at[3, 0].set(jnp.inf))
    with pytest.raises(ValueError, match=r"simulate: got clients\.inputs with 3 NaN or Inf"):
        simulate(average, state, visible, num_rounds=6, cohort_size=2)


def test_nan_in_the_start_is_refused(alone):
    algorithm, start, data = alone
    spoilt = start._replace(params=start.params.at[1].set(jnp.nan))
    with pytest.raises(ValueError, match="simulate: got params with 1 NaN or Inf entries"):
        simulate(algorithm, spoilt, data, num_rounds=1)


def test_nan_behind_the_mask_is_let_through(data, average, long_run):
    start, expected = long_run
    hidden = data._replace(
        inputs=jnp.where(data.mask[..., None], data.inputs, jnp.nan),
        targets=jnp.where(data.mask, data.targets, jnp.nan),
    )
    assert_equal(simulate(average, start, hidden, num_rounds=6, cohort_size=2), expected)


def test_interrupt_loses_no_finished_round(alone, monkeypatch):
    algorithm, start, data = alone
    segment, calls = simulation._segment, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(*args, **options)

    monkeypatch.setattr(simulation, "_segment", interrupted)
    with pytest.warns(UserWarning, match="simulate: interrupted after 2 rounds"):
        state, infos = simulate(algorithm, start, data, num_rounds=9, segment_rounds=1)
    assert state.round == 2
    assert len(infos.losses) == 2
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        simulate(algorithm, start, data, num_rounds=9, segment_rounds=1)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_data_with_axes_of_length_one_are_not_copied(chunk_size):
    def loss(params, image, target):
        return (jnp.sum(jnp.tanh(params["matrix"] @ image.reshape(-1))) - target) ** 2

    update = local.local_sgd(loss, optax.sgd(0.1), num_steps=2, batch_size=4)
    algorithm = fedavg.build(update, chunk_size=chunk_size)

    def temporary_bytes(count):
        images = jnp.ones((count, 8, 1, 7, 7))
        clients = protocol.ClientData(images, jnp.ones((count, 8)), jnp.ones((count, 8), bool))
        params = {"matrix": jnp.ones((3, 49))}
        state = algorithm.init(params, clients, key=jax.random.key(0))

        def run(state, clients):
            return federated.run(algorithm, state, clients, num_rounds=1, key=jax.random.key(1))[0]

        compiled = jax.jit(run).lower(state, clients).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) < temporary_bytes(4) + 8 * 8 * 49


def test_memory_of_a_round_does_not_grow_with_the_cohort():
    size = 10_000

    def update(params, client_state, data, *, key):
        del key
        return jnp.sin(params * data), client_state, {"loss": data}

    algorithm = fedavg.build(update, chunk_size=1)

    def temporary_bytes(count):
        clients = jnp.ones(count)
        state = algorithm.init(jnp.zeros(size), clients, key=jax.random.key(0))
        compiled = (
            jax.jit(algorithm.round)
            .lower(state, clients, jnp.arange(count), key=jax.random.key(0))
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) < temporary_bytes(2) + 8 * size
