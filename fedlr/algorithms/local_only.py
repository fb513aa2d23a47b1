"""Every client alone: the baseline without communication.

    x_k+ = x_k + d_k,   d_k from the local update of client k

With `local.projected_gradient` this is unimodal projected gradient descent, FIRM without its
coupling.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fedlr import _checks
from fedlr.federated import clients as clients_
from fedlr.federated import execution, protocol

__all__ = ["build"]


def build(
    local_update: protocol.LocalUpdate,
    *,
    client_state: Callable[[PyTree], PyTree] | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build the baseline in which no client ever communicates.

    `init` takes the params of ONE client and gives them to all; the state's params have a leading
    client axis. Nothing is sent: all bytes are zero. Members of the cohort advance, the params of
    all other clients stay untouched.

    Args:
        local_update: What one client does, e.g. `local.projected_gradient`.
        client_state: `(params) -> state`, the local state every client starts with; None for none.
        chunk_size: Clients worked on at once, *static*; None takes
            `execution.default_chunk_size`.

    Returns:
        A federated algorithm. Its RoundInfo has the metrics of the local update, stacked over the
        cohort.

    Raises:
        ValueError: While tracing, if a param is not float32 or float64, the update does not have
            the structure, shapes and dtypes of the params, a client state changes its own, the
            metrics have no scalar `loss`, or a cohort does not fit the clients.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import local_only
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(
        ...     (), jnp.array([[1.0], [3.0]]), jnp.ones((2, 1), bool)
        ... )
        >>> algorithm = local_only.build(
        ...     local.projected_gradient(lambda image, _: image, step_size=1.0)
        ... )
        >>> state = algorithm.init(jnp.zeros(1), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=1, key=jax.random.key(1)
        ... )
        >>> state.params
        Array([[1.],
               [3.]], dtype=float32)
    """

    def init(params, clients, *, key):
        del key
        params = jax.tree.map(jnp.asarray, params)
        for leaf in jax.tree.leaves(params):
            _checks.check_floating("init", params=leaf)
        count = clients_.num_clients(clients)
        own = () if client_state is None else client_state(params)
        params, own = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), (params, own)
        )
        return protocol.FederatedState(params, own, (), jnp.zeros((), jnp.int32))

    def round(state, clients, cohort, *, key):
        clients_.check_cohort("round", cohort, clients_.num_clients(clients))

        def one_client(client, params, own, data):
            client_key = jax.random.fold_in(key, client)
            update, new, metrics = local_update(params, own, data, key=client_key)
            protocol.check_like("local_only", "update", update, params)
            protocol.check_like("local_only", "client state", new, own)
            return jax.tree.map(jnp.add, params, update), new, metrics

        rows = clients_.take((state.params, state.clients, clients), cohort)
        members = jnp.asarray(cohort, jnp.int32)
        params, own, metrics = execution.map_clients(
            one_client, members, *rows, chunk_size=chunk_size
        )
        nothing = jnp.zeros(members.shape, jnp.int32)
        info = protocol.RoundInfo(
            losses=protocol.losses("local_only", metrics, len(members)),
            weights=clients_.take(clients_.num_examples(clients), cohort),
            uplink_bytes=nothing,
            downlink_bytes=nothing,
            metrics=metrics,
        )
        params, own = clients_.put((state.params, state.clients), cohort, (params, own))
        return protocol.FederatedState(params, own, (), state.round + 1), info

    return protocol.FederatedAlgorithm(init, round)
