"""Rounds: put the parts of one together, and run many of them."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PyTree

from fedlr import _checks, masking
from fedlr.federated import clients as clients_
from fedlr.federated import compressors, execution, protocol, stopping

__all__ = ["ClientMemory", "ServerMemory", "compose", "run", "simulate", "with_evaluation"]


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
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build a consensus algorithm from the four parts of a round.

        params --> local_update --> compress --> messages ==> aggregate --> server --> params

    One round: every cohort member receives the params, computes its update and sends a message; the
    aggregator joins the messages; the server moves the params. State of clients outside the cohort
    stays untouched. A cohort of total weight zero changes neither the params nor the server. The
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
        chunk_size: Clients worked on at once, *static*; None takes
            `execution.default_chunk_size`.

    Returns:
        A `protocol.FederatedAlgorithm`. Its `init` takes the params of one model; its RoundInfo has
        the metrics of the local update, stacked over the cohort, and exact bytes: up those of the
        message, down those of the params.

    Raises:
        ValueError: While tracing, if a param is not float32 or float64, the update does not have
            the structure, shapes and dtypes of the params, a client state changes its own, the
            metrics have no scalar `loss`, or a cohort or state does not fit the clients.

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
        del key
        params = jax.tree.map(jnp.asarray, params)
        for leaf in jax.tree.leaves(params):
            _checks.check_floating("init", params=leaf)
        count = clients_.num_clients(clients)
        update = jax.tree.map(jnp.zeros_like, params)
        one = ClientMemory(
            () if client_state is None else client_state(params), compressor.init(update)
        )
        return protocol.FederatedState(
            params=params,
            clients=jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), one
            ),
            server=ServerMemory(aggregator.init(params), server.init(params)),
            round=jnp.zeros((), jnp.int32),
        )

    def round(state, clients, cohort, *, key):
        count = clients_.num_clients(clients)
        clients_.check_cohort("round", cohort, count)
        if jax.tree.leaves(state.clients) and clients_.num_clients(state.clients) != count:
            got = f"state of {clients_.num_clients(state.clients)} clients"
            raise _checks.fail("round", got, f"state of {count} clients")
        (size,) = jnp.shape(cohort)
        chunk = execution.default_chunk_size() if chunk_size is None else chunk_size
        # With everyone in order no row is gathered, so on sharded clients none has to move.
        direct = clients_.is_everyone(cohort, count) and size % min(chunk, size) == 0
        client_key, server_key = jax.random.split(key)

        def one_client(client, memory, data):
            if not direct:
                data = jax.tree.map(lambda leaf: jnp.asarray(leaf)[client], clients)
            keys = jax.random.split(jax.random.fold_in(client_key, client))
            update, local_state, metrics = local_update(
                state.params, memory.local, data, key=keys[0]
            )
            protocol.check_like("compose", "update", update, state.params)
            message, compressor_state = compressor.compress(update, memory.compressor, key=keys[1])
            new_memory = ClientMemory(local_state, compressor_state)
            protocol.check_like("compose", "client state", new_memory, memory)
            return message, (new_memory, metrics, compressors.message_bytes(message))

        def decompress(message):
            update = compressor.decompress(message)
            protocol.check_like("compose", "decompressed update", update, state.params)
            return update

        weights = clients_.take(client_weights(clients), cohort)
        args = (
            jnp.asarray(cohort, jnp.int32),
            clients_.take(state.clients, cohort),
            clients if direct else (),
        )
        fold = aggregator.fold
        aggregator_state = state.server.aggregator
        if fold is None:
            messages, outputs = execution.map_clients(one_client, *args, chunk_size=chunk)
            update, aggregator_state = aggregator.aggregate(
                messages, weights, aggregator_state, decompress=decompress
            )
        else:
            carry, outputs = execution.fold_clients(
                one_client,
                functools.partial(fold.add, decompress=decompress),
                fold.init(state.params),
                weights,
                *args,
                chunk_size=chunk,
            )
            update = fold.finish(carry)
        memory, metrics, uplink_bytes = outputs
        params, server_state = server.apply(
            state.params, update, state.server.server, key=server_key
        )
        arrived = jnp.sum(weights) > 0
        params, server_memory = _choose(
            arrived,
            (params, ServerMemory(aggregator_state, server_state)),
            (state.params, state.server),
        )
        info = protocol.RoundInfo(
            losses=protocol.losses("compose", metrics, size),
            weights=weights,
            uplink_bytes=uplink_bytes,
            downlink_bytes=jnp.full((size,), compressors.message_bytes(state.params)),
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


def run(
    algorithm: protocol.FederatedAlgorithm,
    state: protocol.FederatedState,
    clients: PyTree,
    *,
    num_rounds: int,
    cohort_size: int | None = None,
    key: Key[Array, ""],
) -> tuple[protocol.FederatedState, protocol.RoundInfo]:
    """Run rounds in one scan; pure, to be jitted, vmapped over keys, or differentiated.

    The key of a round is folded in from ``state.round``, so a run continued from a state equals
    the uninterrupted one.

    Args:
        algorithm: Any federated algorithm.
        state: State to start from.
        clients: Data of all clients, leaves with a leading client axis.
        num_rounds: Number of rounds to do, *static*.
        cohort_size: Clients drawn per round without replacement, *static*; None for all clients
            in order.
        key: Random key.

    Returns:
        The last state, and the records of all rounds, every leaf with a leading axis (num_rounds,).

    Raises:
        ValueError: If `num_rounds` is not a positive integer, or the cohort is larger than the
            federation.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import local_only
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData((), jnp.ones((2, 3)), jnp.ones((2, 3), bool))
        >>> update = local.projected_gradient(lambda image, _: image, step_size=0.5)
        >>> algorithm = local_only.build(update)
        >>> state = algorithm.init(jnp.zeros(3), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=4, key=jax.random.key(1)
        ... )
        >>> infos.losses.shape, int(state.round)
        ((4, 2), 4)
    """
    _check_run("run", clients, num_rounds, cohort_size)

    def step(state, _):
        return _one_round(algorithm, state, clients, key, cohort_size)

    return lax.scan(step, state, None, length=num_rounds)


def simulate(
    algorithm: protocol.FederatedAlgorithm,
    state: protocol.FederatedState,
    clients: PyTree,
    *,
    num_rounds: int,
    cohort_size: int | None = None,
    key: Key[Array, ""],
    stop: Callable[[protocol.RoundInfo], Bool[Array, ""]] | stopping.Rule | None = None,
    segment_rounds: int | None = None,
    progress: bool = True,
) -> tuple[protocol.FederatedState, protocol.RoundInfo]:
    """Run rounds with a progress bar and early stopping: the driver a person uses.

    Rounds are done in compiled segments. A second call with the same algorithm and shapes, e.g. to
    go on from the returned state, compiles nothing. The numbers are those of `run` for the same
    key.

    An interrupt (Ctrl-C) after the first segment loses nothing: a warning says how many rounds are
    done, and their state and records are returned.

    Args:
        algorithm: Any federated algorithm.
        state: State to start from.
        clients: Data of all clients, leaves with a leading client axis.
        num_rounds: Largest number of rounds to do.
        cohort_size: Clients drawn per round without replacement; None for all clients in order.
        key: Random key.
        stop: Function `stop(info)`, or a `stopping.Rule`. Once it is true for the record of a
            round, the run ends with the state that *entered* this round, which is the one the
            record measures, or with the one that the rule called best since. The memory of a rule
            starts afresh in every call.
        segment_rounds: Rounds per compiled segment, and so between two steps of the bar; None for
            at most 10.
        progress: Show a progress bar.

    Returns:
        The last state, and the records of the rounds done (the stopping one included) as NumPy
        arrays with a leading axis of rounds.

    Raises:
        ValueError: If `num_rounds` or `segment_rounds` is not a positive integer, the cohort is
            larger than the federation, or the params or the data hold NaN or Inf (of a
            `protocol.ClientData` only what its mask does not hide).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import local_only
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData((), jnp.ones((2, 3)), jnp.ones((2, 3), bool))
        >>> update = local.projected_gradient(lambda image, _: image, step_size=0.5)
        >>> algorithm = local_only.build(update)
        >>> state = algorithm.init(jnp.zeros(3), data, key=jax.random.key(0))
        >>> state, infos = federated.simulate(
        ...     algorithm,
        ...     state,
        ...     data,
        ...     num_rounds=50,
        ...     key=jax.random.key(1),
        ...     stop=lambda info: info.losses.max() < 0.1,
        ...     progress=False,
        ... )
        >>> infos.losses.max(axis=1).round(3)
        array([1.5  , 0.375, 0.094], dtype=float32)
        >>> state.params[0], int(state.round)
        (Array([0.75, 0.75, 0.75], dtype=float32), 2)
    """
    _check_run("simulate", clients, num_rounds, cohort_size)
    length = min(num_rounds, 10) if segment_rounds is None else segment_rounds
    _checks.check_count("simulate", "segment_rounds", length)
    _check_data(state, clients)
    # What a rule remembers, and the state to return if it fires.
    memory = () if stop is None else (stopping.as_rule(stop).init(), state)
    records, done, stopped = (), 0, False
    with tqdm.tqdm(total=num_rounds, unit="round", disable=not progress) as bar:
        try:
            while done < num_rounds and not stopped:
                limit = np.int32(min(length, num_rounds - done))
                segment = _segment(
                    algorithm,
                    state,
                    memory,
                    clients,
                    key,
                    limit,
                    cohort_size=cohort_size,
                    stop=stop,
                    length=length,
                )
                infos, count, stopped = jax.device_get(segment[2:])
                record = _first(infos, int(count))
                # One assignment, so that an interrupt finds a state and its own records.
                state, memory, records = segment[0], segment[1], (*records, record)
                done += int(count)
                bar.update(int(count))
                bar.set_postfix_str(f"loss {np.mean(record.losses[-1]):.4g}")
        except KeyboardInterrupt:
            if not records:
                raise
            done = sum(len(record.losses) for record in records)
            warnings.warn(f"simulate: interrupted after {done} rounds", stacklevel=2)
    return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *records)


def _first(infos: PyTree, count: int) -> PyTree:
    """Cut records to the rounds that were run."""
    return jax.tree.map(lambda leaf: leaf[:count], infos)


@functools.partial(jax.jit, static_argnames=("algorithm", "cohort_size", "stop", "length"))
def _segment(algorithm, state, memory, clients, key, limit, *, cohort_size, stop, length):
    """Do at most `limit` rounds, fewer if the rule fires; `length` is the room for records."""
    # Its own jit, so that finding out the shapes of the records costs no second trace.
    one_round = jax.jit(functools.partial(_one_round, algorithm, cohort_size=cohort_size))
    shapes = jax.eval_shape(one_round, state, clients, key)[1]
    infos = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
    rule = None if stop is None else stopping.as_rule(stop)

    def unfinished(carry):
        _, _, _, count, stopped = carry
        return (count < limit) & ~stopped

    def body(carry):
        state, memory, infos, count, stopped = carry
        new_state, info = one_round(state, clients, key)
        infos = jax.tree.map(lambda leaf, new: leaf.at[count].set(new), infos, info)
        if rule is not None:
            (stopped, best), own = rule.update(info, memory[0])
            kept = _choose(best, state, memory[1])
            new_state, memory = _choose(stopped, kept, new_state), (own, kept)
        return new_state, memory, infos, count + 1, stopped

    carry = (state, memory, infos, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    return lax.while_loop(unfinished, body, carry)


def _choose(condition, tree, other):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


def _one_round(algorithm, state, clients, key, cohort_size):
    """Draw the cohort of the round the state has reached and do it."""
    cohort_key, round_key = jax.random.split(jax.random.fold_in(key, state.round))
    count = clients_.num_clients(clients)
    if cohort_size is None:
        cohort = np.arange(count, dtype=np.int32)
    else:
        cohort = clients_.sample_cohort(count, cohort_size, key=cohort_key)
    return algorithm.round(state, clients, cohort, key=round_key)


def _check_run(function: str, clients: PyTree, num_rounds: int, cohort_size: int | None) -> None:
    _checks.check_count(function, "num_rounds", num_rounds)
    count = clients_.num_clients(clients)
    if cohort_size is not None:
        _checks.check_rank(function, cohort_size, count, name="cohort_size")


def _check_data(state: protocol.FederatedState, clients: PyTree) -> None:
    """Refuse NaN and Inf in params and data, of a ClientData only where the mask shows them."""
    mask = clients.mask if isinstance(clients, protocol.ClientData) else None
    for name, tree in (("params", state.params), ("clients", clients)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                continue
            bad = ~jnp.isfinite(leaf)
            if tree is clients and mask is not None and leaf.shape[: mask.ndim] == mask.shape:
                bad &= masking.spread(mask, leaf.shape, function="simulate")
            count = int(jnp.sum(bad))
            if count:
                got = f"{name}{jax.tree_util.keystr(path)} with {count} NaN or Inf entries"
                raise _checks.fail("simulate", got, "finite values where no mask hides them")
