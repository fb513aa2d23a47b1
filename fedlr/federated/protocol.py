"""What a federated algorithm is: a pair of pure functions, and the parts one can be made of.

The clients are one pytree whose leaves have a leading client axis. Per-client functions (a local
update, a compressor) are written for one client, without that axis; the round maps them.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedlr import _checks, masking

__all__ = [
    "Aggregator",
    "ClientData",
    "Compressor",
    "FederatedAlgorithm",
    "FederatedState",
    "Fold",
    "Init",
    "LocalUpdate",
    "Round",
    "RoundInfo",
    "ServerUpdate",
    "Traffic",
    "check_like",
    "losses",
    "present",
]


class ClientData(NamedTuple):
    """Data of all clients, each leaf with a leading client axis.

    Attributes:
        inputs: Pytree of arrays (clients, ...): features, viewing angles, coordinates.
        targets: Array (clients, ...): labels, sinograms, measurements.
        mask: Bool, True = present. Its shape is a leading part of the shape of `targets`:
            (clients, samples) for ragged sample counts, (clients, views) for ragged view counts,
            or the full shape for single missing entries.
    """

    inputs: PyTree
    targets: Array
    mask: Bool[Array, "clients ..."]


class FederatedState(NamedTuple):
    """Everything a run carries from round to round; a plain pytree, so it can be saved.

    Attributes:
        params: What is being learned: one model, or one image for every client.
        clients: Per-client state with a leading client axis (control variates, error feedback).
        server: State of the server (optimizer moments, multipliers, step sizes).
        round: Number of rounds done, int32 scalar. Round keys are folded in from it.
    """

    params: PyTree
    clients: PyTree
    server: PyTree
    round: Int[Array, ""]


class RoundInfo(NamedTuple):
    """Record of one round, per cohort member in the order of the cohort.

    Losses and metrics are those of the state that *entered* the round.

    Attributes:
        losses: Loss of every cohort member, shape (cohort,).
        weights: Aggregation weights, shape (cohort,).
        uplink_bytes: Exact bytes each member sent, int32, shape (cohort,).
        downlink_bytes: Exact bytes each member received, int32, shape (cohort,).
        metrics: Pytree of further arrays, as the algorithm documents.
        evaluation: Result of the evaluation function of `rounds.with_evaluation`, or ().
    """

    losses: Float[Array, " cohort"]
    weights: Float[Array, " cohort"]
    uplink_bytes: Int[Array, " cohort"]
    downlink_bytes: Int[Array, " cohort"]
    metrics: PyTree = ()
    evaluation: PyTree = ()


class Init(Protocol):
    """Make the state a run starts from."""

    def __call__(
        self, params: PyTree, clients: PyTree, *, key: Key[Array, ""]
    ) -> FederatedState: ...


class Round(Protocol):
    """Do one round with the clients named by `cohort`, int (cohort,) of static length."""

    def __call__(
        self,
        state: FederatedState,
        clients: PyTree,
        cohort: Int[Array, " cohort"],
        *,
        key: Key[Array, ""],
    ) -> tuple[FederatedState, RoundInfo]: ...


class FederatedAlgorithm(NamedTuple):
    """A federated algorithm, a pair of pure functions.

    Attributes:
        init: `(params, clients, *, key) -> state`, see `Init`.
        round: `(state, clients, cohort, *, key) -> (state, info)`, see `Round`.
    """

    init: Init
    round: Round


class LocalUpdate(Protocol):
    """What ONE client does: `(params, client_state, data, *, key) -> (update, state, metrics)`.

    `update` is a difference, new minus received, in the structure of `params` unless the server
    expects another. `metrics` is a pytree of scalars with at least a field or key `loss`, the loss
    at the received `params`.
    """

    def __call__(
        self, params: PyTree, client_state: PyTree, data: PyTree, *, key: Key[Array, ""]
    ) -> tuple[PyTree, PyTree, Any]: ...


class Compressor(NamedTuple):
    """How ONE client encodes its update.

    Attributes:
        init: `(update) -> state`, per-client memory such as error feedback or effective ranks.
        compress: `(update, state, *, key) -> (message, state)`; the message is a pytree.
        decompress: `(message) -> update`.
    """

    init: Any
    compress: Any
    decompress: Any


class Fold(NamedTuple):
    """How a linear aggregator sums messages as they come, so that no stack is ever kept.

    Attributes:
        init: `(update) -> carry` of zeros.
        add: `(carry, messages, weights, *, decompress) -> carry` for a chunk with leading axis.
        finish: `(carry) -> update`.
    """

    init: Any
    add: Any
    finish: Any


class Aggregator(NamedTuple):
    """How the server joins the *messages* of a cohort (leading axis) into one update.

    Attributes:
        init: `(update) -> state`.
        aggregate: `(messages, weights, state, *, decompress) -> (update, state)`.
        fold: A `Fold` where the aggregate is a linear running sum, else None.
    """

    init: Any
    aggregate: Any
    fold: Fold | None = None


class ServerUpdate(NamedTuple):
    """How the server moves its params.

    Attributes:
        init: `(params) -> state`.
        apply: `(params, update, state, *, key) -> (params, state)`.
        expects: `(params) -> pytree` like the update that `apply` takes; None for the params.
        needs_messages: Whether a round in which no message arrives leaves params and server as they
            are, *static*. A server that adds noise must not tell that nobody was there.
    """

    init: Any
    apply: Any
    expects: Any = None
    needs_messages: bool = True


class Traffic(NamedTuple):
    """What ONE client sends and receives in a round, where that is not its message and the params.

    Attributes:
        up: `(message, params, client_state, data) -> bytes`, int32 scalar.
        down: `(params, client_state, data) -> bytes`, int32 scalar.
    """

    up: Any
    down: Any


def check_like(function: str, name: str, tree: PyTree, like: PyTree) -> None:
    """Refuse a pytree that differs from another in structure, shapes or dtypes.

    Args:
        function: Name of the caller, for the message.
        name: What the pytree is, for the message.
        tree: The pytree.
        like: What it must be like.

    Raises:
        ValueError: If it is not.
    """

    def describe(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    got, expected = describe(tree), describe(like)
    if got != expected:
        words = [
            f"{structure} of " + ", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves)
            for structure, leaves in (got, expected)
        ]
        raise _checks.fail(function, f"{name} {words[0]}", words[1])


def losses(function: str, metrics: Any, size: int) -> Float[Array, " cohort"]:
    """Return the loss of every cohort member from the stacked metrics of a local update.

    Args:
        function: Name of the caller, for the message.
        metrics: Metrics with a field or key `loss`.
        size: Number of cohort members.

    Returns:
        The losses, shape (size,).

    Raises:
        ValueError: If there is no scalar loss for every member.
    """
    loss = metrics.get("loss") if isinstance(metrics, dict) else getattr(metrics, "loss", None)
    if loss is None or jnp.shape(loss) != (size,):
        got = f"metrics of type {type(metrics).__name__}"
        raise _checks.fail(function, got, "metrics with a scalar `loss`")
    return loss


def present(function: str, clients: ClientData) -> Bool[Array, "clients ..."]:
    """Expand the mask of all clients to the shape of the targets.

    Args:
        function: Name of the caller, for the message.
        clients: Data of all clients; the shape of the mask is a leading part of that of `targets`.

    Returns:
        The mask, bool, of the shape of the targets.

    Raises:
        ValueError: If the mask is not bool or does not fit the targets.
    """
    return masking.spread(clients.mask, clients.targets.shape, function=function)
