"""Federated reconstruction: quality of every method, and what low rank costs beside projections.

Three tables. `quality` at n = 100 is the setting of the reference figures (pixel-driven splatting,
40 views, data from the same operator), so its best PSNR stands beside them; at n = 250 the data
come from closed-form sinograms (100 views) and the projector is the library's. `speed` compares,
at n = 250 and rank 40, the low-rank part of a round (client truncation, joint factors, coupling)
with the projections of the same round. `claims` draws the conclusions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import splatting, timing
from fedlr import federated, phantoms, synthetic, tomography
from fedlr.algorithms import comp_jf, fedavg, firm, local_only
from fedlr.federated import coupling, execution, local, protocol, stopping

CORES = None

# Best PSNR at n = 100 of the reference, float32 NumPy, by method and noise level.
REFERENCE = {
    ("single client", 0.05): 21.09,
    ("single client", 0.1): 19.08,
    ("FIRM", 0.05): 21.46,
    ("FIRM", 0.1): 19.45,
    ("FIRM+", 0.05): 21.46,
    ("FIRM+", 0.1): 19.45,
    ("FedAvg", 0.05): 17.03,
    ("FedAvg", 0.1): 16.54,
    ("CompJF 10", 0.05): 20.42,
    ("CompJF 10", 0.1): 19.85,
    ("CompJF 20", 0.05): 21.98,
    ("CompJF 20", 0.1): 20.18,
    ("CompJF 30", 0.05): 21.93,
    ("CompJF 30", 0.1): 20.02,
    ("CompJF 41", 0.05): 21.84,
    ("CompJF 41", 0.1): 19.89,
    ("CompRandJF 10", 0.05): 19.62,
    ("CompRandJF 10", 0.1): 19.05,
    ("CompRandJF 20", 0.05): 21.52,
    ("CompRandJF 20", 0.1): 20.08,
    ("CompRandJF 30", 0.05): 21.91,
    ("CompRandJF 30", 0.1): 20.29,
    ("CompRandJF 41", 0.05): 21.97,
    ("CompRandJF 41", 0.1): 20.18,
    ("CompJF 35,10,14,16", 0.05): 21.97,
    ("CompJF 35,10,14,16", 0.1): 20.20,
    ("CompRandJF 35,10,14,16", 0.05): 21.96,
    ("CompRandJF 35,10,14,16", 0.1): 20.24,
}
HETEROGENEOUS = (35, 10, 14, 16)
SIGMAS = (0.05, 0.1)


class Problem(NamedTuple):
    """Scans of coupled images, with a leading axis of noise draws on clients and noise levels."""

    forward: Callable[[Array, Any], Array]
    clients: protocol.ClientData
    truth: Array
    noise_levels: Array
    coefficients: Array


class Method(NamedTuple):
    """A federated algorithm, the start its `init` wants, and how to see its images."""

    algorithm: protocol.FederatedAlgorithm
    start: Array
    images: Callable[[protocol.FederatedState], Array]


def splatting_problem(size: int, num_angles: int, sigmas: tuple[float, ...]) -> Problem:
    """Build the setting of the reference figures: one operator for data and reconstruction."""
    ellipses = phantoms.reference_set(dtype=jnp.float32)
    truth = jax.vmap(lambda e: phantoms.rasterize(e, size, subsamples=1))(ellipses)
    angles = synthetic.uniform_angles(num_angles)
    clean = np.asarray(jax.vmap(lambda image: splatting.project(image, angles))(truth))
    peaks = clean.max(axis=(1, 2))
    scans, levels = [], []
    for sigma in sigmas:
        rng = np.random.default_rng(1)
        noise = np.stack([rng.standard_normal(clean.shape[1:]) for _ in clean])
        levels.append(sigma * peaks)
        scans.append((clean + levels[-1][:, None, None] * noise).astype(np.float32))
    return _problem(splatting.project, scans, levels, angles, truth, (0.5, 0.3, 0.2))


def closed_form_problem(size: int, num_angles: int, sigmas: tuple[float, ...]) -> Problem:
    """Build scans from closed-form sinograms, to be reconstructed with the library's projector."""
    geometry = tomography.ParallelBeam(
        shape=(size, size), num_bins=math.ceil(math.sqrt(2.0) * size)
    )
    angles = synthetic.uniform_angles(num_angles)
    sets = [
        synthetic.multimodal_scans(geometry, angles, sigma=sigma, key=jax.random.key(1))
        for sigma in sigmas
    ]
    return _problem(
        partial(tomography.project, geometry),
        [scan.sinograms for scan in sets],
        [scan.noise_levels for scan in sets],
        angles,
        sets[0].images,
        sets[0].coefficients,
    )


def _problem(forward, scans, levels, angles, truth, coefficients) -> Problem:
    """Stack the noise draws."""
    targets = jnp.stack([jnp.asarray(scan) for scan in scans])
    draws, count, views = targets.shape[:3]
    clients = protocol.ClientData(
        inputs=jnp.broadcast_to(angles, (draws, count, views)),
        targets=targets,
        mask=jnp.ones((draws, count, views), bool),
    )
    return Problem(forward, clients, truth, jnp.stack(levels), jnp.asarray(coefficients))


def methods(
    problem: Problem, start: Array, step_size: Array, ranks: dict[str, tuple[int, ...]]
) -> dict[str, Method]:
    """Build the methods by name.

    Args:
        problem: Gives the forward model and the coupling.
        start: Stacked start images (clients, n, n).
        step_size: Gradient step of every method.
        ranks: Label of a rank setting and the rank of every client in it.
    """
    forward, coefficients = problem.forward, problem.coefficients
    gradient = local.projected_gradient(forward, step_size=step_size)

    def repeated(state):
        return jnp.broadcast_to(state.params, start.shape)

    def own(state):
        return state.params

    dense = partial(firm.build, forward, coefficients, step_size=step_size)
    built = {
        "FedAvg": Method(fedavg.build(gradient), start[0], repeated),
        "single client": Method(local_only.build(gradient), start[0], own),
        "FIRM": Method(dense(), start, own),
        "FIRM+": Method(dense(server=coupling.augmented_lagrangian), start, own),
    }
    for name, basis in {"CompJF": comp_jf.exact(), "CompRandJF": comp_jf.sketched()}.items():
        for label, each in ranks.items():
            algorithm = comp_jf.build(
                forward,
                coefficients,
                ranks=(max(each), max(each)),
                client_ranks=jnp.asarray([(rank, rank) for rank in each]),
                joint_basis=basis,
                step_size=step_size,
            )
            built[f"{name} {label}"] = Method(algorithm, start, comp_jf.images)
    return built


def trajectory(method: Method, problem: Problem, num_rounds: int) -> tuple[Array, Any]:
    """Run a method on every noise draw; the images that entered each round, and its infos."""
    algorithm = federated.with_evaluation(method.algorithm, method.images)

    @jax.jit
    def run(start, draws):
        def one(clients):
            state = algorithm.init(start, clients, key=jax.random.key(2))
            _, infos = federated.run(
                algorithm, state, clients, num_rounds=num_rounds, key=jax.random.key(3)
            )
            return infos.evaluation, infos._replace(evaluation=())

        return jax.lax.map(one, draws)

    return run(method.start, problem.clients)


def psnr(images: Array, truth: Array) -> Array:
    """Return the mean PSNR over clients in dB, each with the largest truth value as its range."""
    peak = jnp.max(truth, axis=(-2, -1))
    error = jnp.mean((images - truth) ** 2, axis=(-2, -1))
    return jnp.mean(10.0 * jnp.log10(peak**2 / error), axis=-1)


def ssim(images: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean SSIM over clients: 7 x 7 uniform window, range of each client's truth."""
    from skimage.metrics import structural_similarity  # a peer, not needed by the library

    return float(
        np.mean(
            [
                structural_similarity(t, x, data_range=float(t.max() - t.min()))
                for x, t in zip(images, truth, strict=True)
            ]
        )
    )


def quality(problem: Problem, sigmas, ranks, num_rounds: int, every: int = 5) -> list[dict]:
    """Tabulate PSNR, SSIM, stops and bytes of every method at every noise level."""
    size = problem.truth.shape[-1]
    start = jnp.zeros_like(problem.truth)
    first = jax.tree.map(lambda leaf: leaf[0], problem.clients)
    lipschitz = jax.jit(lambda c: local.operator_norm(problem.forward, c, start[0], key=_KEY))
    step_size = 1.0 / lipschitz(first)
    truth = np.asarray(problem.truth)
    rows = []
    for name, method in methods(problem, start, step_size, ranks).items():
        images, infos = trajectory(method, problem, num_rounds)
        curves = np.asarray(jax.vmap(jax.vmap(lambda x: psnr(x, problem.truth)))(images))
        for draw, sigma in enumerate(sigmas):
            curve = curves[draw]
            best = int(curve.argmax())
            record = jax.tree.map(lambda leaf: leaf[draw], infos)  # noqa: B023
            data = jax.tree.map(lambda leaf: leaf[draw], problem.clients)  # noqa: B023
            stops = stopping_rounds(record, data, problem.noise_levels[draw], sigma)
            checked = range(every, num_rounds, every)
            similarity = [ssim(np.asarray(images[draw, t]), truth) for t in checked]
            up = int(np.asarray(infos.uplink_bytes[draw, 0]).sum())
            down = int(np.asarray(infos.downlink_bytes[draw, 0]).sum())
            rows.append(
                {
                    "table": "quality",
                    "n": size,
                    "sigma": sigma,
                    "method": name,
                    "best_psnr": float(curve[best]),
                    "best_round": best,
                    "final_psnr": float(curve[-1]),
                    "best_ssim": max(similarity),
                    "final_ssim": similarity[-1],
                    "uplink_bytes": up,
                    "downlink_bytes": down,
                    **{f"psnr_at_{rule}": float(curve[stop]) for rule, stop in stops.items()},
                    **{f"round_of_{rule}": stop for rule, stop in stops.items()},
                    "reference_psnr": REFERENCE.get((name, sigma), "") if size == 100 else "",
                }
            )
    return rows


def stopping_rounds(infos, clients, noise_levels, sigma: float) -> dict[str, int]:
    """Find the round where each rule stops, or the last one where it never does."""
    levels = noise_levels.astype(clients.targets.dtype)
    counts = stopping.num_measurements(clients)
    rules = {
        "pooled": stopping.discrepancy(levels, counts),
        "each": stopping.every_client(stopping.noise_thresholds(levels, counts)),
        "paper": stopping.every_client(stopping.noisy_maximum_thresholds(clients, sigma)),
    }
    fired = {name: np.asarray(jax.vmap(rule)(infos)) for name, rule in rules.items()}
    return {name: int(f.argmax()) if f.any() else len(f) - 1 for name, f in fired.items()}


def speed(size: int, num_angles: int, rank: int, repeats: int) -> list[dict]:
    """Compare the low-rank part of a CompJF round with its projections, by wall and CPU time."""
    problem = closed_form_problem(size, num_angles, (0.05,))
    clients = jax.tree.map(lambda leaf: leaf[0], problem.clients)
    start = jnp.zeros_like(problem.truth)
    step_size = 1e-4
    step = local.projected_gradient(problem.forward, step_size=step_size)
    everyone = jnp.arange(start.shape[0])
    key = jax.random.key(0)

    @jax.jit
    def project(images, clients):
        return execution.map_clients(
            lambda image, data: step(image, (), data, key=key)[0], images, clients
        )

    accurate = comp_jf.sketched(oversampling=10, power_iters=1)
    kinds = {
        "exact": (comp_jf.exact(), comp_jf.exact()),
        "sketched joint basis": (comp_jf.sketched(), comp_jf.exact()),
        "sketched everywhere": (accurate, accurate),
        "warm started": (comp_jf.warm_started(), comp_jf.warm_started()),
    }
    calls = {"projections": partial(project, problem.truth, clients)}
    for name, (joint, client) in kinds.items():
        algorithm = comp_jf.build(
            problem.forward,
            problem.coefficients,
            ranks=(rank, rank),
            joint_basis=joint,
            client_basis=client,
            step_size=step_size,
        )
        state = jax.jit(algorithm.init)(problem.truth, clients, key=key)
        state, _ = federated.run(algorithm, state, clients, num_rounds=2, key=key)
        advance = jax.jit(
            lambda state, data, a=algorithm: a.round(state, data, everyone, key=key)[0]
        )
        calls[name] = partial(advance, state, clients)
    times = timing.measure(calls, repeats=repeats)
    base = times["projections"]
    return [
        {
            "table": "speed",
            "n": size,
            "rank": rank,
            "bases": name,
            "projections_ms": 1e3 * base.wall_min,
            "round_ms": 1e3 * t.wall_min,
            "low_rank_share": t.wall_min / base.wall_min - 1.0,
            "low_rank_share_cpu": t.cpu_min / base.cpu_min - 1.0,
        }
        for name, t in times.items()
        if name != "projections"
    ]


def accurate_bases(problem: Problem, sigmas, rank: int, num_rounds: int) -> list[dict]:
    """Compare the best PSNR of cheap basis finders with that of the exact ones."""
    start = jnp.zeros_like(problem.truth)
    accurate = comp_jf.sketched(oversampling=10, power_iters=1)
    kinds = {"exact": comp_jf.exact(), "sketched": accurate, "warm": comp_jf.warm_started()}
    best = {}
    for name, basis in kinds.items():
        algorithm = comp_jf.build(
            problem.forward,
            problem.coefficients,
            ranks=(rank, rank),
            joint_basis=basis,
            client_basis=basis,
        )
        images, _ = trajectory(Method(algorithm, start, comp_jf.images), problem, num_rounds)
        curves = jax.vmap(jax.vmap(lambda x: psnr(x, problem.truth)))(images)
        best[name] = np.asarray(curves).max(axis=1)
    return [
        {
            "table": "bases",
            "n": problem.truth.shape[-1],
            "rank": rank,
            "sigma": sigma,
            "bases": name,
            "best_psnr": float(best[name][draw]),
            "difference_db": float(best[name][draw] - best["exact"][draw]),
        }
        for name in kinds
        for draw, sigma in enumerate(sigmas)
    ]


def num_traces(problem: Problem, rank: int) -> int:
    """Count how often three rounds of CompJF trace the forward model beyond the first round."""
    counts = []
    clients = jax.tree.map(lambda leaf: leaf[0], problem.clients)

    def counted(image, inputs):
        counts.append(None)
        return problem.forward(image, inputs)

    algorithm = comp_jf.build(counted, problem.coefficients, ranks=(rank, rank), step_size=1e-4)
    state = algorithm.init(jnp.zeros_like(problem.truth), clients, key=_KEY)
    advance = jax.jit(lambda s: algorithm.round(s, clients, jnp.arange(4), key=_KEY)[0])
    state = advance(state)
    before = len(counts)
    advance(advance(state))
    return 1 + len(counts) - before


def claims(rows: list[dict]) -> list[dict]:
    """Draw the conclusions from the quality tables."""
    found = []
    keys = sorted({(row["n"], row["sigma"]) for row in rows})
    for size, sigma in keys:
        best = {
            row["method"]: row["best_psnr"]
            for row in rows
            if (row["n"], row["sigma"]) == (size, sigma)
        }
        low_rank = {name: value for name, value in best.items() if name.startswith("Comp")}
        winner = max(low_rank, key=lambda name: low_rank[name])
        found.append(
            {
                "table": "claims",
                "n": size,
                "sigma": sigma,
                "best_low_rank": winner,
                "low_rank_minus_firm_db": low_rank[winner] - best["FIRM"],
                "firm_minus_fedavg_db": best["FIRM"] - best["FedAvg"],
                "firm_minus_single_db": best["FIRM"] - best["single client"],
            }
        )
    return found


_KEY = jax.random.key(0)


def run(size: str) -> list[dict]:
    """Run the tables; "small" is a toy that checks the code, "full" the real settings."""
    if size == "small":
        problem = splatting_problem(24, 8, SIGMAS)
        ranks = {"4": (4, 4, 4, 4), "5,3,4,2": (5, 3, 4, 2)}
        rows = quality(problem, SIGMAS, ranks, num_rounds=10)
        bases = accurate_bases(closed_form_problem(24, 8, SIGMAS), SIGMAS, 4, num_rounds=6)
        times = speed(24, 8, 4, repeats=2)
        traces = num_traces(problem, 4)
    else:
        reference = splatting_problem(100, 40, SIGMAS)
        uniform = {str(rank): (rank,) * 4 for rank in (10, 20, 30, 41)}
        mixed = {",".join(map(str, HETEROGENEOUS)): HETEROGENEOUS}
        rows = quality(reference, SIGMAS, uniform | mixed, num_rounds=250)
        large = closed_form_problem(250, 100, SIGMAS)
        uniform = {str(rank): (rank,) * 4 for rank in (20, 40, 60, 80, 100)}
        rows += quality(large, SIGMAS, uniform, num_rounds=150)
        bases = accurate_bases(large, SIGMAS, 40, num_rounds=100)
        times = speed(250, 100, 40, repeats=15)
        traces = num_traces(reference, 20)
    return [*rows, *claims(rows), *bases, *times, {"table": "traces", "three_rounds": traces}]
