"""How one client encodes its update, and how many bytes the message has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from fedlr import _checks, subspace, tucker
from fedlr.federated import protocol

__all__ = [
    "SVDMessage",
    "TuckerMessage",
    "identity",
    "message_bytes",
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

    def encode(leaf, effective_ranks, key):
        effective_ranks = jnp.minimum(effective_ranks, jnp.asarray(ranks, jnp.int32))
        tensor = tucker.sthosvd(leaf, ranks, basis=find(key), effective_ranks=effective_ranks)
        return TuckerMessage(tensor, effective_ranks)

    def decode(message):
        return tucker.to_dense(message.tensor)

    def check(shape):
        _checks.check_ranks("truncated_tucker", ranks, shape)

    return _leafwise("truncated_tucker", ranks, check, encode, decode, TuckerMessage)


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

    def check(shape):
        _checks.check_rank("truncated_svd", rank, min(shape))

    return _leafwise("truncated_svd", (rank, rank), check, encode, decode, SVDMessage)


def _finder(function: str, basis: Any, random_basis: Any) -> Callable[[Any], subspace.BasisFinder]:
    """Return the function `(key) -> basis finder`."""
    if basis is not None and random_basis is not None:
        raise _checks.fail(function, "both basis and random_basis", "one of them")
    if random_basis is not None:
        return random_basis
    fixed = subspace.gram() if basis is None else basis
    return lambda _: fixed


def _leafwise(function, ranks, check, encode, decode, message_type):
    """Build the compressor that encodes every array with as many modes as there are ranks."""

    def is_message(node):
        return isinstance(node, message_type)

    def init(update):
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(update)]
        fitting = [shape for shape in shapes if len(shape) == len(ranks)]
        if not fitting:
            raise _checks.fail(
                function, f"an update of shapes {shapes}", f"an array of {len(ranks)} modes"
            )
        for shape in fitting:
            check(shape)
        start = jnp.asarray(ranks, jnp.int32)
        return start[0] if message_type is SVDMessage else start

    def compress(update, state, *, key):
        init(update)
        leaves, structure = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        message = [
            encode(leaf, state, leaf_key) if leaf.ndim == len(ranks) else leaf
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
