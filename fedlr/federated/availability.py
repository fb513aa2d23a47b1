"""Whose messages arrive: dropout, stragglers and over-selection.

An arrival rule is ``(cohort, clients, *, key) -> bool (cohort,)``, a part of `rounds.compose`. A
member whose message does not arrive has weight 0, keeps its state, and has received the params but
sent nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedlr import _checks

__all__ = ["Arrivals", "deadline", "dropout", "first_arrivals", "round_times"]

# Whose messages arrive: `(cohort, clients, *, key) -> bool (cohort,)`.
Arrivals = Callable[..., Bool[Array, " cohort"]]


def dropout(probability: Float[Array, " clients"] | float) -> Arrivals:
    """Build independent dropout: every member is lost with its own probability.

    The mean over those who arrive is a ratio estimate: unbiased to first order if dropout does not
    depend on the data, and biased towards the dependable clients if it does.

    Args:
        probability: Probability of being lost, in [0, 1], one number or one per client; traced.

    Returns:
        An arrival rule. The draw of a client depends on its index, not on its place in the cohort.

    Raises:
        ValueError: If a concrete number is outside [0, 1].

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import availability
        >>> lost = availability.dropout(jnp.array([0.0, 1.0, 0.0]))
        >>> lost(jnp.array([1, 2]), (), key=jax.random.key(0))
        Array([False,  True], dtype=bool)
    """
    if isinstance(probability, (int, float)):
        _checks.check_fraction("dropout", "probability", probability)

    def arrivals(cohort, clients, *, key):
        del clients
        cohort = jnp.asarray(cohort, jnp.int32)
        chance = jnp.asarray(probability, jnp.result_type(float))
        own = chance if chance.ndim == 0 else chance[cohort]
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(cohort)
        return draws.astype(own.dtype) >= own

    return arrivals


def round_times(
    seconds_per_step: Float[Array, " clients"],
    *,
    num_steps: Int[Array, " clients"] | int,
    bytes_moved: Int[Array, " clients"] | int = 0,
    bytes_per_second: Float[Array, " clients"] | float = float("inf"),
    latency: Float[Array, " clients"] | float = 0.0,
) -> Float[Array, " clients"]:
    """Tell how long clients take for a round: ``T_k c_k + bytes / bandwidth_k + latency_k``.

    Args:
        seconds_per_step: c_k in seconds, shape (clients,).
        num_steps: Local steps T_k.
        bytes_moved: Bytes up and down.
        bytes_per_second: Bandwidth in bytes per second.
        latency: Latency in seconds.

    Returns:
        Seconds, shape (clients,). The time of a round is the largest among those waited for.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import availability
        >>> availability.round_times(jnp.array([1.0, 2.0]), num_steps=3, latency=0.5)
        Array([3.5, 6.5], dtype=float32)
    """
    dtype = jnp.result_type(seconds_per_step)
    steps, moved, speed, wait = (
        jnp.asarray(value, dtype) for value in (num_steps, bytes_moved, bytes_per_second, latency)
    )
    return steps * seconds_per_step + moved / speed + wait


def deadline(times: Float[Array, " clients"], limit: Float[Array, ""] | float) -> Arrivals:
    """Build a deadline: messages that take longer are not waited for.

    Args:
        times: Seconds of every client, shape (clients,), e.g. from `round_times`.
        limit: Seconds until the server goes on; traced.

    Returns:
        An arrival rule.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import availability
        >>> in_time = availability.deadline(jnp.array([1.0, 5.0, 2.0]), 3.0)
        >>> in_time(jnp.array([1, 2]), (), key=jax.random.key(0))
        Array([False,  True], dtype=bool)
    """

    def arrivals(cohort, clients, *, key):
        del clients, key
        return times[jnp.asarray(cohort, jnp.int32)] <= jnp.asarray(limit, times.dtype)

    return arrivals


def first_arrivals(times: Float[Array, " clients"], count: int) -> Arrivals:
    """Build over-selection: of a larger cohort the first `count` messages are taken.

    This favours fast clients; where speed and data go together, so does the model.

    Args:
        times: Seconds of every client, shape (clients,); ties go to the first in the cohort.
        count: Messages to wait for, *static*; all of a cohort that is smaller.

    Returns:
        An arrival rule.

    Raises:
        ValueError: If `count` is not a positive integer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import availability
        >>> fastest = availability.first_arrivals(jnp.array([4.0, 1.0, 2.0]), 2)
        >>> fastest(jnp.array([0, 1, 2]), (), key=jax.random.key(0))
        Array([False,  True,  True], dtype=bool)
    """
    _checks.check_count("first_arrivals", "count", count)

    def arrivals(cohort, clients, *, key):
        del clients, key
        order = jnp.argsort(times[jnp.asarray(cohort, jnp.int32)])
        return jnp.argsort(order) < count

    return arrivals
