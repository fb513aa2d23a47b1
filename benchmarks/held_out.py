"""Can held-out measurements tell when to stop? A tenth of them is hidden from all clients."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from benchmarks import methods, metrics
from benchmarks.problems import Draw, Problem
from fedlr import federated
from fedlr.federated import stopping

__all__ = ["rows"]

SHARE = 0.1
Rows = list[dict[str, Any]]


def rows(problem: Problem, names: Sequence[str], num_rounds: int) -> Rows:
    """Compare the PSNR at the least held-out residual with the best one.

    The second yardstick, the error of all projections without noise, is one that nobody has: a
    method whose PSNR falls while even that error falls cannot be stopped by any residual.

    Args:
        problem: Data made by its own forward model.
        names: Names of the methods.
        num_rounds: Number of rounds.

    Returns:
        A row for every method and draw.
    """
    shape = problem.draws.clients.targets.shape[1:]
    hidden = jnp.asarray(np.random.default_rng(0).random(shape) < SHARE)
    table = []
    for name in names:
        follow = functools.partial(_follow, name, problem, num_rounds, hidden)
        found = jax.jit(functools.partial(jax.lax.map, follow))(problem.draws)
        psnr, held_out, noiseless, corrected = map(np.asarray, found)
        table += [
            {
                **label,
                "method": name,
                "best_psnr": float(psnr[i].max()),
                "best_round": int(psnr[i].argmax()),
                "psnr_at_corrected": float(psnr[i, corrected[i]]),
                "psnr_at_held_out": float(psnr[i, held_out[i].argmin()]),
                "round_of_held_out": int(held_out[i].argmin()),
                "psnr_at_noiseless": float(psnr[i, noiseless[i].argmin()]),
                "round_of_noiseless": int(noiseless[i].argmin()),
            }
            for i, label in enumerate(problem.labels)
        ]
    return table


def _follow(
    name: str, problem: Problem, num_rounds: int, hidden: Bool[Array, "..."], draw: Draw
) -> tuple[Array, Array, Array, Array]:
    """Run without the hidden data; return PSNR and both errors by round, and the corrected stop."""
    everything = draw.clients
    hidden = hidden & everything.mask
    seen = everything._replace(mask=everything.mask & ~hidden)
    method = methods.build(name, problem, draw._replace(clients=seen))
    project = jax.vmap(problem.forward)
    weights = 1 / draw.noise_levels[:, None, None] ** 2

    def evaluate(state):
        images = method.images(state)
        projections = project(images, everything.inputs)
        residuals = jnp.where(hidden, projections - everything.targets, 0)
        errors = projections - project(problem.truth, everything.inputs)
        return (
            metrics.psnr(images, problem.truth),
            jnp.sum(weights * residuals**2),
            jnp.sum(weights * errors**2),
        )

    algorithm = federated.with_evaluation(method.algorithm, evaluate)
    state = algorithm.init(method.start, seen, key=jax.random.key(2))
    _, infos = federated.run(algorithm, state, seen, num_rounds=num_rounds, key=jax.random.key(3))
    rule = stopping.corrected(draw.noise_levels, stopping.num_measurements(seen))
    return *infos.evaluation, stopping.replay(rule, infos).best
