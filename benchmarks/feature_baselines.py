"""Features without any network: scikit-learn's, and none."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float
from sklearn import (
    cross_decomposition,
    decomposition,
    pipeline,
    preprocessing,
    random_projection,
)

from benchmarks import feature_data, feature_methods

__all__ = ["BASELINES", "fit"]


class Constant:
    """No information: features of zero, from which every head predicts about the mean."""

    def __init__(self, num_features: int):
        self.num_features = num_features

    def fit(self, inputs, targets):
        del inputs, targets
        return self

    def transform(self, inputs):
        return np.zeros((len(inputs), self.num_features))


class Noise(Constant):
    """Standard normal features that have nothing to do with the inputs."""

    def __init__(self, num_features: int, seed: int):
        super().__init__(num_features)
        self.rng = np.random.default_rng(seed)

    def transform(self, inputs):
        return self.rng.standard_normal((len(inputs), self.num_features))


class Raw(Constant):
    """The inputs as they are."""

    def transform(self, inputs):
        return inputs


def products(d: int, seed: int) -> pipeline.Pipeline:
    """Make principal components, scaled, with all their squares and products."""
    return pipeline.make_pipeline(
        decomposition.PCA(d, random_state=seed),
        preprocessing.StandardScaler(),
        preprocessing.PolynomialFeatures(2, include_bias=False),
    )


# What has a number of features of its own.
OWN_SIZE = ("raw inputs", "PCA with products")
BASELINES: dict[str, Callable[[int, int], Any]] = {
    "constant": lambda d, _: Constant(d),
    "noise": Noise,
    "raw inputs": lambda d, _: Raw(d),
    "PCA": lambda d, seed: decomposition.PCA(d, random_state=seed),
    "PCA with products": products,
    "TSVD": lambda d, seed: decomposition.TruncatedSVD(d, random_state=seed),
    "random projection": lambda d, seed: random_projection.GaussianRandomProjection(
        random_state=seed
    ).set_params(n_components=d),
    "PLS": lambda d, _: cross_decomposition.PLSRegression(d, scale=False),
}


def fit(method: str, problem: feature_data.Problem, num_features: int) -> feature_methods.Features:
    """Fit a baseline to the pooled training samples of every split.

    Args:
        method: One of `BASELINES`; "PLS" has a head of its own too, "constant" the mean.
        problem: The problem.
        num_features: d; "raw inputs" has its own, and "PCA with products" d (d + 3) / 2.

    Returns:
        The features.
    """
    found = []
    for split in range(len(problem.scales)):
        train = feature_data.split_of(problem.train, split)
        test = feature_data.split_of(problem.test, split)
        inputs, targets = feature_data.rows(train)
        tested = feature_data.rows(test)[0]
        model = BASELINES[method](num_features, split).fit(inputs, targets)
        arrays = [
            _spread(model.transform(inputs), train.mask),
            _spread(model.transform(tested), test.mask),
        ]
        if method == "constant":
            arrays.append(np.zeros(test.mask.shape))
        if method == "PLS":
            arrays.append(_spread(model.predict(tested).reshape(-1), test.mask))
        found.append(arrays)
    stacked = [np.stack(arrays) for arrays in zip(*found, strict=True)]
    predictions = stacked[2] if len(stacked) > 2 else None
    return feature_methods.Features(
        method, stacked[0], stacked[1], predictions, has_own_size=method in OWN_SIZE
    )


def _spread(
    values: Float[np.ndarray, "present ..."], mask: Bool[Array, "clients samples"]
) -> Float[np.ndarray, "clients samples ..."]:
    """Put the rows of present samples where they belong, zeros elsewhere."""
    table = np.zeros(mask.shape + values.shape[1:], np.float32)
    table[np.asarray(mask)] = values
    return table
