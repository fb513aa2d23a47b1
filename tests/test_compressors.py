import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import subspace, tucker
from fedlr.federated import compressors


@pytest.fixture
def update(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


def send(compressor, update, state=None, *, key):
    state = compressor.init(update) if state is None else state

    @jax.jit
    def there_and_back(update, state, key):
        message, _ = compressor.compress(update, state, key=key)
        return message, compressor.decompress(message)

    return there_and_back(update, state, key)


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
