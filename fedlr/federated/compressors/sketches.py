"""Updates sent as few random linear combinations of all their entries.

A sketch is ``s = S x`` with a random matrix S of few rows that both ends make from a seed, and is
decoded as ``S^T s``. With ``E S^T S = I`` that is unbiased, and as a random direction is hit by a
small part of any x, its variance is large: it averages out over clients and rounds. As every
unbiased compressor it becomes a contraction by `scaled`, which error feedback needs.
"""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, UInt

from fedlr import _checks, _precision, sketching
from fedlr.federated import protocol
from fedlr.federated.compressors import _leafwise

__all__ = ["SketchMessage", "gaussian_sketch", "hadamard_sketch"]

# A block of the random matrix has one or two megabytes. With signs, blocks of 2^16 numbers took
# three times longer on CPU, and larger ones were no faster; Gaussian ones do not care.
_BLOCK_NUMBERS = 2**18
# The Walsh-Hadamard transform as products with matrices of 2^5 rows: 6 ms for 2^20 entries in
# float32 on CPU, where additions of halves took 25 ms, with a fifth of their passes over memory.
_STAGE_BITS = 5


class SketchMessage(eqx.Module):
    """An update sent as a random sketch of its entries.

    Attributes:
        values: The sketch, shape (size,).
        seed: What both ends make the random matrix from, uint32, shape (2,).
        layout: Structure of the update, and shapes and dtypes of its arrays, *static*.
    """

    values: Float[Array, " size"]
    seed: UInt[Array, "2"]
    layout: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]] = eqx.field(static=True)


def gaussian_sketch(
    size: int,
    *,
    test_matrix: sketching.TestMatrix = sketching.gaussian,
    block_size: int | None = None,
) -> protocol.Compressor:
    """Build the sketch of the whole update by a random matrix with independent entries.

    All d entries of the update are sent as `size` = k numbers and a seed of 8 bytes:

        s = S x,   decoded as S^T s,   S (k, d) with independent entries from N(0, 1 / k)

    It is unbiased with ``E ||S^T S x - x||^2 = (d + 1) / k ||x||^2``, so ``scaled(...,
    k / (k + d + 1))`` is a contraction in the mean, with 1 - k / (k + d + 1). Either end draws k d
    random numbers, in blocks: no more than a block of S is ever kept. For large updates
    `hadamard_sketch` is far faster, and has less variance.

    Args:
        size: Numbers of the sketch, *static*. An update with at most so many entries is sent as it
            is.
        test_matrix: Function that draws the entries, times sqrt(k), *static*. `sketching.sign` has
            the variance ``(d - 1) / k``, and a sketch with k = 500, d = 65536 in float32 took 32 ms
            on CPU where a Gaussian one took 430 ms.
        block_size: Entries of the update whose part of S is drawn at once, *static*; None takes
            as many as give blocks of about 2^18 numbers.

    Returns:
        A compressor without state. Its message is a `SketchMessage`, in the widest dtype of the
        update.

    Raises:
        ValueError: If `size` or `block_size` is not a positive integer; while tracing, if an array
            of the update is not float32 or float64, or all have more than 2^30 entries.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> sketch = compressors.gaussian_sketch(5)
        >>> update = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}
        >>> message, _ = sketch.compress(update, sketch.init(update), key=jax.random.key(0))
        >>> jax.tree.map(jnp.shape, sketch.decompress(message))
        {'b': (4,), 'w': (4, 3)}
        >>> int(compressors.message_bytes(message)), 5 * 4 + 8
        (28, 28)

    Reference:
        Yue et al. 2023, arXiv 2309.13307: projections on common random vectors, with which the
        receiver makes the update again. There all clients share the vectors of a round; here every
        message has its own seed.
    """
    _checks.check_count("gaussian_sketch", "size", size)
    if block_size is not None:
        _checks.check_count("gaussian_sketch", "block_size", block_size)

    def blocks(num_entries):
        block = max(1, _BLOCK_NUMBERS // size) if block_size is None else block_size
        block = min(block, num_entries)
        return -(-num_entries // block), block

    def draw(key, index, block, dtype):
        return test_matrix(block, size, key=jax.random.fold_in(key, index), dtype=dtype)

    def project(entries, key):
        count, block = blocks(entries.size)
        parts = jnp.pad(entries, (0, count * block - entries.size)).reshape(count, block)

        def add(total, part):
            index, numbers = part
            return total + numbers @ draw(key, index, block, entries.dtype), None

        indices = jnp.arange(count, dtype=jnp.int32)
        start = jnp.zeros(size, entries.dtype)
        return lax.scan(add, start, (indices, parts))[0] / math.sqrt(size)

    def back(values, key, num_entries):
        count, block = blocks(num_entries)
        parts = lax.map(
            lambda index: draw(key, index, block, values.dtype) @ values,
            jnp.arange(count, dtype=jnp.int32),
        )
        return parts.reshape(-1)[:num_entries] / math.sqrt(size)

    return _sketched("gaussian_sketch", size, project, back)


def hadamard_sketch(size: int) -> protocol.Compressor:
    """Build the sketch of the whole update by rows of a randomized Hadamard matrix.

    All d entries of the update, padded with zeros to N, the next power of two, are sent as `size` =
    k numbers and a seed of 8 bytes:

        s = S x,   decoded as S^T s,   S = R H D

    D has random signs, H is the Walsh-Hadamard matrix of entries +-1, and R takes k different rows
    of it: the N rows are cut into k blocks whose sizes n_b differ by at most one, and every block
    gives a random one of its rows, times ``sqrt(n_b / N)``. It is unbiased with

        E ||S^T S x - x||^2 <= w ||x||^2,   w = min(N q - 1, (d - 1) q),   q = sum_b (n_b / N)^2

    where q is ``1 / k`` for a k that divides N, and at most ``1 / (4 N)`` more for any other. So
    ``scaled(..., 1 / (1 + w))`` is a contraction in the mean. The transform takes N log N
    operations and the memory of the padded update.

    Args:
        size: Numbers of the sketch, *static*. An update with at most so many entries is sent as it
            is.

    Returns:
        A compressor without state. Its message is a `SketchMessage`, in the widest dtype of the
        update.

    Raises:
        ValueError: If `size` is not a positive integer; while tracing, if an array of the update is
            not float32 or float64, or all have more than 2^30 entries.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> sketch = compressors.hadamard_sketch(5)
        >>> update = {"w": jnp.ones((4, 3)), "b": jnp.ones(4)}
        >>> message, _ = sketch.compress(update, sketch.init(update), key=jax.random.key(0))
        >>> jax.tree.map(jnp.shape, sketch.decompress(message))
        {'b': (4,), 'w': (4, 3)}
        >>> int(compressors.message_bytes(message)), 5 * 4 + 8
        (28, 28)

    Reference:
        Tropp 2011, arXiv 1011.1595, equation (1.1), the subsampled randomized Hadamard transform.
        There the rows are any k different ones, which takes a sort of N numbers: a second beside
        the 6 ms of the transform for N = 2^20 on CPU.
    """
    _checks.check_count("hadamard_sketch", "size", size)

    def draw(key, num_entries, num_rows, dtype):
        """Draw the signs of the entries, and the rows and their scales."""
        sign_key, row_key = jax.random.split(key)
        signs = sketching.sign(num_entries, 1, key=sign_key, dtype=dtype).reshape(-1)
        short, num_long = divmod(num_rows, size)
        block = jnp.arange(size, dtype=jnp.int32)
        starts = short * block + jnp.minimum(block, num_long)
        lengths = short + (block < num_long).astype(jnp.int32)
        rows = starts + jax.random.randint(row_key, (size,), 0, lengths, jnp.int32)
        return signs, rows, jnp.sqrt(lengths.astype(dtype) / num_rows)

    def project(entries, key):
        num_rows = _next_power(entries.size)
        signs, rows, scales = draw(key, entries.size, num_rows, entries.dtype)
        padded = jnp.pad(signs * entries, (0, num_rows - entries.size))
        return scales * _walsh_hadamard(padded)[rows]

    def back(values, key, num_entries):
        num_rows = _next_power(num_entries)
        signs, rows, scales = draw(key, num_entries, num_rows, values.dtype)
        spread = jnp.zeros(num_rows, values.dtype).at[rows].set(scales * values)
        return signs * _walsh_hadamard(spread)[:num_entries]

    return _sketched("hadamard_sketch", size, project, back)


def _sketched(function, size, project, back):
    """Build the compressor of the flattened update.

    `project` is `(entries, key) -> values` and `back` is `(values, key, num_entries) -> entries`.
    """

    def init(update):
        _leafwise.check_dtypes(function, update)
        num_entries = sum(jnp.size(leaf) for leaf in jax.tree.leaves(update))
        if num_entries > 2**30:
            got = f"an update of {num_entries} entries"
            raise _checks.fail(function, got, "at most 2^30 entries")
        return ()

    @_precision.highest
    def compress(update, state, *, key):
        init(update)
        leaves, structure = jax.tree.flatten(update)
        if sum(jnp.size(leaf) for leaf in leaves) <= size:
            return update, state
        dtype = max((jnp.result_type(leaf) for leaf in leaves), key=lambda dtype: dtype.itemsize)
        entries = jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])
        layout = tuple(
            jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves
        )
        # Not the key itself: its size depends on the kind of the generator.
        seed = jax.random.bits(key, (2,), jnp.uint32)
        return SketchMessage(project(entries, _key(seed)), seed, (structure, layout)), state

    @_precision.highest
    def decompress(message):
        if not isinstance(message, SketchMessage):
            return message
        structure, layout = message.layout
        sizes = [math.prod(leaf.shape) for leaf in layout]
        entries = back(message.values, _key(message.seed), sum(sizes))
        parts = jnp.split(entries, np.cumsum(sizes)[:-1])
        leaves = [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, layout, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    return protocol.Compressor(init, compress, decompress)


def _key(seed: UInt[Array, "2"]) -> Key[Array, ""]:
    return jax.random.wrap_key_data(seed, impl="threefry2x32")


def _next_power(number: int) -> int:
    """Return the smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def _walsh_hadamard(x: Float[Array, " size"]) -> Float[Array, " size"]:
    """Multiply by the Walsh-Hadamard matrix of entries +-1; the size is a power of two.

    That matrix is the Kronecker product of as many 2 x 2 ones as a position has bits. Every stage
    treats the leading bits of the positions and makes them the last, so after all it is in order.
    """
    bits = x.size.bit_length() - 1
    while bits > 0:
        stage = min(bits, _STAGE_BITS)
        matrix = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * stage)
        x = (x.reshape(2**stage, -1).T @ jnp.asarray(matrix, x.dtype)).reshape(-1)
        bits -= stage
    return x
