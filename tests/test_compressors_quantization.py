import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr.federated import compressors
from tests.reference.messages import bytes_of, receive_many, send

SEEDS = (0, 1, 2)
QUANTIZERS = {bits: compressors.quantize(bits) for bits in (1, 2, 4, 8, 16)}


@pytest.fixture
def update(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


@pytest.mark.parametrize("bits", QUANTIZERS)
def test_codes_are_packed_without_loss(rng, key, bits):
    """Entries on the grid come back exactly, whatever the key."""
    codes = [rng.integers(2**bits, size=size) for size in (2, 3, 9, 2001)]
    for array in codes:
        array[[0, -1]] = 0, 2**bits - 1
    dtypes = (jnp.float64, jnp.float32, jnp.float64, jnp.float32)
    tree = [jnp.asarray(array, dtype) for array, dtype in zip(codes, dtypes, strict=True)]
    message, received = send(QUANTIZERS[bits], tree, key=key)
    jax.tree.map(np.testing.assert_array_equal, received, tree)
    for node, array in zip(message, codes, strict=True):
        digits = (array[:, None] >> np.arange(bits)) & 1
        packed = np.packbits(digits.astype(bool).reshape(-1), bitorder="little")
        np.testing.assert_array_equal(np.asarray(node.codes).view(np.uint8), packed)
        sent = bytes_of(node.codes, node.low, node.step)
        assert compressors.message_bytes(node) == sent
        assert sent == -(-array.size * bits // 8) + 2 * node.low.dtype.itemsize


@pytest.mark.parametrize("bits", QUANTIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_quantization_errs_by_at_most_a_step(rng, bits, dtype):
    """Over many small arrays, so that the quotient of a largest entry is also rounded up."""
    updates = jnp.asarray(rng.normal(size=(20000, 3)), dtype)
    keys = jax.random.split(jax.random.key(0), 20000)
    received = receive_many(QUANTIZERS[bits], updates, keys)
    steps = np.ptp(np.asarray(updates), axis=1, keepdims=True) / (2**bits - 1)
    rounding = 4 * jnp.finfo(dtype).eps * np.abs(updates).max(axis=1, keepdims=True)
    assert (np.abs(received - updates) <= steps + rounding).all()
    for extreme in (np.argmin, np.argmax):
        rows = np.arange(20000), extreme(np.asarray(updates), axis=1)
        assert (np.abs(received - updates)[rows] <= rounding[:, 0]).mean() > 0.98


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", QUANTIZERS)
def test_quantization_is_unbiased(rng, bits, seed):
    update, num_keys = rng.normal(size=(5, 7)).astype(np.float32), 4000
    keys = jax.random.split(jax.random.key(seed), num_keys)
    updates = jnp.broadcast_to(update, (num_keys, *update.shape))
    received = receive_many(QUANTIZERS[bits], updates, keys)
    mean = np.mean(received, axis=0, dtype=np.float64)
    exact = update.astype(np.float64)
    step = np.ptp(exact) / (2**bits - 1)
    fraction = (exact - exact.min()) / step % 1
    standard_error = step * np.sqrt(fraction * (1 - fraction) / num_keys)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert (np.abs(mean - exact) <= 4.5 * standard_error + rounding).all()


def test_arrays_and_clients_are_rounded_independently():
    ramp = jnp.linspace(0, 1, 200)
    _, first = send(QUANTIZERS[1], [ramp, ramp], key=jax.random.key(0))
    _, second = send(QUANTIZERS[1], [ramp, ramp], key=jax.random.key(1))
    draws = [*first, *second]
    for i, draw in enumerate(draws):
        assert not any(np.array_equal(draw, other) for other in draws[:i])
    _, again = send(QUANTIZERS[1], [ramp, ramp], key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("bits", QUANTIZERS)
def test_constant_arrays_are_quantized_exactly(key, bits):
    for value in (0.0, -3.7, 1e30, 1e-30):
        tree = [jnp.full(shape, value, jnp.float32) for shape in ((), (1,), (3, 5))]
        _, received = send(QUANTIZERS[bits], tree, key=key)
        jax.tree.map(np.testing.assert_array_equal, received, tree)


@pytest.mark.parametrize("bits", QUANTIZERS)
def test_quantization_leaves_no_finite_entry_beside_a_bad_one(update, key, bits):
    # The last range is too large for the dtype.
    for bad in (jnp.nan, jnp.inf, -jnp.inf, [-1.5e308, 1.5e308]):
        tree = {"bad": update.at[1, 2, 3:].set(bad), "good": update}
        _, received = send(QUANTIZERS[bits], tree, key=key)
        assert not jnp.isfinite(received["bad"]).any()
        assert jnp.isfinite(received["good"]).all()
