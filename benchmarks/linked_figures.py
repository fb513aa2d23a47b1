"""Pictures of the tables of `linked`, drawn from their rows."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures

__all__ = ["draw"]

Rows = list[dict[str, Any]]


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Draw the figures for which there are rows, as PNG files.

    Args:
        rows: Rows of `linked.run`, or of its JSON file.
        folder: Where to put them; made if it is missing.

    Returns:
        The files.
    """
    pictures = {
        "recovery": ("recovery", _recovery),
        "imputation": ("imputation", _imputation),
        "single": ("single", _single),
    }
    return figures.save(pictures, rows, folder)


def _mean(rows: Rows, value: str, **where: Any) -> float:
    """Average a column over the rows that match."""
    own = [r[value] for r in rows if all(r[k] == v for k, v in where.items())]
    own = [v for v in own if v is not None]
    return float(np.mean(own)) if own else float("nan")


def _values(rows: Rows, column: str) -> list:
    return list(dict.fromkeys(row[column] for row in rows))


def _recovery(plt: Any, rows: Rows) -> Any:
    """Draw the errors of the signal and its parts over the signal-to-noise ratio."""
    scores = {"rse": "signal", "rse_shared": "shared part", "rse_individual": "individual part"}
    shapes = _values(rows, "shapes")
    figure, axes = plt.subplots(
        len(shapes), 3, figsize=(11, 3.2 * len(shapes)), squeeze=False, layout="constrained"
    )
    for line, shape in zip(axes, shapes, strict=True):
        for panel, (score, title) in zip(line, scores.items(), strict=True):
            for method in _values(rows, "method"):
                snrs = _values(rows, "snr")
                errors = [_mean(rows, score, shapes=shape, method=method, snr=snr) for snr in snrs]
                panel.plot(snrs, errors, "o-", label=method)
            panel.set(xscale="log", xlabel="SNR", title=f"{title}\n{shape}", ylim=(0, 1.6))
            panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error")
    axes[0][-1].legend(fontsize=7)
    return figure


def _imputation(plt: Any, rows: Rows) -> Any:
    """Draw the error of the hidden cells over the share that is hidden."""
    panels = [(s, h) for s in _values(rows, "shapes") for h in _values(rows, "hidden")]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for panel, (shapes, hidden) in zip(axes[0], panels, strict=True):
        for method in _values(rows, "method"):
            fractions = _values(rows, "fraction")
            errors = [
                _mean(rows, "rse_hidden", shapes=shapes, hidden=hidden, method=method, fraction=f)
                for f in fractions
            ]
            panel.plot(fractions, errors, "o-", label=method)
        panel.set(xlabel="share hidden", title=f"hidden {hidden}\n{shapes}", ylim=(0, 1.6))
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error of hidden cells")
    axes[0][-1].legend(fontsize=8)
    return figure


def _single(plt: Any, rows: Rows) -> Any:
    """Draw error and rank of one tensor over the signal-to-noise ratio."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for method in _values(rows, "method"):
        snrs = _values(rows, "snr")
        for panel, value in zip(axes, ("rse", "rank"), strict=True):
            panel.plot(
                snrs, [_mean(rows, value, method=method, snr=s) for s in snrs], "o-", label=method
            )
            panel.set(xscale="log", xlabel="SNR", title=value)
            panel.grid(alpha=0.3)
    axes[1].axhline(rows[0]["true_rank"], color="k", linestyle=":", label="true rank")
    axes[1].legend(fontsize=7)
    return figure
