"""Local training against remembered representations, checked by re-encoding with old models."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import information
from fedlr.federated import local, protocol

SAMPLES, INPUTS, FEATURES, BATCH = 5, 3, 2, 3
MASK = np.array([True, True, False, True, True])
PLAN = local.Training(optax.sgd(0.2, momentum=0.5), 3, BATCH)
CONTRASTS = {
    "history": local.history(3, max_age=4),
    "previous_local": local.previous_local(),
    "in_batch": local.in_batch(),
    "history_and_batch": local.history_and_batch(2, max_age=None),
}


def embed(weights, inputs):
    return jnp.tanh(inputs @ weights)


def loss(weights, inputs, targets, valid, anchors):
    """Contrast alone, with a record of what the batch was compared with."""
    del targets
    own = embed(weights, inputs)
    positives, negatives, mask = anchors
    value = information.model_contrastive(own, positives, negatives, mask=mask, rows=valid)
    return value, (inputs, own, valid, anchors)


@functools.cache
def client(filler=np.nan, *, mask=tuple(MASK)):
    inputs = np.random.default_rng(0).normal(size=(SAMPLES, INPUTS))
    mask = np.array(mask)
    inputs = np.where(mask[:, None], inputs, filler)
    return protocol.ClientData(*map(jnp.asarray, (inputs, np.full(SAMPLES, np.nan), mask)))


def weights(seed):
    return jnp.asarray(np.random.default_rng(100 + seed).normal(size=(INPUTS, FEATURES)))


@functools.cache
def updater(name, plan=PLAN):
    """Compile the update of one client, once for all rounds: a second trace is an error."""

    def update(params, memory, data, round, key):
        one = local.local_contrastive(loss, embed, CONTRASTS[name], plan, round=round)
        return one(params, memory, data, key=key)

    update.__name__ = f"update_{name}_{id(plan)}"
    return jax.jit(chex.assert_max_traces(update, n=1))


def empty(name, dtype=jnp.float64):
    inputs = jnp.zeros((1, SAMPLES, INPUTS), dtype)
    clients = protocol.ClientData(inputs, inputs[..., 0], jnp.ones((1, SAMPLES), bool))
    start = jnp.zeros((INPUTS, FEATURES), dtype)
    return local.empty_memory(embed, CONTRASTS[name], start, clients)


def do(name, params, memory, round, *, data=None, key=0, plan=PLAN):
    data = client() if data is None else data
    return updater(name, plan)(params, memory, data, jnp.int32(round), jax.random.key(key))


def codes(params, data=None):
    """Represent the present examples in NumPy, zeros for the others."""
    inputs, _, mask = client() if data is None else data
    found = np.zeros((SAMPLES, FEATURES))
    for i in np.flatnonzero(np.asarray(mask)):
        found[i] = np.tanh(np.asarray(inputs[i]) @ np.asarray(params))
    return found


def remembered(memory):
    """Return what is remembered by the round in which it was written."""
    rounds = np.asarray(memory.rounds)
    return {int(r): np.asarray(memory.embeddings[s]) for s, r in enumerate(rounds) if r >= 0}


# Rounds in which the client is there: without a gap, and with gaps; in 6 one model is too old and
# one just young enough.
@pytest.mark.parametrize("attended", [range(8), (1, 2, 4, 6, 10, 11, 25)])
def test_the_ring_holds_the_last_received_models_and_forgets_none_else(attended):
    memory, held = empty("history"), []
    for t in attended:
        _, memory, metrics = do("history", weights(t), memory, t, key=t)
        anchors = metrics.aux[3]
        usable = [r for r, _ in held if t - r <= 4]
        assert int(anchors.mask.sum()) == BATCH * len(usable)
        if t > 0:  # the model of the first round is nobody's
            held = [*held, (t, codes(weights(t)))][-3:]
        found = remembered(memory)
        assert sorted(found) == [r for r, _ in held]
        for r, expected in held:
            np.testing.assert_allclose(found[r], expected, rtol=1e-13)


@pytest.mark.parametrize("name", ["history", "history_and_batch"])
def test_rows_of_the_anchors_are_those_of_the_batch(name):
    """Against all old models applied to the inputs of the batch itself."""
    memory = empty(name)
    for t in range(6):
        _, memory, metrics = do(name, weights(t), memory, t, key=t)
        inputs, own, valid, anchors = metrics.aux
        assert valid.all()
        np.testing.assert_allclose(anchors.positives, own, rtol=1e-13)
        for i in range(BATCH):
            slots = CONTRASTS[name].slots
            used = np.asarray(anchors.negatives[i])[np.asarray(anchors.mask[i])]
            expected = [embed(weights(r), inputs[i]) for r in range(max(1, t - slots), t)]
            if name == "history_and_batch" and t > 0:
                expected += [own[j] for j in range(BATCH) if j != i]
            assert len(used) == len(expected)
            for code in expected:
                assert np.abs(used - np.asarray(code)).max(axis=1).min() < 1e-13


def test_other_examples_of_the_batch_count_but_never_the_own_nor_what_is_no_example():
    two = client(mask=(False, True, False, True, False))
    for data, count in ((client(), 3), (two, 2)):
        _, memory, metrics = do("in_batch", weights(0), empty("in_batch"), 1, data=data)
        _, own, valid, anchors = metrics.aux
        assert memory.embeddings.shape == (0, SAMPLES, FEATURES)
        assert valid.sum() == count
        expected = np.ones((BATCH, 1), bool) & np.asarray(valid) & ~np.eye(BATCH, dtype=bool)
        np.testing.assert_array_equal(anchors.mask, expected)
        for row in anchors.negatives:
            np.testing.assert_allclose(row, own, rtol=1e-13)


@pytest.mark.parametrize("name", CONTRASTS)
def test_in_the_first_round_loss_and_gradient_are_exactly_zero(name):
    difference, memory, metrics = do(name, weights(0), empty(name), 0)
    assert metrics.loss == 0
    np.testing.assert_array_equal(difference, np.zeros((INPUTS, FEATURES)))
    # Only what the client trained itself is remembered of it.
    assert set(remembered(memory)) == ({0} if name == "previous_local" else set())


def test_models_that_all_agree_give_log_of_one_plus_their_number():
    memory, params = empty("history"), weights(0)
    for t in range(7):
        _, memory, metrics = do("history", params, memory, t)
        number = min(max(t - 1, 0), 3)
        np.testing.assert_allclose(metrics.loss, math.log1p(number), rtol=1e-12, atol=1e-15)


def test_the_model_trained_last_is_remembered_even_after_long():
    first, memory, _ = do("previous_local", weights(0), empty("previous_local"), 4)
    trained = weights(0) + first
    np.testing.assert_allclose(remembered(memory)[4], codes(trained), rtol=1e-13)
    second, memory, metrics = do("previous_local", weights(1), memory, 400)
    inputs, _, _, anchors = metrics.aux
    np.testing.assert_array_equal(anchors.mask, np.ones((BATCH, 1), bool))
    np.testing.assert_allclose(anchors.negatives[:, 0], embed(trained, inputs), rtol=1e-13)
    assert list(remembered(memory)) == [400]
    np.testing.assert_allclose(remembered(memory)[400], codes(weights(1) + second), rtol=1e-13)


def naive_contrast(params, inputs, models, temperature):
    """Contrast the rows of a batch: `models` are the received one and the earlier ones."""

    def direction(one, x):
        code = jnp.tanh(x @ one)
        return code / jnp.sqrt(jnp.sum(code**2))

    total = 0.0
    for i, x in enumerate(inputs):
        own = direction(params, x)
        others = [direction(one, x) for one in models]
        others += [direction(models[0], z) for j, z in enumerate(inputs) if j != i]
        powers = [jnp.exp(jnp.sum(own * other) / temperature) for other in others]
        total = total - jnp.log(powers[0] / functools.reduce(jnp.add, powers))
    return total / len(inputs)


def test_steps_follow_the_gradient_with_anchors_held_fixed():
    """Old and new models encode each batch anew here, as constants."""
    plan = local.Training(optax.sgd(0.3), 2)
    memory, name = empty("history_and_batch"), "history_and_batch"
    for t in (1, 2):
        _, memory, _ = do(name, weights(t), memory, t, plan=plan)
    difference, _, metrics = do(name, weights(3), memory, 3, plan=plan)
    inputs = [jnp.asarray(x) for x in np.asarray(client().inputs)[MASK]]
    models = [weights(t) for t in (3, 1, 2)]
    slope = jax.jit(jax.value_and_grad(lambda w: naive_contrast(w, inputs, models, 0.5)))
    current = weights(3)
    np.testing.assert_allclose(metrics.loss, slope(current)[0], rtol=1e-12)
    for _ in range(2):
        current = current - 0.3 * slope(current)[1]
    np.testing.assert_allclose(difference, current - weights(3), rtol=1e-11)


@pytest.mark.parametrize("name", CONTRASTS)
def test_what_is_no_example_may_hold_anything(name):
    ends = []
    for filler in (0.0, np.nan, 1e30):
        memory = empty(name)
        for t in range(3):
            difference, memory, metrics = do(name, weights(t), memory, t, data=client(filler))
        ends.append((difference, memory, metrics.loss))
    for spoilt in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, spoilt, ends[0])
    assert np.isfinite(ends[0][2])
    assert ends[0][2] > 0


def test_a_client_without_examples_stays_where_it_is():
    nobody = client(mask=(False,) * SAMPLES)
    memory = empty("history_and_batch")
    for t in range(3):
        difference, memory, metrics = do("history_and_batch", weights(t), memory, t, data=nobody)
        np.testing.assert_array_equal(difference, np.zeros((INPUTS, FEATURES)))
        assert metrics.loss == 0
    np.testing.assert_array_equal(memory.embeddings, np.zeros((2, SAMPLES, FEATURES)))


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_updates_and_memories_keep_their_dtypes(name, dtype):
    memory = empty(name, dtype)
    data = protocol.ClientData(
        jnp.ones((SAMPLES, INPUTS), dtype), jnp.ones(SAMPLES, dtype), jnp.asarray(MASK)
    )
    update = local.local_contrastive(loss, embed, CONTRASTS[name], PLAN, round=3)
    params = jnp.ones((INPUTS, FEATURES), dtype)
    found = jax.eval_shape(lambda: update(params, memory, data, key=jax.random.key(0)))
    assert (found[0].shape, found[0].dtype) == (params.shape, dtype)
    jax.tree.map(lambda a, b: chex.assert_shape(a, b.shape), found[1], memory)
    jax.tree.map(lambda a, b: chex.assert_type(a, b.dtype), found[1], memory)
    assert memory.rounds.dtype == jnp.int32


def test_temperatures_may_be_traced():
    def temperature(value):
        return [
            build(temperature=value).temperature
            for build in (local.history, local.in_batch, local.history_and_batch)
        ]

    assert [float(found) for found in jax.jit(temperature)(0.25)] == [0.25] * 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: local.history(0), "history: got count 0, expected an integer from 1"),
        (lambda: local.history(1.5), "history: got count 1.5"),
        (lambda: local.history_and_batch(0), "history_and_batch: got count 0"),
        (lambda: local.history(max_age=0), "history: got max_age 0, expected an integer from 1"),
        (lambda: local.history(temperature=0.0), "history: got temperature 0.0"),
        (lambda: local.in_batch(temperature=-1.0), "in_batch: got temperature -1.0"),
        (lambda: local.previous_local(temperature=np.nan), "previous_local: got temperature nan"),
        (lambda: local.history_and_batch(temperature=0), "history_and_batch: got temperature 0"),
    ],
)
def test_what_is_out_of_its_range_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
