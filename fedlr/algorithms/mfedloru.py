"""mFedLoRU: FedLoRU whose weak clients train low-rank updates of the factors themselves.

    weak client of rank r_k:  U^(k) = U + U_d U_u,   U_d (m, r_k), U_u (r_k, r)
                              D^(k) = D + D_d D_u,   D_d (r, r_k), D_u (r_k, n),   U and D frozen
    strong client:            trains U and D
    server:                   forms U^(k) and D^(k), and goes on as FedLoRU

A weak client trains and sends ``r_k (m + n + 2 r)`` numbers for a leaf instead of ``r (m + n)``.
For a leaf where this is no saving it is a strong one, as every client of rank r is. Nested factors
are drawn anew in every round, with U_d = 0 and D_d = 0.

Reference: Park and Klabjan 2024, arXiv 2409.12371, which says that low-rank updates may be
hierarchical. The form of the nested factors is recalled, and the published code does not have this
variant.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import _checks, _precision, lowrank
from fedlr.federated import aggregators, compressors, local, protocol, rounds, servers, traffic
from fedlr.federated import clients as clients_

__all__ = ["Nested", "build"]


class Nested(NamedTuple):
    """What is trained of one leaf. A client holds a part of it still.

    Attributes:
        update: (U, D), held by weak clients.
        up: (U_d, U_u), zero behind the first r_k columns, and for strong clients.
        down: (D_d, D_u), likewise.
    """

    update: lowrank.LowRank
    up: lowrank.LowRank
    down: lowrank.LowRank


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
    """Build mFedLoRU.

    Its clients are `clients.RankedClients` with ranks r_k from 1 to r.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r of strong clients, *static*.
        local_steps: Local steps per round, *static*.
        accumulate_every: tau, rounds between two accumulations, *static*; None never merges.
        batch_size: Examples per step, *static*; None takes all.
        where: ``(path, leaf) -> bool``, which leaves to factorize, see `lowrank.init`.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model; the params of its state are
        a `lowrank.Adapted`, and `fedloru.merged_params` gives back a model. Metrics are
        `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize, clients have no ranks, or a rank is not from 1 to r; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru, mfedloru
        >>> from fedlr.federated import clients, protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> data = clients.RankedClients(data, jnp.array([1, 1, 2]))
        >>> algorithm = mfedloru.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2),
        ...     optax.sgd(0.1),
        ...     rank=2,
        ...     local_steps=5,
        ...     accumulate_every=5,
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.7 * infos.losses[0].mean())
        True
        >>> fedloru.merged_params(state).shape, infos.uplink_bytes[0], 4 * 1 * (8 + 6 + 2 * 2)
        ((8, 6), Array([ 72,  72, 112], dtype=int32), 72)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371.
    """
    training = local.Training(optimizer, local_steps, batch_size)
    shared = traffic.factors(
        catch_up=lambda params, last: traffic.accumulated(params, last, accumulate_every)
    )

    def up(message, params, last_round, data):
        del last_round
        sizes = lowrank.map_updates(lambda update: _bytes(update, data.ranks), params.factors)
        full = compressors.message_bytes(message.rest)
        return full + sum(jax.tree.leaves(sizes), jnp.zeros((), jnp.int32))

    composed = rounds.compose(
        traffic.dated(_local_update(loss, training)),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.accumulate_low_rank(accumulate_every),
        client_state=traffic.never,
        traffic=protocol.Traffic(up, shared.down),
        chunk_size=chunk_size,
    )

    def init(params, clients, *, key):
        if not isinstance(clients, clients_.RankedClients):
            raise _checks.fail("init", f"clients of type {type(clients).__name__}", "RankedClients")
        clients_.check_ranks("init", clients, rank)
        start = lowrank.adapt(params, rank, key=key, where=where)
        return composed.init(start, clients, key=key)

    return protocol.FederatedAlgorithm(init, composed.round)


def _sizes(update, rank):
    """Count the numbers of nested factors, and of the factors themselves."""
    sides = update.up.shape[0] + update.down.shape[1]
    return rank * (sides + 2 * update.rank), update.rank * sides


def _is_weak(update, rank):
    nested, whole = _sizes(update, rank)
    return nested < whole


def _bytes(update, rank):
    return update.up.dtype.itemsize * jnp.minimum(*_sizes(update, rank))


def _local_update(loss, training):
    of_batch = local.mean_loss(loss)

    def update(params, client_state, data, *, key):
        data, rank = data
        train_key, draw_key = jax.random.split(key)
        received = lowrank.trainable(params)
        start = received._replace(factors=_nest(received.factors, key=draw_key))

        def reconstructed(trained):
            factors = lowrank.map_updates(
                lambda old, new: _reconstruct(old, new, rank),
                received.factors,
                trained.factors,
            )
            return lowrank.Trainable(factors, trained.rest)

        def batch_loss(trained, inputs, targets, valid):
            factors, rest = reconstructed(trained)
            model = lowrank.merge(lowrank.replace_rest(params.base, rest), factors)
            return of_batch(model, inputs, targets, valid)

        trained, metrics = local.train(batch_loss, start, data, training, key=train_key)
        difference = jax.tree.map(jnp.subtract, reconstructed(trained), received)
        return difference, client_state, metrics

    return update


def _nest(factors, *, key):
    """Draw nested factors of the largest rank that a weak client can have."""
    updates, structure = jax.tree.flatten(
        factors, is_leaf=lambda node: isinstance(node, lowrank.LowRank)
    )
    nested = []
    for place, update in enumerate(updates):
        inner = max(update.rank - 1, 1)
        keys = jax.random.split(jax.random.fold_in(key, place))
        pairs = [
            lowrank.LowRank(*lowrank.zero_up(leaf.shape, inner, key=own_key, dtype=leaf.dtype))
            for leaf, own_key in zip((update.up, update.down), keys, strict=True)
        ]
        nested.append(Nested(update, *pairs))
    return jax.tree.unflatten(structure, nested)


@_precision.highest
def _reconstruct(old, new, rank):
    """Form (U^(k), D^(k)); what a client does not train has no gradient."""
    is_weak = _is_weak(old, rank)
    up, down = lowrank.dense_delta(
        lowrank.first_columns((new.up, new.down), jnp.where(is_weak, rank, 0))
    )
    return lowrank.LowRank(
        jnp.where(is_weak, old.up, new.update.up) + up,
        jnp.where(is_weak, old.down, new.update.down) + down,
        old.scale,
    )
