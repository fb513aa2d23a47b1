"""Measure functions beside each other: process CPU time and wall time, blocking on results."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

__all__ = ["Measurement", "bind", "columns", "compile_time", "measure", "ratio"]

EQUAL_ERROR = 1e-3


class Measurement(NamedTuple):
    """Seconds of one call, over the repeats.

    Attributes:
        cpu_median: Median CPU time of the process, all threads added.
        cpu_min: Smallest CPU time: the figure least disturbed by other processes.
        cpu_spread: Interquartile range of the CPU time as a share of its median.
        wall_median: Median wall time.
        wall_min: Smallest wall time.
    """

    cpu_median: float
    cpu_min: float
    cpu_spread: float
    wall_median: float
    wall_min: float


def measure(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1
) -> dict[str, Measurement]:
    """Time functions without arguments in turns, so that a slow spell of the machine hits all.

    Args:
        functions: What to time, by name. JAX results are waited for. What a compiled function
            works on must be its argument (`lambda: compiled(x)`): a constant may be folded away.
        repeats: Number of timed calls of each.
        warmup: Number of untimed calls of each beforehand, which take the compilation.

    Returns:
        A `Measurement` for each name, in the order given.

    Raises:
        ValueError: If `repeats` is less than 1.
    """
    if repeats < 1:
        message = f"measure: got repeats {repeats}, expected at least 1"
        raise ValueError(message)
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            cpu_end, wall_end = time.process_time(), time.perf_counter()
            cpu[name].append(cpu_end - cpu_start)
            wall[name].append(wall_end - wall_start)
    return {name: _summarize(cpu[name], wall[name]) for name in functions}


def compile_time(function: Callable[..., Any], *args: Any) -> float:
    """Return the wall seconds to trace, lower and compile `function` for `args`, uncached.

    Args:
        function: Function of arrays; close over what is static.
        *args: Arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        Seconds; nothing is run.
    """
    start = time.perf_counter()
    jax.jit(lambda *arrays: function(*arrays)).lower(*args).compile()
    return time.perf_counter() - start


def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Return the function of no arguments that `measure` wants."""
    return lambda: function(*arguments)


def columns(measured: Measurement) -> dict[str, float]:
    """Return the columns of a table that tell a CPU time."""
    return {
        "cpu_ms": 1e3 * measured.cpu_min,
        "cpu_median_ms": 1e3 * measured.cpu_median,
        "spread": measured.cpu_spread,
    }


def ratio(times: dict, errors: dict, ours: str, peer: str | None) -> float | None:
    """How many times longer the peer takes, if it is there and its error is not above ours."""
    if peer not in times or errors[ours] > (1 + EQUAL_ERROR) * errors[peer]:
        return None
    return times[peer].cpu_min / times[ours].cpu_min


def _summarize(cpu: list[float], wall: list[float]) -> Measurement:
    median = statistics.median(cpu)
    quarters = statistics.quantiles(cpu, n=4, method="inclusive") if len(cpu) > 1 else [median] * 3
    spread = (quarters[2] - quarters[0]) / median if median > 0 else 0.0
    return Measurement(median, min(cpu), spread, statistics.median(wall), min(wall))
