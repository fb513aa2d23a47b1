"""Put the parts of a round together."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import availability, compressors, execution, protocol
from fedlr.federated import clients as clients_

__all__ = ["ClientMemory", "ServerMemory", "compose", "with_evaluation"]


class ClientMemory(NamedTuple):
    """What the clients of a composed algorithm keep: `FederatedState.clients`.

    Attributes:
        local: State of the local update, leaves (clients, ...).
        compressor: State of the compressor, leaves (clients, ...).
    """

    local: PyTree
    compressor: PyTree


class ServerMemory(NamedTuple):
    """What the server of a composed algorithm keeps: `FederatedState.server`.

    Attributes:
        aggregator: State of the aggregator.
        server: State of the server update.
    """

    aggregator: PyTree
    server: PyTree


def compose(
    local_update: protocol.LocalUpdate,
    *,
    compressor: protocol.Compressor,
    aggregator: protocol.Aggregator,
    server: protocol.ServerUpdate,
    client_state: Callable[[PyTree], PyTree] | None = None,
    client_weights: Callable[[PyTree], Float[Array, " clients"]] = clients_.num_examples,
    arrivals: availability.Arrivals | None = None,
    traffic: protocol.Traffic | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build a consensus algorithm from the parts of a round.

        params --> local_update --> compress --> messages ==> aggregate --> server --> params

    One round: every cohort member receives the params, computes its update and sends a message; the
    aggregator joins the messages; the server moves the params. State of clients outside the cohort
    stays untouched, and so does that of members whose message does not arrive. Where the server
    `needs_messages`, a cohort of total weight zero changes neither the params nor the server. The
    key of a member is folded in from its client index, never from its place in the cohort, so the
    result depends neither on the order of the cohort nor on the chunk size, up to the order of
    summation. Where the aggregator folds into a running sum, no stack of messages is kept and
    temporary memory does not grow with the cohort.

    Args:
        local_update: What one client does, `protocol.LocalUpdate`.
        compressor: How one client encodes its update.
        aggregator: How the server joins the messages.
        server: How the server moves the params.
        client_state: `(params) -> state`, the local state every client starts with (control
            variates, personal parameters); None for none.
        client_weights: `(clients) -> weights`, aggregation weights of all clients, shape
            (clients,). Default: the number of present examples.
        arrivals: `(cohort, clients, *, key) -> bool (cohort,)`, whose messages arrive, see
            `availability`; None for all. A member whose message does not arrive has received the
            params, but counts neither in the aggregate nor in the bytes sent.
        traffic: Bytes of one client, see `protocol.Traffic`; None for those of the message up and
            of the params down.
        chunk_size: Clients worked on at once, *static*; None takes
            `execution.default_chunk_size`.

    Returns:
        A `protocol.FederatedAlgorithm`. Its `init` takes the params of one model; its RoundInfo has
        the metrics of the local update, stacked over the cohort, and exact bytes. Weights are zero
        where no message arrived.

    Raises:
        ValueError: While tracing, if a floating param is not float32 or float64, the update does
            not have the structure, shapes and dtypes that the server expects, a client state or the
            server changes those of what it is given, the metrics have no scalar `loss`, or a cohort
            or state does not fit the clients.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.federated import aggregators, compressors, local, protocol, servers
        >>> data = protocol.ClientData(
        ...     inputs=jnp.ones((3, 4, 2)), targets=jnp.ones((3, 4)), mask=jnp.ones((3, 4), bool)
        ... )
        >>> algorithm = federated.compose(
        ...     local.local_sgd(lambda w, x, y: (x @ w - y) ** 2, optax.sgd(0.1), num_steps=1),
        ...     compressor=compressors.identity(),
        ...     aggregator=aggregators.weighted_mean(),
        ...     server=servers.from_optax(optax.sgd(1.0)),
        ... )
        >>> state = algorithm.init(jnp.zeros(2), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=5, key=jax.random.key(1)
        ... )
        >>> bool(infos.losses[-1].max() < infos.losses[0].min())
        True
    """
    if chunk_size is not None:
        _checks.check_count("compose", "chunk_size", chunk_size)

    def init(params, clients, *, key):
        params = jax.tree.map(jnp.asarray, params)
        for leaf in jax.tree.leaves(params):
            if not jnp.issubdtype(leaf.dtype, jnp.integer):
                _checks.check_floating("init", params=leaf)
        count = clients_.num_clients(clients)
        own = () if client_state is None else client_state(params)
        data = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], clients)
        shapes = jax.eval_shape(lambda *args: local_update(*args, key=key)[0], params, own, data)
        update = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        one = ClientMemory(own, compressor.init(update))
        return protocol.FederatedState(
            params=params,
            clients=jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), one
            ),
            server=ServerMemory(aggregator.init(update), server.init(params)),
            round=jnp.zeros((), jnp.int32),
        )

    def round(state, clients, cohort, *, key):
        count = clients_.num_clients(clients)
        clients_.check_cohort("round", cohort, count)
        if jax.tree.leaves(state.clients) and clients_.num_clients(state.clients) != count:
            got = f"state of {clients_.num_clients(state.clients)} clients"
            raise _checks.fail("round", got, f"state of {count} clients")
        (size,) = jnp.shape(cohort)
        chunk = execution.chunk_length(size, chunk_size)
        # With everyone in order no row is gathered, so on sharded clients none has to move.
        direct = clients_.is_everyone(cohort, count) and size % chunk == 0
        client_key, server_key, arrival_key = jax.random.split(key, 3)
        expected = state.params if server.expects is None else server.expects(state.params)

        def one_client(client, memory, here, data):
            if not direct:
                data = jax.tree.map(lambda leaf: jnp.asarray(leaf)[client], clients)
            keys = jax.random.split(jax.random.fold_in(client_key, client))
            update, local_state, metrics = local_update(
                state.params, memory.local, data, key=keys[0]
            )
            message, compressor_state = compressor.compress(update, memory.compressor, key=keys[1])
            _check_update(jax.eval_shape(compressor.decompress, message), update, expected)
            new_memory = ClientMemory(local_state, compressor_state)
            protocol.check_like("compose", "client state", new_memory, memory)
            if traffic is None:
                up = compressors.message_bytes(message)
                down = compressors.message_bytes(state.params)
            else:
                up = traffic.up(message, state.params, memory.local, data)
                down = traffic.down(state.params, memory.local, data)
            if arrivals is not None:
                up = jnp.where(here, up, 0)
                new_memory = _choose(here, new_memory, memory)
            return message, (new_memory, metrics, up, down)

        weights = clients_.take(client_weights(clients), cohort)
        here = jnp.ones(size, bool)
        if arrivals is not None:
            here = arrivals(cohort, clients, key=arrival_key)
            _checks.check_mask("compose", here, (size,))
            weights = jnp.where(here, weights, 0)
        args = (
            jnp.asarray(cohort, jnp.int32),
            clients_.take(state.clients, cohort),
            here,
            clients if direct else (),
        )
        fold = aggregator.fold
        aggregator_state = state.server.aggregator
        if fold is None:
            messages, outputs = execution.map_clients(one_client, *args, chunk_size=chunk)
            update, aggregator_state = aggregator.aggregate(
                messages, weights, aggregator_state, decompress=compressor.decompress
            )
        else:
            carry, outputs = execution.fold_clients(
                one_client,
                functools.partial(fold.add, decompress=compressor.decompress),
                fold.init(expected),
                weights,
                *args,
                chunk_size=chunk,
            )
            update = fold.finish(carry)
        memory, metrics, uplink_bytes, downlink_bytes = outputs
        params, server_state = server.apply(
            state.params, update, state.server.server, key=server_key
        )
        protocol.check_like("compose", "params of the server", params, state.params)
        server_memory = ServerMemory(aggregator_state, server_state)
        if server.needs_messages:
            params, server_memory = _choose(
                jnp.sum(weights) > 0, (params, server_memory), (state.params, state.server)
            )
        info = protocol.RoundInfo(
            losses=protocol.losses("compose", metrics, size),
            weights=weights,
            uplink_bytes=uplink_bytes,
            downlink_bytes=downlink_bytes,
            metrics=metrics,
        )
        clients_memory = clients_.put(state.clients, cohort, memory)
        state = protocol.FederatedState(params, clients_memory, server_memory, state.round + 1)
        return state, info

    return protocol.FederatedAlgorithm(init, round)


def with_evaluation(
    algorithm: protocol.FederatedAlgorithm,
    evaluate: Callable[[protocol.FederatedState], PyTree],
) -> protocol.FederatedAlgorithm:
    """Add an evaluation of the state that enters a round to the record of every round.

    Args:
        algorithm: Any federated algorithm.
        evaluate: `(state) -> pytree of arrays`, e.g. an error against a known truth.

    Returns:
        The same algorithm, whose `RoundInfo.evaluation` is ``evaluate(state)``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import local_only
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData((), jnp.ones((2, 3)), jnp.ones((2, 3), bool))
        >>> algorithm = federated.with_evaluation(
        ...     local_only.build(local.projected_gradient(lambda w, _: w, step_size=0.5)),
        ...     lambda state: jnp.max(jnp.abs(state.params - 1.0)),
        ... )
        >>> state = algorithm.init(jnp.zeros(3), data, key=jax.random.key(0))
        >>> federated.run(algorithm, state, data, num_rounds=3, key=jax.random.key(1))[1].evaluation
        Array([1.  , 0.5 , 0.25], dtype=float32)
    """

    def round(state, clients, cohort, *, key):
        new_state, info = algorithm.round(state, clients, cohort, key=key)
        return new_state, info._replace(evaluation=evaluate(state))

    return protocol.FederatedAlgorithm(algorithm.init, round)


def _choose(condition, tree, other):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


def _check_update(decompressed, update, expected):
    """Refuse an update that the server does not expect, and say who made it."""
    same = jax.tree.structure(decompressed) == jax.tree.structure(update) and all(
        a.shape == jnp.shape(b) and a.dtype == jnp.result_type(b)
        for a, b in zip(jax.tree.leaves(decompressed), jax.tree.leaves(update), strict=True)
    )
    name = "update" if same else "decompressed update"
    protocol.check_like("compose", name, decompressed, expected)
