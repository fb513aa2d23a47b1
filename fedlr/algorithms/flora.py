"""FLoRA: the factors of all clients are stacked, their product merged, and all begins anew.

    [p_1 U_1 .. p_M U_M] [D_1; ..; D_M] = sum_k p_k U_k D_k,   W <- W + s sum_k p_k U_k D_k

The average of the products is exact, for clients of any ranks, and its rank is up to ``sum_k r_k``.
Fresh factors, U = 0 and one random D for all, are a seed. The server sends the stack: down go
``sum_k r_k (m + n)`` numbers for every round that a client has missed, or W where that is smaller,
and the full leaves. The memory of a server is that of a sum of dense products, not of a stack.

Reference: Wang et al. 2024, arXiv 2409.05976. There clients draw factors for themselves.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import lowrank
from fedlr.federated import (
    aggregators,
    compressors,
    local,
    products,
    protocol,
    rounds,
    traffic,
)
from fedlr.federated import clients as clients_

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
    """Build FLoRA.

    Clients may be `clients.RankedClients`: a client then trains and sends factors of rank r_k, from
    1 to r.

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
        a `lowrank.Adapted`, and `fedloru.merged_params` gives back a model. Bytes of missed rounds
        are those of cohorts like the present one. Metrics are `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize or a client's rank is not from 1 to r; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru, flora
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = flora.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.8 * infos.losses[0].mean())
        True
        >>> infos.uplink_bytes[1], infos.downlink_bytes[1]
        (Array([56, 56, 56], dtype=int32), Array([168, 168, 168], dtype=int32))
        >>> fedloru.merged_params(state).shape
        (8, 6)

    Reference:
        Wang et al. 2024, arXiv 2409.05976.
    """
    training = local.Training(optimizer, local_steps, batch_size)
    up = traffic.ranked().up

    def build_for(clients, cohort):
        is_ranked = isinstance(clients, clients_.RankedClients)
        if is_ranked:
            columns = jnp.sum(clients_.take(clients.ranks, cohort), dtype=jnp.int32)
        else:
            columns = rank * cohort.shape[0]

        def down(params, last_round, data):
            del data
            full = compressors.message_bytes(lowrank.trainable(params).rest)
            count = params.round - jnp.maximum(last_round, 0)
            return full + traffic.missed(params, count, sent=_column, copies=columns)

        return rounds.compose(
            traffic.dated(products.local_factors(loss, training)),
            compressor=products.factor_messages(),
            aggregator=aggregators.weighted_mean(),
            server=products.server(_merge),
            client_state=traffic.never,
            traffic=protocol.Traffic(up, down),
            chunk_size=chunk_size,
        )

    composed = rounds.for_cohorts(build_for)

    def init(params, clients, *, key):
        clients_.check_ranks("init", clients, rank)
        start = lowrank.adapt(params, rank, key=key, where=where)
        return composed.init(start, clients, key=key)

    return protocol.FederatedAlgorithm(init, composed.round)


def _column(update):
    return update.up[:, :1], update.down[:1]


def _merge(base, factors, matrices, *, key):
    return products.add(base, matrices), lowrank.redraw(factors, key=key)
