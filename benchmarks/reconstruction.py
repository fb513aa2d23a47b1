"""Federated reconstruction: every method, and what low rank costs beside projections.

`quality` at n = 100 is the setting of the reference figures (pixel-driven splatting, 40 views,
data from the same operator), so its best PSNR stands beside them. The data of all other tables
come from closed-form sinograms, of `operators` from real images. Each table is a function of the
size and can be run by itself with `--only`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import costs, held_out, problems, reference, runs
from benchmarks.metrics import psnr as psnr
from benchmarks.metrics import ssim as ssim
from benchmarks.problems import Problem
from benchmarks.reconstruction_figures import draw as draw
from fedlr.federated import ranks

CORES = None
SIGMAS = reference.SIGMAS
Rows = list[dict[str, Any]]

# The methods whose PSNR over the rounds is kept for a figure.
CURVES = ("single client", "FIRM", "FedAvg", "CompJF 20", "CompRandJF 20", "FullDecomp 20")


def _named(family: str, *arguments: int) -> tuple[str, ...]:
    return tuple(f"{family} {argument}" for argument in arguments)


DENSE = ("FIRM", "single client", "FIRM+", "FedPGD", "FedAvg")
QUALITY = (
    *DENSE,
    *_named("factor averaging", 20, 41),
    "low rank without coupling 20",
    *_named("CompJF", 10, 20, 30, 41),
    *_named("CompRandJF", 10, 20, 30, 41),
    *_named("FullDecomp", 10, 20, 41),
    "CompJF 35,10,14,16",
    "CompRandJF 35,10,14,16",
    *_named("Top-k", 2200, 4940),
    "CSR 4890",
    *_named("Top-k increments", 2200, 4940),
    *_named("Top-k increments with feedback", 2200, 4940),
    "quantized 8",
    "growing ranks, known noise 41",
    "growing ranks, estimated noise 41",
    "low-rank descent 20",
    "FIRM + TV",
    "CompJF 30 + TV",
    "CompJF 20 + TV",
    "CompRandJF 30 + TV",
)
TOY_QUALITY = (
    "FIRM",
    "single client",
    "FedAvg",
    "low rank without coupling 3",
    "CompJF 4,3,2,2",
    "FullDecomp 3",
    "Top-k increments with feedback 60",
    "low-rank descent 3",
)
LARGE = (
    "FIRM",
    "single client",
    "FIRM+",
    "FedAvg",
    *_named("CompJF", 20, 40, 60, 80, 100),
    *_named("CompRandJF", 20, 40, 60, 80, 100),
    "FullDecomp 40",
    "growing ranks, known noise 103",
    "growing ranks, estimated noise 103",
    "FIRM + TV",
)


def _is_small(size: str) -> bool:
    return size == "small"


def quality(size: str) -> Rows:
    """Tabulate all methods in the setting of the reference figures, with margins over FIRM."""
    if _is_small(size):
        side, views, names, rounds = 16, 6, TOY_QUALITY, ((1, 6),)
    else:
        # Three noise seeds; the best round of all but the slowest methods is below 120.
        side, views, names, rounds = 100, 40, QUALITY, ((1, 250), (2, 120), (3, 120))
    lengths = sorted({length for _, length in rounds}, reverse=True)
    table, curves = [], []
    for length in lengths:
        seeds = [seed for seed, own in rounds if own == length]
        problem = problems.splatting_problem(side, views, SIGMAS, seeds)
        records = {name: runs.run(name, problem, length) for name in names}
        table += runs.rows("quality", problem, records)
        if 1 in seeds:
            curves = _curves(problem, records)
    for row in table:
        known = reference.best_psnr(row["method"], row["sigma"], row["seed"])
        known = None if _is_small(size) else known
        row["reference_psnr"] = "" if known is None else known
        row["difference_db"] = "" if known is None else row["best_psnr"] - known
    first = [row for row in table if row["seed"] == 1]
    return [*table, *margins(table, min(lengths)), *claims("claims", first), *curves]


def _curves(problem: Problem, records: dict[str, runs.Record]) -> Rows:
    """Keep the PSNR over the rounds of some methods, with the corrected stop."""
    return [
        {
            "table": "curves",
            **label,
            "method": name,
            "round_of_corrected": int(record.stops["corrected"][index]),
            "psnr": [round(float(value), 3) for value in record.psnr[index]],
        }
        for index, label in enumerate(problem.labels)
        for name, record in records.items()
        if name in CURVES
    ]


def margins(table: Rows, num_rounds: int) -> Rows:
    """Average over the noise seeds how far the best PSNR of a method is above that of FIRM.

    Only runs of one length are compared: one that got better after the first `num_rounds`, which
    every seed has, is left out of the mean, the spread and the count of seeds.
    """
    best = {
        (row["method"], row["sigma"], row["seed"]): row["best_psnr"]
        for row in table
        if row["best_round"] < num_rounds
    }
    found = []
    for method, sigma in dict.fromkeys((row["method"], row["sigma"]) for row in table):
        seeds = [seed for name, level, seed in best if (name, level) == (method, sigma)]
        over = [best[method, sigma, seed] - best["FIRM", sigma, seed] for seed in seeds]
        known = reference.margin(method, sigma)
        found.append(
            {
                "table": "margins",
                "method": method,
                "sigma": sigma,
                "num_seeds": len(seeds),
                "mean_margin_db": float(np.mean(over)),
                "spread_db": float(np.ptp(over)),
                "reference_margin_db": "" if known is None else known,
            }
        )
    return found


def claims(table: str, rows: Rows) -> Rows:
    """Draw the conclusions from the rows of one draw at every noise level."""
    found = []
    for sigma in sorted({row["sigma"] for row in rows}):
        best = {row["method"]: row["best_psnr"] for row in rows if row["sigma"] == sigma}
        low_rank = {
            name: value
            for name, value in best.items()
            if name.startswith("Comp") and not name.endswith("TV")
        }
        winner = max(low_rank, key=lambda name: low_rank[name])
        found.append(
            {
                "table": table,
                "n": rows[0]["n"],
                "sigma": sigma,
                "best_low_rank": winner,
                "low_rank_minus_firm_db": low_rank[winner] - best["FIRM"],
                "firm_minus_fedavg_db": best["FIRM"] - best["FedAvg"],
                "firm_minus_single_db": best["FIRM"] - best["single client"],
            }
        )
    return found


def quality_large(size: str) -> Rows:
    """Tabulate the methods at n = 250 with data in closed form."""
    if _is_small(size):
        problem, names, rounds = _toy(), ("FIRM", "single client", "FedAvg", "CompJF 3"), 6
    else:
        problem, names, rounds = problems.closed_form_problem(250, 100, SIGMAS), LARGE, 150
    rows = runs.tabulate("quality_large", problem, names, rounds)
    return [*rows, *claims("claims_large", rows)]


def bases(size: str) -> Rows:
    """Compare the best PSNR of cheap basis finders, everywhere, with that of the exact ones."""
    rank, rounds = (3, 6) if _is_small(size) else (40, 100)
    problem = _toy() if _is_small(size) else problems.closed_form_problem(250, 100, SIGMAS)
    names = _named("CompJF", rank)
    names += _named("CompJF warm everywhere", rank)
    if not _is_small(size):
        names += _named("CompJF sketched everywhere", rank)
    return _beside_exact(runs.tabulate("bases", problem, names, rounds))


def sketch(size: str) -> Rows:
    """Compare the best PSNR of cheap joint bases with that of CompJF, over the ranks."""
    if _is_small(size):
        families, cases = ("CompJF warm everywhere",), [(_toy(), (3,), 6)]
    else:
        families = ("CompRandJF", "CompRandJF p=0 q=1", "CompRandJF p=10 q=0")
        families += ("CompRandJF p=10 q=1", "CompJF warm")
        cases = [
            (problems.splatting_problem(100, 40, SIGMAS, (1,)), (10, 20, 30, 41), 120),
            (problems.closed_form_problem(250, 100, SIGMAS), (20, 40), 100),
        ]
    rows = []
    for problem, sizes, rounds in cases:
        for rank in sizes:
            names = [f"{family} {rank}" for family in ("CompJF", *families)]
            table = _beside_exact(runs.tabulate("sketch", problem, names, rounds))
            rows += [{**row, "rank": rank} for row in table]
    return rows


def _beside_exact(rows: Rows) -> Rows:
    """Add how far the best PSNR is above that of the first method on the same draw."""
    first = rows[0]["method"]
    exact = {row["sigma"]: row["best_psnr"] for row in rows if row["method"] == first}
    return [{**row, "difference_db": row["best_psnr"] - exact[row["sigma"]]} for row in rows]


def speed(size: str) -> Rows:
    """Compare the low-rank part of a CompJF round with its projections, by wall and CPU time."""
    rank, repeats = (3, 2) if _is_small(size) else (40, 15)
    problem = _toy() if _is_small(size) else problems.closed_form_problem(250, 100, (0.05,))
    families = {
        "CompJF": "exact",
        "CompRandJF": "sketched joint basis",
        "CompJF sketched everywhere": "sketched everywhere",
        "CompJF warm everywhere": "warm started",
    }
    if _is_small(size):
        families = {"CompJF warm everywhere": "warm started"}
    rows = costs.round_costs(problem, [f"{family} {rank}" for family in families], repeats)
    return [
        {"table": "speed", "rank": rank, "bases": label, **row}
        for row, label in zip(rows, families.values(), strict=True)
    ]


def dense(size: str) -> Rows:
    """Compare rounds that send dense images, with several servers, with one of FIRM."""
    if _is_small(size):
        cases, repeats = [_toy()], 2
    else:
        cases = [
            problems.splatting_problem(100, 40, SIGMAS[:1], (1,)),
            problems.closed_form_problem(250, 100, SIGMAS[:1]),
        ]
        repeats = 100
    rows = []
    for problem in cases:
        firm, *others = costs.round_costs(problem, ("FIRM", "FIRM+", "FedPGD"), repeats)
        for row in (firm, *others):
            cpu = (1 + row["low_rank_share_cpu"]) / (1 + firm["low_rank_share_cpu"])
            rows.append(
                {
                    "table": "dense",
                    "n": row["n"],
                    "clients": row["clients"],
                    "method": row["method"],
                    "round_ms": row["round_ms"],
                    "times_firm": row["round_ms"] / firm["round_ms"],
                    "times_firm_cpu": cpu,
                }
            )
    return rows


def traces(size: str) -> Rows:
    """Count how often three rounds of CompJF are traced, of images and of volumes."""
    if _is_small(size):
        cases = [(_toy(), "CompJF 3")]
    else:
        cases = [
            (problems.splatting_problem(100, 40, SIGMAS[:1], (1,)), "CompJF 20"),
            (problems.volume_problem(96, 40, 0.05, 8), "CompJF 24"),
        ]
    return [
        {
            "table": "traces",
            "shape": "x".join(map(str, problem.truth.shape)),
            "method": name,
            "three_rounds": costs.num_traces(problem, name),
        }
        for problem, name in cases
    ]


def sweep(size: str) -> Rows:
    """Vary rank and noise together, and mark the rows that are not dominated in their noise level.

    A row is dominated if another one reached at least its best PSNR with at most its cumulative
    bytes, and is better in one of the two.
    """
    if _is_small(size):
        problem, sizes, rounds = _toy(), (3,), 6
    else:
        problem = problems.closed_form_problem(250, 100, (0.01, 0.02, 0.05, 0.1, 0.2))
        sizes, rounds = (10, 20, 40, 60, 100, 150), 100
    families = ("CompJF",) if _is_small(size) else ("CompJF", "CompRandJF")
    names = ["FIRM", *(name for family in families for name in _named(family, *sizes))]
    rows = runs.tabulate("sweep", problem, names, rounds)
    return [{**row, "rank": _rank(row["method"]), "pareto": undominated(row, rows)} for row in rows]


def _rank(method: str) -> int | str:
    last = method.rpartition(" ")[2]
    return int(last) if last.isdigit() else ""


def undominated(row: dict[str, Any], rows: Rows) -> bool:
    """Say whether no row of the same noise level dominates this one, see `sweep`."""

    def dominates(other):
        fewer, row_bytes = other["bytes_to_best"], row["bytes_to_best"]
        better, row_best = other["best_psnr"], row["best_psnr"]
        return (
            fewer <= row_bytes and better >= row_best and (fewer, better) != (row_bytes, row_best)
        )

    return not any(dominates(other) for other in rows if other["sigma"] == row["sigma"])


def clients(size: str) -> Rows:
    """Vary the number of clients, coupled by the mean of all others."""
    if _is_small(size):
        counts, side, views, rounds = (3,), 16, 6, 6
        names = ("growing ranks, estimated noise 4",)
    else:
        counts, side, views, rounds = (4, 8, 16, 32), 128, 51, 100
        names = ("FIRM", "CompJF 26", "CompRandJF 26", "growing ranks, estimated noise 53")
    return [
        row
        for count in counts
        for row in runs.tabulate(
            "clients",
            problems.closed_form_problem(
                side, views, (0.05,), coefficients=problems.equal_coefficients(count)
            ),
            names,
            rounds,
        )
    ]


def server(size: str) -> Rows:
    """Time the server's joint factorization over the number of clients."""
    setting = (16, 3, (2, 3), 2) if _is_small(size) else (512, 40, (4, 8, 16, 32, 64), 9)
    return [{"table": "server", **row} for row in costs.server_times(*setting)]


def sizes(size: str) -> Rows:
    """Vary the size of the images, at 0.4 n views and rank n/5."""
    cases = ((16, 6),) if _is_small(size) else ((128, 120), (250, 120), (512, 60))
    sigmas = SIGMAS if _is_small(size) else SIGMAS[:1]
    rows = []
    for side, rounds in cases:
        rank = round(side / 5)
        names = ["FIRM", f"CompJF {rank}", f"CompRandJF {rank}"][: 1 if _is_small(size) else 3]
        problem = problems.closed_form_problem(side, round(0.4 * side), sigmas)
        table = runs.tabulate("sizes", problem, names, rounds)
        dense = 4 * math.prod(problem.truth.shape)
        rows += [{**row, "compression_ratio": dense / row["uplink_bytes"]} for row in table]
    return rows


def heterogeneous(size: str) -> Rows:
    """Draw the ranks of the clients from 20 to 100, with three keys."""
    if _is_small(size):
        problem, rounds, low, high, keys = _toy(), 6, 2, 4, (0,)
    else:
        problem, rounds = problems.closed_form_problem(250, 100, SIGMAS), 150
        low, high, keys = 20, 100, (0, 1, 2)
    drawn = [ranks.draw(4, low, high, key=jax.random.key(key))[:, 0].tolist() for key in keys]
    families = ("CompJF", "CompRandJF")[: 1 if _is_small(size) else 2]
    names = [f"{family} {','.join(map(str, own))}" for own in drawn for family in families]
    return runs.tabulate("heterogeneous", problem, ["FIRM", *names], rounds)


def volumes(size: str) -> Rows:
    """Reconstruct volumes of eight clients, and scale their size and number."""
    if _is_small(size):
        main, rounds, repeats, scaling = (12, 3), 6, 1, ()
        names = ("FIRM",)
    else:
        main, rounds, repeats = (96, 8), 20, 5
        scaling = ((48, 8), (64, 8), (64, 2), (64, 4))
        names = ("CompJF 24", "CompRandJF 24", "CompJF sketched everywhere 24")
        names += ("CompJF warm everywhere 24", "FIRM")
    side, count = main
    views = 6 if _is_small(size) else 40
    problem = problems.volume_problem(side, views, 0.05, count)
    rows = costs.round_costs(problem, names, repeats)
    kept = [name for name in names if "sketched" not in name]
    table = runs.tabulate("volume_quality", problem, kept, rounds)
    for other, others in scaling:
        smaller = problems.volume_problem(other, views, 0.05, others)
        pair = [f"{family} {other // 4}" for family in ("CompJF", "CompJF warm everywhere")]
        rows += costs.round_costs(smaller, pair, repeats)
    return [*({"table": "volumes", **row} for row in rows), *table]


def operators(size: str) -> Rows:
    """Reconstruct a photograph and a hyperspectral cube from several kinds of measurements."""
    cases = _measured(size)
    names = ("FIRM + TV",) if _is_small(size) else ()
    rows = []
    for label, image, weights, kinds, rank in cases:
        own = names or _operator_methods(rank)
        for kind in kinds:
            problem = problems.measured_problem(image, weights, kind, 0.05)
            rounds = 6 if _is_small(size) else 150
            table = runs.tabulate("operators", problem, own, rounds)
            rows += [{"data": label, **row} for row in table]
    return rows


def _operator_methods(rank: int) -> tuple[str, ...]:
    low_rank = (f"CompJF {rank}", f"CompRandJF {rank}", f"FullDecomp {rank}")
    return ("FIRM", "single client", *low_rank, "FIRM + TV")


def _measured(size: str) -> list[tuple]:
    """Name, image, weights, operators and rank of the real data."""
    everything = tuple(problems.OPERATORS)
    if _is_small(size):
        cube = problems.hyperspectral_cube(2, 16)
        photo = problems.photograph(16)
        return [
            ("photograph", photo, problems.LUMINANCE, everything[3:], 3),
            ("cube", cube, (0.5, 0.5), everything[:3], 3),
        ]
    cube = problems.hyperspectral_cube(6)
    return [
        ("photograph", problems.photograph(128), problems.LUMINANCE, everything, 26),
        ("cube", cube, (1 / 6,) * 6, everything[:2], 29),
    ]


def _toy() -> Problem:
    return problems.closed_form_problem(16, 6, SIGMAS)


def hidden(size: str) -> Rows:
    """Stop where measurements that were held out fit best."""
    if _is_small(size):
        problem, names, rounds = problems.splatting_problem(16, 6, SIGMAS, (1,)), ("FIRM",), 6
    else:
        problem, rounds = problems.splatting_problem(100, 40, SIGMAS, (1,)), 120
        names = (
            "FIRM",
            "FIRM + TV",
            *_named("CompJF", 20),
            *_named("factor averaging", 20),
            *_named("Top-k", 2200, 4940),
        )
    return [{"table": "hidden", **row} for row in held_out.rows(problem, names, rounds)]


TABLES: Mapping[str, Callable[[str], Rows]] = {
    "quality": quality,
    "quality_large": quality_large,
    "hidden": hidden,
    "bases": bases,
    "speed": speed,
    "dense": dense,
    "traces": traces,
    "sweep": sweep,
    "clients": clients,
    "server": server,
    "sizes": sizes,
    "heterogeneous": heterogeneous,
    "sketch": sketch,
    "volumes": volumes,
    "operators": operators,
}
"""The tables by name: "small" is a toy that checks the code, "full" the real settings."""


def run(size: str, only: Sequence[str] | None = None) -> Rows:
    """Run all tables, or some.

    Args:
        size: "small" or "full".
        only: Names of `TABLES`; None for all.

    Returns:
        The rows of all of them.
    """
    return [row for name in only or TABLES for row in TABLES[name](size)]
