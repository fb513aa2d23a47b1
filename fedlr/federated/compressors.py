"""How one client encodes its update, and how many bytes the message has."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt

from fedlr import _checks, subspace, tucker
from fedlr.federated import protocol

__all__ = [
    "CSRMessage",
    "ErrorFeedbackState",
    "QuantizedMessage",
    "SVDMessage",
    "SparseMessage",
    "TuckerMessage",
    "csr",
    "error_feedback",
    "identity",
    "message_bytes",
    "quantize",
    "top_k",
    "truncated_svd",
    "truncated_tucker",
]


class TuckerMessage(NamedTuple):
    """An array sent as Tucker core and factors, padded to static ranks.

    Attributes:
        tensor: Core (r_1, ..., r_d) and factors (n_k, r_k), zero beyond the effective ranks.
        ranks: Effective ranks, int32, shape (d,). A real client sends arrays of these sizes.
    """

    tensor: tucker.TuckerTensor
    ranks: Int[Array, " modes"]

    @property
    def sent_bytes(self) -> Int[Array, ""]:
        """Bytes of the core and the factors at the effective ranks, int32."""
        sizes = np.array([factor.shape[-2] for factor in self.tensor.factors], np.int32)
        core = jnp.prod(self.ranks, axis=-1, dtype=jnp.int32)
        factors = jnp.sum(self.ranks * sizes, axis=-1, dtype=jnp.int32)
        return self.tensor.core.dtype.itemsize * (core + factors)


class SVDMessage(NamedTuple):
    """A matrix sent as ``left diag(values) right^T``, padded to a static rank.

    Attributes:
        left: Left singular vectors, shape (rows, rank).
        values: Singular values, zero beyond the effective rank, shape (rank,).
        right: Right singular vectors, shape (columns, rank).
        rank: Effective rank, int32, shape ().
    """

    left: Float[Array, "rows rank"]
    values: Float[Array, " rank"]
    right: Float[Array, "columns rank"]
    rank: Int[Array, ""]

    @property
    def sent_bytes(self) -> Int[Array, ""]:
        """Bytes of ``rank (rows + columns + 1)`` numbers at the effective rank, int32."""
        numbers = self.left.shape[-2] + self.right.shape[-2] + 1
        return self.values.dtype.itemsize * numbers * self.rank


class SparseMessage(eqx.Module):
    """An array sent as some of its entries; the others are zero.

    Attributes:
        values: The entries, shape (k,).
        indices: Their positions in the row-major flattened array, int32, shape (k,).
        shape: Shape of the array, *static*.
    """

    values: Float[Array, " k"]
    indices: Int[Array, " k"]
    shape: tuple[int, ...] = eqx.field(static=True)


class CSRMessage(eqx.Module):
    """A matrix in compressed sparse rows, padded to a static number of entries.

    Attributes:
        values: The entries row by row, zero from ``row_starts[-1]`` on, shape (num_nonzeros,).
        columns: Their columns, int32, shape (num_nonzeros,).
        row_starts: Where every row starts in `values`, and at last the number of entries that are
            no padding, int32, shape (rows + 1,).
        shape: Shape of the matrix, *static*.
    """

    values: Float[Array, " num_nonzeros"]
    columns: Int[Array, " num_nonzeros"]
    row_starts: Int[Array, " starts"]
    shape: tuple[int, int] = eqx.field(static=True)

    @property
    def sent_bytes(self) -> Int[Array, ""]:
        """Bytes of the three arrays without padding, int32."""
        entry = self.values.dtype.itemsize + self.columns.dtype.itemsize
        starts = self.row_starts.dtype.itemsize * self.row_starts.shape[-1]
        return entry * self.row_starts[..., -1] + starts


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


class ErrorFeedbackState(NamedTuple):
    """What a client with error feedback remembers.

    Attributes:
        residual: What its messages have left out so far, a pytree like the update.
        inner: State of the wrapped compressor.
    """

    residual: PyTree
    inner: PyTree


def message_bytes(message: PyTree) -> Int[Array, ""]:
    """Count the bytes of the arrays a real client would send.

    A node with a property `sent_bytes` counts itself; every other array counts its size times the
    bytes of its dtype.

    Args:
        message: Message of ONE client, a pytree.

    Returns:
        The bytes, int32, shape ().

    Raises:
        ValueError: If the arrays, padding included, do not fit an int32 (2 GiB).

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> int(compressors.message_bytes({"w": jnp.zeros((3, 4), jnp.float32)}))
        48
    """

    def size(node):
        return sum(jnp.size(a) * jnp.result_type(a).itemsize for a in jax.tree.leaves(node))

    # With its padding, so that no sum below can overflow.
    if size(message) > np.iinfo(np.int32).max:
        got = f"a message of {size(message)} bytes"
        raise _checks.fail("message_bytes", got, "less than 2 GiB")
    nodes = jax.tree.leaves(message, is_leaf=_counts_itself)
    own = [node.sent_bytes if _counts_itself(node) else size(node) for node in nodes]
    return jnp.asarray(sum(own), jnp.int32)


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


def truncated_tucker(
    ranks: tuple[int, ...],
    *,
    basis: subspace.BasisFinder | None = None,
    random_basis: Callable[[Key[Array, ""]], subspace.BasisFinder] | None = None,
) -> protocol.Compressor:
    """Build the truncation of an update to Tucker ranks by ST-HOSVD.

    Every array of the update with ``len(ranks)`` modes is sent as core and factors, all others as
    they are. The state of a client is its effective ranks, int32 (d,), at first `ranks`: they may
    be lowered for each client and in each round, and count in the bytes. Beyond them the message
    is zero padding. Being traced, they leave it without a derivative, see `tucker.sthosvd`.

    Args:
        ranks: Largest rank of every mode, *static*.
        basis: Basis finder; None takes `subspace.gram`.
        random_basis: `(key) -> basis finder`, *static*, drawn afresh for every message; takes the
            place of `basis`.

    Returns:
        A compressor. Its messages are `TuckerMessage` in the places of the truncated arrays.

    Raises:
        ValueError: If `ranks` is no tuple or both kinds of basis are given; while tracing, if no
            array of the update has ``len(ranks)`` modes or a rank does not fit its mode.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> low_rank = compressors.truncated_tucker((1, 1, 1))
        >>> update = jnp.ones((3, 4, 5))
        >>> message, _ = low_rank.compress(update, low_rank.init(update), key=jax.random.key(0))
        >>> bool(jnp.allclose(low_rank.decompress(message), update, atol=1e-5))
        True
        >>> int(compressors.message_bytes(message)), 4 * (1 + 3 + 4 + 5)
        (52, 52)

    Reference:
        arXiv 2502.02761, client step. ``prod r_k + sum n_k r_k`` numbers instead of ``prod n_k``.
    """
    if not isinstance(ranks, tuple):
        got = f"ranks {ranks!r} of type {type(ranks).__name__}"
        raise _checks.fail("truncated_tucker", got, "a tuple of ints")
    find = _finder("truncated_tucker", basis, random_basis)

    def init(update):
        for shape in _shapes("truncated_tucker", update, len(ranks)):
            _checks.check_ranks("truncated_tucker", ranks, shape)
        return jnp.asarray(ranks, jnp.int32)

    def applies(leaf):
        return leaf.ndim == len(ranks)

    def encode(leaf, effective_ranks, key):
        effective_ranks = jnp.minimum(effective_ranks, jnp.asarray(ranks, jnp.int32))
        tensor = tucker.sthosvd(leaf, ranks, basis=find(key), effective_ranks=effective_ranks)
        return TuckerMessage(tensor, effective_ranks)

    def decode(message):
        return tucker.to_dense(message.tensor)

    return _leafwise(init, applies, encode, decode, TuckerMessage)


def truncated_svd(
    rank: int,
    *,
    basis: subspace.BasisFinder | None = None,
    random_basis: Callable[[Key[Array, ""]], subspace.BasisFinder] | None = None,
) -> protocol.Compressor:
    """Build the truncation of matrices to a rank, sent with a diagonal core.

    The two-mode case of `truncated_tucker` in ``r (1 + m + n)`` instead of ``r (r + m + n)``
    numbers: the core of the ST-HOSVD is made diagonal by a small SVD. Matrices of the update are
    truncated, all other arrays are sent as they are. The state of a client is its effective rank,
    int32, at first `rank`.

    Args:
        rank: Largest rank, *static*.
        basis: Basis finder; None takes `subspace.gram`.
        random_basis: `(key) -> basis finder`, *static*, drawn afresh for every message; takes the
            place of `basis`.

    Returns:
        A compressor. Its messages are `SVDMessage` in the places of the matrices.

    Raises:
        ValueError: If both kinds of basis are given; while tracing, if the update has no matrix or
            the rank does not fit one.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> low_rank = compressors.truncated_svd(1)
        >>> update = jnp.ones((3, 4))
        >>> message, _ = low_rank.compress(update, low_rank.init(update), key=jax.random.key(0))
        >>> bool(jnp.allclose(low_rank.decompress(message), update, atol=1e-5))
        True
        >>> int(compressors.message_bytes(message)), 4 * (1 + 3 + 4)
        (32, 32)
    """
    find = _finder("truncated_svd", basis, random_basis)

    def init(update):
        for shape in _shapes("truncated_svd", update, 2):
            _checks.check_rank("truncated_svd", rank, min(shape))
        return jnp.asarray(rank, jnp.int32)

    def encode(leaf, effective_rank, key):
        effective_rank = jnp.minimum(effective_rank, rank)
        effective_ranks = jnp.stack([effective_rank, effective_rank])
        core, (left, right) = tucker.sthosvd(
            leaf, (rank, rank), basis=find(key), effective_ranks=effective_ranks
        )
        rotation, values, rotation_right = jnp.linalg.svd(core, full_matrices=False)
        with jax.default_matmul_precision("highest"):
            return SVDMessage(left @ rotation, values, right @ rotation_right.T, effective_rank)

    def decode(message):
        with jax.default_matmul_precision("highest"):
            return (message.left * message.values[None]) @ message.right.T

    return _leafwise(init, _is_matrix, encode, decode, SVDMessage)


def top_k(k: int) -> protocol.Compressor:
    """Build the compressor that keeps the `k` entries of largest modulus of every array.

    Of entries with equal modulus the first are kept, NaN counts as the largest modulus. It is a
    contraction: ``||C(x) - x||^2 <= (1 - k / size) ||x||^2`` for every array x. An array with at
    most `k` entries is sent as it is. A message is not always smaller than the array: an entry
    costs its own bytes and four for its position. The derivative is that of the kept entries.

    Args:
        k: Entries kept of every array, *static*.

    Returns:
        A compressor without state. Its messages are `SparseMessage` in the places of the arrays
        with more than `k` entries.

    Raises:
        ValueError: If `k` is not a positive integer; while tracing, if an array of the update is
            not float32 or float64 or has 2^31 entries or more.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> sparse = compressors.top_k(2)
        >>> update = jnp.array([[1.0, -4.0, 0.0], [0.0, 2.0, 3.0]])
        >>> message, _ = sparse.compress(update, sparse.init(update), key=jax.random.key(0))
        >>> sparse.decompress(message)
        Array([[ 0., -4.,  0.],
               [ 0.,  0.,  3.]], dtype=float32)
        >>> int(compressors.message_bytes(message)), 2 * (4 + 4)
        (16, 16)

    Reference:
        Stich, Cordonnier and Jaggi, 2018, arXiv 1809.07599, the k-contraction top_k. There over
        the whole gradient; here over every array of the update by itself.
    """
    _checks.check_count("top_k", "k", k)

    def init(update):
        _check_dtypes("top_k", update)
        return ()

    def applies(leaf):
        return leaf.size > k

    def encode(leaf, state, key):
        del state, key
        indices = _largest("top_k", leaf, k)
        return SparseMessage(leaf.reshape(-1)[indices], indices, leaf.shape)

    def decode(message):
        entries = jnp.zeros(math.prod(message.shape), message.values.dtype)
        return entries.at[message.indices].set(message.values).reshape(message.shape)

    return _leafwise(init, applies, encode, decode, SparseMessage)


def csr(num_nonzeros: int) -> protocol.Compressor:
    """Build the compressor that sends matrices in compressed sparse rows.

    Of every matrix of the update at most `num_nonzeros` entries are sent, those of largest modulus
    as in `top_k`, and never a zero: with fewer non-zeros the message is padded, and the padding is
    not counted. It takes ``nnz (itemsize + 4) + 4 (rows + 1)`` bytes. All other arrays are sent as
    they are. The derivative is that of the kept entries.

    Args:
        num_nonzeros: Largest number of entries sent of a matrix, *static*.

    Returns:
        A compressor without state. Its messages are `CSRMessage` in the places of the matrices.

    Raises:
        ValueError: If `num_nonzeros` is not a positive integer; while tracing, if the update has
            no matrix, an array is not float32 or float64 or a matrix has 2^31 entries or more.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import compressors
        >>> rows = compressors.csr(4)
        >>> update = jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 1.0]])
        >>> message, _ = rows.compress(update, rows.init(update), key=jax.random.key(0))
        >>> message.row_starts
        Array([0, 1, 1, 3], dtype=int32)
        >>> bool((rows.decompress(message) == update).all())
        True
        >>> int(compressors.message_bytes(message)), 3 * (4 + 4) + 4 * (3 + 1)
        (40, 40)

    Reference:
        arXiv 2502.02761, the comparison of message sizes: ``2 nnz + n + 1`` numbers for an image
        with n rows. CSR is a layout; the choice of the entries is that of `top_k`.
    """
    _checks.check_count("csr", "num_nonzeros", num_nonzeros)

    def init(update):
        _check_dtypes("csr", update)
        _shapes("csr", update, 2)
        return ()

    def encode(leaf, state, key):
        del state, key
        rows, columns = leaf.shape
        entries = leaf.reshape(-1)
        indices = _largest("csr", leaf, min(num_nonzeros, leaf.size))
        # Padding gets the first index beyond the matrix, so that sorting puts it last.
        indices = jnp.sort(jnp.where(entries[indices] != 0, indices, leaf.size))
        values = entries.at[indices].get(mode="fill", fill_value=0)
        row_starts = jnp.searchsorted(indices, columns * jnp.arange(rows + 1, dtype=jnp.int32))
        return CSRMessage(values, indices % columns, row_starts, leaf.shape)

    def decode(message):
        places = jnp.arange(message.values.size, dtype=jnp.int32)
        # The row of a padding entry is the first one beyond the matrix.
        rows = jnp.searchsorted(message.row_starts, places, side="right") - 1
        matrix = jnp.zeros(message.shape, message.values.dtype)
        return matrix.at[rows, message.columns].set(message.values, mode="drop")

    return _leafwise(init, _is_matrix, encode, decode, CSRMessage)


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
        _check_dtypes("quantize", update)
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

    return _leafwise(init, applies, encode, decode, QuantizedMessage)


def error_feedback(compressor: protocol.Compressor) -> protocol.Compressor:
    """Build the compressor that adds to every update what earlier messages have left out.

        corrected = update + residual
        message   = compress(corrected)
        residual  = corrected - decompress(message)

    So the decoded messages and the last residual sum to the updates. The residual stays bounded
    where the wrapped compressor is a contraction, as `top_k` and the truncations are; `quantize`
    with few bits is none.

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
    if not isinstance(compressor, protocol.Compressor):
        got = f"compressor of type {type(compressor).__name__}"
        raise _checks.fail("error_feedback", got, "a protocol.Compressor")

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


def _finder(function: str, basis: Any, random_basis: Any) -> Callable[[Any], subspace.BasisFinder]:
    """Return the function `(key) -> basis finder`."""
    if basis is not None and random_basis is not None:
        raise _checks.fail(function, "both basis and random_basis", "one of them")
    if random_basis is not None:
        return random_basis
    fixed = subspace.gram() if basis is None else basis
    return lambda _: fixed


def _check_dtypes(function: str, update: PyTree) -> None:
    """Refuse an update with an array that is not float32 or float64."""
    for leaf in jax.tree.leaves(update):
        _checks.check_floating(function, update=leaf)


def _shapes(function: str, update: PyTree, num_modes: int) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays with so many modes; refuse an update without any."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(update)]
    fitting = [shape for shape in shapes if len(shape) == num_modes]
    if not fitting:
        raise _checks.fail(
            function, f"an update of shapes {shapes}", f"an array of {num_modes} modes"
        )
    return fitting


def _is_matrix(leaf: Array) -> bool:
    return leaf.ndim == 2


def _largest(function: str, array: Array, count: int) -> Int[Array, " count"]:
    """Return where the row-major flattened array has its largest moduli."""
    if array.size > np.iinfo(np.int32).max:
        raise _checks.fail(function, f"an array of {array.size} entries", "less than 2^31 entries")
    return lax.top_k(jnp.abs(array).reshape(-1), count)[1]


def _leafwise(init, applies, encode, decode, message_type):
    """Build the compressor that encodes the arrays it applies to, and sends the others as they are.

    `init` checks the update, too.
    """

    def is_message(node):
        return isinstance(node, message_type)

    def compress(update, state, *, key):
        init(update)
        leaves, structure = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        message = [
            encode(leaf, state, leaf_key) if applies(leaf) else leaf
            for leaf, leaf_key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(structure, message), state

    def decompress(message):
        return jax.tree.map(
            lambda node: decode(node) if is_message(node) else node, message, is_leaf=is_message
        )

    return protocol.Compressor(init, compress, decompress)


def _counts_itself(node: Any) -> bool:
    return hasattr(node, "sent_bytes")
