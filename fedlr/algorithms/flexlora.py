"""FlexLoRA: the products are averaged and factorized anew; a client gets the rank it can take.

    P S Q^T = s sum_k p_k U_k D_k,   client k receives r_k columns of  U = P S / s,  D = Q^T

The average is exact, its truncation to rank r is what is lost. W stays as it was.

Reference: Bai et al. 2024, arXiv 2402.11505. The dense average is decomposed, (m, n). How S
is shared between the factors is a choice made here: a direction that nothing was learned in begins
like U = 0, and D has the size that it was drawn with.
"""

from collections.abc import Callable

import optax
from jaxtyping import Array, Float, PyTree

from fedlr import lowrank
from fedlr.federated import aggregators, local, products, protocol, rounds, traffic
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
    """Build FlexLoRA.

    Clients may be `clients.RankedClients`: a client then receives, trains and sends
    factors of rank r_k, from 1 to r.

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
            factorize or a client's rank is not from 1 to r; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru, flexlora
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = flexlora.build(
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
        Bai et al. 2024, arXiv 2402.11505.
    """
    composed = rounds.compose(
        products.local_factors(loss, local.Training(optimizer, local_steps, batch_size)),
        compressor=products.factor_messages(),
        aggregator=aggregators.weighted_mean(),
        server=products.server(_factorize),
        traffic=traffic.ranked(),
        chunk_size=chunk_size,
    )

    def init(params, clients, *, key):
        clients_.check_ranks("init", clients, rank)
        start = lowrank.adapt(params, rank, key=key, where=where)
        return composed.init(start, clients, key=key)

    return protocol.FederatedAlgorithm(init, composed.round)


def _factorize(base, factors, matrices, *, key):
    del key
    return base, products.truncate(matrices, factors, share=1.0)
