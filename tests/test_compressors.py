import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import tucker
from fedlr.federated import compressors
from tests.reference.messages import bytes_of, send

SEEDS = (0, 1, 2)
# For an update of the shape (4, 5).
LOSSY = {
    "top_k": compressors.top_k(3),
    "csr": compressors.csr(6),
    "quantize_2": compressors.quantize(2),
    "quantize_16": compressors.quantize(16),
    "power_sgd": compressors.power_sgd(1),
    "gaussian_sketch": compressors.gaussian_sketch(4, block_size=3),
    "hadamard_sketch": compressors.hadamard_sketch(5),
    "top_k_with_feedback": compressors.error_feedback(compressors.top_k(3)),
    "svd_with_feedback": compressors.error_feedback(compressors.truncated_svd(1)),
    "power_sgd_with_feedback": compressors.error_feedback(compressors.power_sgd(1)),
    "sketch_with_feedback": compressors.error_feedback(
        compressors.scaled(compressors.hadamard_sketch(5), 5 / 32)
    ),
}


@pytest.fixture
def update(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


def test_identity_sends_the_arrays_themselves(update, key):
    tree = {"a": update, "b": jnp.zeros(2, jnp.float32)}
    message, received = send(compressors.identity(), tree, key=key)
    jax.tree.map(np.testing.assert_array_equal, received, tree)
    assert compressors.message_bytes(message) == bytes_of(*tree.values()) == 8 * 60 + 4 * 2


def test_messages_beyond_two_gigabytes_are_refused():
    huge = jax.ShapeDtypeStruct((2**29,), jnp.float32)
    with pytest.raises(ValueError, match=r"message_bytes: got a message of 2147483648 bytes"):
        jax.eval_shape(compressors.message_bytes, huge)
    tensor = tucker.TuckerTensor(jnp.zeros((1, 1)), (jnp.zeros((2, 1)), jnp.zeros((3, 1))))
    message = compressors.TuckerMessage(
        tensor._replace(core=huge), jax.ShapeDtypeStruct((2,), jnp.int32)
    )
    with pytest.raises(ValueError, match=r"message_bytes: got a message of 2147483696 bytes"):
        jax.eval_shape(compressors.message_bytes, message)


def message_of(size, rank):
    """A Tucker message of a square image, without the work of a decomposition."""
    core, factor = jnp.zeros((rank, rank), jnp.float32), jnp.zeros((size, rank), jnp.float32)
    tensor = tucker.TuckerTensor(core, (factor, factor))
    return compressors.TuckerMessage(tensor, jnp.array([rank, rank], jnp.int32))


@pytest.mark.parametrize(("size", "largest"), [(250, 103), (100, 41)])
def test_messages_are_smaller_than_the_image_up_to_the_stated_rank(size, largest):
    """r^2 + 2 n r < n^2 where r < n (sqrt(2) - 1)."""
    below, above = (
        int(compressors.message_bytes(message_of(size, rank))) for rank in (largest, largest + 1)
    )
    assert below < 4 * size**2 < above


def test_compression_ratios_are_the_stated_ones():
    ratios = [
        250**2 * 4 / int(compressors.message_bytes(message_of(250, rank)))
        for rank in (20, 40, 60, 80, 100)
    ]
    np.testing.assert_allclose(ratios, [6.01, 2.89, 1.86, 1.35, 1.042], atol=5e-3)


def test_diagonal_cores_save_up_to_a_larger_rank():
    def sent(rank):
        vectors, values = jnp.zeros((250, rank), jnp.float32), jnp.zeros(rank, jnp.float32)
        message = compressors.SVDMessage(vectors, values, vectors, jnp.int32(rank))
        return int(compressors.message_bytes(message))

    assert sent(124) < 4 * 250**2 < sent(125)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_messages_keep_dtypes_and_states(rng, key, name, dtype):
    tree = {
        "w": jnp.asarray(rng.normal(size=(4, 5)), dtype),
        "b": jnp.asarray(rng.normal(size=7), dtype),
    }
    compressor = LOSSY[name]
    state = compressor.init(tree)

    def there_and_back(update, state):
        message, state = compressor.compress(update, state, key=key)
        return compressor.decompress(message), state

    found = jax.eval_shape(there_and_back, tree, state)
    assert found == jax.eval_shape(lambda *kept: kept, tree, state)


@pytest.mark.parametrize("name", LOSSY)
def test_clients_mapped_together_send_what_each_sends_alone(rng, name):
    compressor = LOSSY[name]
    updates = jnp.asarray(rng.normal(size=(3, 4, 5)))
    keys = jax.random.split(jax.random.key(0), 3)

    def one(update, key):
        message, state = compressor.compress(update, compressor.init(update), key=key)
        return message, compressors.message_bytes(message), state

    @jax.jit
    def all_of_them(updates, keys):
        messages, *others = jax.vmap(one)(updates, keys)
        return jax.vmap(compressor.decompress)(messages), *others

    @jax.jit
    def one_of_them(update, key):
        message, *others = one(update, key)
        return compressor.decompress(message), *others

    together = all_of_them(updates, keys)
    alone = [one_of_them(*args) for args in zip(updates, keys, strict=True)]
    jax.tree.map(
        lambda found, *single: np.testing.assert_allclose(found, single, rtol=1e-11, atol=1e-12),
        together,
        *alone,
    )


@pytest.mark.parametrize("name", LOSSY)
def test_messages_of_zeros_are_zeros(key, name):
    _, received = send(LOSSY[name], jnp.zeros((4, 5)), key=key)
    np.testing.assert_array_equal(received, 0)


@pytest.mark.parametrize("name", LOSSY)
def test_nan_is_sent_rather_than_hidden(rng, key, name):
    update = jnp.asarray(rng.normal(size=(4, 5))).at[2, 3].set(jnp.nan)
    _, received = send(LOSSY[name], update, key=key)
    assert jnp.isnan(received[2, 3])


@pytest.mark.parametrize("budget", [(5200, 5074), (10800, 10674), (30000, 29874)])
def test_sparse_messages_have_the_stated_budgets(budget):
    """2 k numbers against 2 nnz + n + 1, both just within those of Tucker ranks 20, 40, 100."""
    k, num_nonzeros = budget
    image, key = jnp.ones((250, 250), jnp.float32), jax.random.key(0)
    rank = {5200: 20, 10800: 40, 30000: 100}[k]
    available = int(compressors.message_bytes(message_of(250, rank)))
    for compressor, spare in ((compressors.top_k(k), 0), (compressors.csr(num_nonzeros), 4)):
        message, _ = jax.jit(compressor.compress)(image, (), key=key)
        assert available - compressors.message_bytes(message) == spare


@pytest.mark.parametrize(
    "compressor",
    [compressors.top_k(2), compressors.quantize(4), compressors.hadamard_sketch(2)],
)
def test_empty_arrays_are_sent_as_they_are(key, compressor):
    tree = {"w": jnp.zeros((0, 3)), "none": ()}
    message, received = send(compressor, tree, key=key)
    assert received["w"].shape == (0, 3)
    assert compressors.message_bytes(message) == 0


def run_with_feedback(compressor, updates, key):
    """Send one update after the other; return what arrived and the last state."""
    patient = compressors.error_feedback(compressor)

    def step(state, args):
        update, key = args
        message, state = patient.compress(update, state, key=key)
        return state, patient.decompress(message)

    start = patient.init(jax.tree.map(lambda leaf: leaf[0], updates))
    keys = jax.random.split(key, len(jax.tree.leaves(updates)[0]))
    state, received = jax.jit(lambda start: jax.lax.scan(step, start, (updates, keys)))(start)
    return received, state


@pytest.mark.parametrize(
    "compressor",
    [
        compressors.identity(),
        compressors.top_k(3),
        compressors.csr(3),
        compressors.quantize(4),
        compressors.truncated_svd(1),
        compressors.truncated_tucker((1, 2)),
        compressors.power_sgd(1),
        compressors.power_sgd(1, warm_start=False, num_iters=2),
        compressors.scaled(compressors.gaussian_sketch(20), 20 / (20 + 41 + 1)),
        compressors.scaled(compressors.hadamard_sketch(16), 16 / 64),
    ],
)
def test_decoded_messages_and_residual_sum_to_the_updates(rng, key, compressor):
    updates = {
        "v": jnp.asarray(rng.normal(size=(12, 4, 5)), jnp.float32),
        "w": jnp.asarray(rng.normal(size=(12, 5, 3))),
        "b": jnp.asarray(rng.normal(size=(12, 6))),
    }
    received, state = run_with_feedback(compressor, updates, key)
    for name, sent in updates.items():
        parts = np.concatenate([received[name], state.residual[name][None]])
        found = np.sum(parts, axis=0, dtype=np.float64)
        # In every round two sums and a difference of numbers not above the sum of all.
        atol = 3 * 12 * jnp.finfo(sent.dtype).eps * np.abs(sent).sum(axis=0).max()
        np.testing.assert_allclose(found, np.sum(sent, axis=0, dtype=np.float64), atol=atol)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 4, 10])
def test_residual_of_a_contraction_stays_bounded(key, k, seed):
    """||residual||^2 <= 4 (1 - d) / d^2 max ||update||^2 with d = k / size."""
    updates = jnp.asarray(np.random.default_rng(seed).normal(size=(300, 20)))
    _, state = run_with_feedback(compressors.top_k(k), updates, key)
    contraction = k / 20
    bound = 4 * (1 - contraction) / contraction**2 * jnp.max(jnp.sum(updates**2, axis=1))
    assert 0 < jnp.sum(state.residual**2) <= bound


@pytest.mark.parametrize(
    ("sketch", "factor"),
    [
        (compressors.gaussian_sketch(4), 4 / (4 + 20 + 1)),
        (compressors.hadamard_sketch(8), 8 / 32),
    ],
)
def test_residual_of_a_scaled_sketch_stays_bounded_in_the_mean(rng, key, sketch, factor):
    """E ||residual||^2 <= 4 (1 - f) / f^2 max ||update||^2; without the factor it grows."""
    updates = jnp.asarray(rng.normal(size=(150, 20)))
    bound = 4 * (1 - factor) / factor**2 * jnp.max(jnp.sum(updates**2, axis=1))

    def square(compressor):
        _, state = run_with_feedback(compressor, updates, key)
        return jnp.sum(state.residual**2)

    # One run: its square is below the bound of the mean by far.
    assert 0 < square(compressors.scaled(sketch, factor)) <= bound
    assert square(sketch) > 1e6 * bound


def test_scaling_multiplies_what_is_decoded(rng, key):
    tree = {"w": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), "b": jnp.ones(3)}
    plain, third = compressors.top_k(3), compressors.scaled(compressors.top_k(3), 1 / 3)
    message, received = send(third, tree, key=key)
    expected_message, expected = send(plain, tree, key=key)
    jax.tree.map(np.testing.assert_array_equal, message, expected_message)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(received[name], leaf * jnp.asarray(1 / 3, leaf.dtype))
        assert received[name].dtype == leaf.dtype


def test_state_of_the_wrapped_compressor_is_carried(update, key):
    patient = compressors.error_feedback(compressors.truncated_tucker((2, 2, 2)))
    state = patient.init(update)
    state = state._replace(inner=jnp.array([1, 2, 2], jnp.int32))
    message, new_state = patient.compress(update, state, key=key)
    np.testing.assert_array_equal(new_state.inner, state.inner)
    assert compressors.message_bytes(message) == 8 * (4 + 3 + 2 * 4 + 2 * 5)


def test_misused_sparse_and_quantized_compressors_are_refused(key):
    for build, name in ((compressors.top_k, "k"), (compressors.csr, "num_nonzeros")):
        for wrong in (0, -1, 2.0, True, "3"):
            text = rf"{build.__name__}: got {name} {wrong!r}, expected an integer from 1"
            with pytest.raises(ValueError, match=text):
                build(wrong)
    for wrong in (3, 32):
        text = rf"quantize: got bits {wrong}, expected 1, 2, 4, 8 or 16"
        with pytest.raises(ValueError, match=text):
            compressors.quantize(wrong)
    for wrong in (0, 8.0, True):
        with pytest.raises(ValueError, match=rf"quantize: got bits {wrong}, expected an integer"):
            compressors.quantize(wrong)
    with pytest.raises(ValueError, match=r"csr: got an update of shapes \[\(3,\)\], .* 2 modes"):
        compressors.csr(2).init(jnp.zeros(3))


@pytest.mark.parametrize(
    "build",
    [
        compressors.top_k,
        compressors.csr,
        compressors.quantize,
        compressors.power_sgd,
        compressors.gaussian_sketch,
        compressors.hadamard_sketch,
    ],
)
def test_updates_that_are_not_floating_are_refused(key, build):
    tree = {"w": jnp.zeros((3, 4)), "n": jnp.zeros((2, 2), jnp.int32)}
    text = rf"{build.__name__}: got update of dtype int32, expected float32 or float64"
    with pytest.raises(ValueError, match=text):
        build(2).init(tree)
    with pytest.raises(ValueError, match=text):
        jax.jit(build(2).compress)(tree, (), key=key)


def test_misused_wrappers_are_refused(update, key):
    with pytest.raises(ValueError, match=r"error_feedback: got compressor of type function"):
        compressors.error_feedback(compressors.top_k)
    with pytest.raises(ValueError, match=r"scaled: got compressor of type function"):
        compressors.scaled(compressors.top_k, 0.5)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"scaled: got factor {wrong}, expected a positive"):
            compressors.scaled(compressors.top_k(2), wrong)
    patient = compressors.error_feedback(compressors.top_k(2))
    state = patient.init(update[0])
    with pytest.raises(
        ValueError, match=r"error_feedback: got residual .*\[4, 5\], expected .*3, 4"
    ):
        patient.compress(update, state, key=key)
    flat = compressors.identity()._replace(decompress=jnp.ravel)
    broken = compressors.error_feedback(flat)
    with pytest.raises(ValueError, match=r"error_feedback: got decompressed update .*\[60\]"):
        broken.compress(update, broken.init(update), key=key)
