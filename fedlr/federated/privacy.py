"""Differential privacy of clients: a private round, and what a run of such rounds costs.

A round clips the update of every client to norm C and adds Gaussian noise to their sum:

    w+ = server(w, (sum_i clip(d_i) + N(0, (z C)^2 I)) / m),   clip(d) = d min(1, C / ||d||)

with the noise multiplier z and m clients expected in a round. All clients count once, and m is a
constant: weights by examples would raise what one client can change, and a denominator that counts
would tell who was there.

The guarantee is for the params of every round and all that is computed from them. `RoundInfo`
(exact losses) and `FederatedState.clients` have none: they stay with the server, and a rule that
stops on losses is not covered. The server is trusted, as it sees the updates. Whoever knows the key
of a run knows its noise, so the key is secret, and no two runs on the same clients share one. The
noise is drawn in floating point, by the generator of JAX.

Reference: McMahan et al. 2018, arXiv 1710.06963, Algorithm 1, with the estimator of fixed
denominator and all weights 1; Geyer et al. 2017, arXiv 1712.07557.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import clients as clients_
from fedlr.federated import protocol, servers

__all__ = [
    "Accountant",
    "Budget",
    "ClippedSum",
    "Mechanism",
    "check_rounds",
    "clip",
    "fixed_size_epsilon",
    "gaussian_epsilon",
    "gaussian_mechanism",
    "noise_multiplier",
    "poisson_epsilon",
    "rounds_left",
]

# What a run has cost: `(noise_multiplier, num_rounds, delta) -> epsilon`, on Python floats.
Accountant = Callable[[float, int, float], float]


class Budget(NamedTuple):
    """What the rounds of all runs on the same clients may cost together.

    Attributes:
        epsilon: Above 0.
        delta: Between 0 and 1, well below 1 / number of clients.
    """

    epsilon: float
    delta: float


class ClippedSum(NamedTuple):
    """What the aggregator of a `Mechanism` hands to its server, and no other server takes.

    Attributes:
        total: Sum of the clipped updates, without noise, a pytree like the update.
    """

    total: PyTree


class Mechanism(NamedTuple):
    """The parts of a private round, named as the arguments of `rounds.compose`.

    Attributes:
        aggregator: Clips the decoded updates and sums them.
        server: Adds the noise, divides, and moves the params.
        client_weights: `(clients) -> ones`, shape (clients,).
    """

    aggregator: protocol.Aggregator
    server: protocol.ServerUpdate
    client_weights: Callable[[PyTree], Float[Array, " clients"]]


def clip(update: PyTree, max_norm: float) -> PyTree:
    """Scale an update down to a norm of at most C, over all its arrays together.

        clip(d) = d min(1, C / ||d||)

    An update with a NaN or Inf becomes zero, so that no client can spoil the sum. An update within
    the norm stays as it is, bit by bit, and so does zero, with finite derivatives everywhere. No
    square overflows. A clipped norm exceeds C by rounding only, measured at one eps for float32
    with 10 to 5e7 entries.

    Args:
        update: Update of ONE client, arrays of float32 or float64.
        max_norm: The norm C, above 0.

    Returns:
        The clipped update, of the same structure, shapes and dtypes.

    Raises:
        ValueError: If an array is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import privacy
        >>> privacy.clip({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, 1.0)
        {'b': Array(0.8, dtype=float32), 'w': Array([0.6, 0. ], dtype=float32)}
        >>> privacy.clip(jnp.array([1e30, jnp.nan]), 1.0)
        Array([0., 0.], dtype=float32)
    """
    leaves = jax.tree.leaves(update)
    for leaf in leaves:
        _checks.check_floating("clip", update=leaf)
    dtype = np.result_type(*(jnp.result_type(leaf) for leaf in leaves))
    peaks = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in leaves]
    peak = jnp.max(jnp.stack(peaks))
    finite = jnp.isfinite(peak)
    # The result does not depend on this scale, so it has no derivative.
    usable = finite & (peak >= jnp.finfo(dtype).tiny)
    scale = jax.lax.stop_gradient(jnp.where(usable, peak, 1.0))
    # Zeros before any arithmetic: a NaN would come back through the derivatives.
    update = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), update)
    units = [leaf.astype(dtype) / scale for leaf in jax.tree.leaves(update)]
    square = jnp.sum(jnp.stack([jnp.sum(unit**2) for unit in units]))
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    inside = (length <= max_norm / scale) | (square == 0)
    shrink = max_norm / length

    def scaled(leaf):
        return jnp.where(inside, leaf, (leaf.astype(dtype) / scale * shrink).astype(leaf.dtype))

    return jax.tree.map(scaled, update)


def gaussian_mechanism(
    max_norm: float,
    noise_multiplier: float,
    *,
    clients_per_round: float,
    server: protocol.ServerUpdate | None = None,
) -> Mechanism:
    """Build the parts that make a composed algorithm private for every client.

        update = (sum_i clip(d_i) + N(0, (z C)^2 I)) / m

    It goes with any local update and any compressor, error feedback too: what is clipped is the
    update that the server decodes, whatever a client has sent, so one client changes the sum by at
    most C. The server has to take differences: `servers.of_values` does not fit, nor do algorithms
    that aggregate in other ways.

    Weights say only who is there. A member without examples is there and counts in m; its update is
    zero. A member whose message does not arrive adds nothing, and the scale stays the same. Who
    arrives must not depend on what the clients hold. If nobody arrives, `rounds.compose` leaves the
    params as they are, without noise, and so tells that nobody was there.

    The parts only work together: the server refuses another aggregator's update.

    Args:
        max_norm: C, above 0, *static*. Chosen without a look at the clients' updates, or by a
            private method.
        noise_multiplier: z, the standard deviation of the noise of the sum in units of C, from 0
            (clipping only, not private), *static*. From `noise_multiplier` for a given epsilon.
        clients_per_round: m, the expected number of clients in a round, *static*: the cohort size,
            or the sampling rate times the number of clients. A constant, also where some are lost.
        server: How the params move with the noisy mean update; None for
            ``servers.from_optax(optax.sgd(1.0))``, which adds it.

    Returns:
        The parts, to be handed to `rounds.compose` by name.

    Raises:
        ValueError: If a number is not finite or out of its range; while tracing, if an array of the
            update is not float32 or float64, or the update does not come from the aggregator here.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.federated import compressors, local, privacy, protocol
        >>> data = protocol.ClientData(
        ...     inputs=jnp.ones((3, 4, 2)), targets=jnp.ones((3, 4)), mask=jnp.ones((3, 4), bool)
        ... )
        >>> z = privacy.noise_multiplier(epsilon=2.0, delta=1e-3, num_rounds=5)
        >>> private = privacy.gaussian_mechanism(0.1, z, clients_per_round=3)
        >>> algorithm = federated.compose(
        ...     local.local_sgd(lambda w, x, y: (x @ w - y) ** 2, optax.sgd(0.1), num_steps=1),
        ...     compressor=compressors.identity(),
        ...     **private._asdict(),
        ... )
        >>> state = algorithm.init(jnp.zeros(2), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=5, key=jax.random.key(1)
        ... )
        >>> infos.weights[0]
        Array([1., 1., 1.], dtype=float32)

    Reference:
        McMahan et al. 2018, arXiv 1710.06963, Algorithm 1. There clients are drawn independently
        and weighted; here they are drawn as the run does, and count equally.
    """
    _check_positive("gaussian_mechanism", "max_norm", max_norm)
    _check_multiplier("gaussian_mechanism", noise_multiplier)
    _check_positive("gaussian_mechanism", "clients_per_round", clients_per_round)
    # Python floats, since NumPy's own would raise float32 to float64.
    radius, count = float(max_norm), float(clients_per_round)
    inner = servers.from_optax(optax.sgd(1.0)) if server is None else server
    noisy = _noisy_server(inner, float(noise_multiplier) * radius, count)
    return Mechanism(_clipped_sum(radius), noisy, _ones)


def gaussian_epsilon(noise_multiplier: float, num_rounds: int, delta: float) -> float:
    """Bound what rounds cost in which everyone may take part.

        RDP(a) = a T / (2 z^2)
        epsilon = min_{a > 1} RDP(a) + log((a - 1) / a) - (log delta + log a) / (a - 1)

    It holds if one client's update is replaced by zero (or a client is added or removed, where m
    stays the same), for cohorts of any kind that do not depend on the data. Every a gives a bound;
    the best of a fine grid is taken. The exact value, that of one Gaussian mechanism of multiplier
    z / sqrt(T), is lower by about a tenth.

    Args:
        noise_multiplier: z, from 0; zero gives infinity.
        num_rounds: T, of all runs on the same clients.
        delta: Between 0 and 1.

    Returns:
        epsilon, computed in float64.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from fedlr.federated import privacy
        >>> round(privacy.gaussian_epsilon(5.0, 50, 1e-3), 3)
        5.42

    Reference:
        Mironov 2017, arXiv 1702.07476, Proposition 1 (composition) and Corollary 3; Canonne et al.
        2020, arXiv 2004.00010, Proposition 12 for the conversion.
    """
    _check_release("gaussian_epsilon", noise_multiplier, num_rounds, delta)
    if noise_multiplier == 0:
        return math.inf
    slope = num_rounds / (2 * noise_multiplier**2)
    # About where the minimum is: there it is without the two logarithms of a.
    center = math.sqrt(-math.log(delta) / slope)
    excess = center * np.geomspace(1e-4, 1e4, 40_001)
    log_order = np.log1p(excess)
    bounds = (
        slope * (1 + excess) + np.log(excess) - log_order - (math.log(delta) + log_order) / excess
    )
    return max(0.0, float(np.min(bounds)))


def poisson_epsilon(
    noise_multiplier: float, num_rounds: int, delta: float, *, rate: float
) -> float:
    """Bound what rounds cost that every client joins with a probability of its own draw.

    Such rounds are those of all clients with ``arrivals=availability.dropout(1 - rate)`` and
    ``clients_per_round=rate * K``; who has joined stays secret. It holds if one client's update is
    replaced by zero. With z 1.1, 10,000 rounds and rate 0.01 it is 5.632 at delta 1e-5. The bound
    supposes noise in every round, while `rounds.compose` adds none if nobody joins. That costs at
    most ``num_rounds * (1 - rate)^(K - 1)`` more of delta.

    Args:
        noise_multiplier: z, from 0; zero gives infinity.
        num_rounds: T, of all runs on the same clients.
        delta: Between 0 and 1.
        rate: Probability of joining, in (0, 1], the same for all clients and rounds.

    Returns:
        epsilon, computed in float64.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: Without dp-accounting, which comes with ``fedlr[privacy]``.

    Example:
        >>> from fedlr.federated import privacy
        >>> everyone = privacy.poisson_epsilon(5.0, 50, 1e-3, rate=1.0)
        >>> everyone == privacy.gaussian_epsilon(5.0, 50, 1e-3)
        True

    Reference:
        Mironov et al. 2019, arXiv 1908.10530, as in the `RdpAccountant` of dp-accounting.
    """
    _check_release("poisson_epsilon", noise_multiplier, num_rounds, delta)
    if not 0 < rate <= 1:
        raise _checks.fail("poisson_epsilon", f"rate {rate}", "a probability above 0, up to 1")
    everyone = gaussian_epsilon(noise_multiplier, num_rounds, delta)
    if rate == 1 or noise_multiplier == 0:
        return everyone
    accounting = _accounting("poisson_epsilon")
    event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise_multiplier))
    # Zero in the place of an update costs the same, but not all releases have a name for it.
    relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return min(everyone, _composed(accounting, relation, event, num_rounds, delta))


def fixed_size_epsilon(
    noise_multiplier: float, num_rounds: int, delta: float, *, cohort_size: int, num_clients: int
) -> float:
    """Bound what rounds of cohorts cost that are drawn without replacement, as in `rounds.run`.

    Who is in a cohort stays secret. It holds if one client is replaced by any other, which changes
    the sum by up to 2 C, so this epsilon says more than those of `gaussian_epsilon` and
    `poisson_epsilon` and is larger for the same noise. Where sampling does not help, the value is
    that of everyone in every round.

    Args:
        noise_multiplier: z, in units of C as everywhere here, from 0; zero gives infinity.
        num_rounds: T, of all runs on the same clients.
        delta: Between 0 and 1.
        cohort_size: Clients drawn per round.
        num_clients: Clients drawn from.

    Returns:
        epsilon, computed in float64.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: Without dp-accounting, which comes with ``fedlr[privacy]``.

    Example:
        >>> from fedlr.federated import privacy
        >>> everyone = privacy.fixed_size_epsilon(5.0, 50, 1e-3, cohort_size=9, num_clients=9)
        >>> everyone == privacy.gaussian_epsilon(2.5, 50, 1e-3)
        True

    Reference:
        Wang et al. 2019, arXiv 1808.00087, Theorem 27, as in the `RdpAccountant` of dp-accounting.
    """
    _check_release("fixed_size_epsilon", noise_multiplier, num_rounds, delta)
    _checks.check_count("fixed_size_epsilon", "num_clients", num_clients)
    _checks.check_rank("fixed_size_epsilon", cohort_size, num_clients, name="cohort_size")
    # The accountant's multiplier is in units of what replacing a client changes, 2 C.
    halved = noise_multiplier / 2
    everyone = gaussian_epsilon(halved, num_rounds, delta)
    if cohort_size == num_clients or noise_multiplier == 0:
        return everyone
    accounting = _accounting("fixed_size_epsilon")
    event = accounting.SampledWithoutReplacementDpEvent(
        num_clients, cohort_size, accounting.GaussianDpEvent(halved)
    )
    relation = accounting.NeighboringRelation.REPLACE_ONE
    return min(everyone, _composed(accounting, relation, event, num_rounds, delta))


def noise_multiplier(
    *, epsilon: float, delta: float, num_rounds: int, accountant: Accountant = gaussian_epsilon
) -> float:
    """Find the smallest noise multiplier with which rounds stay within an epsilon.

    Args:
        epsilon: What all rounds may cost together, above 0.
        delta: Between 0 and 1, well below 1 / number of clients.
        num_rounds: Number of rounds, of all runs on the same clients.
        accountant: What a run costs; for drawn cohorts a `functools.partial` of `poisson_epsilon`
            or `fixed_size_epsilon`.

    Returns:
        z, within a relative 1e-6 of the smallest and not below it.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from fedlr.federated import privacy
        >>> z = privacy.noise_multiplier(epsilon=5.42, delta=1e-3, num_rounds=50)
        >>> round(z, 3), privacy.gaussian_epsilon(z, 50, 1e-3) <= 5.42
        (5.0, True)
    """
    _check_budget("noise_multiplier", Budget(epsilon, delta))
    _checks.check_count("noise_multiplier", "num_rounds", num_rounds)
    low = high = 1.0
    while accountant(high, num_rounds, delta) > epsilon:
        low, high = high, 2 * high
    while accountant(low, num_rounds, delta) <= epsilon:
        low, high = low / 2, low
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        if accountant(middle, num_rounds, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def rounds_left(
    budget: Budget,
    noise_multiplier: float,
    *,
    rounds_done: int = 0,
    accountant: Accountant = gaussian_epsilon,
) -> int:
    """Count the rounds that a budget still allows.

    Args:
        budget: What all rounds may cost together.
        noise_multiplier: z of all rounds, done and to come.
        rounds_done: Rounds done, by all runs on the same clients.
        accountant: What a run costs, as in `noise_multiplier`.

    Returns:
        The number, 0 if the budget is spent.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from fedlr.federated import privacy
        >>> privacy.rounds_left(privacy.Budget(5.43, 1e-3), 5.0, rounds_done=20)
        30
    """
    _check_budget("rounds_left", budget)
    _check_multiplier("rounds_left", noise_multiplier)
    _checks.check_count("rounds_left", "rounds_done", rounds_done, minimum=0)
    low, high = 0, 1
    # Rounds are numbered in int32.
    while high < 2**31 and accountant(noise_multiplier, high, budget.delta) <= budget.epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if accountant(noise_multiplier, middle, budget.delta) <= budget.epsilon:
            low = middle
        else:
            high = middle
    return max(low - rounds_done, 0)


def check_rounds(
    budget: Budget,
    noise_multiplier: float,
    num_rounds: int,
    *,
    rounds_done: int = 0,
    accountant: Accountant = gaussian_epsilon,
) -> None:
    """Refuse a run that costs more than the budget allows; to be called before it.

    Args:
        budget: What all rounds may cost together.
        noise_multiplier: z of all rounds, done and to come.
        num_rounds: Rounds to do.
        rounds_done: Rounds done, by all runs on the same clients.
        accountant: What a run costs, as in `noise_multiplier`.

    Raises:
        ValueError: If the rounds are more than are left, or an argument is out of its range.

    Example:
        >>> from fedlr.federated import privacy
        >>> budget = privacy.Budget(5.43, 1e-3)
        >>> privacy.check_rounds(budget, 5.0, 30, rounds_done=20)
        >>> privacy.check_rounds(budget, 5.0, 31, rounds_done=20)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: check_rounds: got 31 rounds after 20, expected at most 30 for epsilon 5.43 ...
    """
    _check_budget("check_rounds", budget)
    _check_multiplier("check_rounds", noise_multiplier)
    _checks.check_count("check_rounds", "num_rounds", num_rounds)
    _checks.check_count("check_rounds", "rounds_done", rounds_done, minimum=0)
    if accountant(noise_multiplier, rounds_done + num_rounds, budget.delta) <= budget.epsilon:
        return
    left = rounds_left(budget, noise_multiplier, rounds_done=rounds_done, accountant=accountant)
    raise _checks.fail(
        "check_rounds",
        f"{num_rounds} rounds after {rounds_done}",
        f"at most {left} for epsilon {budget.epsilon} at delta {budget.delta}",
    )


def _clipped_sum(max_norm: float) -> protocol.Aggregator:
    """Build the sum of the clipped updates of those that arrived."""

    def fold_init(update):
        return jax.tree.map(jnp.zeros_like, update)

    def add(sums, messages, weights, *, decompress):
        updates = jax.vmap(lambda message: clip(decompress(message), max_norm))(messages)

        def accumulate(partial, leaf):
            arrived = (weights > 0).reshape(-1, *[1] * (leaf.ndim - 1))
            return partial + jnp.sum(jnp.where(arrived, leaf, 0.0), axis=0)

        return jax.tree.map(accumulate, sums, updates)

    def aggregate(messages, weights, state, *, decompress):
        first = jax.eval_shape(decompress, jax.tree.map(lambda leaf: leaf[0], messages))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        return ClippedSum(add(zeros, messages, weights, decompress=decompress)), state

    fold = protocol.Fold(fold_init, add, ClippedSum)
    return protocol.Aggregator(lambda _: (), aggregate, fold)


def _noisy_server(
    server: protocol.ServerUpdate, deviation: float, count: float
) -> protocol.ServerUpdate:
    """Let a server take a `ClippedSum`, with noise and divided by a constant."""

    def apply(params, update, state, *, key):
        if not isinstance(update, ClippedSum):
            got = f"an update of type {type(update).__name__}"
            raise _checks.fail("gaussian_mechanism", got, "that of the mechanism's own aggregator")
        # Away from the keys of `compose` (arrivals) and of the inner server: noise drawn with the
        # key of anything else would be known to whoever sees that.
        noise_key, server_key = jax.random.split(jax.random.fold_in(key, 2))
        leaves, structure = jax.tree.flatten(update.total)
        keys = jax.random.split(noise_key, len(leaves))
        mean = [
            (leaf + deviation * jax.random.normal(leaf_key, leaf.shape, leaf.dtype)) / count
            for leaf, leaf_key in zip(leaves, keys, strict=True)
        ]
        return server.apply(params, jax.tree.unflatten(structure, mean), state, key=server_key)

    return protocol.ServerUpdate(server.init, apply, server.expects)


def _ones(clients: PyTree) -> Float[Array, " clients"]:
    """Count every client once."""
    return jnp.ones(clients_.num_clients(clients), jnp.result_type(float))


def _accounting(function: str) -> Any:
    """Import dp-accounting, which only the accountants of drawn cohorts need."""
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        message = f"{function}: got no dp-accounting, expected pip install 'fedlr[privacy]'"
        raise ImportError(message) from error


def _composed(accounting: Any, relation: Any, event: Any, num_rounds: int, delta: float) -> float:
    """Return epsilon of so many such events by Renyi differential privacy."""
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=relation)
    return float(accountant.compose(event, num_rounds).get_epsilon(delta))


def _check_positive(function: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise _checks.fail(function, f"{name} {value}", "a finite number above 0")


def _check_multiplier(function: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise _checks.fail(function, f"noise_multiplier {value}", "a finite number from 0")


def _check_delta(function: str, delta: float) -> None:
    if not 0 < delta < 1:
        raise _checks.fail(function, f"delta {delta}", "a number between 0 and 1")


def _check_release(function: str, multiplier: float, num_rounds: int, delta: float) -> None:
    _check_multiplier(function, multiplier)
    _checks.check_count(function, "num_rounds", num_rounds)
    _check_delta(function, delta)


def _check_budget(function: str, budget: Budget) -> None:
    _check_positive(function, "epsilon", budget.epsilon)
    _check_delta(function, budget.delta)
