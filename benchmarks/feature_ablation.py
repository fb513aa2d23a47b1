"""All settings of the three terms of FDRMFL on all splits: one program, and a loop beside it."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from benchmarks import feature_data, feature_methods, feature_scores, timing
from fedlr.algorithms import fdrmfl

__all__ = ["ablate"]

Rows = list[dict[str, Any]]

TERMS = ("information", "alignment", "contrast")
WEIGHT = 0.1
METHOD = feature_methods.METHODS["FDRMFL"]


def ablate(problem: feature_data.Problem, plan: feature_methods.Plan) -> Rows:
    """Turn every term on and off.

    Args:
        problem: The problem.
        plan: How networks are trained; the program works on so many settings and splits at once as
            it has lanes.

    Returns:
        A row for each of the eight settings, compared with that of no term, then one for each way
        to run all of them.
    """
    settings = np.array(list(itertools.product((0.0, WEIGHT), repeat=3)), np.float32)
    one = _training(problem, plan)
    of_split = (
        feature_methods.starts(problem, plan),
        jax.tree.map(jnp.asarray, problem.train),
        jax.random.split(jax.random.key(1), len(problem.scales)),
    )
    params, rows = _time_both(one, jnp.asarray(settings), of_split, plan.lanes)
    scores, splits = [], len(problem.scales)
    for place, setting in enumerate(settings):
        lanes = slice(place * splits, (place + 1) * splits)
        own = jax.tree.map(lambda leaf, i=lanes: leaf[i], params)
        label = " + ".join(name for name, on in zip(TERMS, setting, strict=True) if on)
        found = feature_methods.apply(label or "no term", problem, plan, own)
        scores.append(feature_scores.score(problem, found, "ridge"))
    return feature_scores.compare(scores, ("no term",)) + rows


def _training(problem: feature_data.Problem, plan: feature_methods.Plan) -> Callable[..., PyTree]:
    """Build the training with one setting on one split."""
    sizes = feature_methods.sizes_of(problem)
    network = feature_methods.structure(sizes, plan.num_features)

    def one(setting, start, clients, key):
        lane = (start, clients, fdrmfl.Weights(*setting), key)
        return feature_methods.run_lane(METHOD, network, plan, lane)[0].params

    return one


def _time_both(
    one: Callable[..., PyTree], settings: jax.Array, of_split: PyTree, lanes: int
) -> tuple[PyTree, Rows]:
    """Run and time one program for all settings and splits, and a loop of single runs, once."""
    (splits,) = {len(leaf) for leaf in jax.tree.leaves(of_split)}
    count = len(settings) * splits

    def pick(place, settings, *of_split):
        own = jax.tree.map(lambda leaf: leaf[place % splits], of_split)
        return settings[place // splits], *own

    def whole(*arrays):
        places = jnp.arange(count)
        return jax.lax.map(lambda place: one(*pick(place, *arrays)), places, batch_size=lanes)

    arguments = (settings, *of_split)
    singles = [pick(place, *arguments) for place in range(count)]
    program, program_seconds = _compile(whole, arguments)
    single, single_seconds = _compile(one, singles[0])
    kept: dict[str, Any] = {}

    def run_program():
        kept["program"] = program(*arguments)
        return kept["program"]

    def run_loop():
        kept["loop"] = [single(*own) for own in singles]
        return kept["loop"]

    times = timing.measure({"program": run_program, "loop": run_loop}, repeats=1, warmup=0)
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept["loop"])
    difference = jax.tree.map(jnp.subtract, kept["program"], looped)
    apart = float(optax.global_norm(difference) / optax.global_norm(looped))
    kinds = {
        "program": ("one program", program, program_seconds),
        "loop": ("loop", single, single_seconds),
    }
    return kept["program"], [
        {
            "runs": count,
            "way": label,
            "at_once": lanes if name == "program" else 1,
            "compile_s": seconds,
            "cpu_s": times[name].cpu_min,
            "wall_s": times[name].wall_min,
            "loop over this, cpu": times["loop"].cpu_min / times[name].cpu_min,
            "loop over this, wall": times["loop"].wall_min / times[name].wall_min,
            **_memory(compiled),
            "relative_difference": apart,
        }
        for name, (label, compiled, seconds) in kinds.items()
    ]


def _compile(function: Callable, arguments: tuple) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def _memory(compiled: Any) -> dict[str, float]:
    """Tell what a program holds at once: its arguments, its results, and what is between."""
    analysis = compiled.memory_analysis()
    names = ("argument", "output", "temp")
    sizes = [float(getattr(analysis, f"{name}_size_in_bytes", 0)) for name in names]
    return {"temporary_mb": sizes[2] / 1e6, "peak_mb": sum(sizes) / 1e6}
