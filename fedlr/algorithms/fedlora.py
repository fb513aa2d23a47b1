"""FedLoRA: federated averaging of the factors of a low-rank update; W stays as it was.

    clients:  train (U, D) of every chosen matrix W, and the full leaves, on f(W + s U D)
    server:   U <- sum_k p_k U_k,   D <- sum_k p_k D_k

The product of the averages is not the average of the products; what is lost is

    sum_k p_k U_k D_k - Ubar Dbar = sum_k p_k (U_k - Ubar) (D_k - Dbar),

second order in the drift of the clients. The rank of all updates together is at most r. It is
FedLoRU without accumulation.

Reference: Zhang et al. 2023, arXiv 2305.05644 (FedIT); Hu et al. 2022, arXiv 2106.09685 for LoRA.
"""

import functools
from collections.abc import Callable

import optax
from jaxtyping import Array, Float, PyTree

from fedlr import lowrank
from fedlr.federated import (
    aggregators,
    compressors,
    local,
    protocol,
    rounds,
    servers,
    traffic,
)

__all__ = ["build"]


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    rank: int,
    local_steps: int,
    batch_size: int | None = None,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FedLoRA.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r, *static*.
        local_steps: Local steps per round, *static*.
        batch_size: Examples per step, *static*; None takes all.
        where: ``(path, leaf) -> bool``, which leaves to factorize, see `lowrank.init`.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model; the params of its state are
        a `lowrank.Adapted`, and `fedloru.merged_params` gives back a model. Metrics are
        `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru, fedlora
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = fedlora.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> fedloru.merged_params(state).shape, infos.uplink_bytes[0]
        ((8, 6), Array([56, 56, 56], dtype=int32))

    Reference:
        Zhang et al. 2023, arXiv 2305.05644.
    """
    composed = rounds.compose(
        local.local_low_rank(loss, local.Training(optimizer, local_steps, batch_size)),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.accumulate_low_rank(None),
        traffic=traffic.factors(),
        chunk_size=chunk_size,
    )
    return rounds.prepared(composed, functools.partial(lowrank.adapt, rank=rank, where=where))
