"""Run many rounds in one scan."""

from typing import cast

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Key, PyTree

from fedlr import _checks
from fedlr.federated import clients as clients_
from fedlr.federated import protocol

__all__ = ["check_run", "one_round", "run"]


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
    check_run("run", clients, num_rounds, cohort_size)

    def step(state, _):
        return one_round(algorithm, state, clients, key, cohort_size)

    return lax.scan(step, state, None, length=num_rounds)


def one_round(
    algorithm: protocol.FederatedAlgorithm,
    state: protocol.FederatedState,
    clients: PyTree,
    key: Key[Array, ""],
    cohort_size: int | None,
) -> tuple[protocol.FederatedState, protocol.RoundInfo]:
    """Draw the cohort of the round the state has reached, and do the round.

    Args:
        algorithm: Any federated algorithm.
        state: State to start from.
        clients: Data of all clients, leaves with a leading client axis.
        key: Key of the run; that of the round is folded in from ``state.round``.
        cohort_size: Clients drawn without replacement, *static*; None for all in order.

    Returns:
        The next state and the record of the round.
    """
    cohort_key, round_key = jax.random.split(jax.random.fold_in(key, state.round))
    count = clients_.num_clients(clients)
    if cohort_size is None:
        # A NumPy array, so that `is_everyone` sees its values while tracing.
        cohort = cast(Array, np.arange(count, dtype=np.int32))
    else:
        cohort = clients_.sample_cohort(count, cohort_size, key=cohort_key)
    return algorithm.round(state, clients, cohort, key=round_key)


def check_run(function: str, clients: PyTree, num_rounds: int, cohort_size: int | None) -> None:
    """Refuse a run that cannot be.

    Args:
        function: Name of the caller, for the message.
        clients: Data of all clients, leaves with a leading client axis.
        num_rounds: Number of rounds.
        cohort_size: Clients drawn per round, or None.

    Raises:
        ValueError: If `num_rounds` is not a positive integer, or the cohort is larger than the
            federation.
    """
    _checks.check_count(function, "num_rounds", num_rounds)
    count = clients_.num_clients(clients)
    if cohort_size is not None:
        _checks.check_rank(function, cohort_size, count, name="cohort_size")
