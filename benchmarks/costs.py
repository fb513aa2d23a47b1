"""What a compiled round costs beside its projections, and the server's factorization alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import methods, timing
from benchmarks.problems import Problem
from fedlr import federated, subspace, tucker
from fedlr.federated import execution, local

__all__ = ["num_traces", "round_costs", "server_times"]

_KEY = jax.random.key(0)


def round_costs(problem: Problem, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Compare one round of methods with the projections of the same round.

    The low-rank share is what the round takes beyond the gradient steps of all clients, relative
    to these, by wall and by CPU time.

    Args:
        problem: Data; the first draw is used.
        names: Names of the methods.
        repeats: Number of timed calls of each.

    Returns:
        One row for every method.
    """
    draw = problem.draw(0)
    clients, everyone = draw.clients, jnp.arange(len(problem.truth))
    step = local.projected_gradient(problem.forward, step_size=problem.step_size)

    @jax.jit
    def project(images, clients):
        return execution.map_clients(
            lambda image, data: step(image, (), data, key=_KEY)[0], images, clients
        )

    calls, memory, traffic = {"": partial(project, problem.truth, clients)}, {}, {}
    for name in names:
        algorithm = methods.build(name, problem, draw).algorithm
        state = jax.jit(algorithm.init)(problem.truth, clients, key=_KEY)
        state, infos = federated.run(algorithm, state, clients, num_rounds=2, key=_KEY)
        advance = jax.jit(lambda s, data, a=algorithm: a.round(s, data, everyone, key=_KEY)[0])
        compiled = advance.lower(state, clients).compile()
        calls[name] = partial(compiled, state, clients)
        analysis = compiled.memory_analysis()
        memory[name] = 0 if analysis is None else analysis.temp_size_in_bytes
        traffic[name] = int(infos.uplink_bytes[-1].sum()), int(infos.downlink_bytes[-1].sum())
    times = timing.measure(calls, repeats=repeats)
    base = times.pop("")
    return [
        {
            "n": problem.truth.shape[-1],
            "clients": len(problem.truth),
            "method": name,
            "projections_ms": 1e3 * base.wall_min,
            "round_ms": 1e3 * t.wall_min,
            "low_rank_share": t.wall_min / base.wall_min - 1.0,
            "low_rank_share_cpu": t.cpu_min / base.cpu_min - 1.0,
            "temporary_bytes": memory[name],
            "uplink_bytes": traffic[name][0],
            "downlink_bytes": traffic[name][1],
        }
        for name, t in times.items()
    ]


def num_traces(problem: Problem, name: str) -> int:
    """Count how often three rounds of a method trace the round.

    Args:
        problem: Data.
        name: Name of the method.
    """
    counts = []
    draw = problem.draw(0)

    def counted(image, inputs):
        counts.append(None)
        return problem.forward(image, inputs)

    method = methods.build(name, problem._replace(forward=counted), draw)
    algorithm, everyone = method.algorithm, jnp.arange(len(problem.truth))
    state = jax.jit(algorithm.init)(method.start, draw.clients, key=_KEY)
    advance = jax.jit(lambda s, data: algorithm.round(s, data, everyone, key=_KEY)[0])
    state = advance(state, draw.clients)
    before = len(counts)
    advance(advance(state, draw.clients), draw.clients)
    return 1 + len(counts) - before


def server_times(size: int, rank: int, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time the server's joint factorization and change of basis on random matrices.

    Args:
        size: Side of the images.
        rank: Rank of every message and of the joint factors.
        counts: Numbers of clients.
        repeats: Number of timed calls of each.

    Returns:
        One row for every number of clients and basis finder, each with the least-squares slope of
        the finder's time over the numbers of clients.
    """
    kinds = {
        "exact": lambda *_: subspace.gram(),
        "sketched p=0 q=0": partial(_sketched, 0, 0),
        "sketched p=10 q=0": partial(_sketched, 10, 0),
        "sketched p=10 q=1": partial(_sketched, 10, 1),
        "warm started": lambda previous, _: subspace.warm_started(previous),
    }

    def join(finder, messages, previous, key):
        factors = tucker.joint_factors(messages, (rank, rank), basis=finder(previous, key))
        return factors, jax.vmap(lambda tensor: tucker.project_core(tensor, factors))(messages)

    compiled = {name: jax.jit(partial(join, finder)) for name, finder in kinds.items()}
    times = {}
    for count in counts:
        messages, previous = _messages(count, size, rank)
        calls = {
            name: partial(function, messages, previous, _KEY) for name, function in compiled.items()
        }
        for name, t in timing.measure(calls, repeats=repeats).items():
            times.setdefault(name, []).append(1e3 * t.wall_min)
    slopes = {name: np.polyfit(counts, ms, 1)[0] for name, ms in times.items()}
    return [
        {
            "n": size,
            "rank": rank,
            "clients": count,
            "bases": name,
            "server_ms": ms[index],
            "slope_ms_per_client": float(slopes[name]),
        }
        for name, ms in times.items()
        for index, count in enumerate(counts)
    ]


def _sketched(oversampling, power_iters, previous, key):
    del previous
    return subspace.randomized(key=key, oversampling=oversampling, power_iters=power_iters)


def _messages(count: int, size: int, rank: int):
    """Draw messages with orthonormal factors, and earlier joint factors."""
    keys = jax.random.split(jax.random.key(7), 4)

    def orthonormal(key, *leading):
        return jnp.linalg.qr(jax.random.normal(key, (*leading, size, rank)))[0]

    core = jax.random.normal(keys[0], (count, rank, rank))
    factors = orthonormal(keys[1], count), orthonormal(keys[2], count)
    previous = orthonormal(keys[3])
    return tucker.TuckerTensor(core, factors), (previous, previous)
