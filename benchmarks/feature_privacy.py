"""What differential privacy of every client costs, on worlds with a known Bayes error."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from benchmarks import feature_data, feature_methods, feature_scores
from fedlr import federated, multimodal
from fedlr.algorithms import fdrmfl
from fedlr.federated import local, privacy, rounds

__all__ = ["utility"]

DELTA = 1e-4
MAX_NORM = 0.5


def utility(
    worlds: feature_data.Worlds, plan: feature_methods.Plan, epsilons: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Train a small network with the noise that each epsilon takes, all by one program.

    Args:
        worlds: Worlds and the samples of their clients.
        plan: How it is trained.
        epsilons: What all rounds may cost at a delta of 1e-4; None for clipping without noise.

    Returns:
        A row for each.
    """
    problem = worlds.problem
    num_clients = problem.train.mask.shape[1]
    predict = _predictor(problem, plan)
    rows = []
    for epsilon in epsilons:
        multiplier = 0.0
        if epsilon is not None:
            multiplier = privacy.noise_multiplier(
                epsilon=epsilon, delta=DELTA, num_rounds=plan.num_rounds
            )
        errors = feature_scores.client_errors(problem, predict(multiplier)).mean(axis=1)
        rows.append(
            {
                "clients": num_clients,
                "samples_of_a_client": problem.train.mask.shape[2],
                "epsilon": epsilon,
                "delta": DELTA,
                "noise_multiplier": multiplier,
                "rounds": plan.num_rounds,
                "mse": float(errors.mean()),
                "sd": float(errors.std(ddof=1)),
                "constant_mse": float(np.mean(problem.scales**2)),
                "bayes": worlds.bayes,
            }
        )
    return rows


def _predictor(
    problem: feature_data.Problem, plan: feature_methods.Plan
) -> Callable[[float], Float[np.ndarray, "splits clients samples"]]:
    """Return how to train on all splits with a noise multiplier, and predict the test samples."""
    network = _network(jax.random.key(0), plan.num_features)
    splits, num_clients = problem.train.mask.shape[:2]

    def one(multiplier, start, clients, test, key):
        mechanism = privacy.gaussian_mechanism(MAX_NORM, multiplier, clients_per_round=num_clients)

        def algorithm(rate):
            # No information term: its critic would have more parameters than the rest.
            return fdrmfl.build(
                network,
                local.Training(fdrmfl.optimizer(rate), plan.num_steps, plan.batch_size),
                weights=fdrmfl.Weights(None, 0.01, None),
                mechanism=mechanism,
                chunk_size=20,
            )

        schedule = optax.cosine_decay_schedule(plan.rate, plan.num_rounds)
        scheduled = rounds.scheduled(algorithm, schedule)
        state = scheduled.init(start, clients, key=key)
        state, _ = federated.run(scheduled, state, clients, num_rounds=plan.num_rounds, key=key)
        model = eqx.combine(state.params, network)
        return jax.vmap(functools.partial(multimodal.predictions, model))(test.inputs)

    train = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)))
    # With the keys of the default kind this took twice as long to compile.
    start_key, run_key = jax.random.split(jax.random.key(2, impl="unsafe_rbg"))
    starts = _draw(jax.random.split(start_key, splits), plan.num_features)
    keys = jax.random.split(run_key, splits)
    return lambda multiplier: np.asarray(
        train(multiplier, starts, problem.train, problem.test, keys)
    )


@functools.partial(jax.jit, static_argnums=1)
def _draw(keys: Key[Array, " splits"], num_features: int) -> PyTree:
    """Draw the networks to start from."""
    draw = jax.vmap(lambda key: eqx.filter(_network(key, num_features), eqx.is_inexact_array))
    return draw(keys)


def _network(key: Key[Array, ""], num_features: int) -> multimodal.Network:
    """Draw a network of 800 parameters, as the noise grows with their number."""
    keys = jax.random.split(key, 4)
    encoders = tuple(
        multimodal.DenseEncoder(channels, 4, hidden=8, key=own)
        for channels, own in zip((40, 30), keys[:2], strict=True)
    )
    fusion = multimodal.GatedFusion(2, 4, num_features, hidden=8, key=keys[2])
    head = eqx.nn.MLP(num_features, 1, 8, 1, activation=jax.nn.gelu, key=keys[3])
    return multimodal.Network(encoders, fusion, head, None)
