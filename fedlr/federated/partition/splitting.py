"""From a data set in one place to the data of clients."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fedlr import _checks
from fedlr.federated import protocol
from fedlr.federated.partition import _assignment

__all__ = ["split"]


def split(
    partition: _assignment.Partition, inputs: PyTree, targets: Array | np.ndarray
) -> protocol.ClientData:
    """Give the clients their examples, padded with zeros to the size of the largest client.

    Memory grows with clients times the largest count, so a strong skew of the sizes costs.

    Args:
        partition: Which client holds which examples.
        inputs: Pytree of arrays, shape (examples, ...).
        targets: Array, shape (examples, ...).

    Returns:
        Client data with leading axes (clients, n_max) and a mask of that shape.

    Raises:
        ValueError: If an array has another number of examples than the partition.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> parts = partition.by_group(np.array([1, 0, 1]))
        >>> partition.split(parts, np.array([[2.0], [3.0], [4.0]]), np.array([5, 6, 7])).targets
        Array([[6, 0],
               [5, 7]], dtype=int32)
    """
    mask = partition.mask
    total = int(partition.counts.sum())

    def gather(leaf):
        leaf = np.asarray(leaf)
        if leaf.shape[:1] != (total,):
            raise _checks.fail("split", f"an array of shape {leaf.shape}", f"{total} examples")
        padded = np.zeros(mask.shape + leaf.shape[1:], leaf.dtype)
        padded[mask] = leaf[partition.indices[mask]]
        return jnp.asarray(padded)

    return protocol.ClientData(jax.tree.map(gather, inputs), gather(targets), jnp.asarray(mask))
