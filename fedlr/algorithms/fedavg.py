"""Federated averaging: one model, moved by the weighted mean of the clients' updates.

    x+ = server(x, sum_k n_k d_k / sum_k n_k),   d_k = y_k - x from the local update of client k

With other local updates, compressors and server optimizers the same round is FedProx, FedAvgM,
FedAdam or FedAvg with compressed messages.

Reference: McMahan et al. 2017, arXiv 1602.05629, Algorithm 1; Reddi et al. 2021,
arXiv 2003.00295, Algorithm 1 for the server optimizers.
"""

import optax

from fedlr.federated import aggregators, compressors, protocol, rounds, servers

__all__ = ["build"]


def build(
    local_update: protocol.LocalUpdate,
    *,
    compressor: protocol.Compressor | None = None,
    server: protocol.ServerUpdate | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build federated averaging.

    `init` takes the params of one model. Weights are the numbers of present examples. Up go the
    bytes of the message, down those of the params.

    Args:
        local_update: What one client does, e.g. `local.local_sgd`.
        compressor: How a client encodes its update; None for `compressors.identity`.
        server: How the server moves the params; None for ``servers.from_optax(optax.sgd(1.0))``,
            which adds the mean update.
        chunk_size: Clients worked on at once, *static*; None takes
            `execution.default_chunk_size`.

    Returns:
        A federated algorithm, see `rounds.compose`.

    Raises:
        ValueError: As `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedavg
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(
        ...     inputs=jnp.ones((3, 4, 2)), targets=jnp.ones((3, 4)), mask=jnp.ones((3, 4), bool)
        ... )
        >>> algorithm = fedavg.build(
        ...     local.local_sgd(lambda w, x, y: (x @ w - y) ** 2 / 2, optax.sgd(0.25), num_steps=1)
        ... )
        >>> state = algorithm.init(jnp.zeros(2), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=3, key=jax.random.key(1)
        ... )
        >>> state.params, infos.uplink_bytes[0]
        (Array([0.4375, 0.4375], dtype=float32), Array([8, 8, 8], dtype=int32))
    """
    return rounds.compose(
        local_update,
        compressor=compressors.identity() if compressor is None else compressor,
        aggregator=aggregators.weighted_mean(),
        server=servers.from_optax(optax.sgd(1.0)) if server is None else server,
        chunk_size=chunk_size,
    )
