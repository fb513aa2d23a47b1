"""How large the ranks of the clients' messages are: fixed, drawn once, or grown with the data.

Ranks are traced numbers below a static maximum, so clients of different and of changing ranks share
one compiled program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, Int, Key

from fedlr import _checks, noise
from fedlr.federated import protocol

__all__ = ["GrowthMemory", "RankRule", "draw", "fixed", "grow"]


class RankRule(NamedTuple):
    """How the ranks of the clients develop, a pair of pure functions.

    Attributes:
        init: `(clients, max_ranks) -> (ranks, memory)` for all clients: ranks int32 (clients,
            modes), every leaf of the memory with a leading client axis.
        update: `(ranks, residual_norm, memory) -> (ranks, memory)` for ONE client, called in every
            round with the ``||A_i w_i - b_i||`` of the image that entered it.
    """

    init: Any
    update: Any


class GrowthMemory(NamedTuple):
    """What a client remembers between two decisions of `grow`.

    Attributes:
        threshold: Residual norm at the noise level, scalar.
        reference: Residual norm at the last decision, scalar.
        age: Rounds since then, int32 scalar.
    """

    threshold: Float[Array, ""]
    reference: Float[Array, ""]
    age: Int[Array, ""]


def draw(
    num_clients: int, low: int, high: int, *, num_modes: int = 2, key: Key[Array, ""]
) -> Int[Array, "clients modes"]:
    """Draw the rank of every client once, the same in all modes.

    Args:
        num_clients: Number of clients, *static*.
        low: Smallest rank, *static*.
        high: Largest rank, drawn too, *static*.
        num_modes: Number of modes, *static*.
        key: Random key.

    Returns:
        Uniform ranks from `low` to `high`, int32, shape (clients, modes).

    Raises:
        ValueError: If a count is not a positive integer or `high` is below `low`.

    Example:
        >>> import jax
        >>> from fedlr.federated import ranks
        >>> ranks.draw(3, 5, 5, key=jax.random.key(0)).tolist()
        [[5, 5], [5, 5], [5, 5]]

    Reference:
        arXiv 2502.02761: heterogeneous ranks from 20 to 100.
    """
    for name, count in (("num_clients", num_clients), ("low", low), ("num_modes", num_modes)):
        _checks.check_count("draw", name, count)
    _checks.check_count("draw", "high", high, low)
    drawn = jax.random.randint(key, (num_clients, 1), low, high + 1, jnp.int32)
    return jnp.broadcast_to(drawn, (num_clients, num_modes))


def fixed(
    function: str,
    client_ranks: Int[Array, "clients modes"] | None,
    max_ranks: tuple[int, ...],
    num_clients: int,
) -> Int[Array, "clients modes"]:
    """Check ranks that stay as they are through a run.

    Args:
        function: Name of the caller, for the message.
        client_ranks: Rank of every client in every mode, int; None for `max_ranks`.
        max_ranks: Largest rank of every mode, *static*.
        num_clients: Number of clients, *static*.

    Returns:
        The ranks, int32, shape (clients, modes).

    Raises:
        ValueError: If the shape or dtype is another, or a rank that is not traced is below 1 or
            above the largest.
    """
    shape = (num_clients, len(max_ranks))
    if client_ranks is None:
        return jnp.broadcast_to(jnp.asarray(max_ranks, jnp.int32), shape)
    client_ranks = jnp.asarray(client_ranks)
    _checks.check_shape(function, "client_ranks", client_ranks, shape)
    if not jnp.issubdtype(client_ranks.dtype, jnp.integer):
        raise _checks.fail(function, f"client_ranks of dtype {client_ranks.dtype}", "integers")
    if not isinstance(client_ranks, core.Tracer):
        concrete = np.asarray(client_ranks)
        if (concrete < 1).any() or (concrete > np.asarray(max_ranks)).any():
            raise _checks.fail(function, f"client_ranks {concrete.tolist()}", f"1 to {max_ranks}")
    return client_ranks.astype(jnp.int32)


def grow(
    noise_levels: Float[Array, " clients"] | None = None,
    *,
    start: int = 8,
    step: int = 4,
    every: int = 5,
    tolerance: float = 0.05,
    kappa: float = 1.0,
) -> RankRule:
    """Build the rule by which a rank grows while the noise level is out of reach.

        every so many rounds:  r_i <- r_i + step   if  ||A_i w_i - b_i|| > kappa sqrt(m_i) s_i
                               and it fell by less than `tolerance` of itself since last time

    With m_i the number of measurements. A residual above the noise that no longer falls says that
    the image does not fit into its rank; one at the noise level says that more rank would fit the
    noise. A fixed relative tolerance inside the loop is no rule: what one step adds is below it and
    is erased again, so the rank falls.

    Args:
        noise_levels: Standard deviation s_i of the noise, shape (clients,); None estimates it from
            the targets by `noise.difference_deviation`, which suits sinograms and other
            measurements that are smooth along their last axis, not sparse samples or spectra.
        start: First rank in every mode, *static*.
        step: Growth, *static*.
        every: Rounds between two decisions, *static*.
        tolerance: Relative fall of the residual that counts as progress, from 0 to 1, *static*.
        kappa: Safety factor of the level.

    Returns:
        A rule; ranks stop at the largest that the algorithm allows.

    Raises:
        ValueError: If a count is not a positive integer, `tolerance` is not from 0 to 1, or a noise
            level is negative or NaN; in `init`, if there is not one level for every client, `start`
            exceeds a mode's largest rank, or the data hold too few neighbours for an estimate.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import protocol, ranks
        >>> clients = protocol.ClientData((), jnp.zeros((2, 9)), jnp.ones((2, 9), bool))
        >>> rule = ranks.grow(jnp.ones(2), start=2, step=3, every=1)
        >>> sizes, memory = rule.init(clients, (8, 4))
        >>> one = memory._replace(threshold=memory.threshold[0], reference=4.0, age=0)
        >>> rule.update(sizes[0], jnp.float32(3.99), one)[0]
        Array([5, 5], dtype=int32)
    """
    for name, count in (("start", start), ("step", step), ("every", every)):
        _checks.check_count("grow", name, count)
    _checks.check_fraction("grow", "tolerance", tolerance)
    if noise_levels is not None:
        _checks.check_non_negative("grow", "noise_levels", noise_levels)

    def init(clients, max_ranks):
        for mode, largest in enumerate(max_ranks):
            _checks.check_rank("grow", start, largest, name=f"start of mode {mode}")
        count = clients.targets.shape[0]
        present = protocol.present("grow", clients)
        levels = noise_levels
        if levels is None:
            levels = jax.vmap(noise.difference_deviation)(clients.targets, present)
            _checks.check_non_negative("grow", "estimated noise levels", levels)
        _checks.check_shape("grow", "noise_levels", levels, (count,))
        numbers = jnp.sum(present, axis=range(1, present.ndim), dtype=clients.targets.dtype)
        threshold = kappa * jnp.sqrt(numbers) * jnp.asarray(levels, numbers.dtype)
        memory = GrowthMemory(
            threshold, jnp.full_like(threshold, jnp.inf), jnp.zeros((count,), jnp.int32)
        )
        return jnp.full((count, len(max_ranks)), start, jnp.int32), memory

    def update(ranks, residual_norm, memory):
        due = memory.age + 1 >= every
        # The first decision has nothing to compare with.
        started = jnp.isfinite(memory.reference)
        fallen = (1.0 - tolerance) * jnp.where(started, memory.reference, 0)
        stuck = started & (residual_norm > fallen)
        grown = due & stuck & (residual_norm > memory.threshold)
        ranks = jnp.where(grown, ranks + jnp.int32(step), ranks)
        reference = jnp.where(due, residual_norm, memory.reference)
        age = jnp.where(due, jnp.int32(0), memory.age + 1)
        return ranks, GrowthMemory(memory.threshold, reference, age)

    return RankRule(init, update)
