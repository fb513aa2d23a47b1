"""Run one benchmark: `python -m benchmarks NAME [--size small|full] [--json FILE]`.

A benchmark is a file of this folder with a function `run(size) -> list[dict]`, one dict of plain
numbers and strings for every row of its table, and a constant `CORES`: 1 to be pinned to a single
core with every thread pool at one thread, so that CPU times of different packages are comparable,
or None to use the whole machine. `--json` writes one JSON object a line, each with the benchmark,
the size, the machine and the versions beside the row.

A benchmark of several tables has a mapping `TABLES` of their names and a second parameter of `run`:
`--only NAME[,NAME]` passes the names, and an existing `--json` FILE keeps the rows of all other
tables. One with a function `draw(rows, folder)` draws pictures of the rows of the file into
`--figures FOLDER`, by default FILE without its ending and with "_figures" at its end.
"""

import argparse
import ast
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PINNED = "FEDLR_BENCHMARK_PINNED"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
ONE_THREAD_XLA = "--xla_cpu_multi_thread_eigen=false"
PACKAGES = (
    "fedlr",
    "jax",
    "jaxlib",
    "numpy",
    "scipy",
    "tensorly",
    "pyttb",
    "astra-toolbox",
    "scikit-image",
    "scikit-learn",
)


def discover(folder: Path = FOLDER) -> dict[str, int | None]:
    """Return the `CORES` of every benchmark of the folder by its name, without importing any."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if not any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in body):
            continue
        for node in body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CORES":
                found[path.stem] = ast.literal_eval(node.value)
    return found


def pin_to_one_core() -> None:
    """Start this command again on one core and with one thread, unless that was done already.

    Thread pools are sized when the libraries load, hence the new process image.
    """
    if os.environ.get(PINNED) == "1":
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD_XLA}".strip()
    environment = os.environ | ONE_THREAD | {"XLA_FLAGS": flags, PINNED: "1"}
    arguments = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
    sys.stdout.flush()
    os.execve(sys.executable, arguments, environment)


def machine() -> dict[str, Any]:
    """Describe the machine: processor, usable cores, memory in GiB, threads, operating system."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _processor(),
        "cores": usable,
        "memory_gib": round(memory, 1),
        "openblas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the rows as text: a table for each run of rows with the same columns."""
    blocks: list[list[dict[str, Any]]] = []
    for row in rows:
        if blocks and list(blocks[-1][0]) == list(row):
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return "\n\n".join(_block(block) for block in blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark, print the table and write the JSON lines."""
    names = discover()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", choices=sorted(names))
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON lines")
    parser.add_argument(
        "--only", metavar="NAME[,NAME]", type=_names, help="run these tables of the benchmark"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="where to draw, default beside the JSON"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(sorted(names)))
        return 0
    if options.name is None:
        parser.error(f"a name is required, one of: {', '.join(sorted(names))}")
    if names[options.name] == 1:
        pin_to_one_core()

    module = importlib.import_module(f"benchmarks.{options.name}")
    _check_options(parser, module, options)

    about = {"machine": machine(), "versions": versions()}
    print(f"{options.name}, size {options.size}")
    for kind, facts in about.items():
        print(f"{kind}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    start = time.perf_counter()
    chosen = (options.only,) if options.only else ()
    rows = module.run(options.size, *chosen)
    if not rows:
        message = f"benchmark {options.name}: got no rows, expected at least one"
        raise ValueError(message)
    seconds = time.perf_counter() - start
    print(f"\n{table(rows)}\n\n{len(rows)} rows in {seconds:.1f} s")
    folder = options.figures
    if options.json is not None:
        head = {"benchmark": options.name, "size": options.size, **about}
        lines = [json.dumps({**head, **row}, allow_nan=False, default=_plain) for row in rows]
        if options.only:
            lines = [*other_tables(options.json, rows), *lines]
            rows = [json.loads(line) for line in lines]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
        folder = folder or options.json.with_name(f"{options.json.stem}_figures")
    if folder is not None and hasattr(module, "draw"):
        files = module.draw(rows, folder)
        print(f"drawn: {', '.join(map(str, files)) or 'nothing'}")
    return 0


def other_tables(path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a JSON file whose table is none of the rows', none if it is missing."""
    if not path.exists():
        return []
    made = {row.get("table") for row in rows}
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line).get("table") not in made]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _check_options(
    parser: argparse.ArgumentParser, module: Any, options: argparse.Namespace
) -> None:
    """Refuse options that the benchmark has no use for."""
    tables = getattr(module, "TABLES", {})
    if options.only is not None and not tables:
        parser.error(f"--only: benchmark {options.name} has no tables to choose from")
    unknown = [name for name in options.only or () if name not in tables]
    if unknown:
        got, known = ", ".join(map(repr, unknown)), ", ".join(tables)
        parser.error(f"--only: got {got}, expected some of: {known}")
    if options.figures is not None and not hasattr(module, "draw"):
        parser.error(f"--figures: benchmark {options.name} draws none")


def _plain(value: Any) -> Any:
    """Turn an array scalar into a Python number for JSON."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    message = f"benchmark row: got {type(value).__name__}, expected plain values"
    raise TypeError(message)


def _block(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    numeric = [isinstance(rows[0][column], (int, float)) for column in columns]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
