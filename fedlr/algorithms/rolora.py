"""RoLoRA: clients train U and D in turn, a round each, so that every average is exact.

    rounds 0, 2, ..:  D is frozen,  U <- sum_k p_k U_k,   U D = sum_k p_k U_k D
    rounds 1, 3, ..:  U is frozen,  D <- sum_k p_k D_k,   U D = sum_k p_k U D_k

Only the factor that is trained, and the full leaves, are sent up; down goes what has moved since a
client last took part. Both factors are learned, unlike in FFA-LoRA. U begins at 0, where D has no
gradient: so U comes first.

Reference: Chen et al. 2024, arXiv 2409.02346, and 2025, arXiv 2502.01755. The order of the two is
that of LoRA-A2, Koo et al. 2024, arXiv 2410.22815.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
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
    """Build RoLoRA.

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
        >>> from fedlr.algorithms import fedloru, rolora
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = rolora.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> infos.uplink_bytes[:3, 0], infos.downlink_bytes[:3, 0]
        (Array([32, 24, 32], dtype=int32), Array([24, 32, 24], dtype=int32))
        >>> fedloru.merged_params(state).shape
        (8, 6)

    Reference:
        Chen et al. 2024, arXiv 2409.02346.
    """
    training = local.Training(optimizer, local_steps, batch_size)
    composed = rounds.compose(
        traffic.dated(local.local_low_rank(loss, training, constrain=_hold_one)),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.accumulate_low_rank(None),
        client_state=traffic.never,
        traffic=_traffic(),
        chunk_size=chunk_size,
    )
    return rounds.prepared(composed, functools.partial(lowrank.adapt, rank=rank, where=where))


def _trains_up(round):
    return round % 2 == 0


def _hold_one(trained, start, round):
    """Keep D as it was received in one round and U in the next."""
    is_up = _trains_up(round)

    def of_update(new, old):
        up, down = jnp.where(is_up, new.up, old.up), jnp.where(is_up, old.down, new.down)
        return lowrank.LowRank(up, down, new.scale)

    return trained._replace(factors=lowrank.map_updates(of_update, trained.factors, start.factors))


def _traffic():
    up_only = traffic.factors(lambda update: update.up)
    down_only = traffic.factors(lambda update: update.down)
    both = traffic.factors()

    def up(message, params, last_round, data):
        args = (message, params, last_round, data)
        return jnp.where(_trains_up(params.round), up_only.up(*args), down_only.up(*args))

    def down(params, last_round, data):
        args = (params, last_round, data)
        # What the round before has moved.
        other = jnp.where(_trains_up(params.round), down_only.down(*args), up_only.down(*args))
        return jnp.where(params.round - last_round > 1, both.down(*args), other)

    return protocol.Traffic(up, down)
