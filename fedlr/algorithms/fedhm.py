"""FedHM: the server keeps whole matrices W, clients train what a low rank leaves of them.

    broadcast:  U = P sqrt(S_r),  D = sqrt(S_r) Q^T   of the truncated SVD  W ~ P S_r Q^T
    clients:    train U, D and the full leaves on f(U D)
    server:     W <- sum_k p_k U_k D_k,   of rank up to M r

Clients of rank r_k take the first r_k columns. In a state, the factors are what is broadcast, and
the base of a factorized leaf is what truncation left out of W, so that merging them gives W.

Reference: Yao et al. 2021, arXiv 2111.14655. Products are averaged as in the published code.
There a kernel (o, i, h, w) is the matrix (o h, i w); here it is (o, i h w) as in all of this
toolkit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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
    """Build FedHM.

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
        a `lowrank.Adapted`, and `fedloru.merged_params` gives back the server's model. Losses are
        those of the truncated one. Metrics are `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize or a client's rank is not from 1 to r; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru, fedhm
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = fedhm.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.eye(8, 6), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> fedloru.merged_params(state).shape, infos.uplink_bytes[0]
        ((8, 6), Array([56, 56, 56], dtype=int32))

    Reference:
        Yao et al. 2021, arXiv 2111.14655.
    """
    training = local.Training(optimizer, local_steps, batch_size)
    composed = rounds.compose(
        products.local_factors(loss, training, form=_only_factors),
        compressor=products.factor_messages(),
        aggregator=aggregators.weighted_mean(),
        server=products.server(_split),
        traffic=traffic.ranked(),
        chunk_size=chunk_size,
    )

    def init(params, clients, *, key):
        clients_.check_ranks("init", clients, rank)
        start = lowrank.adapt(params, rank, key=key, where=where)
        whole = products.of_leaves(start.base, start.factors)
        base, factors = _split(start.base, start.factors, whole, key=key)
        return composed.init(start._replace(base=base, factors=factors), clients, key=key)

    return protocol.FederatedAlgorithm(init, composed.round)


def _blank(base, factors):
    """Put zeros in the places of the factorized leaves."""
    zeros = jax.tree.map(jnp.zeros_like, base)
    return lowrank.replace_rest(zeros, lowrank.rest(base, factors))


def _only_factors(base, factors):
    return lowrank.merge(_blank(base, factors), factors)


def _split(base, factors, whole, *, key):
    """Truncate whole matrices; the base keeps what is left out."""
    del key
    factors = products.truncate(whole, factors)
    left_out = jax.tree.map(jnp.subtract, whole, lowrank.dense_delta(factors))
    return products.add(_blank(base, factors), left_out), factors
