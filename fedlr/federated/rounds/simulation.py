"""Run rounds as a person does: with a progress bar, a log, early stopping, and kills in between."""

import functools
import hashlib
import importlib.metadata
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from jaxtyping import Array, Bool, Key, PyTree

from fedlr import _checks, masking
from fedlr.federated import checkpoints, protocol, stopping
from fedlr.federated import clients as clients_
from fedlr.federated.rounds import recording, running

__all__ = ["Evaluation", "simulate"]


class Evaluation(NamedTuple):
    """A look at the state in every so many rounds.

    Attributes:
        function: `(state) -> pytree of floating arrays`, e.g. the accuracy on test data. It is
            compiled on its own, outside the loop over rounds.
        every: It is called with the states that enter the rounds 0, every, 2 every, ...
    """

    function: Callable[[protocol.FederatedState], PyTree]
    every: int = 1


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
    evaluate: Evaluation | None = None,
    output: recording.Output | None = None,
    donate: bool = False,
) -> tuple[protocol.FederatedState, protocol.RoundInfo]:
    """Run rounds with progress bar, log, checkpoints and early stopping: the driver a person uses.

    Rounds are done in compiled segments. A second call with the same algorithm and shapes, e.g. to
    go on from the returned state, compiles nothing. The numbers are those of `run` for the same
    key.

    An interrupt (Ctrl-C) after the first segment loses nothing, unless the states are donated: a
    warning says how many rounds are done, and their state and records are returned.

    With `output`, a folder gets a log (``log.jsonl``, see `rounds.recording`) and checkpoints. The
    same call again, after an interrupt, a crash or a kill at any moment, goes on from the last good
    checkpoint. What it returns is bit by bit that of one uninterrupted run on this device, if the
    algorithm is deterministic there, and the log has every round once. A call for more rounds goes
    on after the last one. One process writes to a folder at a time.

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
            starts afresh in every call that does not go on from a checkpoint.
        segment_rounds: Rounds per compiled segment, and so between two steps of the bar; None for
            at most 10.
        progress: Show a progress bar.
        evaluate: Evaluation of the state in every so many rounds.
        output: Folder for the log and the checkpoints of this run.
        donate: Let every segment write its state over the one it started from, so that besides the
            start one state is in memory instead of two, which counts where clients keep a state
            each. The start stays as it is: the run begins with a copy. An interrupt within a
            segment is then raised, and only what `output` has saved is left.

    Returns:
        The last state, and the records of the rounds done (the stopping one included) as NumPy
        arrays with a leading axis of rounds. `evaluation` has the values of `evaluate`, and NaN in
        rounds without one: ``infos.evaluation[:: evaluate.every]`` if the run began at round 0.
        The last state enters no round: call the function for its value.

    Raises:
        ValueError: If `num_rounds` or `segment_rounds` is not a positive integer, the cohort is
            larger than the federation, the params or the data hold NaN or Inf (of a
            `protocol.ClientData` only what its mask does not hide), or the evaluation is not
            floating or the algorithm has one already. With `output`: if the checkpoint is of a run
            with another algorithm, rule, evaluation, start state, key, cohort size or data, or of
            more rounds, if all checkpoints are damaged (a later damaged one is skipped with a
            warning), or if the folder cannot be written.

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

        A run that is called again goes on from where it was:

        >>> import tempfile
        >>> from fedlr.federated import rounds
        >>> start = algorithm.init(jnp.zeros(3), data, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for num_rounds in (4, 6):
        ...         state, infos = federated.simulate(
        ...             algorithm,
        ...             start,
        ...             data,
        ...             num_rounds=num_rounds,
        ...             key=jax.random.key(1),
        ...             progress=False,
        ...             output=rounds.Output(folder, checkpoint_every=2),
        ...         )
        ...         print(int(state.round), infos.losses.shape)
        4 (4, 2)
        6 (6, 2)
    """
    running.check_run("simulate", clients, num_rounds, cohort_size)
    length = min(num_rounds, 10) if segment_rounds is None else segment_rounds
    _checks.check_count("simulate", "segment_rounds", length)
    _check_data(state, clients)
    # What a rule remembers, and the state to return if it fires.
    memory = () if stop is None else (stopping.as_rule(stop).init(), state)
    args = (algorithm, state, memory, clients, key)
    options = {"cohort_size": cohort_size, "stop": stop}
    reached = recording.Progress(state, memory, (), (), np.array(False))
    first, run = int(state.round), None
    if evaluate is not None or output is not None:
        like = _describe(args, options, length, evaluate)
        if output is not None:
            every = 1 if evaluate is None else evaluate.every
            about = _identify(args, options, like, evaluate)
            run = recording.Run(output, *about, like, first, every)
            run, reached = recording.begin(run, reached, num_rounds)
    begun = done = recording.num_done(reached)
    segment_of = _donating_segment if donate else _segment
    # A copy is neither the start, which is not ours to donate, nor the same array in state and
    # memory; in a mesh it lies where the states of later segments will: nothing compiles twice.
    if donate or jax.sharding.get_abstract_mesh().axis_names:
        state, memory = jax.tree.map(jnp.copy, (reached.state, reached.memory))
        reached = reached._replace(state=state, memory=memory)
    with tqdm.tqdm(total=num_rounds, initial=done, unit="round", disable=not progress) as bar:
        try:
            while done < num_rounds and not reached.stopped:
                limit = min(length, num_rounds - done)
                if output is not None:
                    limit = min(limit, output.checkpoint_every - done % output.checkpoint_every)
                values = ()
                if evaluate is not None:
                    limit = min(limit, evaluate.every - (first + done) % evaluate.every)
                    values = _look(evaluate, first + done, reached.state)
                start = time.perf_counter()
                segment = segment_of(
                    algorithm,
                    reached.state,
                    reached.memory,
                    clients,
                    key,
                    np.int32(limit),
                    length=length,
                    **options,
                )
                infos, count, stopped = jax.device_get(segment[2:])
                seconds = (time.perf_counter() - start) / count
                record = _first(infos, int(count))
                if evaluate is not None:
                    record = record._replace(evaluation=_spread(values, int(count)))
                # One assignment, so that an interrupt finds a state and its own records.
                reached = recording.Progress(
                    segment[0],
                    segment[1],
                    (*reached.infos, record),
                    (*reached.seconds, np.full(count, seconds)),
                    stopped,
                )
                done += int(count)
                bar.update(int(count))
                bar.set_postfix_str(f"loss {np.mean(record.losses[-1]):.4g}")
                if run is not None:
                    recording.log(run, reached)
                    over = reached.stopped or done == num_rounds
                    if over or done % run.output.checkpoint_every == 0:
                        recording.save(run, reached)
        except KeyboardInterrupt:
            done = recording.num_done(reached)
            if done == begun or _is_lost(reached.state):
                raise
            if run is not None:
                recording.rewrite_log(run, reached)
                recording.save(run, reached)
            warnings.warn(f"simulate: interrupted after {done} rounds", stacklevel=2)
    return reached.state, recording.stack(reached.infos)


def _first(infos: PyTree, count: int) -> PyTree:
    """Cut records to the rounds that were run."""
    return jax.tree.map(lambda leaf: leaf[:count], infos)


def _is_lost(tree: PyTree) -> bool:
    """Say whether an array was donated to a segment that did not return."""
    leaves = jax.tree.leaves(tree)
    return any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array))


def _do_segment(algorithm, state, memory, clients, key, limit, *, cohort_size, stop, length):
    """Do at most `limit` rounds, fewer if the rule fires; `length` is the room for records."""
    step = functools.partial(_step, algorithm, cohort_size=cohort_size, stop=stop)
    shapes = jax.eval_shape(step, state, memory, clients, key)[2]
    infos = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)

    def unfinished(carry):
        _, _, _, count, stopped = carry
        return (count < limit) & ~stopped

    def body(carry):
        state, memory, infos, count, _ = carry
        state, memory, info, stopped = step(state, memory, clients, key)
        infos = jax.tree.map(lambda leaf, new: leaf.at[count].set(new), infos, info)
        return state, memory, infos, count + 1, stopped

    carry = (state, memory, infos, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    return lax.while_loop(unfinished, body, carry)


_STATIC = ("algorithm", "cohort_size", "stop", "length")
_segment = jax.jit(_do_segment, static_argnames=_STATIC)
_donating_segment = jax.jit(
    _do_segment, static_argnames=_STATIC, donate_argnames=("state", "memory")
)


# Its own jit, so that neither the shapes of the records nor the fingerprint cost a second trace.
@functools.partial(jax.jit, static_argnames=("algorithm", "cohort_size", "stop"))
def _step(algorithm, state, memory, clients, key, *, cohort_size, stop):
    """Do a round and ask the rule."""
    new_state, info = running.one_round(algorithm, state, clients, key, cohort_size)
    stopped = jnp.zeros((), bool)
    if stop is not None:
        (stopped, best), own = stopping.as_rule(stop).update(info, memory[0])
        kept = _choose(best, state, memory[1])
        new_state, memory = _choose(stopped, kept, new_state), (own, kept)
    return new_state, memory, info, stopped


@functools.partial(jax.jit, static_argnames="function")
def _evaluate(function, state):
    return function(state)


def _look(evaluate: Evaluation, number: int, state: protocol.FederatedState) -> PyTree:
    """Evaluate the state that enters a round, or give NaN if the round is not one for that."""
    if number % evaluate.every == 0:
        return jax.device_get(_evaluate(evaluate.function, state))
    shapes = _evaluate.eval_shape(evaluate.function, state)
    return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)


def _spread(values: PyTree, count: int) -> PyTree:
    """Make rows of so many rounds, the first of which was evaluated."""

    def spread(value):
        rows = np.full((count, *np.shape(value)), np.nan, value.dtype)
        rows[0] = value
        return rows

    return jax.tree.map(spread, values)


def _describe(
    args: tuple, options: dict, length: int, evaluate: Evaluation | None
) -> tuple[PyTree, PyTree, protocol.RoundInfo]:
    """Describe state, memory and record of a round as they come out of a segment."""
    shapes = _segment.eval_shape(*args, np.int32(1), length=length, **options)
    info = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes[2])
    if evaluate is not None:
        _checks.check_count("simulate", "every", evaluate.every)
        if jax.tree.leaves(info.evaluation):
            raise _checks.fail("simulate", "evaluate and an algorithm with evaluation", "one")
        values = _evaluate.eval_shape(evaluate.function, shapes[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(values):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                got = f"evaluation{jax.tree_util.keystr(path)} of dtype {leaf.dtype}"
                raise _checks.fail("simulate", got, "floating, for NaN in the other rounds")
        info = info._replace(evaluation=values)

    def describe(shape, leaf):
        committed = isinstance(leaf, jax.Array) and leaf.committed
        return jax.ShapeDtypeStruct(
            shape.shape,
            shape.dtype,
            sharding=leaf.sharding if committed else None,
            weak_type=shape.weak_type,
        )

    state, memory = jax.tree.map(describe, shapes[:2], args[1:3])
    return state, memory, info


def _identify(
    args: tuple, options: dict, like: tuple, evaluate: Evaluation | None
) -> tuple[dict, dict]:
    """Return what has to be the same for a run to go on, and the first line of its log."""
    algorithm, state, _, clients, key = args
    # Shapes only, so that the text does not depend on where the arrays are.
    shapes = jax.eval_shape(lambda *arrays: arrays, clients, key)
    bare = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), like[:2]
    )
    program = _step.lower(algorithm, *bare, *shapes, **options).as_text()
    if evaluate is not None:
        program += _evaluate.lower(evaluate.function, bare[0]).as_text() + str(evaluate.every)
    environment = {
        "fedlr": importlib.metadata.version("fedlr"),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "mesh": dict(jax.sharding.get_abstract_mesh().shape),
    }
    count, size = clients_.num_clients(clients), options["cohort_size"]
    sizes = {"num_clients": count, "cohort_size": count if size is None else int(size)}
    identity = {
        "environment": environment,
        **sizes,
        "key": checkpoints.fingerprint(key),
        "clients": checkpoints.fingerprint(clients),
        "start": checkpoints.fingerprint(state),
        "program": hashlib.sha256(program.encode()).hexdigest(),
    }
    return identity, {**environment, **sizes}


def _choose(condition, tree, other):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


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
