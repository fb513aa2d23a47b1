"""pFedLoRU: FedLoRU with a second low-rank update that every client keeps for itself.

    model of client k:  W + s U D + s U_k^p D_k^p
    client k:  1. train its own (U_k^p, D_k^p), U and D frozen
               2. train U, D and the full leaves, its own frozen, and send these only
    server:    averages U and D, and every tau rounds merges them, W <- W + s U D

What clients keep never travels; it survives accumulations and rounds of absence.

Reference: Park and Klabjan 2024, arXiv 2409.12371, which says that clients may have several
low-rank updates. The order of the two and their common number of steps are recalled, and the
published code does not have this variant.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int, PyTree

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
from fedlr.federated import clients as clients_

__all__ = ["Personal", "build", "personal_params"]


class Personal(NamedTuple):
    """What a client keeps.

    Attributes:
        factors: Its own low-rank updates, of the shapes of the shared ones.
        last_round: Round in which it last received the model, -1 for never, int32, shape ().
    """

    factors: PyTree
    last_round: Int[Array, ""]


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    rank: int,
    local_steps: int,
    accumulate_every: int | None,
    batch_size: int | None = None,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build pFedLoRU.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r of the shared updates and of a client's own, *static*.
        local_steps: Steps of a client in a round, for its own factors and then again for the
            shared ones, *static*.
        accumulate_every: tau, rounds between two accumulations, *static*; None never merges.
        batch_size: Examples per step, *static*; None takes all.
        where: ``(path, leaf) -> bool``, which leaves to factorize, see `lowrank.init`.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model; the params of its state are
        a `lowrank.Adapted`, of which `fedloru.merged_params` gives back the shared model, and
        `personal_params` that of a client. Losses are those of the clients' own models. Metrics are
        `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import pfedloru
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = pfedloru.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2),
        ...     optax.sgd(0.1),
        ...     rank=1,
        ...     local_steps=5,
        ...     accumulate_every=5,
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=10, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> pfedloru.personal_params(state, 2).shape, infos.uplink_bytes[0]
        ((8, 6), Array([56, 56, 56], dtype=int32))

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371.
    """
    training = local.Training(optimizer, local_steps, batch_size)
    composed = rounds.compose(
        _local_update(loss, training),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.accumulate_low_rank(accumulate_every),
        client_state=lambda params: Personal(params.factors, traffic.never(params)),
        traffic=traffic.factors(
            catch_up=lambda params, own: traffic.accumulated(
                params, own.last_round, accumulate_every
            )
        ),
        chunk_size=chunk_size,
    )

    def init(params, clients, *, key):
        shared_key, own_key = jax.random.split(key)
        start = lowrank.adapt(params, rank, key=shared_key, where=where)
        state = composed.init(start, clients, key=key)
        keys = jax.random.split(own_key, clients_.num_clients(clients))
        own = jax.vmap(lambda key: lowrank.redraw(start.factors, key=key))(keys)
        memory = state.clients._replace(local=state.clients.local._replace(factors=own))
        return state._replace(clients=memory)

    return protocol.FederatedAlgorithm(init, composed.round)


def personal_params(state: protocol.FederatedState, client: Int[Array, ""] | int) -> PyTree:
    """Return the model of one client, ``W + s U D + s U_k^p D_k^p`` and the full leaves.

    Args:
        state: State of the algorithm.
        client: Index of the client.

    Returns:
        The params of its model.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.algorithms import pfedloru
        >>> from fedlr.federated import protocol
        >>> mask = jnp.ones((3, 5), bool)
        >>> data = protocol.ClientData(jnp.ones((3, 5, 6)), jnp.ones((3, 5)), mask)
        >>> algorithm = pfedloru.build(
        ...     lambda w, x, y: jnp.mean(w @ x - y) ** 2,
        ...     optax.sgd(0.1),
        ...     rank=1,
        ...     local_steps=1,
        ...     accumulate_every=None,
        ... )
        >>> state = algorithm.init(jnp.ones((8, 6)), data, key=jax.random.key(0))
        >>> bool((pfedloru.personal_params(state, 1) == 1).all())
        True
    """
    own = jax.tree.map(lambda leaf: leaf[client], state.clients.local.factors)
    shared = lowrank.merge(state.params.base, state.params.factors)
    return lowrank.merge(shared, own)


def _local_update(loss, training):
    of_batch = local.mean_loss(loss)
    train_shared = local.local_low_rank(loss, training)

    def update(params, client_state, data, *, key):
        own_key, shared_key = jax.random.split(key)
        received = lowrank.merge(params.base, params.factors)

        def own_loss(own, inputs, targets, valid):
            return of_batch(lowrank.merge(received, own), inputs, targets, valid)

        own, metrics = local.train(own_loss, client_state.factors, data, training, key=own_key)
        mine = params._replace(base=lowrank.merge(params.base, own))
        difference, _, _ = train_shared(mine, (), data, key=shared_key)
        return difference, Personal(own, params.round), metrics

    return update
