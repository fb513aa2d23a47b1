import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import subspace
from fedlr.federated import compressors
from tests.reference.messages import bytes_of, send

POWER = {num_iters: compressors.power_sgd(2, num_iters=num_iters) for num_iters in (1, 3)}
COLD = compressors.power_sgd(2, warm_start=False)


@pytest.fixture
def update(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


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


@functools.partial(jax.jit, static_argnums=0)
def follow(compressor, updates, state, key):
    """Send one update after the other; return what arrived, the messages and the states."""

    def step(state, args):
        update, key = args
        message, state = compressor.compress(update, state, key=key)
        return state, (compressor.decompress(message), message, state)

    keys = jax.random.split(key, len(jax.tree.leaves(updates)[0]))
    return jax.lax.scan(step, state, (updates, keys))[1]


def product(rng, *shape, rank=2, dtype=jnp.float64):
    """A random array whose flattening behind the first mode has the rank."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    left, right = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))
    return jnp.asarray((left @ right).reshape(shape), dtype)


@pytest.mark.parametrize("num_iters", POWER)
def test_power_sgd_is_subspace_iteration_from_the_last_message(rng, key, num_iters):
    updates, right = rng.normal(size=(4, 6, 7)), rng.normal(size=(7, 2))
    received, message, (states,) = follow(
        POWER[num_iters], jnp.asarray(updates), (jnp.asarray(right),), key
    )
    for matrix, found, left_found, state in zip(
        updates, received, message.left, states, strict=True
    ):
        for _ in range(num_iters):
            left = np.linalg.qr(matrix @ right)[0]
            right = matrix.T @ left
        np.testing.assert_allclose(found, left @ right.T, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(left_found.T @ left_found, np.eye(2), atol=1e-14)
        np.testing.assert_allclose(jnp.max(jnp.abs(state)), 1, rtol=1e-15)


@pytest.mark.parametrize("compressor", [POWER[1], COLD])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_power_sgd_is_exact_up_to_its_rank(rng, key, compressor, dtype):
    """Also where the state has a lower rank, was spoilt by NaN, or is that of tiny updates."""
    corner = jnp.zeros((6, 3, 5), dtype).at[1, 2, 3].set(1)
    updates = jnp.stack(
        [
            product(rng, 6, 3, 5, dtype=dtype),
            jnp.zeros((6, 3, 5), dtype),
            product(rng, 6, 3, 5, rank=1, dtype=dtype),
            corner,
            product(rng, 6, 3, 5, dtype=dtype),
            corner.at[0, 0, 0].set(jnp.nan),
            *(1e-30 * product(rng, 6, 3, 5, dtype=dtype) for _ in range(3)),
        ]
    )
    received, _, _ = follow(compressor, updates, compressor.init(updates[0]), key)
    assert jnp.isnan(received[5]).any()
    for found, expected in zip(received, updates, strict=True):
        if not jnp.isnan(expected).any():
            scale = float(jnp.max(jnp.abs(expected)))
            atol = 200 * float(jnp.finfo(dtype).eps) * scale
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_power_sgd_leaves_an_error_orthogonal_to_what_it_sends(rng, key):
    update = jnp.asarray(rng.normal(size=(6, 7)))
    for compressor in (*POWER.values(), COLD):
        _, received = send(compressor, update, key=key)
        np.testing.assert_allclose(jnp.vdot(received, update - received), 0, atol=1e-13)
        assert 0 < jnp.sum((update - received) ** 2) < jnp.sum(update**2)


def test_warm_starts_approach_the_best_approximation(rng, key):
    values = np.array([5.0, 4.0, 1.0, 0.5, 0.2, 0.1])
    left, right = (np.linalg.qr(rng.normal(size=(size, 6)))[0] for size in (6, 7))
    update = (left * values) @ right.T
    updates = jnp.broadcast_to(update, (12, 6, 7))

    def errors(compressor):
        received, _, _ = follow(compressor, updates, compressor.init(updates[0]), key)
        return np.sqrt(np.sum((received - updates) ** 2, axis=(1, 2)))

    best = np.sqrt(np.sum(values[2:] ** 2))
    warm = errors(POWER[1])
    assert (np.diff(warm) <= 1e-12).all()
    np.testing.assert_allclose(warm[-1], best, rtol=1e-9)
    # Every further iteration of one message is worth one message.
    np.testing.assert_allclose(errors(POWER[3])[-1], best, rtol=1e-12)
    assert errors(COLD).min() > best * (1 + 1e-4)


def test_cold_starts_are_drawn_afresh_for_every_message(rng):
    update = jnp.asarray(rng.normal(size=(6, 7)))
    first, second, again = (send(COLD, update, key=jax.random.key(i))[1] for i in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    assert COLD.init(update) == ()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_power_sgd_factors_what_becomes_smaller(rng, key, dtype):
    shapes = {"b": (9,), "conv": (5, 2, 3), "equal": (3, 6), "small": (3, 5), "w": (4, 5)}
    tree = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    state = POWER[1].init(tree)
    message, received = send(POWER[1], tree, state, key=key)
    factored = {"conv": (5, 6), "w": (4, 5)}
    for name, leaf in tree.items():
        if name in factored:
            assert isinstance(message[name], compressors.FactorMessage)
            left, right = message[name].left, message[name].right
            assert (left.shape, right.shape) == tuple((size, 2) for size in factored[name])
        else:
            np.testing.assert_array_equal(received[name], leaf)
        assert received[name].shape == leaf.shape
        assert received[name].dtype == dtype
    kept = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    assert kept == [(6, 2), (5, 2)]
    numbers = 2 * (5 + 6) + 2 * (4 + 5) + 9 + 18 + 15
    assert compressors.message_bytes(message) == numbers * dtype.dtype.itemsize
    assert bytes_of(*jax.tree.leaves(message)) == numbers * dtype.dtype.itemsize


def test_misused_power_sgd_is_refused(rng, key):
    for name in ("rank", "num_iters"):
        for wrong in (0, 1.0, True):
            text = rf"power_sgd: got {name} {wrong!r}, expected an integer from 1"
            with pytest.raises(ValueError, match=text):
                compressors.power_sgd(**{"rank": 1, name: wrong})
    text = r"power_sgd: got an update of shapes \[\(7,\), \(3, 6\), \(0, 5\)\], .* rank 2 makes"
    with pytest.raises(ValueError, match=text):
        POWER[1].init([jnp.zeros(7), jnp.zeros((3, 6)), jnp.zeros((0, 5))])
    state = POWER[1].init(jnp.zeros((6, 7)))
    with pytest.raises(ValueError, match=r"power_sgd: got state .*\[7, 2\], expected .*\[8, 2\]"):
        POWER[1].compress(jnp.zeros((6, 8)), state, key=key)
