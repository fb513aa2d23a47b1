"""What low-rank methods send: bytes of factors, and of what clients missed while absent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from fedlr import lowrank
from fedlr.federated import clients as clients_
from fedlr.federated import compressors, protocol

__all__ = ["accumulated", "dated", "factors", "first_columns", "missed", "never", "ranked"]


def _pair(update: lowrank.LowRank) -> PyTree:
    return update


def factors(
    sent: Callable[[lowrank.LowRank], PyTree] = _pair,
    *,
    catch_up: Callable[[lowrank.Adapted, Any], Int[Array, ""]] | None = None,
) -> protocol.Traffic:
    """Build the bytes of methods that send factors and full leaves both ways.

    Args:
        sent: ``(update) -> pytree``, which arrays of a pair travel; both by default.
        catch_up: ``(params, client_state) -> bytes`` that a client receives beyond these, e.g.
            `accumulated`; None for none.

    Returns:
        The traffic of an algorithm with `lowrank.Adapted` params and `lowrank.Trainable` messages.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import traffic
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> bytes_of = traffic.factors(lambda update: update.up)
        >>> int(bytes_of.down(model, (), ())), 4 * 8
        (32, 32)
    """

    def size(part):
        pairs = lowrank.map_updates(sent, part.factors)
        return compressors.message_bytes((pairs, part.rest))

    def up(message, params, client_state, data):
        del params, client_state, data
        return size(message)

    def down(params, client_state, data):
        del data
        received = size(lowrank.trainable(params))
        return received if catch_up is None else received + catch_up(params, client_state)

    return protocol.Traffic(up, down)


def first_columns(factors: PyTree, count: Int[Array, ""] | int) -> Int[Array, ""]:
    """Count the bytes of the first columns of U and rows of D of all factors.

    Args:
        factors: Low-rank updates.
        count: How many columns.

    Returns:
        The bytes, int32, shape ().

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import traffic
        >>> update = lowrank.LowRank(jnp.ones((8, 2)), jnp.ones((2, 6)))
        >>> int(traffic.first_columns(update, 1)), 4 * (8 + 6)
        (56, 56)
    """
    compressors.message_bytes(factors)
    columns = lowrank.map_updates(lambda update: lowrank.num_bytes(update) // update.rank, factors)
    return jnp.asarray(count, jnp.int32) * jnp.int32(sum(jax.tree.leaves(columns)))


def ranked() -> protocol.Traffic:
    """Build the bytes of clients that receive and send the columns they train, and full leaves.

    Returns:
        The traffic of an algorithm with `lowrank.Adapted` params and `clients.RankedClients`, or
        clients without ranks, who train all columns.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import clients, traffic
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 2, key=jax.random.key(0))
        >>> weak = clients.RankedClients((), jnp.int32(1))
        >>> int(traffic.ranked().down(model, (), weak)), 4 * (8 + 6)
        (56, 56)
    """

    def size(part, data):
        full = compressors.message_bytes(part.rest)
        if isinstance(data, clients_.RankedClients):
            return full + first_columns(part.factors, data.ranks)
        return full + compressors.message_bytes(part.factors)

    def up(message, params, client_state, data):
        del params, client_state
        return size(message, data)

    def down(params, client_state, data):
        del client_state
        return size(lowrank.trainable(params), data)

    return protocol.Traffic(up, down)


def dated(local_update: protocol.LocalUpdate) -> protocol.LocalUpdate:
    """Let every client remember the round in which it last received the model.

    Args:
        local_update: A local update for `lowrank.Adapted` params that keeps no client state.

    Returns:
        The same whose client state is that round, an int32 scalar; it starts as `never`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import traffic
        >>> def nothing(params, client_state, data, *, key):
        ...     return lowrank.trainable(params), client_state, {"loss": jnp.zeros(())}
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> later = model._replace(round=jnp.int32(7))
        >>> _, last, _ = traffic.dated(nothing)(later, traffic.never(model), (), key=None)
        >>> int(traffic.never(model)), int(last)
        (-1, 7)
    """

    def update(params, client_state, data, *, key):
        del client_state
        result, _, metrics = local_update(params, (), data, key=key)
        return result, params.round, metrics

    return update


def never(params: lowrank.Adapted) -> Int[Array, ""]:
    """Return the round of clients that have not yet received the model, -1.

    Args:
        params: A model with low-rank updates.
    """
    return jnp.full_like(params.round, -1)


def missed(
    params: lowrank.Adapted,
    rounds: Int[Array, ""],
    *,
    sent: Callable[[lowrank.LowRank], PyTree] = _pair,
    copies: Int[Array, ""] | int = 1,
) -> Int[Array, ""]:
    """Count the bytes by which a client catches up with W, to which others have added.

    Per leaf, W is sent instead where that is smaller. Everyone holds the W of the start.

    Args:
        params: The model and its updates.
        rounds: How often something was added since the client last received the model, int32.
        sent: ``(update) -> pytree``, which arrays of a pair were added each time.
        copies: How many of these were added each time.

    Returns:
        The bytes, int32, shape ().

    Raises:
        ValueError: If the model does not fit an int32 (2 GiB).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import traffic
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> [int(traffic.missed(model, jnp.int32(j))) for j in (0, 1, 3, 4)], 4 * 8 * 6
        ([0, 56, 168, 192], 192)
    """
    compressors.message_bytes(params.base)
    total = jnp.zeros((), jnp.int32)
    leaves, structure = jax.tree.flatten(params.base)
    for leaf, update in zip(leaves, structure.flatten_up_to(params.factors), strict=True):
        if update is not None:
            whole = leaf.size * leaf.dtype.itemsize
            each = min(lowrank.num_bytes(sent(update)), whole)
            total = total + _times(rounds, _times(copies, each, whole), whole)
    return total


def accumulated(
    params: lowrank.Adapted,
    last_round: Int[Array, ""],
    every: int | None,
    *,
    sent: Callable[[lowrank.LowRank], PyTree] = _pair,
) -> Int[Array, ""]:
    """Count the bytes of the pairs that were merged since a client last received the model.

    In the round after an accumulation the merged pair takes the place of the present one, which is
    a seed then.

    Args:
        params: The model and its updates.
        last_round: Round in which the client last received it, -1 for never.
        every: Rounds between two accumulations, *static*; None for none.
        sent: ``(update) -> pytree``, which arrays of a pair travel.

    Returns:
        The bytes, int32, shape (). They are to be added to those of the present pair.

    Raises:
        ValueError: As `missed`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import traffic
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> later = model._replace(round=jnp.int32(5))
        >>> int(traffic.accumulated(later, jnp.int32(1), 2)), 2 * 4 * (8 + 6)
        (112, 112)
    """
    if every is None:
        return jnp.zeros((), jnp.int32)
    count = params.round // every - jnp.maximum(last_round, 0) // every
    is_after = (params.round % every == 0) & (params.round > 0)
    present = lowrank.num_bytes(lowrank.map_updates(sent, params.factors))
    total = missed(params, count, sent=sent)
    return total - jnp.where(is_after & (count > 0), jnp.int32(present), 0)


def _times(count: Array | int, size: Array | int, limit: int) -> Array:
    """Multiply, up to a limit; no product leaves int32."""
    count, size = jnp.asarray(count, jnp.int32), jnp.asarray(size, jnp.int32)
    beyond = count > np.int32(limit) // jnp.maximum(size, 1)
    return jnp.where(beyond, np.int32(limit), count * size)
