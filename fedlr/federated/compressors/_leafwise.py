"""Compressors that encode one array of the update after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fedlr import _checks
from fedlr.federated import protocol


def check_dtypes(function: str, update: PyTree) -> None:
    """Refuse an update with an array that is not float32 or float64."""
    for leaf in jax.tree.leaves(update):
        _checks.check_floating(function, update=leaf)


def shapes_with(function: str, update: PyTree, num_modes: int) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays with so many modes; refuse an update without any."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(update)]
    fitting = [shape for shape in shapes if len(shape) == num_modes]
    if not fitting:
        raise _checks.fail(
            function, f"an update of shapes {shapes}", f"an array of {num_modes} modes"
        )
    return fitting


def is_matrix(leaf: Array) -> bool:
    """Say whether an array has two modes."""
    return leaf.ndim == 2


def leafwise(init, applies, encode, decode, message_type):
    """Build the compressor that encodes the arrays it applies to, and sends the others as they are.

    `init` checks the update, too.
    """

    def compress(update, state, *, key):
        init(update)
        leaves, structure = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        message = [
            encode(leaf, state, leaf_key) if applies(leaf) else leaf
            for leaf, leaf_key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(structure, message), state

    return protocol.Compressor(init, compress, decoder(decode, message_type))


def decoder(decode: Callable[[Any], Array], message_type: type) -> Callable[[PyTree], PyTree]:
    """Build the function that decodes the messages of one type, and leaves all other nodes."""

    def is_message(node):
        return isinstance(node, message_type)

    def decompress(message):
        return jax.tree.map(
            lambda node: decode(node) if is_message(node) else node, message, is_leaf=is_message
        )

    return decompress
