"""What a run of private rounds costs, the noise for a given cost, and whether a budget allows it.

All of it on the host, in float64. The costs are those of `privacy.gaussian_mechanism`.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedlr import _checks
from fedlr.federated.privacy import _numbers

__all__ = [
    "Accountant",
    "Budget",
    "check_rounds",
    "fixed_size_epsilon",
    "gaussian_epsilon",
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
    replaced by zero. With z 1.1, 10,000 rounds and rate 0.01 it is 5.632 at delta 1e-5.

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
    _numbers.check_multiplier("rounds_left", noise_multiplier)
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
    _numbers.check_multiplier("check_rounds", noise_multiplier)
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


def _check_release(function: str, multiplier: float, num_rounds: int, delta: float) -> None:
    _numbers.check_multiplier(function, multiplier)
    _checks.check_count(function, "num_rounds", num_rounds)
    _numbers.check_delta(function, delta)


def _check_budget(function: str, budget: Budget) -> None:
    _numbers.check_size(function, "epsilon", budget.epsilon)
    _numbers.check_delta(function, budget.delta)
