import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from fedlr.federated import compressors
from tests.reference.messages import bytes_of, send

SEEDS = (0, 1, 2)


@pytest.fixture
def update(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


def largest(array, count):
    """Keep the entries of largest modulus, of equal ones the first."""
    kept, flat = np.zeros(array.size, array.dtype), np.asarray(array).reshape(-1)
    chosen = np.argsort(-np.abs(flat), kind="stable")[:count]
    kept[chosen] = flat[chosen]
    return kept.reshape(array.shape)


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


@pytest.mark.parametrize(
    "compressor",
    [
        compressors.top_k(3),
        compressors.csr(6),
        compressors.error_feedback(compressors.top_k(3)),
    ],
)
def test_derivative_is_that_of_the_kept_entries(rng, key, compressor):
    """The gradient of ||C(x)||^2 / 2 is C(x)."""
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


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_csr_of_empty_matrices_has_only_row_starts(key, shape):
    message, received = send(compressors.csr(2), jnp.zeros(shape), key=key)
    assert received.shape == shape
    assert compressors.message_bytes(message) == 4 * (shape[0] + 1)


@pytest.mark.parametrize("build", [compressors.top_k, compressors.csr])
def test_arrays_too_large_for_int32_positions_are_refused(key, build):
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    text = rf"{build.__name__}: got an array of 2147483648 entries, expected less than 2\^31"
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(lambda update: build(2).compress(update, (), key=key), huge)
