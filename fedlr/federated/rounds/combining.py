"""Make federated algorithms of federated algorithms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from fedlr.federated import clients as clients_
from fedlr.federated import protocol

__all__ = ["for_cohorts", "in_turn", "prepared", "scheduled"]


def prepared(
    algorithm: protocol.FederatedAlgorithm, prepare: Callable[..., PyTree]
) -> protocol.FederatedAlgorithm:
    """Let an algorithm start from what a function makes of the params.

    Args:
        algorithm: Any federated algorithm.
        prepare: ``(params, *, key) -> params`` for the algorithm's own `init`, e.g.
            `lowrank.adapt` with its options.

    Returns:
        The same algorithm with another `init`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import local_only
        >>> from fedlr.federated import local, protocol, rounds
        >>> data = protocol.ClientData((), jnp.ones((2, 3)), jnp.ones((2, 3), bool))
        >>> algorithm = rounds.prepared(
        ...     local_only.build(local.projected_gradient(lambda w, _: w, step_size=0.5)),
        ...     lambda params, *, key: params + 4.0,
        ... )
        >>> algorithm.init(jnp.zeros(3), data, key=jax.random.key(0)).params[0]
        Array([4., 4., 4.], dtype=float32)
    """

    def init(params, clients, *, key):
        params = prepare(jax.tree.map(jnp.asarray, params), key=key)
        return algorithm.init(params, clients, key=key)

    return protocol.FederatedAlgorithm(init, algorithm.round)


def for_cohorts(
    build: Callable[[PyTree, Int[Array, " cohort"]], protocol.FederatedAlgorithm],
) -> protocol.FederatedAlgorithm:
    """Let an algorithm know the cohort of the round, its size for one.

    Args:
        build: ``(clients, cohort) -> algorithm`` for the round of this cohort. All the algorithms
            must have states of one kind; the `init` of that for all clients is taken.

    Returns:
        A federated algorithm.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import local_only
        >>> from fedlr.federated import local, protocol, rounds
        >>> data = protocol.ClientData((), jnp.ones((2, 3)), jnp.ones((2, 3), bool))
        >>> algorithm = rounds.for_cohorts(
        ...     lambda clients, cohort: local_only.build(
        ...         local.projected_gradient(lambda w, _: w, step_size=1.0 / cohort.size)
        ...     )
        ... )
        >>> state = algorithm.init(jnp.zeros(3), data, key=jax.random.key(0))
        >>> state, _ = algorithm.round(state, data, jnp.arange(2), key=jax.random.key(1))
        >>> state.params[0]
        Array([0.5, 0.5, 0.5], dtype=float32)
    """

    def init(params, clients, *, key):
        everyone = jnp.arange(clients_.num_clients(clients), dtype=jnp.int32)
        return build(clients, everyone).init(params, clients, key=key)

    def round(state, clients, cohort, *, key):
        return build(clients, cohort).round(state, clients, cohort, key=key)

    return protocol.FederatedAlgorithm(init, round)


def in_turn(
    first: protocol.FederatedAlgorithm, second: protocol.FederatedAlgorithm
) -> protocol.FederatedAlgorithm:
    """Do the rounds of two algorithms one after the other as one round, with one cohort.

    Of methods whose round exchanges messages twice, each exchange is a round of its own.

    Args:
        first: Algorithm whose round comes first; its losses are recorded, since they are those of
            the state that enters the round.
        second: Algorithm that goes on from the params of the first; its weights are recorded.

    Returns:
        A federated algorithm. Params are common; states of clients and servers are pairs, and so
        are metrics; bytes are summed.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.algorithms import fedavg
        >>> from fedlr.federated import local, protocol, rounds
        >>> mask = jnp.ones((2, 1), bool)
        >>> data = protocol.ClientData(jnp.ones((2, 1)), jnp.ones((2, 1)), mask)
        >>> once = fedavg.build(
        ...     local.local_sgd(lambda w, x, y: (w - y) ** 2 / 2, optax.sgd(0.5), num_steps=1)
        ... )
        >>> twice = rounds.in_turn(once, once)
        >>> state = twice.init(jnp.float32(0.0), data, key=jax.random.key(0))
        >>> state, info = twice.round(state, data, jnp.arange(2), key=jax.random.key(1))
        >>> float(state.params), info.uplink_bytes
        (0.75, Array([8, 8], dtype=int32))
    """

    def init(params, clients, *, key):
        one = first.init(params, clients, key=key)
        two = second.init(params, clients, key=key)
        return one._replace(clients=(one.clients, two.clients), server=(one.server, two.server))

    def round(state, clients, cohort, *, key):
        params, done, infos, memories = state.params, state.round, [], []
        for place, algorithm in enumerate((first, second)):
            own = protocol.FederatedState(params, state.clients[place], state.server[place], done)
            own, info = algorithm.round(own, clients, cohort, key=jax.random.fold_in(key, place))
            params = own.params
            infos.append(info)
            memories.append(own)
        one, two = infos
        info = protocol.RoundInfo(
            losses=one.losses,
            weights=two.weights,
            uplink_bytes=one.uplink_bytes + two.uplink_bytes,
            downlink_bytes=one.downlink_bytes + two.downlink_bytes,
            metrics=(one.metrics, two.metrics),
        )
        pair: tuple[Any, ...] = tuple(memory.clients for memory in memories)
        servers = tuple(memory.server for memory in memories)
        return protocol.FederatedState(params, pair, servers, done + 1), info

    return protocol.FederatedAlgorithm(init, round)


def scheduled(
    build: Callable[[Any], protocol.FederatedAlgorithm],
    schedule: optax.Schedule,
) -> protocol.FederatedAlgorithm:
    """Let a number, a learning rate for instance, change from round to round.

    The optimizer of a client starts afresh in every round, so that a schedule of its own would
    start afresh too. One program serves all rounds: the number is traced.

    Args:
        build: ``(number) -> algorithm``; what the number touches must not be static.
        schedule: ``(round) -> number``, any optax schedule; the first round is 0.

    Returns:
        The algorithm whose round t is that of ``build(schedule(t))``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedavg
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.ones((2, 1), bool))
        >>> def build(rate):
        ...     train = local.local_sgd(lambda w, x, y: w, optax.sgd(rate), num_steps=1)
        ...     return fedavg.build(train)
        >>> algorithm = federated.scheduled(build, optax.linear_schedule(1.0, 0.0, 2))
        >>> state = algorithm.init(jnp.float32(0.0), data, key=jax.random.key(0))
        >>> federated.run(algorithm, state, data, num_rounds=4, key=jax.random.key(1))[0].params
        Array(-1.5, dtype=float32)
    """

    def at(count):
        # optax divides the int32 count by a float, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return build(schedule(count))

    def init(params, clients, *, key):
        return at(jnp.zeros((), jnp.int32)).init(params, clients, key=key)

    def round(state, clients, cohort, *, key):
        return at(state.round).round(state, clients, cohort, key=key)

    return protocol.FederatedAlgorithm(init, round)
