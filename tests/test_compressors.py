import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from fedlr import subspace, tucker
from fedlr.federated import compressors

SEEDS = (0, 1, 2)
QUANTIZERS = {bits: compressors.quantize(bits) for bits in (1, 2, 4, 8, 16)}
# For an update of the shape (4, 5).
LOSSY = {
    "top_k": compressors.top_k(3),
    "csr": compressors.csr(6),
    "quantize_2": QUANTIZERS[2],
    "quantize_16": QUANTIZERS[16],
    "top_k_with_feedback": compressors.error_feedback(compressors.top_k(3)),
    "svd_with_feedback": compressors.error_feedback(compressors.truncated_svd(1)),
}


@pytest.fixture
def update(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


def send(compressor, update, state=None, *, key):
    state = compressor.init(update) if state is None else state
    return there_and_back(compressor, update, state, key)


@functools.partial(jax.jit, static_argnums=0)
def there_and_back(compressor, update, state, key):
    message, _ = compressor.compress(update, state, key=key)
    return message, compressor.decompress(message)


@functools.partial(jax.jit, static_argnums=0)
def receive_many(compressor, updates, keys):
    """Send the update of every client by a compressor without state."""
    return jax.vmap(lambda update, key: there_and_back(compressor, update, (), key)[1])(
        updates, keys
    )


def bytes_of(*arrays):
    return sum(np.asarray(array).nbytes for array in arrays)


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


def test_full_ranks_are_lossless(update, key):
    _, received = send(compressors.truncated_tucker((3, 4, 5)), update, key=key)
    np.testing.assert_allclose(received, update, rtol=1e-11, atol=1e-12)
    matrix = update[0]
    _, received = send(compressors.truncated_svd(4), matrix, key=key)
    np.testing.assert_allclose(received, matrix, rtol=1e-11, atol=1e-12)


def test_truncation_is_a_contraction(update, key):
    _, received = send(compressors.truncated_tucker((2, 2, 2)), update, key=key)
    assert jnp.sum((update - received) ** 2) < jnp.sum(update**2)
    _, again = send(compressors.truncated_tucker((2, 2, 2)), received, key=key)
    np.testing.assert_allclose(again, received, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("effective", [(2, 3, 3), (1, 3, 2), (2, 1, 1)])
def test_client_sends_what_its_own_ranks_need(update, key, effective):
    padded = compressors.truncated_tucker((2, 3, 3))
    state = jnp.array(effective, jnp.int32)
    message, received = send(padded, update, state, key=key)
    own, own_received = send(compressors.truncated_tucker(effective), update, key=key)
    np.testing.assert_allclose(received, own_received, rtol=1e-11, atol=1e-12)
    sent = bytes_of(own.tensor.core, *own.tensor.factors)
    assert compressors.message_bytes(message) == compressors.message_bytes(own) == sent
    sizes = np.array(update.shape)
    assert sent == 8 * (np.prod(effective) + np.sum(sizes * np.array(effective)))


def test_ranks_above_the_largest_are_not_counted(update, key):
    low_rank = compressors.truncated_tucker((2, 2, 2))
    message, _ = send(low_rank, update, jnp.array([9, 9, 9], jnp.int32), key=key)
    assert compressors.message_bytes(message) == 8 * (8 + 2 * (3 + 4 + 5))


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


def test_diagonal_core_gives_the_same_matrix_in_fewer_bytes(rng, key):
    matrix = jnp.asarray(rng.normal(size=(5, 6)))
    rank = jnp.array(2, jnp.int32)
    message, received = send(compressors.truncated_svd(3), matrix, rank, key=key)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(received, best, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(message.values, [*values[:2], 0], rtol=1e-10, atol=1e-14)
    sent = bytes_of(left[:, :2], values[:2], right[:2])
    assert compressors.message_bytes(message) == sent == 8 * 2 * (1 + 5 + 6)
    tucker_message, _ = send(compressors.truncated_tucker((2, 2)), matrix, key=key)
    assert compressors.message_bytes(tucker_message) == sent + 8 * (4 - 2)


@pytest.mark.parametrize("build", [compressors.truncated_svd, compressors.truncated_tucker])
def test_only_arrays_with_as_many_modes_as_ranks_are_truncated(build, rng, key):
    tree = {"w": jnp.asarray(rng.normal(size=(4, 5))), "b": jnp.asarray(rng.normal(size=5))}
    compressor = build((2, 2) if build is compressors.truncated_tucker else 2)
    message, received = send(compressor, tree, key=key)
    np.testing.assert_array_equal(received["b"], tree["b"])
    assert jax.tree.structure(received) == jax.tree.structure(tree)
    weights, _ = send(compressor, tree["w"], key=key)
    expected = compressors.message_bytes(weights) + bytes_of(tree["b"])
    assert compressors.message_bytes(message) == expected


def test_bytes_are_counted_for_each_client_under_vmap(rng, key):
    low_rank = compressors.truncated_tucker((2, 2))
    updates = jnp.asarray(rng.normal(size=(3, 4, 5)))
    ranks = jnp.array([[2, 2], [1, 2], [1, 1]], jnp.int32)

    def one(update, state):
        message, state = low_rank.compress(update, state, key=key)
        return compressors.message_bytes(message), state

    counted, kept = jax.jit(jax.vmap(one))(updates, ranks)
    np.testing.assert_array_equal(counted, [8 * (4 + 18), 8 * (2 + 4 + 10), 8 * (1 + 9)])
    np.testing.assert_array_equal(kept, ranks)
    assert counted.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_messages_keep_the_dtype(update, key, dtype):
    _, received = send(compressors.truncated_tucker((2, 2, 2)), update.astype(dtype), key=key)
    assert received.dtype == dtype


def test_random_bases_are_drawn_afresh_for_every_message(update):
    sketched = compressors.truncated_tucker(
        (1, 1, 1),
        random_basis=lambda key: subspace.randomized(key=key, oversampling=0, power_iters=0),
    )
    first, second = (send(sketched, update, key=jax.random.key(i))[1] for i in range(2))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, send(sketched, update, key=jax.random.key(0))[1])


def test_a_given_basis_finder_is_used(update, key):
    def axis_basis(matrix, rank, *, mode):
        return jnp.eye(matrix.shape[0], rank, dtype=matrix.dtype)

    corner = compressors.truncated_tucker((2, 2, 2), basis=axis_basis)
    _, received = send(corner, update, key=key)
    np.testing.assert_allclose(
        received, jnp.zeros_like(update).at[:2, :2, :2].set(update[:2, :2, :2])
    )


def test_updates_and_ranks_that_do_not_fit_are_refused(update):
    with pytest.raises(ValueError, match=r"truncated_tucker: got an update of shapes .* 2 modes"):
        compressors.truncated_tucker((2, 2)).init(update)
    with pytest.raises(ValueError, match=r"truncated_tucker: got ranks \(2, 2, 6\)"):
        compressors.truncated_tucker((2, 2, 6)).init(update)
    with pytest.raises(ValueError, match=r"truncated_tucker: got ranks \[2, 2, 2\] of type list"):
        compressors.truncated_tucker([2, 2, 2])
    with pytest.raises(ValueError, match=r"truncated_tucker: got ranks 2 of type int"):
        compressors.truncated_tucker(2)
    with pytest.raises(ValueError, match=r"truncated_svd: got rank 5, expected .* 1 to 4"):
        compressors.truncated_svd(5).init(update[0])
    with pytest.raises(ValueError, match=r"got both basis and random_basis, expected one"):
        compressors.truncated_svd(1, basis=subspace.gram(), random_basis=subspace.gram)


def largest(array, count):
    """Keep the entries of largest modulus, of equal ones the first."""
    kept, flat = np.zeros(array.size, array.dtype), np.asarray(array).reshape(-1)
    chosen = np.argsort(-np.abs(flat), kind="stable")[:count]
    kept[chosen] = flat[chosen]
    return kept.reshape(array.shape)


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
        return compressors.message_bytes(message), compressor.decompress(message), state

    together = jax.jit(jax.vmap(one))(updates, keys)
    alone = [one(update, key) for update, key in zip(updates, keys, strict=True)]
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


@pytest.mark.parametrize("build", [compressors.top_k, compressors.csr])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_largest_entries_are_kept(rng, key, build, dtype):
    update = jnp.asarray(rng.normal(size=(4, 5)), dtype)
    for count in (1, 7, 25):
        _, received = send(build(count), update, key=key)
        np.testing.assert_array_equal(received, largest(update, count))


@pytest.mark.parametrize("build", [compressors.top_k, compressors.csr])
def test_of_equal_moduli_the_first_are_kept(key, build):
    update = jnp.array([[1.0, -2.0, 2.0], [-2.0, 0.0, 2.0]])
    for count in (1, 2, 4):
        _, received = send(build(count), update, key=key)
        np.testing.assert_array_equal(received, largest(update, count))


@pytest.mark.parametrize("k", [1, 6, 13, 24])
def test_top_k_contracts_every_array(rng, key, k):
    sizes = (3, 8), (2, 3, 4), (24,)
    # The bound is attained by entries of one modulus.
    tree = [*(jnp.asarray(rng.normal(size=size)) for size in sizes), jnp.full((4, 6), -0.5)]
    _, received = send(compressors.top_k(k), tree, key=key)
    for found, array in zip(received, tree, strict=True):
        bound = (1 - k / 24) * jnp.sum(array**2)
        assert jnp.sum((found - array) ** 2) <= bound * (1 + 24 * jnp.finfo(jnp.float64).eps)


@pytest.mark.parametrize("build", [compressors.top_k, compressors.csr])
def test_enough_entries_are_lossless(rng, key, build):
    sparse = jnp.asarray(np.where(rng.random((6, 7)) < 0.2, rng.normal(size=(6, 7)), 0))
    count = int(jnp.count_nonzero(sparse))
    for enough in (count, count + 3):
        np.testing.assert_array_equal(send(build(enough), sparse, key=key)[1], sparse)
    assert not np.array_equal(send(build(count - 1), sparse, key=key)[1], sparse)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_top_k_sends_values_and_positions(update, key, dtype):
    tree = {"long": update.astype(dtype), "short": jnp.arange(4, dtype=dtype)}
    message, received = send(compressors.top_k(4), tree, key=key)
    long = message["long"]
    np.testing.assert_array_equal(long.values, tree["long"].reshape(-1)[long.indices])
    np.testing.assert_array_equal(received["short"], message["short"])
    assert long.indices.dtype == jnp.int32
    sent = bytes_of(long.values, long.indices, message["short"])
    assert (
        compressors.message_bytes(message)
        == sent
        == 4 * (dtype.dtype.itemsize + 4) + bytes_of(tree["short"])
    )


@pytest.mark.parametrize("name", ["top_k", "csr", "top_k_with_feedback"])
def test_derivative_is_that_of_the_kept_entries(rng, key, name):
    """The gradient of ||C(x)||^2 / 2 is C(x)."""
    compressor = LOSSY[name]
    update = jnp.asarray(rng.normal(size=(4, 5))).at[0, 0].set(0)

    def half_square(update):
        return jnp.sum(send(compressor, update, key=key)[1] ** 2) / 2

    gradient = jax.grad(half_square)(update)
    np.testing.assert_array_equal(gradient, send(compressor, update, key=key)[1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_csr_has_the_arrays_of_scipy(key, seed, dtype):
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((6, 7)) < 0.25, rng.normal(size=(6, 7)), 0).astype(dtype)
    dense[seed], dense[-1] = 0, 0
    expected = scipy.sparse.csr_matrix(dense)
    message, received = send(compressors.csr(30), jnp.asarray(dense), key=key)
    np.testing.assert_array_equal(message.values[: expected.nnz], expected.data)
    np.testing.assert_array_equal(message.columns[: expected.nnz], expected.indices)
    np.testing.assert_array_equal(message.row_starts, expected.indptr)
    np.testing.assert_array_equal(message.values[expected.nnz :], 0)
    np.testing.assert_array_equal(received, dense)
    assert message.columns.dtype == message.row_starts.dtype == jnp.int32
    sent = bytes_of(expected.data, expected.indices, expected.indptr)
    assert compressors.message_bytes(message) == sent
    if dtype == jnp.float32:
        assert sent == 4 * (2 * expected.nnz + 6 + 1)


def test_csr_of_chosen_entries_has_the_arrays_of_scipy(rng, key):
    dense = jnp.asarray(rng.normal(size=(5, 4)))
    expected = scipy.sparse.csr_matrix(largest(dense, 9))
    message, _ = send(compressors.csr(9), dense, key=key)
    np.testing.assert_array_equal(message.values, expected.data)
    np.testing.assert_array_equal(message.columns, expected.indices)
    np.testing.assert_array_equal(message.row_starts, expected.indptr)


def test_csr_leaves_what_is_no_matrix(rng, key):
    tree = {"w": jnp.zeros((3, 4)), "b": jnp.asarray(rng.normal(size=5))}
    message, received = send(compressors.csr(2), tree, key=key)
    np.testing.assert_array_equal(received["b"], tree["b"])
    # No entry of a zero matrix is sent, only where its rows start.
    assert compressors.message_bytes(message) == 4 * (3 + 1) + bytes_of(tree["b"])


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


@pytest.mark.parametrize("compressor", [compressors.top_k(2), QUANTIZERS[4]])
def test_empty_arrays_are_sent_as_they_are(key, compressor):
    tree = {"w": jnp.zeros((0, 3)), "none": ()}
    message, received = send(compressor, tree, key=key)
    assert received["w"].shape == (0, 3)
    assert compressors.message_bytes(message) == 0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_csr_of_empty_matrices_has_only_row_starts(key, shape):
    message, received = send(compressors.csr(2), jnp.zeros(shape), key=key)
    assert received.shape == shape
    assert compressors.message_bytes(message) == 4 * (shape[0] + 1)


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
        QUANTIZERS[4],
        compressors.truncated_svd(1),
        compressors.truncated_tucker((1, 2)),
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


@pytest.mark.parametrize("build", [compressors.top_k, compressors.csr, compressors.quantize])
def test_updates_that_are_not_floating_are_refused(key, build):
    tree = {"w": jnp.zeros((3, 4)), "n": jnp.zeros((2, 2), jnp.int32)}
    text = rf"{build.__name__}: got update of dtype int32, expected float32 or float64"
    with pytest.raises(ValueError, match=text):
        build(2).init(tree)
    with pytest.raises(ValueError, match=text):
        jax.jit(build(2).compress)(tree, (), key=key)


@pytest.mark.parametrize("build", [compressors.top_k, compressors.csr])
def test_arrays_too_large_for_int32_positions_are_refused(key, build):
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    text = rf"{build.__name__}: got an array of 2147483648 entries, expected less than 2\^31"
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(lambda update: build(2).compress(update, (), key=key), huge)


def test_misused_error_feedback_is_refused(update, key):
    with pytest.raises(ValueError, match=r"error_feedback: got compressor of type function"):
        compressors.error_feedback(compressors.top_k)
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
