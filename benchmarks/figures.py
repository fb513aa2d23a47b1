"""Save the pictures that belong to the tables among some rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["save"]

Rows = list[dict[str, Any]]
Picture = Callable[[Any, Rows], Any]


def save(figures: Mapping[str, tuple[str, Picture]], rows: Rows, folder: Path) -> list[Path]:
    """Draw the figures for whose table there are rows, as PNG files.

    Args:
        figures: By name the table and a function ``(pyplot, rows) -> figure``.
        rows: Rows of all tables.
        folder: Where to put them; made if it is missing.

    Returns:
        The files.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (table, picture) in figures.items():
        own = [row for row in rows if row.get("table") == table]
        if own:
            figure = picture(plt, own)
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=120)
            plt.close(figure)
    return files
