"""MOON against loops that keep the clients' old models and apply them anew."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import federated
from fedlr.algorithms import fedavg, moon
from fedlr.federated import local, protocol

SIZES, INPUTS, FEATURES, SAMPLES = (4, 2, 3), 3, 2, 5
RATE, STRENGTH, TEMPERATURE = 0.3, 0.7, 0.4
TRAINING = local.Training(optax.sgd(RATE), 2)


def embed(params, inputs):
    return jnp.tanh(inputs @ params["encoder"])


def squared_error(params, inputs, target):
    return (jnp.sum(embed(params, inputs) * params["head"]) - target) ** 2 / 2


@functools.cache
def problem():
    """Ragged clients as arrays, and the same as lists."""
    rng = np.random.default_rng(0)
    lists = [(rng.normal(size=(n, INPUTS)), rng.normal(size=n)) for n in SIZES]
    inputs = np.full((len(SIZES), SAMPLES, INPUTS), np.nan)
    targets = np.full((len(SIZES), SAMPLES), 1e30)
    for k, (x, y) in enumerate(lists):
        inputs[k, : len(y)], targets[k, : len(y)] = x, y
    mask = np.arange(SAMPLES) < np.array(SIZES)[:, None]
    return protocol.ClientData(*map(jnp.asarray, (inputs, targets, mask))), lists


def model(dtype="float64"):
    rng = np.random.default_rng(1)
    return {
        "encoder": jnp.asarray(rng.normal(size=(INPUTS, FEATURES)), dtype),
        "head": jnp.asarray(rng.normal(size=FEATURES), dtype),
    }


def begin(algorithm):
    return algorithm.init(model(), problem()[0], key=jax.random.key(0))


@functools.cache
def stepper(size):
    """Compile a round of a cohort, once for all rounds and strengths."""

    def step(state, cohort, strength):
        algorithm = moon.build(
            squared_error, embed, TRAINING, strength=strength, temperature=TEMPERATURE
        )
        return algorithm.round(state, problem()[0], cohort, key=jax.random.key(0))

    step.__name__ = f"step_{size}"
    return jax.jit(chex.assert_max_traces(step, n=1))


def step(state, cohort=(0, 1, 2), strength=STRENGTH):
    cohort = jnp.array(cohort)
    return stepper(cohort.size)(state, cohort, jnp.asarray(strength, jnp.float64))


def start():
    return begin(moon.build(squared_error, embed, TRAINING, temperature=TEMPERATURE))


def naive_loss(params, client, received, previous):
    """Mean error of a client plus the contrast of its examples, one by one."""

    def direction(one, x):
        code = jnp.tanh(x @ one["encoder"])
        return code / jnp.sqrt(jnp.sum(code**2))

    total = 0.0
    for x, y in zip(*client, strict=True):
        error = jnp.tanh(x @ params["encoder"]) @ params["head"] - y
        total = total + error**2 / 2
        if previous is not None:
            near, far = (
                jnp.exp(jnp.sum(direction(params, x) * direction(one, x)) / TEMPERATURE)
                for one in (received, previous)
            )
            total = total - STRENGTH * jnp.log(near / (near + far))
    return total / len(client[1])


def test_rounds_are_those_of_loops_that_keep_old_models():
    _, lists = problem()
    slopes = [
        jax.jit(jax.value_and_grad(functools.partial(naive_loss, client=one))) for one in lists
    ]
    state, params, previous = start(), model(), [None] * 3
    # Client 1 comes back to the model that it trained two rounds before.
    for cohort in ((0, 1, 2), (0, 2), (1, 2), (0, 1, 2)):
        state, info = step(state, cohort)
        moved = []
        for place, k in enumerate(cohort):
            current, received = params, params
            value, _ = slopes[k](current, received=received, previous=previous[k])
            np.testing.assert_allclose(info.losses[place], value, rtol=1e-11)
            for _ in range(TRAINING.num_steps):
                _, slope = slopes[k](current, received=received, previous=previous[k])
                current = jax.tree.map(lambda w, g: w - RATE * g, current, slope)
            moved.append(current)
            previous[k] = current
        shares = np.array([SIZES[k] for k in cohort]) / sum(SIZES[k] for k in cohort)
        params = jax.tree.map(
            lambda *ws, shares=shares: sum(s * w for s, w in zip(shares, ws, strict=True)), *moved
        )
        for name in params:
            np.testing.assert_allclose(state.params[name], params[name], rtol=1e-10, atol=1e-12)


def test_without_strength_it_is_fedavg_and_in_the_first_round_always():
    average = fedavg.build(local.local_sgd(squared_error, optax.sgd(RATE), num_steps=2))
    expected, same, pulled = begin(average), start(), start()
    one_round = jax.jit(
        lambda state: average.round(state, problem()[0], jnp.arange(3), key=jax.random.key(0))
    )
    for t in range(3):
        expected, info = one_round(expected)
        same, same_info = step(same, strength=0.0)
        pulled, _ = step(pulled)
        np.testing.assert_allclose(same_info.losses, info.losses, rtol=1e-12)
        for name in expected.params:
            np.testing.assert_allclose(same.params[name], expected.params[name], rtol=1e-12)
        gap = np.abs(pulled.params["encoder"] - expected.params["encoder"]).max()
        assert (gap < 1e-14) == (t == 0)


def test_whoever_is_away_keeps_its_memory():
    state, _ = step(start())
    later, _ = step(state, (0, 2))
    kept, now = state.clients.local, later.clients.local
    assert now.rounds.tolist() == [[1], [0], [1]]
    np.testing.assert_array_equal(now.embeddings[1], kept.embeddings[1])
    assert not np.array_equal(now.embeddings[0], kept.embeddings[0])


def test_many_strengths_are_one_program():
    state, _ = step(start())
    strengths = jnp.array([0.0, 1.0, 5.0])

    def one(strength):
        algorithm = moon.build(
            squared_error, embed, TRAINING, strength=strength, temperature=TEMPERATURE
        )
        return algorithm.round(state, problem()[0], jnp.arange(3), key=jax.random.key(0))[0].params

    many = jax.jit(jax.vmap(one))(strengths)
    for i, strength in enumerate(strengths):
        alone, _ = step(state, strength=strength)
        for name in alone.params:
            np.testing.assert_allclose(many[name][i], alone.params[name], rtol=1e-12, atol=1e-14)


def test_it_keeps_float32_whatever_the_type_of_the_strength():
    data = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, problem()[0]
    )
    algorithm = moon.build(squared_error, embed, TRAINING, strength=np.float64(0.5))

    def run(key):
        state = algorithm.init(model("float32"), data, key=key)
        return federated.run(algorithm, state, data, num_rounds=2, key=key)

    state, infos = jax.eval_shape(run, jax.random.key(0))
    kinds = {leaf.dtype for leaf in (*jax.tree.leaves(state.params), infos.losses)}
    assert kinds == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": -0.1}, "build: got strength -0.1, expected a non-negative number"),
        ({"temperature": 0.0}, "previous_local: got temperature 0.0, expected a positive number"),
        ({"chunk_size": 0}, "compose: got chunk_size 0"),
    ],
)
def test_what_is_out_of_its_range_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        begin(moon.build(squared_error, embed, TRAINING, **options))
