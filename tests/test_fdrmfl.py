"""FDRMFL: its terms by loops, its rounds against loops that keep the old global models."""

import functools
import itertools
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import federated, information, multimodal
from fedlr.algorithms import fdrmfl, fedavg
from fedlr.federated import local, privacy, protocol

SIZES, WIDTH, FEATURES = (3, 2), 2, 2
CLIENTS, SAMPLES, COUNTS = 3, 5, np.array([5, 1, 4])
SLOTS, TEMPERATURE = 2, 0.5
TRAINING = local.Training(optax.sgd(0.1, momentum=0.5), 2, 3)
WEIGHTS = fdrmfl.Weights(0.3, 0.2, 0.7, 0.1)
NOTHING = fdrmfl.Weights(None, None, None, None)
ZEROS = fdrmfl.Weights(0.0, 0.0, 0.0, 0.0)
# A small program where the other terms are not the subject.
CONTRAST = {"contrast": 0.7}


class Squashed(eqx.Module):
    """An encoder as small as can be."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        return jnp.tanh(self.layer(x))


def drawn(make):
    """Make a network and fill it with numbers of NumPy, without compiling anything."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype) if is_array else leaf

    return jax.tree.map(draw, eqx.filter_eval_shape(make, jax.random.key(0)))


@functools.cache
def network(kind="gaussian", dtype=jnp.float64):
    """Make a network of points, or of Gaussians."""

    def make(key):
        options = {"key": key, "dtype": dtype}
        encoders = tuple(Squashed(eqx.nn.Linear(size, WIDTH, **options)) for size in SIZES)
        if kind == "gaussian":
            encoders = tuple(multimodal.GaussianEncoder(e, WIDTH, **options) for e in encoders)
            fusion = multimodal.PrecisionFusion(WIDTH, FEATURES, hidden=3, **options)
        else:
            fusion = multimodal.GatedFusion(len(SIZES), WIDTH, FEATURES, hidden=3, **options)
        head = eqx.nn.MLP(FEATURES, 1, 3, 1, **options)
        critic = information.joint_critic(FEATURES, 1, width=3, depth=1, **options)
        return multimodal.Network(encoders, fusion, head, critic)

    return drawn(make)


def params_of(network):
    return eqx.filter(network, eqx.is_inexact_array)


def fill(values, counts, filler):
    """Put a filler for what does not count."""
    spread = np.asarray(counts).reshape(counts.shape + (1,) * (values.ndim - counts.ndim))
    return jnp.asarray(np.where(spread, values, filler))


# Loops. Rows that do not count have `ok` zero, and hold zeros.


def mlp(module, x, activation):
    first, last = module.layers
    return last.weight @ activation(first.weight @ x + first.bias) + last.bias


def naive_code(encoder, x):
    """Return mean and variance of the code of one value; a point has variance one."""
    if isinstance(encoder, Squashed):
        return jnp.tanh(encoder.layer.weight @ x + encoder.layer.bias), jnp.ones(WIDTH)
    hidden, _ = naive_code(encoder.encoder, x)
    log_var = encoder.log_var.weight @ hidden + encoder.log_var.bias
    return encoder.mean.weight @ hidden + encoder.mean.bias, jnp.exp(jnp.clip(log_var, -8, 4))


def naive_features(model, xs, present):
    """Return codes and features of one sample; `present` is of zeros and ones."""
    codes = [naive_code(encoder, x) for encoder, x in zip(model.encoders, xs, strict=True)]
    if isinstance(model.fusion, multimodal.PrecisionFusion):
        shares = [there / variance for (_, variance), there in zip(codes, present, strict=True)]
        total = functools.reduce(jnp.add, shares)
        means = [share * mean for (mean, _), share in zip(codes, shares, strict=True)]
        fused = functools.reduce(jnp.add, means) / jnp.where(total > 0, total, 1.0)
    else:
        powers = [there * jnp.exp(g) for g, there in zip(model.fusion.gates, present, strict=True)]
        scale = sum(present) / jnp.maximum(sum(powers), 1e-300)
        blocks = [scale * p * mean for (mean, _), p in zip(codes, powers, strict=True)]
        fused = jnp.concatenate(blocks)
    return codes, mlp(model.fusion.mixing, fused, jax.nn.gelu)


def divergence(one, other):
    """Divergence of the first diagonal Gaussian (mean, variance) from the second."""
    (mean, variance), (centre, scale) = one, other
    terms = jnp.log(scale / variance) + (variance + (mean - centre) ** 2) / scale - 1
    return jnp.sum(terms) / 2


def cosine(one, other):
    return jnp.sum(one * other) / jnp.sqrt(jnp.sum(one**2) * jnp.sum(other**2))


def mean(values, counts):
    """Average a list over what counts; 0 without any."""
    total = sum(count * value for value, count in zip(values, counts, strict=True))
    return total / jnp.maximum(sum(counts), 1.0)


def naive_terms(model, rows, anchors):
    """Compute the terms of rows (xs, present, target, ok), anchors (positive, negatives, used)."""
    found = [naive_features(model, xs, present) for xs, present, _, _ in rows]
    ok = [row[3] for row in rows]
    errors, joint, product, pairs = [], [], [], []
    for i, (_, fused) in enumerate(found):
        target = rows[i][2]
        errors.append((mlp(model.head, fused, jax.nn.relu)[0] - target) ** 2)
        for j, (_, other) in enumerate(found):
            z_y = jnp.concatenate([other, target[None]])
            score = mlp(model.critic.network, z_y, jax.nn.relu)[0]
            if i == j:
                joint.append(jnp.log1p(jnp.exp(-score)))
            else:
                product.append(jnp.log1p(jnp.exp(score)))
                pairs.append(ok[i] * ok[j])
    gaps, both, priors, there = [], [], [], []
    for (codes, _), (_, present, _, one) in zip(found, rows, strict=True):
        for m, k in itertools.combinations(range(len(codes)), 2):
            gaps.append(divergence(codes[m], codes[k]) + divergence(codes[k], codes[m]))
            both.append(one * present[m] * present[k])
        for code, here in zip(codes, present, strict=True):
            priors.append(divergence(code, (jnp.zeros(WIDTH), jnp.ones(WIDTH))))
            there.append(one * here)
    contrasts = []
    for (_, fused), (positive, negatives, used) in zip(found, anchors, strict=True):
        near = jnp.exp(cosine(fused, positive) / TEMPERATURE)
        powers = [jnp.exp(cosine(fused, other) / TEMPERATURE) for other in negatives]
        far = sum(count * power for count, power in zip(used, powers, strict=True))
        contrasts.append(-jnp.log(near / (near + far)))
    some = jnp.where(sum(pairs) > 0, 1.0, 0.0)
    return fdrmfl.Terms(
        mean(errors, ok),
        some * mean(joint, ok) + mean(product, pairs),
        mean(gaps, both) / WIDTH,
        mean(contrasts, ok),
        mean(priors, there) / WIDTH,
    )


def weighted(terms, weights):
    pairs = zip(terms[1:], weights, strict=True)
    return terms.prediction + sum(weight * term for term, weight in pairs if weight is not None)


# One batch.

VALID = np.array([1, 1, 0, 1, 1, 1], bool)
PRESENT = np.array([[1, 1], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1]], bool)
USABLE = VALID & PRESENT.any(axis=1)
USED = np.array([True, False, True])


class Batch(NamedTuple):
    """What a loss is computed of, besides the params."""

    samples: multimodal.Modalities
    targets: jax.Array
    valid: jax.Array
    anchors: local.Anchors | None


def batch(filler=0.0):
    """Make a batch of six with a filler for all that does not count."""
    rng = np.random.default_rng(2)
    there = PRESENT & VALID[:, None]
    values = [fill(rng.normal(size=(6, p)), there[:, m], filler) for m, p in enumerate(SIZES)]
    used = np.broadcast_to(USED, (6, 3))
    anchors = local.Anchors(
        fill(rng.normal(size=(6, FEATURES)), USABLE, filler),
        fill(rng.normal(size=(6, 3, FEATURES)), USABLE[:, None] & used, filler),
        jnp.asarray(used),
    )
    samples = multimodal.Modalities(tuple(values), jnp.asarray(PRESENT))
    targets = fill(rng.normal(size=6), USABLE, filler)
    return Batch(samples, targets, jnp.asarray(VALID), anchors)


def weights_of(kind):
    return WEIGHTS if kind == "gaussian" else WEIGHTS._replace(prior=None)


@functools.cache
def evaluator(kind):
    """Compile the loss and its terms, with the derivatives of all of them."""
    loss = fdrmfl.multimodal_loss(network(kind), weights=weights_of(kind), temperature=TEMPERATURE)

    def values(params, given):
        value, terms = loss(params, *given)
        found = jnp.stack([value, *(term for term in terms if term is not None)])
        return found, (value, terms)

    return jax.jit(jax.jacrev(values, has_aux=True))


def evaluate(kind, given, params=None):
    return evaluator(kind)(params_of(network(kind)) if params is None else params, given)


@pytest.mark.parametrize("kind", ["points", "gaussian"])
def test_terms_are_those_of_loops(kind):
    given = batch()
    slopes, (value, terms) = evaluate(kind, given)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    rows = [
        ([x[i] for x in given.samples.values], PRESENT[i] * 1.0, given.targets[i], USABLE[i] * 1.0)
        for i in range(6)
    ]
    positives, negatives, _ = given.anchors
    # Any that are not zero for rows that do not count, and zero has no direction.
    positives = jnp.where(USABLE[:, None], positives, 1.0)
    negatives = jnp.where(USED[None, :, None] & USABLE[:, None, None], negatives, 1.0)
    anchors = [(positives[i], negatives[i], USED * 1.0) for i in range(6)]
    expected = naive_terms(network(kind), rows, anchors)
    if kind == "points":
        assert terms.prior is None
        expected = expected._replace(prior=None)
    for name in fdrmfl.Terms._fields:
        if getattr(expected, name) is not None:
            np.testing.assert_allclose(getattr(terms, name), getattr(expected, name), rtol=1e-11)
    np.testing.assert_allclose(value, weighted(expected, weights_of(kind)), rtol=1e-11)


@pytest.mark.parametrize("kind", ["points", "gaussian"])
def test_what_does_not_count_changes_neither_values_nor_gradients(kind):
    clean = evaluate(kind, batch())
    for filler in (np.nan, 1e30):
        jax.tree.map(np.testing.assert_array_equal, evaluate(kind, batch(filler)), clean)
    # A sample without any modality is none at all.
    hidden = batch()._replace(valid=jnp.asarray(USABLE))
    jax.tree.map(np.testing.assert_array_equal, evaluate(kind, hidden), clean)


@pytest.mark.parametrize("kind", ["points", "gaussian"])
def test_without_any_sample_all_terms_and_gradients_are_zero(kind):
    given = batch(np.nan)
    absent = given.samples._replace(present=jnp.zeros((6, 2), bool))
    for nothing in (given._replace(valid=jnp.zeros(6, bool)), given._replace(samples=absent)):
        slopes, values = evaluate(kind, nothing)
        for leaf in (*jax.tree.leaves(slopes), *jax.tree.leaves(values)):
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_without_negatives_the_contrast_and_its_gradient_are_zero():
    given = batch(np.nan)
    anchors = given.anchors._replace(mask=jnp.zeros((6, 3), bool))
    slopes, (_, terms) = evaluate("gaussian", given._replace(anchors=anchors))
    assert terms.contrast == 0
    row = 1 + fdrmfl.Terms._fields.index("contrast")
    for leaf in jax.tree.leaves(slopes):
        np.testing.assert_array_equal(leaf[row], np.zeros(leaf.shape[1:]))


def constant_network(codes):
    """Make a network of encoders that always return the same."""
    encoders = tuple(lambda _, code=code: code for code in codes)
    return multimodal.Network(encoders, lambda *_: jnp.zeros(1), lambda z: z, None)


def alignment(codes, present):
    """Return R_kl of up to four samples, for each a row of `present`."""
    present = [*present, *[[0] * len(codes)] * (4 - len(present))]
    weights = fdrmfl.Weights(None, 1.0, None, None)
    model = constant_network(codes)
    values = tuple(jnp.zeros((4, 1)) for _ in codes)
    samples = multimodal.Modalities(values, jnp.array(present, bool))
    loss = fdrmfl.multimodal_loss(model, weights=weights)
    _, terms = loss(params_of(model), samples, jnp.zeros(4), jnp.ones(4, bool), None)
    return terms.alignment


def test_alignment_is_the_mean_over_pairs_that_are_there():
    codes = [jnp.array([1.0, 2.0]), jnp.array([0.0, 2.5]), jnp.array([-1.0, 0.0])]
    gap = [[float(jnp.sum((a - b) ** 2)) / 2 for b in codes] for a in codes]
    np.testing.assert_allclose(alignment(codes, [[1, 1, 0], [0, 1, 0]]), gap[0][1], rtol=1e-14)
    present = [[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]
    expected = (gap[0][1] + gap[0][2] + 2 * gap[1][2]) / 4
    np.testing.assert_allclose(alignment(codes, present), expected, rtol=1e-14)
    assert alignment(codes, [[1, 0, 0], [0, 0, 1]]) == 0
    assert alignment([codes[0]] * 3, present) == 0
    # Without a second modality there is nothing to align.
    assert alignment(codes[:1], [[1]]) == 0


def test_alignment_of_gaussians_is_their_symmetric_divergence():
    means = [jnp.array([1.0, 2.0]), jnp.array([0.0, 2.5])]
    logs = [jnp.array([0.3, -1.0]), jnp.array([-0.5, 0.2])]
    codes = [multimodal.Gaussian(*pair) for pair in zip(means, logs, strict=True)]
    expected = information.symmetric_kl(means[0], logs[0], means[1], logs[1]) / 2
    np.testing.assert_allclose(alignment(codes, [[1, 1]]), expected, rtol=1e-14)
    # A common variance divides what points give.
    same = [code._replace(log_var=jnp.full(2, 0.7)) for code in codes]
    points = alignment(means, [[1, 1]])
    np.testing.assert_allclose(alignment(same, [[1, 1]]), points / np.exp(0.7), rtol=1e-13)


def test_gaussians_of_variance_one_are_points():
    model = network("gaussian")
    zeros = [
        jnp.zeros_like(leaf) for e in model.encoders for leaf in (e.log_var.weight, e.log_var.bias)
    ]
    flat = eqx.tree_at(
        lambda n: [leaf for e in n.encoders for leaf in (e.log_var.weight, e.log_var.bias)],
        model,
        zeros,
    )
    _, (_, terms) = evaluate("gaussian", batch(), params_of(flat))
    encoders = tuple(eqx.nn.Sequential([eqx.nn.Lambda(e.encoder), e.mean]) for e in model.encoders)
    points = multimodal.Network(encoders, model.fusion, model.head, model.critic)
    loss = fdrmfl.multimodal_loss(points, weights=weights_of("points"), temperature=TEMPERATURE)
    _, expected = jax.jit(loss)(params_of(points), *batch())
    for name in ("prediction", "information", "alignment", "contrast"):
        np.testing.assert_allclose(getattr(terms, name), getattr(expected, name), rtol=1e-12)


# Rounds.


@functools.cache
def data(filler=0.0, *, whole=False):
    """Make ragged clients; unless `whole`, modalities are missing and all of one sample."""
    rng = np.random.default_rng(3)
    mask = np.arange(SAMPLES) < COUNTS[:, None]
    present = np.ones((CLIENTS, SAMPLES, len(SIZES)), bool)
    if not whole:
        present[0, 1, 0] = present[0, 2] = present[2, 0, 1] = False
    values = [
        fill(rng.normal(size=(CLIENTS, SAMPLES, p)), mask & present[..., m], filler)
        for m, p in enumerate(SIZES)
    ]
    targets = fill(rng.normal(size=(CLIENTS, SAMPLES)), mask & present.any(axis=2), filler)
    samples = multimodal.Modalities(tuple(values), jnp.asarray(present))
    return protocol.ClientData(samples, targets, jnp.asarray(mask))


USABLE_COUNTS = np.array([4, 1, 4])


def build(weights, **options):
    contrast = local.history(SLOTS, temperature=TEMPERATURE)
    return fdrmfl.build(network(), TRAINING, weights=weights, contrast=contrast, **options)


def one_round(state, given, weights, here, key):
    """Do a round with those who are here; everything but the network is traced."""
    algorithm = build(weights, arrivals=lambda cohort, *_, **__: here[cohort])
    return algorithm.round(state, given, np.arange(CLIENTS), key=key)


# All weights, data and absences are one program.
advance = jax.jit(chex.assert_max_traces(one_round, n=1))
EVERYONE = jnp.ones(CLIENTS, bool)


def traced(weights):
    return jax.tree.map(lambda weight: jnp.asarray(weight, jnp.float64), weights)


def start(given=None):
    given = data() if given is None else given
    return build(WEIGHTS).init(params_of(network()), given, key=jax.random.key(0))


def key_of(number):
    return jax.random.split(jax.random.fold_in(jax.random.key(7), number))[1]


def go(state, num_rounds=1, *, given=None, weights=WEIGHTS, here=EVERYONE):
    """Do rounds whose keys are those of `federated.run` with key 7."""
    given = data() if given is None else given
    for _ in range(num_rounds):
        state, info = advance(state, given, traced(weights), here, key_of(state.round))
    return state, info


def assert_close(tree, other, rtol=1e-12, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), tree, other)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@jax.jit
def naive_step(params, optimizer_state, rows, models, used):
    """Do a step of a client, which applies the received and the old models to the batch anew."""
    static = eqx.partition(network(), eqx.is_inexact_array)[1]

    def loss(params):
        anchors = []
        for xs, present, _, _ in rows:
            codes = [naive_features(eqx.combine(m, static), xs, present)[1] for m in models]
            anchors.append((codes[0], codes[1:], used))
        terms = naive_terms(eqx.combine(params, static), rows, anchors)
        return weighted(terms, WEIGHTS), terms

    (value, terms), slope = jax.value_and_grad(loss, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):
        update, optimizer_state = TRAINING.optimizer.update(slope, optimizer_state, params)
    return optax.apply_updates(params, update), optimizer_state, value, terms


def naive_batches(client, key):
    """Return the rows of every step: usable samples in a random order, over and over."""
    given = jax.tree.map(lambda leaf: np.asarray(leaf[client]), data())
    usable = np.flatnonzero(given.mask & given.inputs.present.any(axis=1))
    ranks = np.asarray(jax.random.uniform(key, (SAMPLES,), jnp.float32))
    order, size = usable[np.argsort(ranks[usable])], TRAINING.batch_size
    for t in range(TRAINING.num_steps):
        chosen = [order[(t * size + b) % len(order)] for b in range(size)]
        yield [
            (
                [x[i] for x in given.inputs.values],
                given.inputs.present[i] * 1.0,
                given.targets[i],
                float(b < len(order)),
            )
            for b, i in enumerate(chosen)
        ]


def test_rounds_are_those_of_loops_that_keep_the_old_global_models():
    state, received = start(), [params_of(network())]
    optimizer_start = TRAINING.optimizer.init(received[0])
    for t in range(SLOTS + 3):
        params = received[t]
        # What the run starts from is nobody's model.
        older = received[1:t][-SLOTS:]
        models = [params, *older, *[params] * (SLOTS - len(older))]
        used = np.arange(SLOTS) < len(older)
        state, info = go(state)
        trained = []
        for k in range(CLIENTS):
            own = jax.random.split(jax.random.fold_in(jax.random.split(key_of(t))[0], k))[0]
            current, optimizer_state = params, optimizer_start
            for step, rows in enumerate(naive_batches(k, own)):
                current, optimizer_state, value, terms = naive_step(
                    current, optimizer_state, rows, models, used * 1.0
                )
                if step == 0:
                    first = jax.tree.map(lambda leaf, k=k: leaf[k], info.metrics)
                    assert_close((first.loss, first.terms), (value, terms), 1e-10)
            moves = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), current, params)
            assert_close(first.squared_move, sum(jax.tree.leaves(moves)), 1e-9)
            trained.append(current)
        mean = [np.average(leaves, axis=0, weights=USABLE_COUNTS) for leaves in leaves_of(trained)]
        received.append(jax.tree.unflatten(jax.tree.structure(params), map(jnp.asarray, mean)))
        assert_close(state.params, received[-1], 1e-10, 1e-12)
        np.testing.assert_array_equal(info.weights, USABLE_COUNTS)
        np.testing.assert_array_equal(info.metrics.num_examples, USABLE_COUNTS)
        assert (info.metrics.terms.contrast > 0).all() == (t > 1)


def leaves_of(trees):
    """Return the leaves in their order, each from all trees."""
    return zip(*map(jax.tree.leaves, trees), strict=True)


def test_a_scan_of_rounds_is_a_loop_of_them():
    algorithm = build(NOTHING._replace(**CONTRAST))
    run = jax.jit(
        lambda state: federated.run(algorithm, state, data(), num_rounds=4, key=jax.random.key(7))
    )
    state, infos = run(start())
    expected, info = go(start(), 4, weights=ZEROS._replace(**CONTRAST))
    assert_close(state, expected)
    assert_close(infos.losses[-1], info.losses)
    assert_close(infos.metrics.terms.contrast[-1], info.metrics.terms.contrast)


def test_without_weights_it_is_fedavg_round_for_round():
    """Of whole samples, with no term in the program and with all terms times zero."""
    given = data(whole=True)

    def squared_error(params, sample, target):
        model = eqx.combine(params, eqx.partition(network(), eqx.is_inexact_array)[1])
        return (model.predict(model.encode(sample).fused) - target) ** 2

    optimizer, num_steps, batch_size, _ = TRAINING
    update = local.local_sgd(squared_error, optimizer, num_steps=num_steps, batch_size=batch_size)
    states, steps = [], []
    for algorithm in (fedavg.build(update), build(NOTHING)):
        states.append(algorithm.init(params_of(network()), given, key=jax.random.key(0)))
        steps.append(jax.jit(functools.partial(algorithm.round, cohort=np.arange(CLIENTS))))
    state = start(given)
    for t in range(4):
        (average, info), (plain, plain_info) = (
            step(one, given, key=key_of(t)) for step, one in zip(steps, states, strict=True)
        )
        states = [average, plain]
        state, _ = go(state, given=given, weights=ZEROS)
        assert_close(plain.params, average.params)
        assert_close(state.params, average.params)
        assert_close(plain_info.losses, info.losses)
        assert_close(plain_info.metrics.terms.prediction, info.losses)
        assert plain_info.metrics.terms[1:] == (None,) * 4


def test_one_client_and_one_step_are_a_step_of_the_optimizer():
    given = data()
    optimizer = fdrmfl.optimizer(0.01)
    weights = NOTHING._replace(alignment=0.2)
    algorithm = fdrmfl.build(network(), local.Training(optimizer, 1), weights=weights)
    params = params_of(network())
    state = algorithm.init(params, given, key=jax.random.key(0))
    assert jax.tree.leaves(state.clients.local) == []
    cohort = jnp.array([2])
    state, _ = jax.jit(algorithm.round)(state, given, cohort, key=jax.random.key(1))
    loss = fdrmfl.multimodal_loss(network(), weights=weights)
    one = jax.tree.map(lambda leaf: leaf[2], given)

    @jax.jit
    def step(params):
        slope = jax.grad(lambda p: loss(p, *one, None)[0])(params)
        with jax.numpy_dtype_promotion("standard"):
            update, _ = optimizer.update(slope, optimizer.init(params), params)
        return optax.apply_updates(params, update)

    assert_close(state.params, step(params))


def test_what_is_no_usable_sample_may_hold_anything():
    ends = [go(start(), 3, given=data(filler)) for filler in (0.0, np.nan, 1e30)]
    for spoilt in ends[1:]:
        assert_equal(spoilt, ends[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ends[0]))
    # A sample without any modality is none at all.
    hidden = data()._replace(mask=data().mask & data().inputs.present.any(axis=2))
    assert hidden.mask.sum() == data().mask.sum() - 1
    assert_equal(go(start(), 3, given=hidden), ends[0])


def test_an_absent_client_is_as_if_never_listed():
    algorithm = build(NOTHING._replace(**CONTRAST))
    cohort_round = jax.jit(
        lambda state, key: algorithm.round(state, data(), jnp.array([0, 2]), key=key)
    )
    expected, weights = start(), ZEROS._replace(**CONTRAST)
    for t in range(3):
        expected, _ = cohort_round(expected, key_of(t))
    state, info = go(start(), 3, weights=weights, here=jnp.array([True, False, True]))
    assert_close(state, expected)
    assert info.weights.tolist() == [4, 0, 4]
    # Who joins remembers nothing, so its contrast is 0; the others have two older models.
    later, info = go(state)
    contrast = info.metrics.terms.contrast
    assert contrast[1] == 0
    assert (contrast[::2] > 0).all()
    assert state.clients.local.rounds.tolist() == [[1, 2], [-1, -1], [1, 2]]
    assert later.clients.local.rounds.tolist() == [[3, 2], [3, -1], [3, 2]]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((later, info)))
    nobody, _ = go(later, here=~EVERYONE)
    assert_equal(nobody._replace(round=later.round), later)


def test_many_weights_are_one_program():
    """`advance` refuses a second trace."""

    def one(alignment, prior):
        algorithm = build(NOTHING._replace(alignment=alignment, prior=prior))
        state = algorithm.init(params_of(network()), data(), key=jax.random.key(0))
        return algorithm.round(state, data(), np.arange(CLIENTS), key=key_of(0))[0].params

    alignments, priors = jnp.array([0.0, 0.3, 2.0]), jnp.array([0.5, 0.0, 0.1])
    many = jax.jit(jax.vmap(one))(alignments, priors)
    for i in range(3):
        weights = ZEROS._replace(alignment=alignments[i], prior=priors[i])
        alone = go(start(), weights=weights)[0].params
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], many), alone)


def test_without_noise_a_private_round_is_the_uniform_average():
    def make(key):
        encoders = tuple(eqx.nn.Linear(p, 2, key=key, dtype=jnp.float64) for p in SIZES)
        head = eqx.nn.Linear(2, 1, key=key, dtype=jnp.float64)
        return multimodal.Network(encoders, lambda means, *_: jnp.sum(means, axis=0), head, None)

    model = drawn(make)
    mechanism = privacy.gaussian_mechanism(1e6, 0.0, clients_per_round=CLIENTS)
    private, plain = (
        fdrmfl.build(model, TRAINING, weights=NOTHING, mechanism=one) for one in (mechanism, None)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def one_round(algorithm, cohort):
        state = algorithm.init(params_of(model), data(), key=jax.random.key(0))
        return algorithm.round(state, data(), cohort, key=key_of(0))

    found, info = one_round(private, jnp.arange(CLIENTS))
    assert info.weights.tolist() == [1, 1, 1]
    alone = [one_round(plain, jnp.array([k]))[0].params for k in range(CLIENTS)]
    mean = [np.mean(leaves, axis=0) for leaves in leaves_of(alone)]
    assert_close(jax.tree.leaves(found.params), mean)


def test_spectra_and_tokens_are_modalities_too():
    def make(key):
        options = {"key": key, "dtype": jnp.float64}
        encoders = (
            Squashed(eqx.nn.Linear(SIZES[0], WIDTH, **options)),
            multimodal.ConvolutionEncoder(1, WIDTH, hidden=(2, 2), **options),
            multimodal.TokenEncoder(4, WIDTH, hidden=2, **options),
        )
        fusion = multimodal.GatedFusion(3, WIDTH, FEATURES, hidden=3, **options)
        return multimodal.Network(encoders, fusion, eqx.nn.Linear(FEATURES, 1, **options), None)

    model = drawn(make)
    training = local.Training(optax.sgd(0.1), 1, 3)
    algorithm = fdrmfl.build(
        model,
        training,
        weights=NOTHING._replace(**CONTRAST),
        contrast=local.history_and_batch(1),
    )
    rng = np.random.default_rng(5)
    shape = (CLIENTS, SAMPLES)
    present = rng.random((*shape, 3)) < 0.7
    mask = np.arange(SAMPLES) < COUNTS[:, None]
    spectra, tokens = rng.normal(size=(*shape, 6)), rng.integers(-2, 4, size=(*shape, 5))

    def made(filler, token):
        counts = mask[..., None] & present
        values = (
            data().inputs.values[0],
            fill(spectra, counts[..., 1], filler),
            fill(tokens.astype(np.int32), counts[..., 2], np.int32(token)),
        )
        samples = multimodal.Modalities(values, jnp.asarray(present))
        return protocol.ClientData(samples, data().targets, jnp.asarray(mask))

    state = algorithm.init(params_of(model), made(0.0, 0), key=jax.random.key(0))
    one_round = jax.jit(functools.partial(algorithm.round, cohort=np.arange(CLIENTS)))

    def run(given):
        current = state
        for t in range(3):
            current, info = one_round(current, given, key=key_of(t))
        return current, info

    end, info = run(made(0.0, 0))
    assert_equal(run(made(np.nan, 2**31 - 1)), (end, info))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((end, info)))
    for before, after in leaves_of((state.params, end.params)):
        assert (before != after).any()


def test_the_optimizer_is_adamw_of_clipped_gradients():
    chain, adam = fdrmfl.optimizer(0.1), optax.adamw(0.1, weight_decay=1e-4)
    params = jnp.array([3.0, -1.0])
    slopes = [jnp.array([30.0, 40.0]), jnp.array([0.3, -0.1])]
    scaled = [slopes[0] * 5 / 50, slopes[1]]
    one, two = chain.init(params), adam.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for slope, short in zip(slopes, scaled, strict=True):
            found, one = chain.update(slope, one, params)
            expected, two = adam.update(short, two, params)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_float32_stays():
    given = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, data()
    )
    model, weights = network(dtype=jnp.float32), jax.tree.map(np.float64, WEIGHTS)
    algorithm = fdrmfl.build(model, TRAINING, weights=weights)

    def run(key):
        state = algorithm.init(params_of(model), given, key=key)
        return federated.run(algorithm, state, given, num_rounds=2, key=key)

    state, infos = jax.eval_shape(run, jax.random.key(0))
    floats = [leaf for leaf in jax.tree.leaves((state, infos)) if leaf.dtype.kind == "f"]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def begin(model=None, given=None, **options):
    model, given = network() if model is None else model, data() if given is None else given
    algorithm = fdrmfl.build(model, TRAINING, **options)
    return algorithm.init(params_of(model), given, key=jax.random.key(0))


def samples_with(**changes):
    return data()._replace(inputs=data().inputs._replace(**changes))


def few():
    """Make clients whose second modality has a sample less than the first."""
    first, second = data().inputs.values
    return samples_with(values=(first, second[:, 1:]))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: begin(given=few()), r"build: got samples of shapes .*\(4, 2\).* for targets of"),
        (
            lambda: begin(given=data()._replace(targets=data().targets[..., None])),
            r"build: got samples of .* for targets of shape \(5, 1\), expected targets \(samples",
        ),
        (
            lambda: begin(given=samples_with(values=data().inputs.values[:1])),
            "encode: got 1 modalities, expected 2, one an encoder",
        ),
        (
            lambda: begin(eqx.tree_at(lambda n: n.critic, network(), None)),
            "multimodal_loss: got a network without critic, expected one with a critic, or None",
        ),
        (
            lambda: begin(network("points"), weights=WEIGHTS),
            "multimodal_loss: got a prior for points, expected encoders of Gaussians",
        ),
        (lambda: begin(chunk_size=0), "compose: got chunk_size 0"),
        (
            lambda: evaluate("gaussian", batch()._replace(anchors=None)),
            "multimodal_loss: got a weight of the contrast, no anchors, expected anchors",
        ),
        (
            lambda: jax.eval_shape(
                fdrmfl.multimodal_loss(network(), weights=WEIGHTS, temperature=0.0),
                params_of(network()),
                *batch(),
            ),
            "model_contrastive: got temperature 0.0, expected a positive number",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
