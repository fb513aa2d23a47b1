import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr.federated import channels, compressors

SHAPE = (3, 4)
# Bytes of a float64 image of this shape in each encoding, counted by hand.
ENCODINGS = {
    "dense": (None, 8 * 12),
    "top_k": (compressors.top_k(5), 5 * (8 + 4)),
    "csr": (compressors.csr(5), 5 * (8 + 4) + 4 * (3 + 1)),
    "tucker": (compressors.truncated_tucker((2, 1)), 8 * (2 * 1 + 3 * 2 + 4 * 1)),
    "svd": (compressors.truncated_svd(2), 8 * 2 * (1 + 3 + 4)),
    "quantized": (compressors.quantize(4), 6 + 2 * 8),
}


@pytest.fixture
def pair(rng):
    """An image, and one that both ends know."""
    return jnp.asarray(rng.normal(size=SHAPE)), jnp.asarray(rng.normal(size=SHAPE))


@functools.partial(jax.jit, static_argnames=("channel", "num_times"))
def follow(channel, image, *, num_times):
    """Send one image again and again; what arrives is known to both ends the next time."""

    def step(carry, key):
        known, state = carry
        known, _, state = channel.send(image, known, state, key=key)
        return (known, state), known

    start = (jnp.zeros_like(image), channel.init(image))
    return jax.lax.scan(step, start, jax.random.split(jax.random.key(0), num_times))[1]


def test_dense_states_arrive_whole_whatever_is_known(pair, key):
    image, known = pair
    channel = channels.states()
    received, sent, state = channel.send(image, known, channel.init(image), key=key)
    np.testing.assert_array_equal(received, image)
    assert sent == 8 * 12
    assert sent.dtype == jnp.int32
    assert state == ()


def test_dense_increments_arrive_whole_up_to_rounding(pair, key):
    image, known = pair
    channel = channels.increments(compressors.identity())
    received, sent, _ = channel.send(image, known, channel.init(image), key=key)
    eps = np.finfo(float).eps
    np.testing.assert_allclose(received, image, atol=4 * eps)
    assert sent == 8 * 12


@pytest.mark.parametrize("name", ENCODINGS)
def test_channels_send_what_their_compressor_encodes_with_its_bytes(pair, key, name):
    image, known = pair
    compressor, expected_bytes = ENCODINGS[name]
    encoded = compressors.identity() if compressor is None else compressor

    def decoded(x):
        return encoded.decompress(encoded.compress(x, encoded.init(x), key=key)[0])

    states = channels.states(compressor)
    received, sent, _ = states.send(image, known, states.init(image), key=key)
    np.testing.assert_array_equal(received, decoded(image))
    increments = channels.increments(encoded)
    moved, sent_again, _ = increments.send(image, known, increments.init(image), key=key)
    np.testing.assert_array_equal(moved, known + decoded(image - known))
    assert sent == sent_again == expected_bytes


def test_memory_of_error_feedback_is_kept_and_added_to_the_next_image(pair, key):
    image, known = pair
    for build, seen in ((channels.states, image), (channels.increments, image - known)):
        channel = build(compressors.error_feedback(compressors.top_k(5)))
        state = channel.init(image)
        np.testing.assert_array_equal(state.residual, 0)
        sums, start = jnp.zeros(SHAPE), known if build is channels.increments else 0 * known
        for turn in range(1, 4):
            received, _, state = channel.send(image, known, state, key=key)
            sums += received - start
            # The decoded messages and the residual sum to the updates.
            np.testing.assert_allclose(sums + state.residual, turn * seen, atol=1e-14)
        assert jnp.abs(state.residual).max() > 0


def test_increments_reach_a_fixed_image_where_states_stay_short_of_it(pair):
    """Top-k of the difference leaves the rest for the next time; of the image it drops it."""
    image, _ = pair
    increments = follow(channels.increments(compressors.top_k(5)), image, num_times=3)
    states = follow(channels.states(compressors.top_k(5)), image, num_times=3)
    entries = np.sort(np.abs(image).ravel())
    for turn, received in enumerate(increments):
        left_out = entries[: max(0, 12 - 5 * (turn + 1))]
        np.testing.assert_allclose(np.sum((received - image) ** 2), np.sum(left_out**2), atol=1e-30)
    for received in states:
        np.testing.assert_allclose(np.sum((received - image) ** 2), np.sum(entries[:7] ** 2))


@pytest.mark.parametrize("seed", range(3))
def test_error_of_increments_falls_with_every_message_and_that_of_states_does_not(seed):
    """The range to quantize shrinks with the difference: by 1 / (2^bits - 1) or better."""
    image = jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE))
    errors = {
        build.__name__: np.abs(
            follow(build(compressors.quantize(4)), image, num_times=4) - image[None]
        )
        for build in (channels.increments, channels.states)
    }
    spread = float(image.max() - image.min())
    for turn in range(4):
        # Each difference spreads over no more than twice the error before.
        assert errors["increments"][turn].max() <= spread / 15 * (2 / 15) ** turn
    assert errors["states"][3].max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_channels_can_be_mapped_over_clients(seed):
    """With effective ranks of their own, which count in the bytes."""
    rng = np.random.default_rng(seed)
    images, known = (jnp.asarray(rng.normal(size=(3, *SHAPE))) for _ in range(2))
    channel = channels.increments(compressors.truncated_tucker((3, 3)))
    state = jax.vmap(channel.init)(images)
    np.testing.assert_array_equal(state, np.full((3, 2), 3))
    ranks = jnp.array([[1, 1], [2, 3], [3, 2]], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    send = jax.jit(jax.vmap(lambda *args: channel.send(*args[:3], key=args[3])))
    received, sent, after = send(images, known, ranks, keys)
    np.testing.assert_array_equal(after, ranks)
    np.testing.assert_array_equal(sent, [8 * (a * b + 3 * a + 4 * b) for a, b in ranks.tolist()])
    for i in range(3):
        moved = np.asarray(received[i] - known[i])
        assert np.linalg.matrix_rank(moved, tol=1e-10) == int(ranks[i].min())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_channels_keep_the_dtype(pair, key, dtype):
    image, known = (x.astype(dtype) for x in pair)
    for compressor, _ in ENCODINGS.values():
        for channel in (
            channels.states(compressor),
            channels.increments(compressor or compressors.identity()),
        ):
            received = jax.eval_shape(channel.send, image, known, channel.init(image), key=key)[0]
            assert received.dtype == dtype
            assert received.shape == SHAPE
