"""Run rounds as a person does: with a progress bar, early stopping and interrupts."""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from jaxtyping import Array, Bool, Key, PyTree

from fedlr import _checks, masking
from fedlr.federated import protocol, stopping
from fedlr.federated.rounds import running

__all__ = ["simulate"]


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
    running.check_run("simulate", clients, num_rounds, cohort_size)
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
    one_round = jax.jit(functools.partial(running.one_round, algorithm, cohort_size=cohort_size))
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
