"""Run methods on all draws of a problem and summarise them in rows of a table."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import methods, metrics
from benchmarks.problems import Draw, Problem
from fedlr import federated, noise
from fedlr.federated import local, protocol, stopping

__all__ = ["Record", "rows", "run", "stopping_rounds", "tabulate"]

SSIM_EVERY = 5
"""Rounds between two computations of the SSIM."""


class Record(NamedTuple):
    """What a method did on every draw, as NumPy arrays (draws, rounds).

    Attributes:
        psnr: Mean PSNR of the images that entered a round.
        ssim: Mean SSIM of the same, -inf in rounds where it was not computed.
        uplink: Bytes sent by all clients together.
        downlink: Bytes received by all clients together.
        stops: Round whose entering images a stopping rule returns, by rule, shape (draws,).
        seconds: Wall time of a round, without compilation.
    """

    psnr: np.ndarray
    ssim: np.ndarray
    uplink: np.ndarray
    downlink: np.ndarray
    stops: dict[str, np.ndarray]
    seconds: float


def run(name: str, problem: Problem, num_rounds: int) -> Record:
    """Run a method by name on every draw, in one compiled call.

    Args:
        name: Name of the method, see `methods`.
        problem: Data.
        num_rounds: Number of rounds, more than `SSIM_EVERY`.

    Returns:
        The record.
    """
    leaves, structure = jax.tree.flatten(problem._replace(forward=(), labels=()))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    compiled = _compiled(name, problem.forward, num_rounds, structure, shapes)
    start = time.perf_counter()
    outputs = jax.block_until_ready(compiled(*leaves))
    seconds = time.perf_counter() - start
    stops = stopping_rounds(outputs[2], problem.draws)
    (psnr, ssim), (uplink, downlink), stops = jax.tree.map(np.asarray, (*outputs[:2], stops))
    # Images that have diverged beyond the largest float count as 0 dB.
    psnr = np.where(np.isfinite(psnr), psnr, 0.0)
    traffic = uplink.astype(np.int64), downlink.astype(np.int64)
    return Record(psnr, ssim, *traffic, stops, seconds / psnr.size)


@functools.cache
def _compiled(name, forward, num_rounds, structure, shapes):
    """Compile a run for the shapes of a problem; the data are arguments, not constants to fold."""

    def one(problem, draw):
        method = methods.build(name, problem, draw)

        def evaluate(state):
            images = method.images(state)
            due = (state.round > 0) & (state.round % SSIM_EVERY == 0)
            similarity = jax.lax.cond(
                due,
                lambda: metrics.ssim(images, problem.truth),
                lambda: jnp.full((), -jnp.inf, images.dtype),
            )
            return metrics.psnr(images, problem.truth), similarity

        algorithm = federated.with_evaluation(method.algorithm, evaluate)
        state = algorithm.init(method.start, draw.clients, key=jax.random.key(2))
        _, infos = federated.run(
            algorithm, state, draw.clients, num_rounds=num_rounds, key=jax.random.key(3)
        )
        sent = jnp.sum(infos.uplink_bytes, axis=1), jnp.sum(infos.downlink_bytes, axis=1)
        return infos.evaluation, sent, infos.metrics.residual_norm

    def every_draw(*leaves):
        problem = jax.tree.unflatten(structure, leaves)._replace(forward=forward)
        # One draw after the other: at n = 100 a round of CompJF 20 takes 35 ms by lax.map and 30
        # by vmap, one of FIRM 19 and 22, but vmap computes both branches of every cond, and
        # compiles for longer (5.5 instead of 3.2 s).
        return jax.lax.map(functools.partial(one, problem), problem.draws)

    return jax.jit(every_draw).lower(*shapes).compile()


@jax.jit
def stopping_rounds(residual_norms: Array, draws: Draw) -> dict[str, Array]:
    """Find the state that each stopping rule returns, the last one where it never stops.

    Args:
        residual_norms: Residual norm of every client's image that entered a round, shape (draws,
            rounds, clients).
        draws: The data, with the noise that the rules may know.

    Returns:
        The round that this state enters, shape (draws,), by rule: the pooled residual, every
        client's own, the paper's, `stopping.corrected` with the true and with the estimated noise.
    """

    def one(arguments):
        norms, draw = arguments
        data, levels = draw.clients, draw.noise_levels
        counts = stopping.num_measurements(data)
        estimated = jax.vmap(noise.difference_deviation)(data.targets, data.mask)
        rules = {
            "pooled": stopping.discrepancy(levels, counts),
            "each": stopping.every_client(stopping.noise_thresholds(levels, counts)),
            "paper": stopping.every_client(stopping.noisy_maximum_thresholds(data, draw.sigma)),
            "corrected": stopping.corrected(levels, counts),
            "estimated": stopping.corrected(estimated, counts),
        }
        # Of a record the rules read nothing but the residual norms.
        metrics_ = local.ReconstructionMetrics(norms**2 / 2, norms)
        nothing = jnp.zeros(norms.shape, jnp.int32)
        infos = protocol.RoundInfo(metrics_.loss, jnp.ones_like(norms), nothing, nothing, metrics_)
        return {name: stopping.replay(rule, infos).best for name, rule in rules.items()}

    return jax.lax.map(one, (residual_norms, draws))


def rows(table: str, problem: Problem, records: dict[str, Record]) -> list[dict[str, Any]]:
    """Summarise records, one row for every method and draw.

    Bytes of a round are a mean over the rounds, and cumulative ones those of all rounds before the
    state was reached, over all clients in both directions. `bytes_to_firm` is what it took to come
    within .02 dB of FIRM's best PSNR on the same draw, "" where that was not reached.

    Args:
        table: Name of the table.
        problem: The problem of all records.
        records: Record of every method.
    """
    return [
        _row(table, label, name, record, draw, records.get("FIRM"))
        for draw, label in enumerate(problem.labels)
        for name, record in records.items()
    ]


def tabulate(
    table: str,
    problem: Problem,
    names: Sequence[str],
    num_rounds: int,
) -> list[dict[str, Any]]:
    """Run methods by name and summarise them: `run`, then `rows`.

    Args:
        table: Name of the table.
        problem: Data.
        names: Names of the methods.
        num_rounds: Number of rounds, more than `SSIM_EVERY`.
    """
    records = {name: run(name, problem, num_rounds) for name in names}
    return rows(table, problem, records)


def _row(table, label, name, record, draw, yardstick) -> dict[str, Any]:
    curve = record.psnr[draw]
    best = int(np.argmax(curve))
    traffic = np.concatenate([[0], np.cumsum(record.uplink[draw] + record.downlink[draw])])
    similarity = record.ssim[draw][np.isfinite(record.ssim[draw])]
    row = {
        "table": table,
        **label,
        "method": name,
        "best_psnr": float(curve[best]),
        "best_round": best,
        "final_psnr": float(curve[-1]),
        "best_ssim": float(similarity.max()),
        "final_ssim": float(similarity[-1]),
    }
    for rule, stops in record.stops.items():
        stop = int(stops[draw])
        row |= {f"psnr_at_{rule}": float(curve[stop]), f"round_of_{rule}": stop}
    to_firm: int | str = ""
    if yardstick is not None:
        reached = curve >= yardstick.psnr[draw].max() - 0.02
        to_firm = int(traffic[np.argmax(reached)]) if reached.any() else ""
    return {
        **row,
        "uplink_bytes": int(record.uplink[draw].mean()),
        "downlink_bytes": int(record.downlink[draw].mean()),
        "bytes_to_best": int(traffic[best]),
        "bytes_to_firm": to_firm,
        "ms_per_round": 1e3 * record.seconds,
    }
