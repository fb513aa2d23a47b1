"""How an image travels between the server and ONE client, with exact bytes.

A channel is one direction of the traffic. It encodes an image with any compressor, either as it is
(`states`) or as its difference to an image that both ends know already (`increments`).
"""

from typing import Any, NamedTuple

from fedlr.federated import compressors, protocol

__all__ = ["Channel", "increments", "states"]


class Channel(NamedTuple):
    """One direction of the traffic of one client, a pair of pure functions.

    Attributes:
        init: `(image) -> state`, the memory of the sending end (error feedback, effective ranks).
        send: `(image, known, state, *, key) -> (received, sent_bytes, state)`: what arrives of an
            image where `known` is the last image that both ends know; bytes int32, shape ().
    """

    init: Any
    send: Any


def states(compressor: protocol.Compressor | None = None) -> Channel:
    """Build the channel that encodes images themselves.

    With `compressors.top_k` this keeps the largest pixels, with `compressors.truncated_tucker` the
    leading components of the image. What the encoding drops is lost.

    Args:
        compressor: How an image is encoded; None for `compressors.identity`, which sends it dense.

    Returns:
        A channel whose state is that of the compressor.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import channels
        >>> image, known = jnp.array([1.0, 2.0]), jnp.zeros(2)
        >>> channel = channels.states()
        >>> channel.send(image, known, channel.init(image), key=jax.random.key(0))[:2]
        (Array([1., 2.], dtype=float32), Array(8, dtype=int32))
    """
    compressor = compressors.identity() if compressor is None else compressor

    def send(image, known, state, *, key):
        del known
        message, state = compressor.compress(image, state, key=key)
        return compressor.decompress(message), compressors.message_bytes(message), state

    return Channel(compressor.init, send)


def increments(compressor: protocol.Compressor) -> Channel:
    """Build the channel that encodes the difference to the image both ends know.

        received = known + decode(encode(image - known))

    What the encoding drops now is part of the next difference where `known` is what was received
    before. Where it is not, `compressors.error_feedback` around the compressor keeps it.

    Args:
        compressor: How a difference is encoded.

    Returns:
        A channel whose state is that of the compressor.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import channels, compressors
        >>> image, known = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
        >>> channel = channels.increments(compressors.identity())
        >>> channel.send(image, known, channel.init(image), key=jax.random.key(0))[0]
        Array([1., 2.], dtype=float32)
    """
    encoded = states(compressor)

    def send(image, known, state, *, key):
        received, sent_bytes, state = encoded.send(image - known, known, state, key=key)
        return known + received, sent_bytes, state

    return Channel(compressor.init, send)
