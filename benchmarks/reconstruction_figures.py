"""Pictures of the tables of `reconstruction`, drawn from their rows."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from benchmarks import figures, methods, problems
from fedlr import federated

__all__ = ["draw"]

Rows = list[dict[str, Any]]


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw the figures for which there are rows, as PNG files.

    Args:
        rows: Rows of `reconstruction.run`, or of its JSON file.
        folder: Where to put them; made if it is missing.

    Returns:
        The files.
    """
    pictures = {
        "pareto": ("sweep", _pareto),
        "rank": ("sweep", _over_rank),
        "rounds": ("curves", _over_rounds),
        "server": ("server", _server),
        "photograph": ("operators", _photograph),
    }
    return figures.save(pictures, rows, folder)


def _panels(plt, rows: Rows, title: str):
    """Make a panel for every noise level; return the figure and (panel, rows) of each."""
    sigmas = sorted({row["sigma"] for row in rows})
    figure, axes = plt.subplots(
        1, len(sigmas), figsize=(4.2 * len(sigmas), 3.8), squeeze=False, layout="constrained"
    )
    panels = []
    for panel, sigma in zip(axes[0], sigmas, strict=True):
        panel.set_title(f"{title}, sigma {sigma:g}")
        panels.append((panel, [row for row in rows if row["sigma"] == sigma]))
    return figure, panels


def _families(rows: Rows) -> dict[str, Rows]:
    """Group the rows by the family of their method."""
    grouped: dict[str, Rows] = {}
    for row in rows:
        family = row["method"].rpartition(" ")[0] or row["method"]
        grouped.setdefault(family, []).append(row)
    return grouped


def _pareto(plt, rows: Rows):
    figure, panels = _panels(plt, rows, "best PSNR")
    for panel, own in panels:
        for family, points in _families(own).items():
            megabytes = [row["bytes_to_best"] / 1e6 for row in points]
            panel.plot(megabytes, [row["best_psnr"] for row in points], "o", label=family)
            for x, row in zip(megabytes, points, strict=True):
                panel.annotate(f" {row['rank']}", (x, row["best_psnr"]), fontsize=7)
        front = sorted((r["bytes_to_best"] / 1e6, r["best_psnr"]) for r in own if r["pareto"])
        panel.plot(*zip(*front, strict=True), "k-", lw=0.8, label="not dominated")
        panel.set(xlabel="MB until then", ylabel="dB", xscale="log")
        panel.legend(fontsize=7)
    return figure


def _over_rank(plt, rows: Rows):
    figure, panels = _panels(plt, rows, "best PSNR")
    for panel, own in panels:
        for family, points in _families(own).items():
            best = [row["best_psnr"] for row in points]
            if points[0]["rank"] == "":
                panel.axhline(best[0], color="k", lw=0.8, label=family)
            else:
                panel.plot([row["rank"] for row in points], best, "o-", label=family)
        panel.set(xlabel="rank", ylabel="dB")
        panel.legend(fontsize=7)
    return figure


def _over_rounds(plt, rows: Rows):
    figure, panels = _panels(plt, rows, "PSNR")
    for panel, own in panels:
        for row in own:
            curve, stop = np.asarray(row["psnr"]), row["round_of_corrected"]
            (line,) = panel.plot(curve, lw=1, label=row["method"])
            panel.plot(stop, curve[stop], "o", color=line.get_color(), ms=4)
        panel.set(xlabel="round (dot: corrected stop)", ylabel="dB", ylim=(10, None))
        panel.legend(fontsize=7)
    return figure


def _server(plt, rows: Rows):
    figure, panel = plt.subplots(figsize=(5, 3.8), layout="constrained")
    for kind in dict.fromkeys(row["bases"] for row in rows):
        own = [row for row in rows if row["bases"] == kind]
        label = f"{kind}: {own[0]['slope_ms_per_client']:.2g} ms a client"
        panel.plot([r["clients"] for r in own], [r["server_ms"] for r in own], "o-", label=label)
    panel.set(xlabel="clients", ylabel="ms", title="joint factorization")
    panel.legend(fontsize=7)
    return figure


def _photograph(plt, rows: Rows):
    """Show truth, data and reconstructions of the photograph, each at its best round."""
    own = [row for row in rows if row["data"] == "photograph"]
    kinds = list(dict.fromkeys(row["operator"] for row in own))
    wanted = [row["method"] for row in own if row["operator"] == kinds[0]]
    names = [name for name in wanted if name.startswith(("FIRM", "CompJF"))]
    image = problems.photograph(own[0]["n"])
    figure, axes = plt.subplots(
        len(kinds),
        2 + len(names),
        figsize=(2.2 * (2 + len(names)), 2.4 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for panels, kind in zip(axes, kinds, strict=True):
        found = {row["method"]: row for row in own if row["operator"] == kind}
        problem = problems.measured_problem(
            image, problems.LUMINANCE, kind, found[names[0]]["sigma"]
        )
        target = np.asarray(problem.draws.clients.targets[0, -1])
        data = np.log(np.hypot(*target) + 1e-3) if target.ndim == 3 else target
        panels[0].imshow(_colours(problem.truth))
        panels[0].set_title("truth", fontsize=8)
        panels[1].imshow(data, cmap="gray", aspect="auto")
        panels[1].set_title(f"{kind}, last client", fontsize=8)
        for panel, name in zip(panels[2:], names, strict=True):
            row = found[name]
            panel.imshow(_colours(_images(name, problem, max(1, row["best_round"]))))
            panel.set_title(f"{name}, {row['best_psnr']:.2f} dB", fontsize=8)
        for panel in panels:
            panel.set_axis_off()
    return figure


def _images(name: str, problem: problems.Problem, num_rounds: int):
    """Repeat a run of a table up to a round."""
    draw_ = problem.draw(0)
    method = methods.build(name, problem, draw_)

    @jax.jit
    def final(clients):
        state = method.algorithm.init(method.start, clients, key=jax.random.key(2))
        state, _ = federated.run(
            method.algorithm, state, clients, num_rounds=num_rounds, key=jax.random.key(3)
        )
        return method.images(state)

    return final(draw_.clients)


def _colours(images: Array) -> np.ndarray:
    return np.clip(np.moveaxis(np.asarray(images[:3]), 0, -1), 0, 1)
