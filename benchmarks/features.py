"""Learned features of several modalities beside classical ones, with the same heads on both.

Errors are mean squared errors of test samples in the squared unit of the target, averaged over the
clients by their shares of the training samples; `sd` is over splits or draws. `mse` is that of the
head named, on features of all methods; networks and some baselines have a head of their own too.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import (
    feature_ablation,
    feature_baselines,
    feature_data,
    feature_methods,
    feature_privacy,
    feature_scores,
)
from benchmarks.feature_methods import Plan
from fedlr import synthetic
from fedlr.algorithms import fdrmfl

__all__ = ["CORES", "TABLES", "run"]

CORES = None
Rows = list[dict[str, Any]]

RESPONSES = {
    "S1": synthetic.tanh_response,
    "S2": synthetic.softplus_response,
    "S3": synthetic.sech_response,
}
# Of information, alignment and contrast.
PAPER_MODE = (0.1, 0.01, 0.1)
# Rounds, steps of a client in each, and learning rates of `training`.
LENGTHS = ((40, 16), (40, 50), (80, 50))
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
# What is chosen from on inner splits; the strengths are those of MOON's paper.
STRENGTHS = (0.1, 1.0, 5.0, 10.0)
WEIGHTS = tuple(itertools.product((0.0, 0.1, 1.0), (0.0, 0.1), (0.0, 0.1)))


def _is_small(size: str) -> bool:
    return size == "small"


def _splits(size: str) -> int:
    return 2 if _is_small(size) else 20


def _weights(values: Sequence[float], splits: int) -> fdrmfl.Weights:
    """Give all splits the same weights."""
    return fdrmfl.Weights(*(jnp.full(splits, value) for value in values))


def simulation(size: str) -> Rows:
    """Repeat the paper's simulations, whose modalities share nothing, with forests of two sizes.

    The published comparison gave its features 100 trees and those of all baselines 5.
    """
    small = _is_small(size)
    draws, num_train, num_test = (2, 60, 30) if small else (5, 2000, 500)
    plan = Plan(num_rounds=5, num_steps=63, batch_size=32, rate=1e-3, lanes=1)
    if small:
        plan = plan._replace(num_rounds=1, num_steps=2)
    names = ("constant", "noise", "raw inputs", "PCA", "TSVD", "random projection")
    rows = []
    for response in list(RESPONSES)[: 1 if small else 3]:
        problem = _sums(RESPONSES[response], draws, num_train, num_test)
        found = [feature_baselines.fit(name, problem, plan.num_features) for name in names]
        found.append(feature_methods.learn("FedAvg", problem, plan))
        for weight in () if small else (0.01, 0.1):
            weights = _weights([weight] * 3, draws)
            label = f"FDRMFL, weights {weight:g}"
            found.append(
                feature_methods.learn("FDRMFL", problem, plan, numbers=weights, label=label)
            )
        # 3604 inputs are much for a forest.
        narrow = [features for features in found if not features.has_own_size]
        baselines = [features for features in narrow if features.trained is None]
        heads = {"ridge": found, "forest of 100": narrow, "forest of 5": baselines}
        for head, own in heads.items():
            scores = [feature_scores.score(problem, features, head) for features in own]
            compared = feature_scores.compare(scores, ("constant", "PCA"))
            rows += [{"table": "simulation", "response": response, **row} for row in compared]
    return rows


def _sums(response, draws: int, num_train: int, num_test: int) -> feature_data.Problem:
    """Draw the samples of a simulation, for three clients with equal shares."""

    def draw(seed):
        count = num_train + num_test
        data = synthetic.fused_sums(count, response, key=jax.random.key(seed))
        inputs = tuple(np.asarray(x).reshape(count, -1) for x in data.inputs)
        samples = feature_data.Samples(inputs, np.asarray(data.targets))
        owners = feature_data.iid(count, 3, seed)
        return feature_data.Draw(samples, owners, np.arange(count) >= num_train)

    return feature_data.make_problem(draw(seed) for seed in range(draws))


def _meat(splits: int) -> feature_data.Problem:
    """Deal the samples of meat to three clients by their fat, and hold a fifth of each out."""
    samples = feature_data.meat()

    def draw(seed):
        rng = np.random.default_rng(seed)
        owners = feature_data.by_target(samples.targets, rng)
        return feature_data.Draw(samples, owners, feature_data.hold_out(owners, 0.2, rng))

    return feature_data.make_problem(draw(seed) for seed in range(splits))


def _meat_plan(size: str, num_features: int = 8) -> Plan:
    plan = Plan(num_features)
    return plan._replace(num_rounds=2, num_steps=2, lanes=2) if _is_small(size) else plan


def training(size: str) -> Rows:
    """Train FedAvg for longer and shorter: all tables of the spectra of meat have the best plan.

    The splits are theirs too, so that a sample which is held out here may be for the test there.
    """
    small, splits, rows = _is_small(size), _splits(size), []
    problem = _meat(splits)
    for num_rounds, num_steps in ((1, 2),) if small else LENGTHS:
        for rate in (3e-3,) if small else RATES:
            plan = _meat_plan(size)._replace(num_rounds=num_rounds, num_steps=num_steps, rate=rate)
            errors = feature_methods.validate("FedAvg", problem, plan)[0] * problem.scales**2
            rows.append(
                {
                    "table": "training",
                    "method": "FedAvg",
                    "rounds": num_rounds,
                    "steps": num_steps,
                    "rate": rate,
                    "validation_mse": float(errors.mean()),
                    "sd": float(errors.std(ddof=1)),
                }
            )
    return rows


def tecator(size: str) -> Rows:
    """Predict the fat of meat from two ranges of its spectrum, by all methods."""
    plan, splits = _meat_plan(size), _splits(size)
    problem = _meat(splits)
    names = (
        "constant",
        "raw inputs",
        "PCA",
        "PCA with products",
        "TSVD",
        "random projection",
        "PLS",
    )
    found = [feature_baselines.fit(name, problem, plan.num_features) for name in names]
    found += [
        feature_methods.learn(name, problem, plan, numbers=numbers, label=label)
        for name, numbers, label in _networks(size, problem, plan)
    ]
    rows = []
    for head in ("ridge", "forest of 100"):
        scores = [feature_scores.score(problem, features, head) for features in found]
        compared = feature_scores.compare(scores, ("FedAvg", "PCA"))
        rows += [{"table": "tecator", **row} for row in compared]
    return rows


def _networks(size: str, problem: feature_data.Problem, plan: Plan):
    """Yield name, numbers and label of every network to train."""
    splits = len(problem.scales)
    yield "FedAvg", None, "FedAvg"
    if _is_small(size):
        return
    yield "central", None, "central"
    yield "local only", None, "local only"
    yield "FedProx", jnp.full(splits, 0.01), "FedProx"
    yield "MOON", jnp.full(splits, 1.0), "MOON"
    strengths = feature_methods.choose("MOON", problem, plan, jnp.array(STRENGTHS))
    yield "MOON", strengths, "MOON, strength chosen"
    yield "FDRMFL", _weights(PAPER_MODE, splits), "FDRMFL"
    grid = fdrmfl.Weights(*jnp.array(WEIGHTS).T)
    weights = feature_methods.choose("FDRMFL", problem, plan, grid)
    yield "FDRMFL", weights, "FDRMFL, weights chosen"


def dimensions(size: str) -> Rows:
    """Do so with other numbers of features."""
    splits = _splits(size)
    problem, rows = _meat(splits), []
    for count in (8,) if _is_small(size) else (2, 4, 16):
        plan = _meat_plan(size, count)
        found = [feature_baselines.fit(name, problem, count) for name in ("PCA", "PLS")]
        found.append(feature_methods.learn("FedAvg", problem, plan))
        if not _is_small(size):
            weights = _weights(PAPER_MODE, splits)
            found.append(feature_methods.learn("FDRMFL", problem, plan, numbers=weights))
        scores = [feature_scores.score(problem, features, "ridge") for features in found]
        compared = feature_scores.compare(scores, ("FedAvg", "PCA"))
        rows += [{"table": "dimensions", **row} for row in compared]
    return rows


def ablation(size: str) -> Rows:
    """Turn every term on and off, in one program, and time that beside a loop of single runs."""
    rows = feature_ablation.ablate(_meat(_splits(size)), _meat_plan(size))
    return [{"table": "ablation", **row} for row in rows]


def heterogeneity(size: str) -> Rows:
    """Let the targets of the clients differ more and less."""
    small = _is_small(size)
    samples, splits, plan = feature_data.meat(), _splits(size), _meat_plan(size)
    alphas = (0.5,) if small else (0.1, 0.5, 1.0, 10.0, None)

    def draw(alpha, seed):
        rng = np.random.default_rng(seed)
        if alpha is None:
            owners = feature_data.iid(len(samples.targets), 3, seed)
        else:
            owners = feature_data.dirichlet(samples.targets, 3, alpha, seed)
        return feature_data.Draw(samples, owners, feature_data.hold_out(owners, 0.2, rng))

    draws = [draw(alpha, seed) for alpha in alphas for seed in range(splits)]
    problem = feature_data.make_problem(draws)
    numbers: dict[str, Any] = {"FedAvg": None}
    if not small:
        numbers["FedProx"] = jnp.full(len(draws), 0.01)
        numbers["MOON"] = jnp.full(len(draws), 1.0)
        numbers["FDRMFL"] = _weights(PAPER_MODE, len(draws))
    scores = []
    for name, own in numbers.items():
        features = feature_methods.learn(name, problem, plan, numbers=own)
        scores.append(feature_scores.score(problem, features, "ridge"))
    rows = []
    for place, alpha in enumerate(alphas):
        own = slice(place * splits, (place + 1) * splits)
        compared = feature_scores.compare([score.part(own) for score in scores], ("FedAvg",))
        rows += [{"table": "heterogeneity", "dirichlet": alpha, **row} for row in compared]
    return rows


def _worlds(size: str) -> tuple[feature_data.Worlds, Plan]:
    """Draw worlds of five clients, and tell how networks are trained on them."""
    if _is_small(size):
        return feature_data.worlds(2, 2, 40, 20), Plan(num_rounds=2, num_steps=2, lanes=2)
    plan = Plan(num_rounds=40, num_steps=250, batch_size=32, rate=3e-3, lanes=3)
    return feature_data.worlds(3, 5, 4000, 500), plan


def known_error(size: str) -> Rows:
    """Come close to a known Bayes error, by features that nothing linear finds."""
    worlds, plan = _worlds(size)
    problem, splits = worlds.problem, len(worlds.problem.scales)
    names = ("constant", "raw inputs", "PCA", "random projection", "PLS")
    found = [feature_baselines.fit(name, problem, plan.num_features) for name in names]
    found.append(feature_methods.learn("FedAvg", problem, plan))
    if not _is_small(size):
        weights = _weights(PAPER_MODE, splits)._replace(contrast=None)
        found.append(feature_methods.learn("FDRMFL", problem, plan, numbers=weights))
    forests = [own for own in found if own.trained is not None or own.method == "PCA"]
    rows = []
    for head, own in {"ridge": found, "forest of 100": forests}.items():
        scores = [feature_scores.score(problem, features, head) for features in own]
        for row in feature_scores.compare(scores, ("PCA",)):
            alone = row["own_head_mse"]
            above = {
                "bayes": worlds.bayes,
                "oracle_mse": worlds.oracle,
                "above_bayes": row["mse"] / worlds.bayes - 1,
                "own_head_above_bayes": None if alone is None else alone / worlds.bayes - 1,
            }
            rows.append({"table": "synthetic", **row, **above})
    return rows


def alignment(size: str) -> Rows:
    """Let the weight of the alignment grow, and a modality be missing at the test.

    In training a quarter of the samples misses the first modality and another the second.
    """
    grid = (0.0, 0.1) if _is_small(size) else (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0)
    worlds, plan = _worlds(size)
    train = feature_data.with_gaps(worlds.problem.train, 0.25, np.random.default_rng(0))
    problem = worlds.problem._replace(train=train)
    splits = len(problem.scales)
    trained = feature_methods.train(
        "FDRMFL without information",
        problem,
        plan,
        numbers=fdrmfl.Weights(None, jnp.repeat(jnp.array(grid), splits), None),
        repeats=len(grid),
    )
    tests = {
        "complete": (problem.test, worlds.bayes),
        "without the first": (
            feature_data.without_modality(problem.test, 0),
            worlds.bayes_without_first,
        ),
        "without the second": (feature_data.without_modality(problem.test, 1), worlds.bayes),
    }
    rows = []
    for name, (test, bayes) in tests.items():
        own = problem._replace(test=test)
        scores = {
            "PCA": feature_scores.score(
                own, feature_baselines.fit("PCA", own, plan.num_features), "ridge"
            )
        }
        for place, weight in enumerate(grid):
            lanes = slice(place * splits, (place + 1) * splits)
            params = jax.tree.map(lambda leaf, i=lanes: leaf[i], trained.params)
            label = f"alignment {weight:g}"
            features = feature_methods.apply(label, own, plan, params)
            scores[label] = feature_scores.score(own, features, "ridge")
        gaps = np.asarray(trained.metrics.terms.alignment).reshape(len(grid), -1).mean(axis=1)
        compared = feature_scores.compare(list(scores.values()), ("alignment 0",))
        for row, gap in zip(compared, [None, *map(float, gaps)], strict=True):
            above = {"bayes": bayes, "above_bayes": row["mse"] / bayes - 1, "gap_in_training": gap}
            rows.append({"table": "alignment", "test": name, **row, **above})
    return rows


def privacy(size: str) -> Rows:
    """Protect every client with differential privacy, for many and for few of them."""
    small = _is_small(size)
    plan = Plan(4, num_rounds=20, num_steps=10, batch_size=20, rate=1e-2)
    if small:
        plan = plan._replace(num_rounds=2, num_steps=1)
    settings = {(100, 100): (None, 16.0, 8.0, 4.0, 2.0, 1.0), (1000, 20): (None, 4.0, 1.0)}
    if small:
        settings = {(8, 10): (4.0,)}
    rows = []
    for (num_clients, num_train), epsilons in settings.items():
        worlds = feature_data.worlds(2 if small else 5, num_clients, num_train, 10)
        found = feature_privacy.utility(worlds, plan, epsilons)
        rows += [{"table": "privacy", **row} for row in found]
    return rows


TABLES: dict[str, Callable[[str], Rows]] = {
    "simulation": simulation,
    "training": training,
    "tecator": tecator,
    "dimensions": dimensions,
    "ablation": ablation,
    "heterogeneity": heterogeneity,
    "synthetic": known_error,
    "alignment": alignment,
    "privacy": privacy,
}


def run(size: str, only: Sequence[str] | None = None) -> Rows:
    """Run all tables at "small" or "full" size, or those named, and return their rows.

    A table whose data are nowhere to be found is left out; see `fedlr.datasets.search_folders`.
    """
    rows = []
    for name in only or TABLES:
        try:
            rows += TABLES[name](size)
        except FileNotFoundError as error:
            print(f"{name} left out: {error}")
    return rows
