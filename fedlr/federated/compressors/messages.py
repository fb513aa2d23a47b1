"""How many bytes a message has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from fedlr import _checks

__all__ = ["message_bytes"]


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


def _counts_itself(node: Any) -> bool:
    return hasattr(node, "sent_bytes")
