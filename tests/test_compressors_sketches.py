import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fedlr import sketching
from fedlr.federated import compressors
from tests.reference.messages import bytes_of, receive_many, send

SEEDS = (0, 1, 2)
NUM_KEYS = 4000
# For updates of twelve entries; the Hadamard matrix has sixteen rows.
SKETCHES = {
    "gaussian": compressors.gaussian_sketch(5, block_size=5),
    "sign": compressors.gaussian_sketch(5, test_matrix=sketching.sign, block_size=5),
    "hadamard": compressors.hadamard_sketch(4),
    "uneven_hadamard": compressors.hadamard_sketch(5),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def matrix_of(compressor, num_entries, key):
    """Return the random matrix: what it makes of the unit vectors, and of its own rows."""
    messages = jax.vmap(lambda unit: compressor.compress(unit, (), key=key)[0])(
        jnp.eye(num_entries)
    )
    size = messages.values.shape[1]

    def back(values):
        message = compressors.SketchMessage(values, messages.seed[0], messages.layout)
        return compressor.decompress(message)

    return messages.values.T, jax.vmap(back)(jnp.eye(size))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_are_linear_and_decoded_by_the_transpose(rng, name, seed):
    update, key = jnp.asarray(rng.normal(size=12)), jax.random.key(seed)
    matrix, transpose = matrix_of(SKETCHES[name], 12, key)
    np.testing.assert_allclose(transpose, matrix, rtol=1e-12, atol=1e-14)
    message, received = send(SKETCHES[name], update, key=key)
    np.testing.assert_allclose(message.values, matrix @ update, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(received, matrix.T @ message.values, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("size", "num_entries"), [(1, 2), (5, 12), (8, 16), (9, 70), (70, 128)])
def test_hadamard_sketch_takes_one_row_of_every_block(size, num_entries):
    num_rows = 2 ** int(np.ceil(np.log2(num_entries)))
    hadamard = scipy.linalg.hadamard(num_rows)[:, :num_entries]
    starts = np.cumsum([0, *(len(block) for block in np.array_split(np.arange(num_rows), size))])
    matrix, _ = matrix_of(compressors.hadamard_sketch(size), num_entries, jax.random.key(0))
    scales = np.sqrt(np.diff(starts) / num_rows)
    np.testing.assert_allclose(np.abs(matrix), np.tile(scales[:, None], num_entries), rtol=1e-12)
    found = np.sign(matrix)
    if num_entries == num_rows:
        np.testing.assert_array_equal(found @ found.T, num_rows * np.eye(size))

    # With the signs of the columns unknown, some row of the first block must explain all others.
    def fits(row):
        unsigned = found * (found[0] * hadamard[row])
        return all(
            (unsigned[b] == hadamard[starts[b] : starts[b + 1]]).all(axis=1).any()
            for b in range(size)
        )

    assert any(fits(row) for row in range(starts[1]))


def test_blocks_of_a_gaussian_sketch_are_independent(key):
    matrix, _ = matrix_of(compressors.gaussian_sketch(40, block_size=7), 60, key)
    correlation = np.corrcoef(matrix.T)[np.triu_indices(60, 1)]
    # Of 1770 correlations of 40 numbers the largest is below five standard deviations.
    assert np.abs(correlation).max() < 5 / np.sqrt(40)
    assert abs(np.mean(matrix)) < 4 / np.sqrt(40 * 60 * 40)
    np.testing.assert_allclose(np.var(matrix) * 40, 1, atol=4 * np.sqrt(2 / 2400))


def sum_of_squared_shares(num_rows, size):
    blocks = np.array_split(np.arange(num_rows), size)
    share = sum(len(block) ** 2 for block in blocks) / num_rows**2
    assert 1 / size <= share <= 1 / size + 1 / (4 * num_rows)
    assert share == 1 / size or num_rows % size
    return share


def variance(name, square):
    """E ||S^T S x - x||^2 for all x with this ||x||^2, or its bound."""
    if name == "gaussian":
        return (12 + 1) / 5 * square
    if name == "sign":
        return (12 - 1) / 5 * square
    share = sum_of_squared_shares(16, 4 if name == "hadamard" else 5)
    return min(16 * share - 1, (12 - 1) * share) * square


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_are_unbiased_with_the_stated_variance(rng, name, seed):
    """And contractions in the mean, if scaled by the stated factor."""
    update = rng.normal(size=(3, 4)).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), NUM_KEYS)
    updates = jnp.broadcast_to(update, (NUM_KEYS, 3, 4))
    received = np.asarray(receive_many(SKETCHES[name], updates, keys), np.float64)
    error = received - update
    standard_error = error.std(axis=0) / np.sqrt(NUM_KEYS)
    assert (np.abs(error.mean(axis=0)) <= 4 * standard_error).all()
    squares = np.sum(error**2, axis=(1, 2))
    expected = variance(name, np.sum(update.astype(np.float64) ** 2))
    excess = (squares.mean() - expected) / (squares.std() / np.sqrt(NUM_KEYS))
    assert excess <= 4
    # The twelve entries do not fill the sixteen columns of the Hadamard matrix.
    if "hadamard" not in name:
        assert excess >= -4
    factor = 1 / (1 + variance(name, 1))
    squares = np.sum((factor * received - update) ** 2, axis=(1, 2))
    bound = (1 - factor) * np.sum(update.astype(np.float64) ** 2)
    assert squares.mean() <= bound + 4 * squares.std() / np.sqrt(NUM_KEYS)


@pytest.mark.parametrize("size", [4, 5])
def test_hadamard_sketch_attains_its_variance_without_padding(rng, size):
    update = rng.normal(size=16)
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)
    updates = jnp.broadcast_to(update, (NUM_KEYS, 16))
    received = receive_many(compressors.hadamard_sketch(size), updates, keys)
    squares = np.sum((np.asarray(received) - update) ** 2, axis=1)
    expected = (16 * sum_of_squared_shares(16, size) - 1) * np.sum(update**2)
    # With equal blocks every message errs by the same length.
    standard_error = squares.std() / np.sqrt(NUM_KEYS) + 1e-12
    assert abs(squares.mean() - expected) <= 4 * standard_error


@pytest.mark.parametrize("name", ["gaussian", "hadamard"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_message_is_the_sketch_and_eight_bytes_of_seed(rng, key, name, dtype):
    size = 5 if name == "gaussian" else 4
    tree = {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.ones(2, dtype)}
    message, received = send(SKETCHES[name], tree, key=key)
    assert message.values.shape == (size,)
    assert message.values.dtype == dtype
    sent = bytes_of(message.values, message.seed)
    assert compressors.message_bytes(message) == sent == size * dtype.dtype.itemsize + 8
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), received) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )


@pytest.mark.parametrize("name", ["gaussian", "hadamard"])
def test_all_arrays_of_an_update_make_one_vector(rng, key, name):
    """In the widest dtype, whatever their own."""
    tree = {
        "b": jnp.asarray(rng.normal(size=2), jnp.float32),
        "none": (),
        "w": jnp.asarray(rng.normal(size=(5, 2))),
    }
    message, received = send(SKETCHES[name], tree, key=key)
    flat = jnp.concatenate([tree["b"].astype(jnp.float64), tree["w"].reshape(-1)])
    flat_message, flat_received = send(SKETCHES[name], flat, key=key)
    np.testing.assert_array_equal(message.values, flat_message.values)
    np.testing.assert_array_equal(received["w"], flat_received[2:].reshape(5, 2))
    np.testing.assert_array_equal(received["b"], flat_received[:2].astype(jnp.float32))
    assert received["b"].dtype == jnp.float32


@pytest.mark.parametrize("name", SKETCHES)
def test_every_message_has_its_own_matrix(rng, name):
    update = jnp.asarray(rng.normal(size=12))
    first, second, again = (
        send(SKETCHES[name], update, key=jax.random.key(i))[0] for i in (0, 1, 0)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.seed, second.seed)
    assert not np.allclose(first.values, second.values)


def test_the_kind_of_the_generator_does_not_show_in_the_bytes(rng):
    update = jnp.asarray(rng.normal(size=12))
    message, received = send(SKETCHES["hadamard"], update, key=jax.random.key(0, impl="rbg"))
    assert compressors.message_bytes(message) == 4 * 8 + 8
    assert jnp.isfinite(received).all()


@pytest.mark.parametrize("build", [compressors.gaussian_sketch, compressors.hadamard_sketch])
def test_updates_no_larger_than_the_sketch_are_sent_as_they_are(rng, key, build):
    tree = {"w": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.ones(2)}
    message, received = send(build(14), tree, key=key)
    for sent in (message, received):
        jax.tree.map(np.testing.assert_array_equal, sent, tree)
    assert isinstance(send(build(13), tree, key=key)[0], compressors.SketchMessage)


def test_memory_does_not_hold_the_gaussian_matrix():
    size, num_entries = 64, 2**18
    sketch = compressors.gaussian_sketch(size)
    update = jax.ShapeDtypeStruct((num_entries,), jnp.float32)

    @jax.jit
    def there_and_back(update, key):
        return sketch.decompress(sketch.compress(update, (), key=key)[0])

    compiled = there_and_back.lower(update, jax.random.key(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size * num_entries * 4 / 8


def test_misused_sketches_are_refused(key):
    builds = compressors.gaussian_sketch, compressors.hadamard_sketch
    for build in builds:
        for wrong in (0, 2.0, True):
            text = rf"{build.__name__}: got size {wrong!r}, expected an integer from 1"
            with pytest.raises(ValueError, match=text):
                build(wrong)
        huge = jax.ShapeDtypeStruct((2**15, 2**15 + 1), jnp.float32)
        text = (
            rf"{build.__name__}: got an update of {2**30 + 2**15} entries, expected at most 2\^30"
        )
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(lambda update, b=build: b(2).compress(update, (), key=key), huge)
    with pytest.raises(ValueError, match=r"gaussian_sketch: got block_size 0, expected an integer"):
        compressors.gaussian_sketch(2, block_size=0)
