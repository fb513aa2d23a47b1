"""How uneven a partition is, in classes and in sizes."""

import numpy as np
from jaxtyping import Float, Int

from fedlr import _checks
from fedlr.federated.partition import _assignment

__all__ = ["effective_classes", "label_divergence", "label_histograms", "size_gini"]


def label_histograms(
    labels: _assignment.Labels, partition: _assignment.Partition
) -> Int[np.ndarray, "clients classes"]:
    """Count the examples of every class at every client.

    Args:
        labels: Class of every example, integers, shape (examples,).
        partition: Which client holds which examples.

    Returns:
        Counts, shape (clients, classes); the classes are those that occur, in increasing order.

    Raises:
        ValueError: If `labels` is no integer vector of the partition's length.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> parts = partition.by_group(np.array([0, 0, 0, 1]))
        >>> partition.label_histograms(np.array([7, 5, 7, 5]), parts).tolist()
        [[1, 2], [1, 0]]
    """
    return _histograms("label_histograms", labels, partition)


def label_divergence(
    labels: _assignment.Labels, partition: _assignment.Partition
) -> Float[np.ndarray, " clients"]:
    """Measure how far every client's class mix is from that of all examples.

    Args:
        labels: Class of every example, integers, shape (examples,).
        partition: Which client holds which examples.

    Returns:
        Jensen-Shannon divergence in bits, from 0 for equal mixes to less than 1, shape (clients,);
        NaN for a client without examples.

    Raises:
        ValueError: If `labels` is no integer vector of the partition's length.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> parts = partition.by_group(np.array([0, 0, 1, 1]))
        >>> partition.label_divergence(np.array([0, 1, 0, 1]), parts).tolist()
        [0.0, 0.0]
    """
    histograms = _histograms("label_divergence", labels, partition)
    mixes, overall = _mixes(histograms), _mixes(histograms.sum(axis=0, keepdims=True))
    divergence = _entropy((mixes + overall) / 2) - (_entropy(mixes) + _entropy(overall)) / 2
    return np.maximum(divergence, 0)  # not less than 0 but for rounding


def effective_classes(
    labels: _assignment.Labels, partition: _assignment.Partition
) -> Float[np.ndarray, " clients"]:
    """Count every client's classes by the exponential of the entropy of its mix.

    c classes in equal parts count c, and a rare class counts little.

    Args:
        labels: Class of every example, integers, shape (examples,).
        partition: Which client holds which examples.

    Returns:
        Numbers from 1 to the number of classes, shape (clients,); NaN for a client without
        examples.

    Raises:
        ValueError: If `labels` is no integer vector of the partition's length.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> parts = partition.by_group(np.array([0, 0, 1, 1]))
        >>> partition.effective_classes(np.array([4, 4, 4, 8]), parts).round(2).tolist()
        [1.0, 2.0]
    """
    return 2.0 ** _entropy(_mixes(_histograms("effective_classes", labels, partition)))


def size_gini(partition: _assignment.Partition) -> float:
    """Return the Gini coefficient of the clients' sizes: 0 if equal, near 1 if one holds all.

    Args:
        partition: Which client holds which examples.

    Returns:
        A number from 0 to ``1 - 1 / clients``.

    Example:
        >>> import numpy as np
        >>> from fedlr.federated import partition
        >>> partition.size_gini(partition.by_group(np.array([0, 1, 1, 1])))
        0.25
    """
    counts = np.sort(partition.counts).astype(float)
    ranks = 2.0 * np.arange(1, len(counts) + 1) - len(counts) - 1
    return float(ranks @ counts / (len(counts) * counts.sum()))


def _histograms(
    function: str, labels: _assignment.Labels, partition: _assignment.Partition
) -> Int[np.ndarray, "clients classes"]:
    """Count the examples of every class at every client."""
    classes, num_classes = _assignment.number_classes(function, labels)
    if len(classes) != partition.counts.sum():
        raise _checks.fail(function, f"{len(classes)} labels", f"{partition.counts.sum()}")
    clients = np.repeat(np.arange(len(partition.counts)), partition.counts)
    cells = clients * num_classes + classes[partition.indices[partition.mask]]
    size = len(partition.counts) * num_classes
    return np.bincount(cells, minlength=size).reshape(-1, num_classes)


def _mixes(histograms: Int[np.ndarray, "rows classes"]) -> Float[np.ndarray, "rows classes"]:
    """Divide each row by its sum; NaN where that is zero."""
    total = histograms.sum(axis=1, keepdims=True)
    return histograms / np.where(total == 0, np.nan, total)


def _entropy(mixes: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, " rows"]:
    """Return the entropy of every row in bits."""
    return -(mixes * np.log2(np.where(mixes == 0, 1, mixes))).sum(axis=1)
