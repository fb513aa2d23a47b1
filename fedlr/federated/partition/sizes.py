"""Partitioners that see no classes: even sizes, uneven sizes, and given groups."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Shaped

from fedlr import _checks
from fedlr.federated.partition import _assignment

__all__ = [
    "Sizes",
    "by_group",
    "dirichlet_sizes",
    "iid",
    "lognormal_sizes",
    "power_law_sizes",
    "quantity_skew",
]

# A law of relative client sizes: (rng, num_clients) -> non-negative weights (num_clients,).
Sizes = Callable[[np.random.Generator, int], Float[np.ndarray, " clients"]]


def iid(num_examples: int, num_clients: int, *, seed: int) -> _assignment.Partition:
    """Give random examples to all clients, whose sizes differ by at most 1.

    Args:
        num_examples: Number of examples.
        num_clients: Number of clients.
        seed: Seed of the generator.

    Returns:
        The partition.

    Raises:
        ValueError: If there are more clients than examples.

    Example:
        >>> from fedlr.federated import partition
        >>> partition.iid(8, 3, seed=0).counts.tolist()
        [3, 3, 2]
    """
    _assignment.check_clients("iid", num_clients, num_examples)
    rng = _assignment.generator("iid", seed)
    return _assignment.from_owners(
        rng.permutation(np.arange(num_examples) % num_clients), num_clients
    )


def quantity_skew(
    num_examples: int, num_clients: int, *, sizes: Sizes, seed: int, min_size: int = 1
) -> _assignment.Partition:
    """Give random examples to clients of uneven sizes.

    Args:
        num_examples: Number of examples.
        num_clients: Number of clients.
        sizes: Law of the relative sizes, `dirichlet_sizes`, `lognormal_sizes`, `power_law_sizes`
            or any other function ``(rng, num_clients) -> weights``.
        seed: Seed of the generator.
        min_size: Least number of examples of a client. What is missing comes from the clients that
            are then the largest.

    Returns:
        The partition.

    Raises:
        ValueError: If there are more clients than examples or too few for the minimum, or the law
            gives no weights.

    Example:
        >>> from fedlr.federated import partition
        >>> parts = partition.quantity_skew(
        ...     70, 3, sizes=partition.power_law_sizes(1.0), seed=0
        ... )
        >>> sorted(parts.counts.tolist())
        [13, 19, 38]
    """
    _assignment.check_clients("quantity_skew", num_clients, num_examples, min_size)
    rng = _assignment.generator("quantity_skew", seed)
    weights = np.asarray(sizes(rng, num_clients), float)
    if weights.shape != (num_clients,) or not (weights >= 0).all() or not 0 < weights.sum() < 1e300:
        expected = f"{num_clients} non-negative numbers, not all zero"
        raise _checks.fail("quantity_skew", f"sizes {weights}", expected)
    counts = _assignment.round_shares(weights / weights.sum(), num_examples)
    owners = rng.permutation(np.repeat(np.arange(num_clients), counts))
    return _assignment.from_owners(
        _assignment.fill_up(owners, num_clients, min_size, rng), num_clients
    )


def dirichlet_sizes(beta: float) -> Sizes:
    """Make the law of sizes ``Dir(beta 1_K)``.

    Args:
        beta: Concentration, positive: small for a few clients that hold nearly all.

    Returns:
        The law, for `quantity_skew`.

    Raises:
        ValueError: If `beta` is not positive.

    Reference:
        Q. Li, Y. Diao, Q. Chen and B. He, ICDE 2022, arXiv:2102.02079, "quantity skew".
    """
    _checks.check_positive("dirichlet_sizes", "beta", beta)
    return lambda rng, num_clients: _assignment.draw_shares(rng, beta, np.ones(num_clients))


def lognormal_sizes(sigma: float) -> Sizes:
    """Make the law of sizes ``exp(sigma z)`` with z standard normal.

    Args:
        sigma: Spread, from 0, which gives equal sizes.

    Returns:
        The law, for `quantity_skew`.

    Raises:
        ValueError: If `sigma` is negative or not finite.
    """
    _check_skew("lognormal_sizes", "sigma", sigma)

    def draw(rng, num_clients):
        exponents = sigma * rng.standard_normal(num_clients)
        return np.exp(exponents - exponents.max())

    return draw


def power_law_sizes(exponent: float) -> Sizes:
    """Make the law of sizes ``rank^-exponent``, in which only the order of the clients is random.

    Args:
        exponent: Exponent, from 0, which gives equal sizes; 1 is Zipf's law.

    Returns:
        The law, for `quantity_skew`.

    Raises:
        ValueError: If `exponent` is negative or not finite.
    """
    _check_skew("power_law_sizes", "exponent", exponent)
    return lambda rng, num_clients: rng.permutation(np.arange(1.0, num_clients + 1) ** -exponent)


def by_group(groups: Shaped[np.ndarray, " examples"]) -> _assignment.Partition:
    """Make every group of examples one client, such as the writer, the hospital or the instrument.

    Args:
        groups: Group of every example, integers or strings, shape (examples,).

    Returns:
        The partition, its clients in the sorted order of the groups.

    Raises:
        ValueError: If `groups` is empty, not a vector, or of floating-point numbers.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> partition.by_group(np.array(["Oslo", "Bonn", "Oslo"]))
        Partition(indices=array([[1, 0],
               [0, 2]], dtype=int32), counts=array([1, 2], dtype=int32))
    """
    groups = np.asarray(groups)
    if groups.ndim != 1 or not groups.size or groups.dtype.kind in "fc":
        got = f"groups of shape {groups.shape}, dtype {groups.dtype}"
        raise _checks.fail("by_group", got, "a vector of integers or strings")
    names, owners = np.unique(groups, return_inverse=True)
    return _assignment.from_owners(owners, len(names))


def _check_skew(function: str, name: str, value: float) -> None:
    """Refuse a strength of skew that is negative or not finite."""
    if not 0 <= value < math.inf:
        raise _checks.fail(function, f"{name} {value}", "a finite number from 0")
