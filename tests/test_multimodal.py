"""Encoders, fusion and networks of several modalities, against NumPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import information, multimodal

SAMPLES, WIDTH, FEATURES = 4, 3, 2
PRESENT = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]], bool)


def small(key):
    """Make a network for a vector, a spectrum and a set of tokens."""
    options = {"key": key, "dtype": jnp.float64}
    encoders = (
        multimodal.DenseEncoder(4, WIDTH, hidden=2, **options),
        multimodal.ConvolutionEncoder(1, WIDTH, hidden=(2, 3), **options),
        multimodal.TokenEncoder(5, WIDTH, hidden=2, **options),
    )
    fusion = multimodal.GatedFusion(3, WIDTH, FEATURES, hidden=3, **options)
    head = eqx.nn.MLP(FEATURES, 1, 3, 1, **options)
    critic = information.joint_critic(FEATURES, 1, width=3, depth=1, **options)
    return multimodal.Network(encoders, fusion, head, critic)


def drawn(make):
    """Make a module and fill it with numbers of NumPy, without compiling anything."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if is_array else leaf

    return jax.tree.map(draw, eqx.filter_eval_shape(make, jax.random.key(0)))


@functools.cache
def whole():
    return drawn(small)


@pytest.fixture
def network():
    return whole()


def gaussian_encoder(key):
    return multimodal.GaussianEncoder(lambda x: x, WIDTH, key=key, dtype=jnp.float64)


def precision_fusion(key):
    return multimodal.PrecisionFusion(WIDTH, FEATURES, hidden=2, key=key, dtype=jnp.float64)


def samples(*, numbers=0.0, tokens=0):
    """Make samples whose missing modalities hold what is given."""
    rng = np.random.default_rng(1)
    values = [rng.normal(size=(SAMPLES, size)) for size in (4, 6)]
    values.append(rng.integers(-2, 5, size=(SAMPLES, 5)).astype(np.int32))
    fillers = (numbers, numbers, tokens)
    filled = (
        jnp.asarray(np.where(there[:, None], value, np.asarray(filler, value.dtype)))
        for there, value, filler in zip(PRESENT.T, values, fillers, strict=True)
    )
    return multimodal.Modalities(tuple(filled), jnp.asarray(PRESENT))


def gelu(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def linear(layer, x):
    return np.asarray(layer.weight) @ x + np.asarray(layer.bias)


def normalize(norm, x):
    scaled = (x - x.mean()) / np.sqrt(x.var() + norm.eps)
    return scaled * np.asarray(norm.weight) + np.asarray(norm.bias)


def convolve(layer, maps):
    """Correlate maps (channels, length) with the kernels, zeros beyond both ends."""
    kernels, bias = np.asarray(layer.weight), np.asarray(layer.bias)
    half = kernels.shape[2] // 2
    padded = np.pad(maps, ((0, 0), (half, half)))
    found = np.empty((len(kernels), maps.shape[1]))
    for o, kernel in enumerate(kernels):
        for p in range(maps.shape[1]):
            found[o, p] = np.sum(kernel * padded[:, p : p + kernel.shape[1]]) + bias[o, 0]
    return found


def dense_code(encoder, x):
    return normalize(encoder.norm, linear(encoder.last, gelu(linear(encoder.hidden, x))))


def convolution_code(encoder, rows):
    maps = gelu(convolve(encoder.second, gelu(convolve(encoder.first, rows.T))))
    return normalize(encoder.norm, linear(encoder.last, maps.mean(axis=1)))


def token_code(encoder, tokens):
    rows = [np.asarray(encoder.embeddings)[token] for token in tokens if token >= 0]
    mean = np.mean(rows, axis=0) if rows else np.zeros(encoder.embeddings.shape[1])
    return normalize(encoder.norm, linear(encoder.last, gelu(mean)))


def gated_features(fusion, codes, present):
    """Fuse the codes (M, q) of one sample."""
    powers = np.where(present, np.exp(fusion.gates), 0.0)
    shares = sum(present) * powers / max(sum(powers), 1e-300)
    first, last = fusion.mixing.layers
    return linear(last, gelu(linear(first, (shares[:, None] * codes).reshape(-1))))


def score(critic, fused, target):
    first, last = critic.network.layers
    hidden = np.maximum(linear(first, np.append(fused, target)), 0)
    return np.asarray(last.weight)[0] @ hidden + np.asarray(last.bias)


def test_encoders_are_those_of_numpy(network, rng):
    dense, convolution, tokens = network.encoders
    x, spectrum = rng.normal(size=4), rng.normal(size=7)
    np.testing.assert_allclose(dense(jnp.asarray(x)), dense_code(dense, x), rtol=1e-12)
    expected = convolution_code(convolution, spectrum[:, None])
    np.testing.assert_allclose(convolution(jnp.asarray(spectrum)), expected, rtol=1e-11)
    for words in ([0, 4, 4], [3, -1, 1, -7], [-1, -1]):
        found = tokens(jnp.array(words, jnp.int32))
        np.testing.assert_allclose(found, token_code(tokens, words), rtol=1e-12)


def test_a_sequence_of_vectors_has_their_length_as_channels(network, rng):
    def make(key):
        return multimodal.ConvolutionEncoder(2, WIDTH, hidden=(3, 2), key=key, dtype=jnp.float64)

    several = drawn(make)
    rows = rng.normal(size=(5, 2))
    found = several(jnp.asarray(rows))
    np.testing.assert_allclose(found, convolution_code(several, rows), rtol=1e-11)
    convolution, spectrum = network.encoders[1], jnp.asarray(rng.normal(size=7))
    np.testing.assert_array_equal(convolution(spectrum), convolution(spectrum[:, None]))


def test_order_and_padding_of_tokens_do_not_matter(network):
    encoder = network.encoders[2]
    expected = encoder(jnp.array([2, 0, 3]))
    for words in ([3, 2, 0], [-1, 0, 2, -9, 3, -1]):
        np.testing.assert_allclose(encoder(jnp.array(words)), expected, rtol=1e-13)


def test_logarithms_of_variances_are_clipped():
    hidden = 1e3 * jnp.array([1.0, -1.0, 1e-6])
    encoder = drawn(gaussian_encoder)
    wide = eqx.tree_at(lambda e: (e.log_var.weight, e.log_var.bias), encoder, (jnp.eye(3), hidden))
    code = wide(jnp.zeros(3))
    np.testing.assert_array_equal(code.log_var, [4.0, -8.0, 1e-3])
    np.testing.assert_array_equal(code.mean, encoder.mean(jnp.zeros(3)))


def test_equal_gates_scale_nothing_and_others_share_the_weight(network, rng):
    codes = rng.normal(size=(3, WIDTH))
    for gates in (np.zeros(3), np.array([0.5, -1.0, 2.0])):
        fusion = eqx.tree_at(lambda f: f.gates, network.fusion, jnp.asarray(gates))
        for present in ([1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]):
            there = np.array(present, bool)
            found = fusion(jnp.asarray(codes), None, jnp.asarray(there))
            np.testing.assert_allclose(found, gated_features(fusion, codes, there), rtol=1e-12)
    equal = eqx.tree_at(lambda f: f.gates, network.fusion, jnp.full(3, 0.7))
    plain = equal.mixing(jnp.asarray(codes.reshape(-1)))
    found = equal(jnp.asarray(codes), None, jnp.ones(3, bool))
    np.testing.assert_allclose(found, plain, rtol=1e-13)


def test_fusion_of_nothing_has_no_derivative(network):
    codes, nothing = jnp.ones((3, WIDTH)), jnp.zeros(3, bool)
    for fusion in (network.fusion, drawn(precision_fusion)):
        slope = jax.grad(lambda means, f=fusion: jnp.sum(f(means, means, nothing)))(codes)
        np.testing.assert_array_equal(slope, np.zeros((3, WIDTH)))


def test_the_precision_fusion_has_the_mean_of_the_product_of_densities(rng):
    """The densities are multiplied on a grid, on which the rule of trapezoids is exact."""
    means, log_vars = rng.normal(size=(3, WIDTH)), rng.uniform(-2, 1, size=(3, WIDTH))
    fusion = drawn(precision_fusion)
    grid = np.linspace(-15, 15, 6001)
    for present in ([1, 1, 1], [1, 0, 1], [0, 1, 0]):
        expected = []
        for i in range(WIDTH):
            density = np.ones_like(grid)
            for m in np.flatnonzero(present):
                gap = grid - means[m, i]
                density = density * np.exp(-(gap**2) / (2 * np.exp(log_vars[m, i])))
            expected.append(np.sum(grid * density) / np.sum(density))
        there = jnp.array(present, bool)
        found = fusion.mean(jnp.asarray(means), jnp.asarray(log_vars), there)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        points = fusion.mean(jnp.asarray(means), None, there)
        np.testing.assert_allclose(points, means[np.array(present, bool)].mean(axis=0), rtol=1e-13)
        fused = fusion(jnp.asarray(means), jnp.asarray(log_vars), there)
        np.testing.assert_array_equal(fused, fusion.mixing(found))
    nothing = fusion.mean(jnp.asarray(means), jnp.asarray(log_vars), jnp.zeros(3, bool))
    np.testing.assert_array_equal(nothing, np.zeros(WIDTH))


TARGETS = jnp.array([0.3, -1.0, 0.0, 2.0])


@jax.jit
def outcomes(arrays, given):
    """Compute features, predictions and scores, and the gradient of what is made of them."""

    def total(arrays):
        network = eqx.combine(arrays, whole())
        fused = multimodal.features(network, given)
        found = fused, multimodal.predictions(network, given), network.scores(fused, TARGETS)
        return sum(jnp.sum(leaf**2) for leaf in found), found

    return jax.grad(total, has_aux=True)(arrays)


def arrays_of(network):
    return eqx.filter(network, eqx.is_inexact_array)


def test_networks_are_their_parts_put_together(network):
    given = samples()
    _, (fused, predicted, scores) = outcomes(arrays_of(network), given)
    codes = (dense_code, lambda e, x: convolution_code(e, x[:, None]), token_code)
    first, last = network.head.layers
    for i, present in enumerate(PRESENT):
        sample = [np.asarray(value[i]) for value in given.values]
        means = [code(e, x) for code, e, x in zip(codes, network.encoders, sample, strict=True)]
        expected = gated_features(network.fusion, np.array(means), present)
        np.testing.assert_allclose(fused[i], expected, rtol=1e-10)
        head = linear(last, np.maximum(linear(first, expected), 0))[0]
        np.testing.assert_allclose(predicted[i], head, rtol=1e-10)
        for j in range(SAMPLES):
            expected = score(network.critic, fused[i], TARGETS[j])
            np.testing.assert_allclose(scores[i, j], expected, rtol=1e-10)


def test_what_a_missing_modality_holds_changes_neither_values_nor_gradients(network):
    arrays = arrays_of(network)
    clean = outcomes(arrays, samples())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    assert all(leaf.any() for leaf in jax.tree.leaves(clean[0]))
    for numbers, tokens in ((np.nan, 2**31 - 1), (1e30, -5)):
        spoilt = outcomes(arrays, samples(numbers=numbers, tokens=tokens))
        jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


def test_codes_of_missing_modalities_are_zero(network):
    present = jnp.array([False, True])
    given = multimodal.Modalities((jnp.ones(4), jnp.ones(4)), present)
    encoder = network.encoders[0]
    points = multimodal.Network((encoder, encoder), lambda means, *_: means[0], len, None)
    encoded = points.encode(given)
    np.testing.assert_array_equal(encoded.means, [np.zeros(WIDTH), encoder(jnp.ones(4))])
    assert encoded.log_vars is None
    uncertain = eqx.tree_at(lambda e: e.encoder, drawn(gaussian_encoder), encoder)
    both = multimodal.Network((uncertain, uncertain), lambda *known: known, len, None).encode(given)
    code = uncertain(jnp.ones(4))
    np.testing.assert_array_equal(both.means, [np.zeros(WIDTH), code.mean])
    np.testing.assert_array_equal(both.log_vars, [np.zeros(WIDTH), code.log_var])
    jax.tree.map(np.testing.assert_array_equal, both.fused, (both.means, both.log_vars, present))


def test_modalities_of_whole_samples_are_all_present():
    values = [np.ones((2, 4, 3)), np.ones((2, 4, 5, 5), np.int32)]
    whole = multimodal.all_present(values, batch_ndim=2)
    assert [value.dtype for value in whole.values] == [jnp.float64, jnp.int32]
    np.testing.assert_array_equal(whole.present, np.ones((2, 4, 2), bool))


def through(dtype, gaussian, key):
    network = multimodal.dense_network(
        (4, 3), width=5, num_features=2, gaussian=gaussian, key=key, dtype=dtype
    )
    values = [jax.random.normal(key, (6, size), dtype) for size in (4, 3)]
    given = multimodal.all_present(values)
    fused = multimodal.features(network, given)
    return fused, multimodal.predictions(network, given), network.scores(fused, fused[:, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("gaussian", [False, True])
def test_dense_networks_keep_their_dtype(dtype, gaussian):
    found = jax.eval_shape(lambda key: through(dtype, gaussian, key), jax.random.key(0))
    assert [leaf.shape for leaf in found] == [(6, 2), (6,), (6, 6)]
    assert {leaf.dtype for leaf in found} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("width", "expected"), [(64, 3 * 64 + 64 + 64**2 + 64 + 64 + 1), (None, 0)]
)
def test_a_network_has_the_critic_asked_for_or_none(width, expected):
    def draw(key):
        network = multimodal.dense_network((4,), num_features=2, critic_width=width, key=key)
        usual = multimodal.dense_network((4,), num_features=2, key=key)
        arrays = [eqx.filter(own, eqx.is_array) for own in (network, usual)]
        return tuple((own.critic, (own.encoders, own.fusion, own.head)) for own in arrays)

    (critic, rest), (_, usual) = jax.jit(draw)(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(critic)) == expected
    jax.tree.map(np.testing.assert_array_equal, rest, usual)


def test_heads_begin_near_zero():
    def last(key):
        layer = multimodal.dense_network((4,), key=key).head.layers[-1]
        return jnp.max(jnp.abs(layer.weight)), layer.bias

    largest, bias = jax.jit(last)(jax.random.key(0))
    # The layer of equinox, uniform within 1 / sqrt(32), times 0.1.
    assert 0 < float(largest) <= 0.1 / np.sqrt(32)
    np.testing.assert_array_equal(bias, [0.0])


def test_modalities_that_do_not_belong_together_are_refused(network):
    with pytest.raises(
        ValueError, match=r"all_present: got values of shapes \[\(4, 3\), \(5, 2\)\]"
    ):
        multimodal.all_present([np.ones((4, 3)), np.ones((5, 2))])
    with pytest.raises(ValueError, match=r"all_present: got values of shapes \[\], expected"):
        multimodal.all_present([])
    with pytest.raises(ValueError, match=r"all_present: got values of shapes \[\(2,\), \(2,\)\]"):
        multimodal.all_present([np.ones(2), np.ones(2)], batch_ndim=2)
    given = samples()
    fewer = multimodal.Modalities(given.values[:2], given.present[:, :2])
    with pytest.raises(ValueError, match=r"encode: got 2 modalities, expected 3, one an encoder"):
        multimodal.features(network, fewer)
    with pytest.raises(ValueError, match=r"encode: got mask of shape \(2,\), expected"):
        multimodal.features(network, given._replace(present=given.present[:, :2]))
    with pytest.raises(ValueError, match=r"encode: got mask of dtype float64"):
        multimodal.features(network, given._replace(present=given.present.astype(float)))


def test_networks_that_are_not_whole_are_refused(network):
    gaussian = eqx.tree_at(lambda e: e.encoder, drawn(gaussian_encoder), network.encoders[0])
    mixed = eqx.tree_at(lambda n: n.encoders, network, (gaussian, *network.encoders[1:]))
    with pytest.raises(ValueError, match=r"encode: got points and Gaussians, expected encoders of"):
        jax.eval_shape(lambda: multimodal.features(mixed, samples()))
    without = eqx.tree_at(lambda n: n.critic, network, None)
    with pytest.raises(ValueError, match=r"scores: got a network without critic, expected"):
        without.scores(jnp.ones((2, FEATURES)), jnp.ones(2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sizes": ()}, "got no sizes, expected at least one modality"),
        ({"sizes": (3, 0)}, "got size 0, expected an integer from 1"),
        ({"width": 0}, "got width 0"),
        ({"num_features": 2.0}, "got num_features 2.0"),
        ({"critic_width": 0}, "got critic_width 0"),
    ],
)
def test_sizes_that_are_no_counts_are_refused(changes, match):
    with pytest.raises(ValueError, match=f"dense_network: {match}"):
        multimodal.dense_network(**{"sizes": (3,), "key": jax.random.key(0)} | changes)
