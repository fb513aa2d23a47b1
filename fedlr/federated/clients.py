"""The client axis: stacking clients, choosing a cohort, gathering and scattering its rows.

Whatever belongs to the clients is one pytree whose leaves have a leading client axis. That axis is
the only one that is ever sharded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from fedlr import _checks
from fedlr.federated import protocol

__all__ = [
    "RankedClients",
    "check_cohort",
    "check_everyone",
    "check_ranks",
    "horvitz_thompson",
    "is_everyone",
    "num_clients",
    "num_examples",
    "put",
    "sample_cohort",
    "shard_clients",
    "stack_clients",
    "take",
]


class RankedClients(NamedTuple):
    """Clients of different means: their data, and the ranks of the factors that they can train.

    Attributes:
        data: Data of all clients.
        ranks: Ranks, int32, shape (clients,).
    """

    data: protocol.ClientData
    ranks: Int[Array, " clients"]


def stack_clients(clients: list[PyTree]) -> PyTree:
    """Stack the pytrees of single clients along a new leading client axis.

    Args:
        clients: One pytree per client, all with the same structure, shapes and dtypes. Ragged
            clients are padded first and carry a mask (`fedlr.masking.stack_ragged`).

    Returns:
        The same pytree, every leaf with a leading axis of length ``len(clients)``.

    Raises:
        ValueError: If the list is empty, or structures, shapes or dtypes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import clients
        >>> clients.stack_clients([jnp.zeros((2, 5)), jnp.ones((2, 5))]).shape
        (2, 2, 5)
    """
    if not clients:
        raise _checks.fail("stack_clients", "no client", "at least one")
    first = jax.tree.structure(clients[0])
    for client in clients[1:]:
        if jax.tree.structure(client) != first:
            got = f"structures {first} and {jax.tree.structure(client)}"
            raise _checks.fail("stack_clients", got, "one structure for all clients")

    def stack(*leaves):
        kinds = sorted({f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in leaves})
        if len(kinds) > 1:
            raise _checks.fail(
                "stack_clients", f"leaves {', '.join(kinds)}", "one shape and dtype (pad and mask)"
            )
        return jnp.stack(leaves)

    return jax.tree.map(stack, *clients)


def num_clients(clients: PyTree) -> int:
    """Return the length of the client axis.

    Args:
        clients: Pytree whose leaves have a leading client axis.

    Returns:
        The number of clients, a Python int.

    Raises:
        ValueError: If there is no leaf, a leaf is a scalar, or the leading axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import clients
        >>> clients.num_clients((jnp.zeros((3, 4)), jnp.zeros(3)))
        3
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(clients)]
    counts = {shape[0] for shape in shapes if shape}
    if len(counts) != 1 or () in shapes:
        raise _checks.fail(
            "num_clients", f"leaves of shapes {shapes}", "one leading client axis for all"
        )
    return counts.pop()


def num_examples(clients: PyTree) -> Float[Array, " clients"]:
    """Count the present examples of every client, the usual aggregation weights.

    Args:
        clients: A `protocol.ClientData`, alone or in `RankedClients`, or any other pytree with a
            leading client axis.

    Returns:
        The number of True entries of the mask of each client, shape (clients,), in the dtype of
        floating targets and in the default float dtype otherwise. Ones for any other pytree.

    Raises:
        ValueError: If the mask of a ClientData is not bool, or its shape is not a leading part of
            the shape of the targets.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import clients, protocol
        >>> mask = jnp.array([[True, True, False], [True, False, False]])
        >>> data = protocol.ClientData(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3)), mask)
        >>> clients.num_examples(data)
        Array([2., 1.], dtype=float32)
    """
    default = jnp.result_type(float)
    if isinstance(clients, RankedClients):
        clients = clients.data
    if not isinstance(clients, protocol.ClientData):
        return jnp.ones(num_clients(clients), default)
    mask = clients.mask
    _checks.check_mask("num_examples", mask, jnp.shape(clients.targets)[: jnp.ndim(mask)])
    dtype = jnp.result_type(clients.targets)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else default
    return jnp.sum(mask, axis=tuple(range(1, jnp.ndim(mask))), dtype=dtype)


def horvitz_thompson(
    inclusion: Float[Array, " clients"] | float,
) -> Callable[[PyTree], Float[Array, " clients"]]:
    """Build weights by which a sum over a drawn cohort estimates the mean over all clients.

        w_k = n_k / (pi_k sum_j n_j),   the sum over all clients

    With `aggregators.weighted_sum` the expected update is that of a round with everyone, whichever
    clients are drawn and lost, as long as pi_k is right and nobody has pi_k = 0.

    Args:
        inclusion: pi_k, the probability that the message of a client is among those of a round,
            in (0, 1], one number or one per client; traced. ``M / K`` for a cohort of M of K
            clients, times ``1 - p_k`` where `availability.dropout` loses them with p_k.

    Returns:
        `(clients) -> weights`, shape (clients,), for `rounds.compose`; n_k are `num_examples`. All
        zero if there is no example.

    Raises:
        ValueError: If a concrete number is outside (0, 1]; when called, if there is not one for
            every client.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import clients, protocol
        >>> mask = jnp.array([[True, True, False], [True, True, False]])
        >>> data = protocol.ClientData(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3)), mask)
        >>> clients.horvitz_thompson(0.5)(data)
        Array([1., 1.], dtype=float32)

    Reference:
        Horvitz and Thompson 1952, J. Am. Stat. Assoc. 47, 663.
    """
    if not isinstance(inclusion, core.Tracer):
        chances = np.asarray(inclusion)
        if not np.all((chances > 0) & (chances <= 1)):
            raise _checks.fail("horvitz_thompson", f"inclusion {inclusion}", "numbers in (0, 1]")

    def weights(clients):
        counts = num_examples(clients)
        chance = jnp.asarray(inclusion, counts.dtype)
        if chance.shape not in ((), counts.shape):
            got = f"inclusion of shape {chance.shape}"
            raise _checks.fail("horvitz_thompson", got, f"() or {counts.shape}")
        total = jnp.sum(counts)
        return counts / (chance * jnp.where(total > 0, total, 1))

    return weights


def check_cohort(function: str, cohort: Int[Array, " cohort"], count: int) -> None:
    """Refuse a cohort that does not name distinct clients among `count`.

    A traced cohort shows only its shape and dtype. Its indices are not checked: negative ones count
    from the end, of all others outside the range `take` gets the last row and `put` drops them.

    Args:
        function: Name of the caller, for the message.
        cohort: Client indices, shape (cohort,), integers.
        count: Number of clients.

    Raises:
        ValueError: If the cohort is not a non-empty integer vector of at most `count` entries, or,
            where its values are known, if an index is out of range or occurs twice.
    """
    dtype, shape = jnp.result_type(cohort), jnp.shape(cohort)
    if not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 1:
        raise _checks.fail(function, f"cohort of shape {shape}, dtype {dtype}", "an int vector")
    if not 1 <= shape[0] <= count:
        raise _checks.fail(function, f"cohort of {shape[0]} clients", f"1 to {count} clients")
    if isinstance(cohort, core.Tracer):
        return
    indices = np.asarray(cohort)
    for index in indices:
        if not 0 <= index < count:
            expected = f"client indices from 0 to {count - 1}"
            raise _checks.fail(function, f"cohort with index {index}", expected)
    if len(np.unique(indices)) < len(indices):
        raise _checks.fail(function, f"cohort {indices.tolist()}", "every client at most once")


def check_everyone(function: str, cohort: Int[Array, " cohort"], clients: PyTree) -> None:
    """Refuse a cohort that leaves clients out, for algorithms that need all of them.

    Args:
        function: Name of the caller, for the message.
        cohort: Client indices in any order, shape (cohort,), integers.
        clients: Pytree whose leaves have a leading client axis.

    Raises:
        ValueError: As `check_cohort`, or if the cohort is shorter than the client axis.
    """
    count = num_clients(clients)
    check_cohort(function, cohort, count)
    if jnp.shape(cohort) != (count,):
        got = f"cohort of {jnp.shape(cohort)[0]} clients"
        raise _checks.fail(function, got, f"all {count} clients")


def check_ranks(function: str, clients: PyTree, largest: int) -> None:
    """Refuse `RankedClients` with a rank that is no integer in ``1 .. largest``.

    Args:
        function: Name of the caller, for the message.
        clients: Clients; if they have no ranks there is nothing to check.
        largest: Largest rank.

    Raises:
        ValueError: If the ranks are no int32 vector with one entry for every client or, where their
            values are known, a rank is out of range.
    """
    if not isinstance(clients, RankedClients):
        return
    ranks = clients.ranks
    dtype, shape = jnp.result_type(ranks), jnp.shape(ranks)
    if dtype != jnp.int32 or shape != (num_clients(clients.data),):
        got = f"ranks of shape {shape}, dtype {dtype}"
        raise _checks.fail(function, got, f"int32 ({num_clients(clients.data)},)")
    if not isinstance(ranks, core.Tracer):
        for rank in np.asarray(ranks).tolist():
            _checks.check_rank(function, rank, largest)


def is_everyone(cohort: Int[Array, " cohort"], count: int) -> bool:
    """Tell whether a cohort is known while tracing to be ``0, 1, ..., count - 1``.

    Args:
        cohort: Client indices, shape (cohort,).
        count: Number of clients.

    Returns:
        True if so; False for any other and for a traced cohort.
    """
    if isinstance(cohort, core.Tracer) or jnp.shape(cohort) != (count,):
        return False
    return bool(np.array_equal(np.asarray(cohort), np.arange(count)))


def take(tree: PyTree, cohort: Int[Array, " cohort"]) -> PyTree:
    """Gather the rows of a cohort from everything that has a client axis.

    A cohort known to be all clients in order is returned as it is, without a copy; on sharded
    clients this keeps every row on its device.

    Args:
        tree: Pytree whose leaves have a leading client axis.
        cohort: Client indices, shape (cohort,). Traced indices too large get the last row.

    Returns:
        The same pytree with leading axis (cohort,).

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import clients
        >>> clients.take(jnp.array([10, 11, 12]), jnp.array([2, 0]))
        Array([12, 10], dtype=int32)
    """
    if not jax.tree.leaves(tree) or is_everyone(cohort, num_clients(tree)):
        return tree
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[cohort].get(mode="clip"), tree)


def put(tree: PyTree, cohort: Int[Array, " cohort"], values: PyTree) -> PyTree:
    """Scatter the rows of a cohort back; the rows of all other clients stay untouched.

    Args:
        tree: Pytree whose leaves have a leading client axis.
        cohort: Distinct client indices, shape (cohort,). Traced indices too large are dropped.
        values: Pytree of the same structure with leading axis (cohort,).

    Returns:
        The updated pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import clients
        >>> clients.put(jnp.zeros(3), jnp.array([2, 0]), jnp.array([5.0, 6.0]))
        Array([6., 0., 5.], dtype=float32)
    """
    if not jax.tree.leaves(tree) or is_everyone(cohort, num_clients(tree)):
        return values
    return jax.tree.map(
        lambda leaf, rows: jnp.asarray(leaf).at[cohort].set(rows, mode="drop"), tree, values
    )


def sample_cohort(count: int, cohort_size: int, *, key: Key[Array, ""]) -> Int[Array, " cohort"]:
    """Draw a cohort uniformly without replacement.

    Args:
        count: Number of clients, *static*.
        cohort_size: Number of clients to draw, *static*.
        key: Random key.

    Returns:
        Distinct client indices, int32, shape (cohort_size,).

    Raises:
        ValueError: If `cohort_size` is not an integer in ``1 .. count``.

    Example:
        >>> import jax
        >>> from fedlr.federated import clients
        >>> clients.sample_cohort(10, 3, key=jax.random.key(0)).shape
        (3,)
    """
    _checks.check_rank("sample_cohort", cohort_size, count, name="cohort_size")
    return jax.random.permutation(key, jnp.arange(count, dtype=jnp.int32))[:cohort_size]


def shard_clients(clients: PyTree, mesh: Mesh) -> PyTree:
    """Spread the leading client axis over the mesh axis "clients".

    The same round then runs on all devices of the mesh, with the same numbers up to the order of
    summation. The per-client part of a state (`FederatedState.clients`, and the params of
    algorithms with one model per client) can be spread in the same way. Every device works on its
    own clients if the round is mapped over chunks whose size is a multiple of the number of
    devices; within ``jax.set_mesh(mesh)`` that is the default, and sampled cohorts are spread too
    (`fedlr.federated.execution`).

    Args:
        clients: Pytree whose leaves have a leading client axis.
        mesh: Mesh with an axis called "clients" of type Auto, e.g.
            ``jax.make_mesh((4,), ("clients",), axis_types=(AxisType.Auto,))``.

    Returns:
        The same pytree with every leaf sharded along its leading axis.

    Raises:
        ValueError: If the mesh has no axis "clients" of type Auto, or its length does not divide
            the number of clients.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import AxisType
        >>> from fedlr.federated import clients
        >>> mesh = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Auto,))
        >>> clients.shard_clients(jnp.zeros((4, 3)), mesh).sharding.spec
        P('clients',)
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("clients") != AxisType.Auto:
        raise _checks.fail("shard_clients", f"mesh axes {kinds}", 'an axis "clients" of type Auto')
    count, devices = num_clients(clients), mesh.shape["clients"]
    if count % devices:
        expected = f"a multiple of the {devices} devices"
        raise _checks.fail("shard_clients", f"{count} clients", expected)
    return jax.device_put(clients, NamedSharding(mesh, PartitionSpec("clients")))
