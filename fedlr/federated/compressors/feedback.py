"""No compression, and compressors around others: scaled, and with error feedback."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedlr import _checks
from fedlr.federated import protocol

__all__ = ["ErrorFeedbackState", "error_feedback", "identity", "scaled"]


class ErrorFeedbackState(NamedTuple):
    """What a client with error feedback remembers.

    Attributes:
        residual: What its messages have left out so far, a pytree like the update.
        inner: State of the wrapped compressor.
    """

    residual: PyTree
    inner: PyTree


def identity() -> protocol.Compressor:
    """Build the compressor that sends the update as it is.

    Returns:
        A compressor without state.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> dense = compressors.identity()
        >>> update = jnp.array([1.0, 2.0])
        >>> message, _ = dense.compress(update, dense.init(update), key=jax.random.key(0))
        >>> dense.decompress(message)
        Array([1., 2.], dtype=float32)
    """

    def init(update):
        del update
        return ()

    def compress(update, state, *, key):
        del key
        return update, state

    return protocol.Compressor(init, compress, lambda message: message)


def scaled(compressor: protocol.Compressor, factor: float) -> protocol.Compressor:
    """Build the compressor whose decoded messages are multiplied by a number.

    It makes a contraction of an unbiased compressor C, so that error feedback may be put around it:

        E C(x) = x,   E ||C(x) - x||^2 <= w ||x||^2,   f = 1 / (1 + w)
        E ||f C(x) - x||^2 <= (1 - f) ||x||^2

    The messages, their bytes and the state are those of the wrapped compressor.

    Args:
        compressor: The compressor to wrap.
        factor: The number, positive, *static*. For the w of a compressor see its own text.

    Returns:
        A compressor.

    Raises:
        ValueError: If `compressor` is no `protocol.Compressor` or `factor` is not positive.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> half = compressors.scaled(compressors.identity(), 0.5)
        >>> message, _ = half.compress(jnp.array([2.0, 4.0]), (), key=jax.random.key(0))
        >>> message, half.decompress(message)
        (Array([2., 4.], dtype=float32), Array([1., 2.], dtype=float32))

    Reference:
        Beznosikov et al. 2020, arXiv 2002.12410, on scaling unbiased compressors.
    """
    _check_compressor("scaled", compressor)
    _checks.check_positive("scaled", "factor", factor)

    def decompress(message):
        return jax.tree.map(lambda leaf: factor * leaf, compressor.decompress(message))

    return protocol.Compressor(compressor.init, compressor.compress, decompress)


def error_feedback(compressor: protocol.Compressor) -> protocol.Compressor:
    """Build the compressor that adds to every update what earlier messages have left out.

        corrected = update + residual
        message   = compress(corrected)
        residual  = corrected - decompress(message)

    So the decoded messages and the last residual sum to the updates. The residual stays bounded
    where the wrapped compressor is a contraction, as `top_k` and the truncations are; `quantize`
    with few bits and the sketches are none, and become one by `scaled`.

    Args:
        compressor: The compressor to wrap.

    Returns:
        A compressor with the messages of the wrapped one and the state `ErrorFeedbackState`, at
        first with a residual of zeros.

    Raises:
        ValueError: If `compressor` is no `protocol.Compressor`; while tracing, if the residual or
            the decompressed message differs from the update in structure, shapes or dtypes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> patient = compressors.error_feedback(compressors.top_k(1))
        >>> update = jnp.array([2.0, 3.0])
        >>> state = patient.init(update)
        >>> message, state = patient.compress(update, state, key=jax.random.key(0))
        >>> patient.decompress(message), state.residual
        (Array([0., 3.], dtype=float32), Array([2., 0.], dtype=float32))
        >>> message, state = patient.compress(update, state, key=jax.random.key(1))
        >>> patient.decompress(message), state.residual
        (Array([4., 0.], dtype=float32), Array([0., 3.], dtype=float32))

    Reference:
        Seide et al., 1-bit stochastic gradient descent, Interspeech 2014; Karimireddy et al., 2019,
        arXiv 1901.09847, algorithm 2.
    """
    _check_compressor("error_feedback", compressor)

    def init(update):
        residual = jax.tree.map(jnp.zeros_like, update)
        return ErrorFeedbackState(residual, compressor.init(update))

    def compress(update, state, *, key):
        protocol.check_like("error_feedback", "residual", state.residual, update)
        corrected = jax.tree.map(jnp.add, update, state.residual)
        message, inner = compressor.compress(corrected, state.inner, key=key)
        received = compressor.decompress(message)
        protocol.check_like("error_feedback", "decompressed update", received, update)
        residual = jax.tree.map(jnp.subtract, corrected, received)
        return message, ErrorFeedbackState(residual, inner)

    return protocol.Compressor(init, compress, compressor.decompress)


def _check_compressor(function: str, compressor: object) -> None:
    if not isinstance(compressor, protocol.Compressor):
        got = f"compressor of type {type(compressor).__name__}"
        raise _checks.fail(function, got, "a protocol.Compressor")
