"""What all partitioners share: the table of indices, rounding, dealing and minimum sizes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedlr import _checks

Labels = Int[Array, " examples"] | Int[np.ndarray, " examples"]


class Partition(NamedTuple):
    """Which examples each client holds.

    Attributes:
        indices: Indices of the examples, in increasing order, int32, shape (clients, n_max); zero
            beyond the client's count.
        counts: Number of examples of each client, int32, shape (clients,).
    """

    indices: Int[np.ndarray, "clients n_max"]
    counts: Int[np.ndarray, " clients"]

    @property
    def mask(self) -> Bool[np.ndarray, "clients n_max"]:
        """Which entries of `indices` are examples."""
        return np.arange(self.indices.shape[1]) < self.counts[:, None]


def from_owners(owners: Int[np.ndarray, " examples"], num_clients: int) -> Partition:
    """Make the partition from the client of every example."""
    counts = np.bincount(owners, minlength=num_clients).astype(np.int32)
    partition = Partition(np.zeros((num_clients, counts.max()), np.int32), counts)
    partition.indices[partition.mask] = np.argsort(owners, kind="stable")
    return partition


def deal(
    classes: Int[np.ndarray, " examples"],
    table: Int[np.ndarray, "clients classes"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " examples"]:
    """Return owners of which each has as many examples of each class as the table says."""
    clients, count = np.arange(table.shape[0]), table.shape[1]
    owners = np.empty(len(classes), int)
    owners[by_class(classes, rng)] = np.repeat(np.tile(clients, count), table.T.ravel())
    return owners


def by_class(
    classes: Int[np.ndarray, " examples"], rng: np.random.Generator
) -> Int[np.ndarray, " examples"]:
    """Return the indices of all examples, class after class, each in random order."""
    order = rng.permutation(len(classes))
    return order[np.argsort(classes[order], kind="stable")]


def fill_up(
    owners: Int[np.ndarray, " examples"], num_clients: int, min_size: int, rng: np.random.Generator
) -> Int[np.ndarray, " examples"]:
    """Move random examples from the largest clients to those below the minimum size."""
    counts = np.bincount(owners, minlength=num_clients)
    missing = np.maximum(min_size - counts, 0)
    given = np.zeros(num_clients, int)
    for _ in range(missing.sum()):
        given[(counts - given).argmax()] += 1
    order = rng.permutation(len(owners))
    moved = [order[owners[order] == client][: given[client]] for client in np.flatnonzero(given)]
    if moved:
        owners = owners.copy()
        owners[rng.permutation(np.concatenate(moved))] = np.repeat(np.arange(num_clients), missing)
    return owners


def even_sizes(total: int, parts: int) -> Int[np.ndarray, " parts"]:
    """Return sizes that differ by at most 1."""
    return total // parts + (np.arange(parts) < total % parts)


def round_shares(shares: Float[np.ndarray, " parts"], total: int) -> Int[np.ndarray, " parts"]:
    """Round shares of a total to integers with that sum, by largest remainders."""
    exact = shares * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def draw_shares(
    rng: np.random.Generator, alpha: float, base: Float[np.ndarray, " parts"]
) -> Float[np.ndarray, " parts"]:
    """Draw from ``Dir(alpha base)``; beyond what the generator can do its limits are reached."""
    return rng.dirichlet(np.clip(alpha, 1e-300, 1e300) * base)


def number_classes(function: str, labels: Labels) -> tuple[Int[np.ndarray, " examples"], int]:
    """Number the classes that occur from 0, and count them."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        got = f"labels of shape {labels.shape}, dtype {labels.dtype}"
        raise _checks.fail(function, got, "a vector of integers")
    values, classes = np.unique(labels, return_inverse=True)
    return classes, len(values)


def generator(function: str, seed: int) -> np.random.Generator:
    """Make the generator; a seed of None would not be reproducible."""
    _checks.check_count(function, "seed", seed, minimum=0)
    return np.random.default_rng(seed)


def check_clients(function: str, num_clients: int, num_examples: int, min_size: int = 1) -> None:
    """Refuse numbers of clients for which there are not enough examples."""
    _checks.check_count(function, "num_examples", num_examples)
    _checks.check_count(function, "min_size", min_size, minimum=0)
    _checks.check_rank(function, num_clients, num_examples, "num_clients")
    if min_size * num_clients > num_examples:
        got = f"min_size {min_size} of {num_clients} clients with {num_examples} examples"
        raise _checks.fail(function, got, f"at most {num_examples // num_clients}")
