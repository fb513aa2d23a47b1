"""Arrays sent as integer codes."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from fedlr import _checks
from fedlr.federated import protocol
from fedlr.federated.compressors import _leafwise

__all__ = ["QuantizedMessage", "quantize"]


class QuantizedMessage(eqx.Module):
    """An array sent as integer codes: ``low + step * code``.

    Attributes:
        codes: Codes of the row-major flattened array, uint8 with several to a byte, the first in
            the lowest bits, or uint16.
        low: Value of the code zero, shape ().
        step: Distance of neighbouring codes, shape ().
        shape: Shape of the array, *static*.
    """

    codes: UInt[Array, " words"]
    low: Float[Array, ""]
    step: Float[Array, ""]
    shape: tuple[int, ...] = eqx.field(static=True)


def quantize(bits: int) -> protocol.Compressor:
    """Build the uniform quantization of every array, with stochastic rounding.

    The range of an array x is cut into ``2^bits - 1`` steps, and every entry is rounded to one of
    its two neighbours at random, the nearer one being likelier:

        step = (max x - min x) / (2^bits - 1),   E[decoded x] = x,   |decoded x - x| <= step

    The codes of an array take ``ceil(size bits / 8)`` bytes, `low` and `step` one number each.
    Constant arrays come back exactly. In the place of an array with NaN, Inf or a range that
    overflows no entry comes back finite. There is no useful derivative.

    Args:
        bits: Bits of a code, *static*: 1, 2, 4, 8 or 16.

    Returns:
        A compressor without state. Its messages are `QuantizedMessage` in the places of all arrays
        that are not empty.

    Raises:
        ValueError: If `bits` is none of these numbers; while tracing, if an array of the update is
            not float32 or float64.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> coarse = compressors.quantize(2)
        >>> update = jnp.array([-1.0, 0.0, 1.0, 2.0, 2.0])
        >>> message, _ = coarse.compress(update, coarse.init(update), key=jax.random.key(0))
        >>> message.codes  # 3 2 1 0 in the first byte, 3 in the second
        Array([228,   3], dtype=uint8)
        >>> coarse.decompress(message)
        Array([-1.,  0.,  1.,  2.,  2.], dtype=float32)
        >>> int(compressors.message_bytes(message)), 2 + 2 * 4
        (10, 10)

    Reference:
        Alistarh et al., QSGD, 2017, arXiv 1610.02132, section 3.1. The paper rounds ``|x| / ||x||``
        and sends signs, norm and entropy-coded levels; here the levels lie between the smallest and
        the largest entry, which needs no signs, and have a fixed width.
    """
    _checks.check_count("quantize", "bits", bits)
    if bits not in (1, 2, 4, 8, 16):
        raise _checks.fail("quantize", f"bits {bits}", "1, 2, 4, 8 or 16")
    largest = 2**bits - 1
    word = np.uint16 if bits == 16 else np.uint8
    shifts = np.arange(0, np.iinfo(word).bits, bits, dtype=word)[None]

    def init(update):
        _leafwise.check_dtypes("quantize", update)
        return ()

    def applies(leaf):
        return leaf.size > 0

    def encode(leaf, state, key):
        del state
        low = jnp.min(leaf)
        step = (jnp.max(leaf) - low) / largest
        # Rounding can put the quotient of the largest entry above the largest code.
        scaled = jnp.minimum((leaf - low) / jnp.where(step > 0, step, 1), largest)
        floor = jnp.floor(scaled)
        # Not floor(scaled + uniform): this sum is rounded, which would favour the upper neighbour.
        up = jax.random.uniform(key, leaf.shape, leaf.dtype) < scaled - floor
        codes = jnp.where(up, floor + 1, floor).astype(word).reshape(-1)
        codes = jnp.pad(codes, (0, -leaf.size % shifts.size)).reshape(-1, shifts.size)
        words = jnp.sum(codes << shifts, axis=1, dtype=word)
        return QuantizedMessage(words, low, step, leaf.shape)

    def decode(message):
        codes = (message.codes[:, None] >> shifts) & largest
        codes = codes.reshape(-1)[: math.prod(message.shape)].reshape(message.shape)
        return message.low + message.step * codes.astype(message.step.dtype)

    return _leafwise.leafwise(init, applies, encode, decode, QuantizedMessage)
