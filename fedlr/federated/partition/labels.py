"""Partitioners by class: Dirichlet mixes, shards, and few classes per client."""

import numpy as np

from fedlr import _checks
from fedlr.federated.partition import _assignment

__all__ = ["dirichlet", "dirichlet_clients", "pathological", "shards"]


def dirichlet(
    labels: _assignment.Labels, num_clients: int, alpha: float, *, seed: int, min_size: int = 1
) -> _assignment.Partition:
    """Split every class among the clients by shares ``q ~ Dir(alpha 1_K)``.

    Class mixes and sizes are both skewed: a small `alpha` gives each class to few clients, infinity
    spreads it evenly.

    Args:
        labels: Class of every example, integers, shape (examples,).
        num_clients: Number of clients K.
        alpha: Concentration, positive.
        seed: Seed of the generator.
        min_size: Least number of examples of a client. What is missing comes, at random, from the
            clients that are then the largest.

    Returns:
        The partition.

    Raises:
        ValueError: If `labels` is no integer vector, there are more clients than examples or too
            few for the minimum, or `alpha` is not positive.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> parts = partition.dirichlet(np.array([0, 0, 0, 1, 1, 1]), 2, 0.1, seed=0)
        >>> int(parts.counts.sum())
        6

    Reference:
        M. Yurochkin et al., "Bayesian nonparametric federated learning of neural networks", ICML
        2019, arXiv:1905.12022, section 4; its code draws all shares anew until no client is too
        small.
    """
    classes, num_classes = _assignment.number_classes("dirichlet", labels)
    _assignment.check_clients("dirichlet", num_clients, len(classes), min_size)
    _checks.check_positive("dirichlet", "alpha", alpha)
    rng = _assignment.generator("dirichlet", seed)
    table = np.stack(
        [
            _assignment.round_shares(
                _assignment.draw_shares(rng, alpha, np.ones(num_clients)), size
            )
            for size in np.bincount(classes, minlength=num_classes)
        ],
        axis=1,
    )
    owners = _assignment.fill_up(_assignment.deal(classes, table, rng), num_clients, min_size, rng)
    return _assignment.from_owners(owners, num_clients)


def dirichlet_clients(
    labels: _assignment.Labels, num_clients: int, alpha: float, *, seed: int
) -> _assignment.Partition:
    """Give every client equally many examples with a class mix ``q_k ~ Dir(alpha p)``.

    p is the mix of the whole data set. One client after the other draws its examples by its mix,
    without replacement; where a class is used up, it goes on with the rest of its mix. So the later
    clients have mixes closer to what is left. Sizes differ by at most 1. This is another
    distribution than that of `dirichlet`, also at the same `alpha`, which multiplies p here and a
    vector of ones there.

    Args:
        labels: Class of every example, integers, shape (examples,).
        num_clients: Number of clients.
        alpha: Concentration, positive: small for one class per client, infinity for random
            examples.
        seed: Seed of the generator.

    Returns:
        The partition.

    Raises:
        ValueError: If `labels` is no integer vector, there are more clients than examples, or
            `alpha` is not positive.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> partition.dirichlet_clients(labels, 2, 0.1, seed=0).counts.tolist()
        [3, 3]

    Reference:
        T.-M. H. Hsu, H. Qi and M. Brown, "Measuring the effects of non-identical data distribution
        for federated visual classification", 2019, arXiv:1909.06335, section 3.
    """
    classes, num_classes = _assignment.number_classes("dirichlet_clients", labels)
    _assignment.check_clients("dirichlet_clients", num_clients, len(classes))
    _checks.check_positive("dirichlet_clients", "alpha", alpha)
    rng = _assignment.generator("dirichlet_clients", seed)
    pools = np.bincount(classes, minlength=num_classes)
    prior = pools / len(classes)
    table = np.zeros((num_clients, num_classes), int)
    for client, size in enumerate(_assignment.even_sizes(len(classes), num_clients)):
        mix = _assignment.draw_shares(rng, alpha, prior)
        while left := size - table[client].sum():
            open_classes = pools > 0
            mix = np.where(open_classes, mix, 0.0)
            if not mix.sum() > 0:
                # The rest of the mix has underflowed. It is independent of the part that was used,
                # and Dirichlet again.
                mix[open_classes] = _assignment.draw_shares(rng, alpha, prior[open_classes])
            # Drawing one by one is the same: only what finds its class empty is drawn again.
            drawn = np.minimum(rng.multinomial(left, mix / mix.sum()), pools)
            table[client] += drawn
            pools = pools - drawn
    return _assignment.from_owners(_assignment.deal(classes, table, rng), num_clients)


def shards(
    labels: _assignment.Labels, num_clients: int, shards_per_client: int, *, seed: int
) -> _assignment.Partition:
    """Sort by class, cut into equal shards and give every client the same number of them.

    Shards differ by at most one example. Most hold one class, so that a client has at most about as
    many classes as shards.

    Args:
        labels: Class of every example, integers, shape (examples,).
        num_clients: Number of clients.
        shards_per_client: Number of shards that each client gets.
        seed: Seed of the generator.

    Returns:
        The partition.

    Raises:
        ValueError: If `labels` is no integer vector, or there are more shards than examples.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
        >>> parts = partition.shards(labels, 4, 1, seed=0)
        >>> sorted(partition.label_histograms(labels, parts).tolist())
        [[0, 2], [0, 2], [2, 0], [2, 0]]

    Reference:
        H. B. McMahan et al., "Communication-efficient learning of deep networks from decentralized
        data", AISTATS 2017, arXiv:1602.05629, section 3.
    """
    classes, _ = _assignment.number_classes("shards", labels)
    _assignment.check_clients("shards", num_clients, len(classes))
    _checks.check_count("shards", "shards_per_client", shards_per_client)
    count = num_clients * shards_per_client
    if count > len(classes):
        expected = f"at most {len(classes)}, the number of examples"
        raise _checks.fail("shards", f"{num_clients} x {shards_per_client} shards", expected)
    rng = _assignment.generator("shards", seed)
    owners = np.empty(len(classes), int)
    owner_of_shard = rng.permutation(np.arange(count) % num_clients)
    owners[_assignment.by_class(classes, rng)] = np.repeat(
        owner_of_shard, _assignment.even_sizes(len(classes), count)
    )
    return _assignment.from_owners(owners, num_clients)


def pathological(
    labels: _assignment.Labels, num_clients: int, classes_per_client: int, *, seed: int
) -> _assignment.Partition:
    """Give every client examples of exactly so many classes.

    Each class is split evenly among its clients. How many these are follows the size of the class,
    so that the sizes of the clients are as even as the classes allow; which they are is random.

    Args:
        labels: Class of every example, integers, shape (examples,).
        num_clients: Number of clients.
        classes_per_client: Number of distinct classes of each client.
        seed: Seed of the generator.

    Returns:
        The partition.

    Raises:
        ValueError: If `labels` is no integer vector, or the numbers admit no such partition: more
            clients than examples, more classes per client than there are, too few to use every
            class, or classes too small for so many clients.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> labels = np.array([0, 1, 2, 0, 1, 2])
        >>> parts = partition.pathological(labels, 3, 2, seed=0)
        >>> (partition.label_histograms(labels, parts) > 0).sum(axis=1).tolist()
        [2, 2, 2]

    Reference:
        Q. Li, Y. Diao, Q. Chen and B. He, "Federated learning on non-IID data silos: an
        experimental study", ICDE 2022, arXiv:2102.02079, "quantity-based label imbalance". There
        the clients draw their classes independently, and one that nobody draws is lost.
    """
    classes, num_classes = _assignment.number_classes("pathological", labels)
    _assignment.check_clients("pathological", num_clients, len(classes))
    _checks.check_rank("pathological", classes_per_client, num_classes, "classes_per_client")
    sizes = np.bincount(classes, minlength=num_classes)
    places = num_clients * classes_per_client
    most = int(np.minimum(sizes, num_clients).sum())
    if not num_classes <= places <= most:
        got = f"{num_clients} clients of {classes_per_client} classes, {places} in all"
        raise _checks.fail("pathological", got, f"{num_classes} to {most} for these labels")
    rng = _assignment.generator("pathological", seed)
    holders = np.ones(num_classes, int)
    for _ in range(places - num_classes):
        able = holders < np.minimum(sizes, num_clients)
        holders[np.where(able, sizes / holders, 0).argmax()] += 1
    # Those with the most holders left are given first: then no class is ever left with more holders
    # than there are clients.
    left = holders.copy()
    held = np.zeros((num_clients, num_classes), bool)
    for client in range(num_clients):
        chosen = np.lexsort((rng.random(num_classes), -left))[:classes_per_client]
        held[client, chosen] = True
        left[chosen] -= 1
    table = np.zeros(held.shape, int)
    for label, size in enumerate(sizes):
        owners = rng.permutation(np.flatnonzero(held[:, label]))
        table[owners, label] = _assignment.even_sizes(size, len(owners))
    return _assignment.from_owners(_assignment.deal(classes, table, rng), num_clients)
