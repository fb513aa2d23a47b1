"""FFA-LoRA: the factor D is random and frozen, so that averaging U is exact.

    clients:  train U, from 0, and the full leaves, on f(W + s U D)
    server:   U <- sum_k p_k U_k,   so   U D = sum_k p_k U_k D

Only U and the full leaves travel, D is a seed: half the bytes of a square matrix. Noise on U enters
the product linearly, which suits differential privacy. All updates stay in the row space of one D,
unless factors are merged and D is drawn anew every tau rounds.

Reference: Sun et al. 2024, arXiv 2403.12313. Merging is not part of it.
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
    accumulate_every: int | None = None,
    batch_size: int | None = None,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FFA-LoRA.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r, *static*.
        local_steps: Local steps per round, *static*.
        accumulate_every: tau, rounds between two merges, *static*; None never merges.
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
        >>> from fedlr.algorithms import fedloru, ffa_lora
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = ffa_lora.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < infos.losses[0].mean())
        True
        >>> fedloru.merged_params(state).shape, infos.uplink_bytes[0]
        ((8, 6), Array([32, 32, 32], dtype=int32))

    Reference:
        Sun et al. 2024, arXiv 2403.12313.
    """
    training = local.Training(optimizer, local_steps, batch_size)
    composed = rounds.compose(
        traffic.dated(local.local_low_rank(loss, training, constrain=_hold_down)),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.accumulate_low_rank(accumulate_every),
        client_state=traffic.never,
        traffic=traffic.factors(
            _up,
            catch_up=lambda params, last: traffic.accumulated(
                params, last, accumulate_every, sent=_up
            ),
        ),
        chunk_size=chunk_size,
    )
    return rounds.prepared(composed, functools.partial(lowrank.adapt, rank=rank, where=where))


def _up(update):
    return update.up


def _hold_down(trained, start, round):
    """Keep D as it was received."""
    del round
    factors = lowrank.map_updates(
        lambda new, old: lowrank.LowRank(new.up, old.down, new.scale),
        trained.factors,
        start.factors,
    )
    return trained._replace(factors=factors)
