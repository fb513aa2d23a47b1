"""The same kind of examples, seen differently by every client."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fedlr import _checks, masking
from fedlr.federated import clients as clients_
from fedlr.federated import protocol
from fedlr.federated.partition import _assignment

__all__ = ["feature_shift"]


def feature_shift(
    clients: protocol.ClientData,
    *,
    gain: float = 0.0,
    offset: float = 0.0,
    noise: float = 0.0,
    seed: int,
) -> protocol.ClientData:
    """Let every client see its inputs with a gain, an offset and a noise level of its own.

        x -> (1 + gain a_k) x + offset b_k + noise (k / K) e,   a_k, b_k, e ~ Normal(0, 1)

    with one a_k and b_k for each client k = 1..K and leaf of the inputs, and e for every entry. So
    client K has the whole noise and client 1 nearly none. Labels and sizes stay: make them uneven
    or not by the partition.

    Args:
        clients: Data of all clients; the inputs are floating, shape (clients, n_max, ...).
        gain: Standard deviation of the gains around 1.
        offset: Standard deviation of the offsets, in units of the inputs.
        noise: Standard deviation of the noise of the last client, in units of the inputs.
        seed: Seed of all draws.

    Returns:
        The same clients with shifted inputs, where the mask hides none; the rest stays as it is.

    Raises:
        ValueError: If a number is negative or not finite, the seed is not an integer from 0, the
            inputs are not floating, or the mask does not fit them.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import partition, protocol
        >>> ones = jnp.ones((2, 3), jnp.float32)
        >>> data = protocol.ClientData(ones, ones, jnp.ones((2, 3), bool))
        >>> partition.feature_shift(data, offset=1.0, seed=0).inputs.round(2)
        Array([[1.64, 1.64, 1.64],
               [1.1 , 1.1 , 1.1 ]], dtype=float32)

    Reference:
        Li et al. 2022, arXiv 2102.02079, noise-based feature imbalance; there, as recalled, it is
        the variance that grows with the number of the client, here the standard deviation. Gain and
        offset are an affine map per client, as of two scanners.
    """
    for name, value in {"gain": gain, "offset": offset, "noise": noise}.items():
        _checks.check_non_negative("feature_shift", name, value)
        if not np.isfinite(value):
            raise _checks.fail("feature_shift", f"{name} {value}", "a finite number")
    random = _assignment.generator("feature_shift", seed)
    count = clients_.num_clients(clients)

    def shift(leaf: Array) -> Array:
        _checks.check_floating("feature_shift", inputs=jnp.asarray(leaf))
        values = np.asarray(leaf)
        present = masking.spread(clients.mask, values.shape, function="feature_shift")
        column = (count, *[1] * (values.ndim - 1))
        gains, offsets = random.standard_normal((2, *column))
        level = noise * np.arange(1, count + 1).reshape(column) / count
        moved = (1 + gain * gains) * values + offset * offsets
        moved += level * random.standard_normal(values.shape)
        return jnp.asarray(np.where(present, moved.astype(values.dtype), values))

    return clients._replace(inputs=jax.tree.map(shift, clients.inputs))
