"""FedEx-LoRA: factors are averaged, and what this loses is added to W in every round.

    U <- Ubar,   D <- Dbar,   W <- W + s R,   R = sum_k p_k (U_k - Ubar) (D_k - Dbar)

so that ``W + s U D`` is exactly the average of the clients' models. R has rank (M - 1) r at most
for M clients. Down go the factors, the full leaves, and for every round that a client has missed
the ``(M - 1) r (m + n)`` numbers of R, or W where that is smaller.

Reference: Singhal et al. 2024, arXiv 2410.09432. R is computed from the differences to the received
factors, not as ``mean(U_k D_k) - Ubar Dbar``, which cancels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import lowrank
from fedlr.federated import (
    aggregators,
    local,
    products,
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
    """Build FedEx-LoRA.

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
            factorize; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru, fedex_lora
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = fedex_lora.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> infos.uplink_bytes[1], infos.downlink_bytes[1]
        (Array([56, 56, 56], dtype=int32), Array([168, 168, 168], dtype=int32))
        >>> fedloru.merged_params(state).shape
        (8, 6)

    Reference:
        Singhal et al. 2024, arXiv 2410.09432.
    """
    training = local.Training(optimizer, local_steps, batch_size)

    def build_for(clients, cohort):
        del clients

        def catch_up(params, last_round):
            count = params.round - jnp.maximum(last_round, 0)
            return traffic.missed(params, count, copies=cohort.shape[0] - 1)

        return rounds.compose(
            traffic.dated(local.local_low_rank(loss, training)),
            compressor=protocol.Compressor(lambda _: (), _as_it_is, _with_products),
            aggregator=aggregators.weighted_mean(),
            server=_server(),
            client_state=traffic.never,
            traffic=traffic.factors(catch_up=catch_up),
            chunk_size=chunk_size,
        )

    return rounds.prepared(
        rounds.for_cohorts(build_for), functools.partial(lowrank.adapt, rank=rank, where=where)
    )


def _as_it_is(update, state, *, key):
    del key
    return update, state


def _with_products(difference):
    """Decode differences (dU, dD) as themselves and their products s dU dD."""
    return difference, lowrank.dense_delta(difference.factors)


def _server():
    average = servers.accumulate_low_rank(None)

    def apply(params, update, state, *, key):
        difference, matrices = update
        residual = jax.tree.map(jnp.subtract, matrices, lowrank.dense_delta(difference.factors))
        params, state = average.apply(params, difference, state, key=key)
        return params._replace(base=products.add(params.base, residual)), state

    def expects(params):
        return jax.eval_shape(_with_products, lowrank.trainable(params))

    return protocol.ServerUpdate(average.init, apply, expects)
