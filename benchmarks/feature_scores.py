"""Heads on features, their test errors, and tables that compare like with like."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import joblib
import numpy as np
from jaxtyping import Float
from scipy import stats
from sklearn import ensemble, linear_model, pipeline, preprocessing

from benchmarks import feature_data, feature_methods

__all__ = ["HEADS", "Scores", "client_errors", "compare", "score"]

Errors = Float[np.ndarray, "splits clients"]

HEADS: dict[str, Callable[[int], Any]] = {
    "ridge": lambda _: pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.RidgeCV(np.logspace(-4, 4, 17))
    ),
    "forest of 100": lambda seed: ensemble.RandomForestRegressor(100, random_state=seed),
    "forest of 5": lambda seed: ensemble.RandomForestRegressor(5, random_state=seed),
}


class Scores(NamedTuple):
    """Test errors of a method with a head.

    Attributes:
        features: The features, for what is told of the method.
        head: Name of the head.
        errors: Mean squared errors of the clients, in the squared unit of the target, shape
            (splits, clients).
        own_errors: The same by the method's own head; None without one.
        shares: Shares of the clients in the training samples, shape (splits, clients).
    """

    features: feature_methods.Features
    head: str
    errors: Errors
    own_errors: Errors | None
    shares: Errors

    def part(self, splits: slice) -> "Scores":
        """Return the scores of some splits."""
        own = None if self.own_errors is None else self.own_errors[splits]
        return Scores(self.features, self.head, self.errors[splits], own, self.shares[splits])


def score(problem: feature_data.Problem, features: feature_methods.Features, head: str) -> Scores:
    """Fit a head to the training features of all clients, or to each client's own, and test it.

    Args:
        problem: The problem.
        features: Features of its samples.
        head: One of `HEADS`; the penalty of the ridge is the best by leave-one-out on the training
            samples.

    Returns:
        The scores.
    """
    jobs = [
        joblib.delayed(_predict)(problem, features, head, i) for i in range(len(problem.scales))
    ]
    # The forests release Python's lock.
    found: Any = joblib.Parallel(n_jobs=-1, prefer="threads")(jobs)
    own = features.predictions
    sizes = np.asarray(problem.train.mask).sum(axis=2)
    return Scores(
        features,
        head,
        client_errors(problem, np.stack(found)),
        None if own is None else client_errors(problem, own),
        sizes / sizes.sum(axis=1, keepdims=True),
    )


def client_errors(
    problem: feature_data.Problem, predictions: Float[np.ndarray, "splits clients samples"]
) -> Errors:
    """Average the squared errors of the test samples of every client.

    Args:
        problem: The problem.
        predictions: Predictions of all test samples, standardized.

    Returns:
        Mean squared errors in the squared unit of the target.
    """
    squares = (predictions - np.asarray(problem.test.targets)) ** 2
    means = np.mean(squares, axis=2, where=np.asarray(problem.test.mask))
    return means * problem.scales[:, None] ** 2


def compare(scores: Sequence[Scores], references: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Make the table of methods with one head and one number of features.

    Differences to a reference are paired over the splits, with the 95 % interval of Student's t and
    the p of Wilcoxon's signed ranks. Splits of one data set share samples, so that these speak of
    more splits of the same samples and are too sure about others.

    Args:
        scores: Scores of the methods on the same splits.
        references: Methods that all others are compared with.

    Returns:
        A row for each method.

    Raises:
        ValueError: If heads differ, numbers of features differ without being a method's own, or a
            reference is missing.
    """
    heads = sorted({own.head for own in scores})
    if len(heads) != 1:
        message = f"compare: got heads {heads}, expected one for the whole table"
        raise ValueError(message)
    sizes = {own.features.train.shape[-1] for own in scores if not own.features.has_own_size}
    if len(sizes) > 1:
        message = f"compare: got {sorted(sizes)} features, expected one number for the whole table"
        raise ValueError(message)
    by_method = {own.features.method: own for own in scores}
    missing = [name for name in references if name not in by_method]
    if missing:
        message = f"compare: got no scores of {missing}, expected those of all references"
        raise ValueError(message)
    return [_row(own, {name: by_method[name] for name in references}) for own in scores]


def _row(own: Scores, references: dict[str, Scores]) -> dict[str, Any]:
    mean = _weighted(own.errors, own.shares)
    row: dict[str, Any] = {
        "method": own.features.method,
        "head": own.head,
        "features": own.features.train.shape[-1],
        "mse": float(mean.mean()),
        "sd": float(mean.std(ddof=1)),
        "client_mse": [float(value) for value in own.errors.mean(axis=0)],
        "worst_client_mse": float(own.errors.max(axis=1).mean()),
    }
    for name, other in references.items():
        row |= _differences(name, mean - _weighted(other.errors, other.shares))
    alone = None if own.own_errors is None else _weighted(own.own_errors, own.shares)
    trained = own.features.trained
    return row | {
        "own_head_mse": None if alone is None else float(alone.mean()),
        "own_head_sd": None if alone is None else float(alone.std(ddof=1)),
        "rounds": trained.num_rounds if trained else None,
        "up_bytes": float(trained.up_bytes.mean()) if trained else None,
        "down_bytes": float(trained.down_bytes.mean()) if trained else None,
    }


def _weighted(errors: Errors, shares: Errors) -> Float[np.ndarray, " splits"]:
    """Average errors over the clients by their shares of the training samples."""
    return np.sum(shares * errors, axis=1)


def _differences(name: str, differences: Float[np.ndarray, " splits"]) -> dict[str, Any]:
    """Tell the mean paired difference to a reference and how sure it is."""
    count = len(differences)
    half = stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count)
    # Wilcoxon's test has no answer if nothing differs.
    ranks: Any = stats.wilcoxon(differences) if differences.any() else None
    return {
        f"minus {name}": float(differences.mean()),
        f"minus {name}, low": float(differences.mean() - half),
        f"minus {name}, high": float(differences.mean() + half),
        f"minus {name}, p": 1.0 if ranks is None else float(ranks.pvalue),
    }


def _predict(
    problem: feature_data.Problem, features: feature_methods.Features, head: str, split: int
) -> Float[np.ndarray, "clients samples"]:
    """Return the head's predictions of all test samples of a split, zeros where there is none."""
    there = np.asarray(problem.train.mask[split])
    targets = np.asarray(problem.train.targets[split])
    inputs, tested = features.train[split], features.test[split]
    everyone = list(range(len(there)))
    found = np.zeros(tested.shape[:2])
    for clients in [[k] for k in everyone] if features.is_alone else [everyone]:
        own = there[clients]
        model = HEADS[head](split).fit(inputs[clients][own], targets[clients][own])
        rows = tested[clients].reshape(-1, tested.shape[-1])
        found[clients] = model.predict(rows).reshape(len(clients), -1)
    return found
