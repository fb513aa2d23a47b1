"""Linked tensors: what MULTIFAC recovers, imputes and selects, and what it costs.

Scores are relative errors against the noise-free truth, ``|signal - estimate| / |signal|``, mean
over the tensors. `oracle` picks the penalty of a grid that has the least such error, which nobody
can do without the truth: it is the yardstick of the rules that can. Each table is a function of
the size and can be run by itself with `--only`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import published_multifac, timing
from benchmarks.linked_figures import draw as draw
from fedlr import cp, datasets, linked, masking, synthetic

CORES = None
Rows = list[dict[str, Any]]

SNRS = (1 / 3, 1.0, 3.0)
SMALL_SHAPES = ((10, 10, 8), (10, 14, 5, 3))  # the example of the published code
LARGE_SHAPES = ((200, 12, 10), (200, 14, 5, 3))
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "multifac"


def _is_small(size: str) -> bool:
    return size == "small"


def _seeds(size: str) -> range:
    return range(1) if _is_small(size) else range(3)


def _rse(truths: Sequence, estimates: Sequence) -> float:
    """Average the relative errors over the tensors whose truth is not zero."""
    errors = [
        float(jnp.linalg.norm((t - e).ravel()) / jnp.linalg.norm(t.ravel()))
        for t, e in zip(truths, estimates, strict=True)
        if float(jnp.linalg.norm(t.ravel())) > 0
    ]
    return float(np.mean(errors)) if errors else float("nan")


@functools.partial(jax.jit, static_argnames=("rank", "starts", "sweeps"))
def _path(tensors, masks, penalties, key, *, rank, starts, sweeps):
    """Follow the penalties upwards from the best of some starts at penalty 0."""
    options = {"masks": masks, "max_iters": sweeps, "tol": 1e-6}

    def begin(key):
        start = linked.random_init(tensors, rank, key=key)
        fit, info = linked.multifac(tensors, init=start, penalty=0.0, **options)
        return fit, info.objective[-1]

    fits, objectives = jax.vmap(begin)(jax.random.split(key, starts))
    best = jax.tree.map(lambda leaf: leaf[jnp.argmin(objectives)], fits)
    return linked.penalty_path(tensors, penalties, init=best, **options)[0]


def follow(tensors, penalties, key, *, masks=None, rank=12, starts=5, sweeps=300):
    """Return the fits at the penalties, as a list."""
    path = _path(
        tensors, masks, jnp.asarray(penalties), key, rank=rank, starts=starts, sweeps=sweeps
    )
    return [jax.tree.map(lambda leaf, i=i: leaf[i], path) for i in range(len(penalties))]


def _grid(size: str) -> np.ndarray:
    return np.geomspace(0.1, 200, 4 if _is_small(size) else 16).astype(np.float32)


def _noise_levels(tensors, data) -> np.ndarray:
    return np.array([float(jnp.std(x - s)) for x, s in zip(tensors, data.signals, strict=True)])


def _ranks(fit: linked.LinkedCP) -> list[int]:
    """Count the shared components and the others of every tensor."""
    active = np.asarray(linked.active_components(fit))
    together = active.all(axis=0)
    return [int(together.sum()), *(int((row & ~together).sum()) for row in active)]


def single(size: str) -> Rows:
    """Recover one tensor and its rank at three signal-to-noise ratios, by rules for the penalty."""
    shape, rank = ((8, 7, 6), 2) if _is_small(size) else ((30, 25, 20), 5)
    rows = []
    for snr in SNRS[-1:] if _is_small(size) else SNRS:
        for seed in _seeds(size):
            keys = jax.random.split(jax.random.key(seed), 3)
            data = synthetic.cp_tensor(shape, rank, snr=snr, key=keys[0])
            tensors, truth = (data.tensor,), (data.signal,)
            known = float(jnp.std(data.tensor - data.signal))
            estimated = float(linked.noise_scale(data.tensor))
            grid = _grid(size)
            fits = follow(tensors, grid, keys[1], rank=2 * rank + 2)
            scores = [_rse(truth, linked.to_dense(fit)) for fit in fits]
            least = int(np.argmin(scores))
            found = {"oracle penalty": (fits[least], grid[least])}
            for name, level in (("theory, known noise", known), ("theory, estimated", estimated)):
                penalty = float(linked.theory_penalty([shape], level))
                path = (
                    [penalty] * len(grid) if penalty <= 1 else [1.0] + [penalty] * (len(grid) - 1)
                )
                found[name] = (follow(tensors, path, keys[1], rank=2 * rank + 2)[-1], penalty)
            choice = _select(tensors, keys[2], size, rank=2 * rank + 2, folds=5)
            found["cross-validation"] = (choice.fit, float(choice.penalty))
            start = cp.random_init(shape, rank, key=keys[1])
            als, _ = cp.als(data.tensor, init=start, max_iters=300, tol=1e-6)
            rows += [
                {
                    "table": "single",
                    "shape": "x".join(map(str, shape)),
                    "true_rank": rank,
                    "snr": round(snr, 3),
                    "seed": seed,
                    "method": name,
                    "penalty": float(penalty),
                    "rank": int(linked.active_components(fit).sum()),
                    "rse": _rse(truth, linked.to_dense(fit)),
                }
                for name, (fit, penalty) in found.items()
            ]
            rows.append(
                {
                    **rows[-1],
                    "method": "als of the true rank",
                    "penalty": 0.0,
                    "rank": rank,
                    "rse": _rse(truth, (cp.to_dense(als),)),
                }
            )
    return rows


def _select(tensors, key, size: str, *, rank: int, folds: int, masks=None):
    """Cross-validate as the paper does; large tensors around the theory penalty, for the time."""
    options: dict[str, Any] = {"num_folds": folds, "num_starts": 5, "max_iters": 301}
    if _is_small(size):
        grid = jnp.asarray([0.5, 5.0], tensors[0].dtype)
        options = {"penalties": grid, "num_folds": 2, "num_starts": 1, "max_iters": 20}
    elif sum(x.size for x in tensors) > 10_000:
        levels = jnp.stack([linked.noise_scale(x) for x in tensors])
        grid = linked.theory_grid([x.shape for x in tensors], levels)
        options = {"penalties": grid, "num_folds": 5, "num_starts": 3, "max_iters": 150}
    return linked.select_penalty(
        tensors, key=key, rank=rank, masks=masks, tol=1e-6, progress=False, **options
    )


def _linked_methods(data, key, size: str, rank: int) -> dict[str, tuple[linked.LinkedCP, float]]:
    """Fit by every rule for the penalty, and by what knows nothing of links or of penalties."""
    tensors, grid = data.tensors, _grid(size)
    shapes = [x.shape for x in tensors]
    keys = jax.random.split(key, 3)
    fits = follow(tensors, grid, keys[0], rank=rank)
    least = int(np.argmin([_rse(data.signals, linked.to_dense(fit)) for fit in fits]))
    found = {"oracle penalty": (fits[least], float(grid[least]))}
    levels = np.array([float(linked.noise_scale(x)) for x in tensors])
    for name, noise in (("known noise", _noise_levels(tensors, data)), ("estimated", levels)):
        penalty = float(linked.theory_penalty(shapes, jnp.asarray(noise, jnp.float32)))
        path = np.full(len(grid), penalty, np.float32)
        path[0] = min(1.0, penalty)
        found[f"theory, {name}"] = (follow(tensors, path, keys[0], rank=rank)[-1], penalty)
    choice = _select(tensors, keys[1], size, rank=rank, folds=10)
    found["cross-validation"] = (choice.fit, float(choice.penalty))
    found["no penalty"] = (
        follow(tensors, np.zeros(len(grid), np.float32), keys[0], rank=rank)[0],
        0,
    )
    start = jax.vmap(lambda k: linked.random_init(tensors, rank, key=k))(
        jax.random.split(keys[2], 5)
    )
    bayes = jax.jit(jax.vmap(lambda s: linked.variational_multifac(tensors, init=s, max_iters=500)))
    fit, info = bayes(start)
    best = int(jnp.argmin(info.objective[:, -1]))
    found["variational"] = (jax.tree.map(lambda leaf: leaf[best], fit.fit), float("nan"))
    return found


def _separate(data, key, size: str, rank: int) -> tuple[list, list[int]]:
    """Fit every tensor by itself at the best penalty of the grid; return estimates and ranks."""
    estimates, ranks = [], []
    for x, signal in zip(data.tensors, data.signals, strict=True):
        fits = follow((x,), _grid(size), key, rank=rank)
        scores = [_rse((signal,), linked.to_dense(fit)) for fit in fits]
        best = fits[int(np.argmin(scores))]
        estimates.append(linked.to_dense(best)[0])
        ranks.append(int(linked.active_components(best).sum()))
    return estimates, ranks


def recovery(size: str) -> Rows:
    """Recover the signal, its shared and its individual part of two linked tensors."""
    designs = (SMALL_SHAPES,) if _is_small(size) else (SMALL_SHAPES, LARGE_SHAPES)
    rank = 4 if _is_small(size) else 12
    rows = []
    for shapes in designs:
        for snr in SNRS[-1:] if _is_small(size) else SNRS:
            for seed in _seeds(size):
                keys = jax.random.split(jax.random.key(seed), 2)
                data = synthetic.linked_tensors(
                    shapes, shared_rank=2, individual_ranks=(3, 3), snr=snr, key=keys[0]
                )
                common = {
                    "table": "recovery",
                    "shapes": " and ".join("x".join(map(str, shape)) for shape in shapes),
                    "true_ranks": [2, 3, 3],
                    "snr": round(snr, 3),
                    "seed": seed,
                }
                rows += [
                    {
                        **common,
                        "method": name,
                        "penalty": None if np.isnan(penalty) else penalty,
                        "ranks": _ranks(fit),
                        "rse": _rse(data.signals, linked.to_dense(fit)),
                        "rse_shared": _rse(data.shared, linked.shared_part(fit)),
                        "rse_individual": _rse(data.individual, linked.individual_part(fit)),
                    }
                    for name, (fit, penalty) in _linked_methods(data, keys[1], size, rank).items()
                ]
                estimates, ranks = _separate(data, keys[1], size, rank)
                rows.append(
                    {
                        **common,
                        "method": "each by itself, oracle penalty",
                        "penalty": None,
                        "ranks": [0, *ranks],
                        "rse": _rse(data.signals, estimates),
                        "rse_shared": None,
                        "rse_individual": None,
                    }
                )
    return rows


def imputation(size: str) -> Rows:
    """Impute hidden entries and hidden samples, linked and each tensor by itself."""
    fractions = (0.1,) if _is_small(size) else (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    designs = (SMALL_SHAPES,) if _is_small(size) else (SMALL_SHAPES, LARGE_SHAPES)
    rank = 4 if _is_small(size) else 12
    rows = []
    for shapes in designs:
        for kind in ("entries", "samples"):
            for fraction in fractions:
                for seed in _seeds(size):
                    keys = jax.random.split(jax.random.key(seed), 3)
                    data = synthetic.linked_tensors(
                        shapes, shared_rank=3, individual_ranks=(1, 1), snr=3.0, key=keys[0]
                    )
                    masks = _hide(shapes, kind, fraction, keys[1])
                    noise = _noise_levels(data.tensors, data)
                    rows += [
                        {
                            "table": "imputation",
                            "shapes": " and ".join("x".join(map(str, s)) for s in shapes),
                            "hidden": kind,
                            "fraction": fraction,
                            "seed": seed,
                            "method": name,
                            "rse_hidden": _hidden_rse(data.signals, estimates, masks),
                            "rse_observed": _hidden_rse(
                                data.signals, estimates, [~mask for mask in masks]
                            ),
                        }
                        for name, estimates in _imputers(
                            data, masks, noise, keys[2], size, rank
                        ).items()
                    ]
    return rows


def _hide(shapes, kind: str, fraction: float, key) -> tuple:
    """Hide a share of the entries, or of the samples: of every tensor other ones."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (2,))))
    if kind == "entries":
        return tuple(jnp.asarray(rng.random(shape) >= fraction) for shape in shapes)
    samples = shapes[0][0]
    count = max(1, round(fraction * samples))
    order = rng.permutation(samples)
    masks = []
    for k, shape in enumerate(shapes):
        mask = np.ones(shape, bool)
        mask[order[k * count : (k + 1) * count]] = False
        masks.append(jnp.asarray(mask))
    return tuple(masks)


def _imputers(data, masks, noise, key, size: str, rank: int) -> dict[str, list]:
    """Estimate the tensors at the theory penalty of the known noise."""
    sweeps = 20 if _is_small(size) else 300

    def fit(tensors, own_masks, levels):
        shapes = [x.shape for x in tensors]
        penalty = float(linked.theory_penalty(shapes, jnp.asarray(levels, jnp.float32)))
        path = np.array([min(1.0, penalty), penalty], np.float32)
        found = follow(tensors, path, key, masks=own_masks, rank=rank, sweeps=sweeps)[-1]
        return linked.impute(found, tensors, own_masks), linked.to_dense(found)

    imputed, dense = fit(data.tensors, masks, noise)
    linked_ = [jnp.where(m, d, i) for m, d, i in zip(masks, dense, imputed, strict=True)]
    alone, mean = [], []
    for x, mask, level in zip(data.tensors, masks, noise, strict=True):
        filled, estimate = fit((x,), (mask,), [level])
        alone.append(jnp.where(mask, estimate[0], filled[0]))
        average = jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(mask.sum(dtype=x.dtype), 1)
        mean.append(jnp.full_like(x, average))
    return {"linked": linked_, "each by itself": alone, "mean": mean}


def _hidden_rse(signals, estimates, masks) -> float:
    pairs = zip(signals, estimates, masks, strict=True)
    errors = [float(jnp.linalg.norm((s - e)[~m]) / jnp.linalg.norm(s[~m])) for s, e, m in pairs]
    return float(np.mean(errors))


def sweeps(size: str) -> Rows:
    """Time a sweep of many fits at a time beside one of the published recipe in NumPy."""
    rank, count, lanes = (3, 5, (2,)) if _is_small(size) else (20, 100, (1, 10, 25))
    rows = []
    with jax.enable_x64(True):
        data = synthetic.linked_tensors(
            SMALL_SHAPES, shared_rank=2, individual_ranks=(3, 3), snr=3.0,
            key=jax.random.key(0), dtype=jnp.float64,
        )  # fmt: skip
        masks = synthetic.missing_masks(
            SMALL_SHAPES, sample_fraction=0.05, entry_fraction=0.05, key=jax.random.key(1)
        )
        for kind, own_masks in (("complete", None), ("imputing", masks)):
            rows += _sweep_rows(kind, data.tensors, own_masks, rank, count, lanes, size)
    return rows


def _sweep_rows(kind: str, tensors, masks, rank: int, count: int, lanes, size: str) -> Rows:
    """Time one kind of sweep for several numbers of lanes."""
    keys = jax.random.split(jax.random.key(2), max(lanes))
    starts = jax.vmap(lambda k: linked.random_init(tensors, rank, key=k))(keys)

    @jax.jit
    def fit(tensors, starts, masks):
        def one(start):
            options = {"masks": masks, "max_iters": count, "tol": 0.0}
            return linked.multifac(tensors, init=start, penalty=2.0, **options)[1].objective

        return jax.vmap(one)(starts)

    def ours(n: int):
        return fit(tensors, jax.tree.map(lambda leaf: leaf[:n], starts), masks)

    first = jax.tree.map(lambda leaf: leaf[0], starts)
    functions: dict[str, Callable[[], Any]] = {
        f"multifac, {n} lanes": functools.partial(ours, n) for n in lanes
    }
    functions["published recipe, NumPy"] = lambda: _published(tensors, first, masks, count)
    times = timing.measure(functions, repeats=2 if _is_small(size) else 5)
    per_sweep = {
        name: 1e3 * times[name].cpu_min / count / n
        for name, n in zip(functions, (*lanes, 1), strict=True)
    }
    return [
        {
            "table": "sweeps",
            "kind": kind,
            "rank": rank,
            "method": name,
            "cpu_ms_per_sweep": value,
            "over published": per_sweep["published recipe, NumPy"] / value,
            "objective": float(np.ravel(np.asarray(functions[name]())[..., -1])[0]),
        }
        for name, value in per_sweep.items()
    ]


def _published(tensors, start, masks, count: int) -> np.ndarray:
    """Run the published recipe; hidden entries begin as those of `multifac` do."""
    models = [[np.array(start.shared), *map(np.array, own)] for own in start.factors]
    if masks is None:
        data, hidden = [np.array(x) for x in tensors], None
    else:
        # A random start fits worse than zero does, so hidden entries begin at zero.
        data = [np.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True)]
        hidden = [np.asarray(mask) for mask in masks]
    return np.array([published_multifac.sweep(data, models, 2.0, hidden) for _ in range(count)])


def pipeline(size: str) -> Rows:
    """Time the two-step cross-validation, with and without compiling, and tell what it selects."""
    problems = {"simulated": _simulated()}
    if not _is_small(size) and (REFERENCE / "als_R6_sig2_50it.npz").exists():
        stored = np.load(REFERENCE / "als_R6_sig2_50it.npz")
        problems["reference data"] = (stored["tensor1"], stored["tensor2"])
    rows = []
    with jax.enable_x64(True):
        for name, tensors in problems.items():
            tensors = tuple(jnp.asarray(x) for x in tensors)
            for seed in range(1 if _is_small(size) else 5):
                begin = time.perf_counter(), time.process_time()
                choice = _select(
                    tensors, jax.random.key(seed), size, rank=3 if _is_small(size) else 20, folds=10
                )
                end = time.perf_counter(), time.process_time()
                rows.append(
                    {
                        "table": "pipeline",
                        "data": name,
                        "seed": seed,
                        "compiled_before": seed > 0,
                        "wall_s": end[0] - begin[0],
                        "cpu_s": end[1] - begin[1],
                        "penalty_1se": float(choice.penalty_1se),
                        "penalty": float(choice.penalty),
                        "ranks_1se": _ranks(choice.free_fit),
                        "ranks": _ranks(choice.fit),
                    }
                )
    return rows


def _simulated(snr: float = 3.0) -> tuple:
    data = synthetic.linked_tensors(
        SMALL_SHAPES, shared_rank=2, individual_ranks=(3, 3), snr=snr, key=jax.random.key(0)
    )
    return tuple(np.asarray(x, np.float64) for x in data.tensors)


def stability(size: str) -> Rows:
    """Select on the same data with other folds and starts, and other numbers of folds."""
    rows = []
    designs = {"small": SMALL_SHAPES} if _is_small(size) else {
        "small": SMALL_SHAPES, "large": LARGE_SHAPES
    }  # fmt: skip
    for name, shapes in designs.items():
        data = synthetic.linked_tensors(
            shapes, shared_rank=2, individual_ranks=(3, 3), snr=3.0, key=jax.random.key(0)
        )
        for folds in (2,) if _is_small(size) else ((5, 10) if name == "small" else (5,)):
            for seed in range(1 if _is_small(size) else 6):
                choice = _select(
                    data.tensors,
                    jax.random.key(seed),
                    size,
                    rank=3 if _is_small(size) else 12,
                    folds=folds,
                )
                rows.append(
                    {
                        "table": "stability",
                        "design": name,
                        "true_ranks": [2, 3, 3],
                        "folds": folds,
                        "seed": seed,
                        "penalty_1se": float(choice.penalty_1se),
                        "penalty": float(choice.penalty),
                        "ranks": _ranks(choice.fit),
                        "rse": _rse(data.signals, linked.to_dense(choice.fit)),
                    }
                )
    return rows


def scaling(size: str) -> Rows:
    """Time a sweep of two large linked tensors, and what memory it needs."""
    rows = []
    for side in (10,) if _is_small(size) else (100, 200):
        shapes = ((side,) * 3, (side,) * 3)
        data = synthetic.linked_tensors(
            shapes, shared_rank=4, individual_ranks=(3, 3), snr=3.0, key=jax.random.key(0)
        )
        start = linked.random_init(data.tensors, 10, key=jax.random.key(1))
        count = 20

        def fit(tensors, start, count=count):
            return linked.multifac(tensors, init=start, penalty=2.0, max_iters=count, tol=0.0)[0]

        compiled = jax.jit(fit).lower(data.tensors, start).compile()
        analysis = compiled.memory_analysis()
        times = timing.measure(
            {"fit": lambda c=compiled, d=data, s=start: c(d.tensors, s)}, repeats=3
        )
        rows.append(
            {
                "table": "scaling",
                "tensors": f"2 x {side}^3",
                "rank": 10,
                "cpu_ms_per_sweep": 1e3 * times["fit"].cpu_min / count,
                "wall_ms_per_sweep": 1e3 * times["fit"].wall_min / count,
                "data_mb": sum(x.nbytes for x in data.tensors) / 1e6,
                "temporary_mb": float(getattr(analysis, "temp_size_in_bytes", 0)) / 1e6,
                "rse": _rse(data.signals, linked.to_dense(compiled(data.tensors, start))),
            }
        )
    return rows


def acceleration(size: str) -> Rows:
    """Count the sweeps of plain and extrapolated fits from the same starts."""
    tensors = tuple(jnp.asarray(x, jnp.float32) for x in _simulated())
    starts = jax.vmap(lambda k: linked.random_init(tensors, 20, key=k))(
        jax.random.split(jax.random.key(3), 2 if _is_small(size) else 8)
    )
    rows = []
    with jax.enable_x64(True):
        data = tuple(jnp.asarray(x) for x in _simulated())
        starts = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), starts)
        for extrapolate in (False, True):
            options = {"max_iters": 40 if _is_small(size) else 3000, "tol": 1e-9}

            @jax.jit
            def fit(starts, penalty, extrapolate=extrapolate, options=options):
                def one(start):
                    return linked.multifac(
                        data, init=start, penalty=penalty, extrapolate=extrapolate, **options
                    )[1]

                return jax.vmap(one)(starts)

            for penalty in (0.0, 2.0, 8.0):
                info = fit(starts, penalty)
                rows.append(
                    {
                        "table": "acceleration",
                        "penalty": penalty,
                        "extrapolated": extrapolate,
                        "starts": len(info.num_iters),
                        "mean_sweeps": float(info.num_iters.mean()),
                        "most_sweeps": int(info.num_iters.max()),
                        "mean_objective": float(info.objective[:, -1].mean()),
                        "least_objective": float(info.objective[:, -1].min()),
                    }
                )
    return rows


def real(size: str) -> Rows:
    """Decompose real data sets, where their files are found."""
    rows = []
    tables = {"amino acids": _amino_acids, "IL-2": _il2, "serology": _serology}
    for name, table in list(tables.items())[: 2 if _is_small(size) else 3]:
        try:
            rows += [{"table": "real", "data": name, **row} for row in table(size)]
        except FileNotFoundError as error:
            print(f"{name} left out: {error}")
    return rows


def _amino_acids(size: str) -> Rows:
    """Compare the sample factor of a CP model with the known concentrations."""
    data = datasets.amino_acids()
    rows = []
    for rank in (3,) if _is_small(size) else (2, 3, 4):
        start = cp.svd_init(data.intensity, rank, key=jax.random.key(0))
        options = {"max_iters": 2000, "tol": 1e-6, "extrapolate": True}
        fit, info = jax.jit(lambda x, s, o=options: cp.als(x, init=s, **o))(data.intensity, start)
        known = np.asarray(data.concentrations, np.float64)
        samples = np.asarray(cp.normalize(fit).factors[0], np.float64)
        cosines = np.abs(
            (samples / np.linalg.norm(samples, axis=0)).T @ (known / np.linalg.norm(known, axis=0))
        )
        rows.append(
            {
                "rank": rank,
                "sweeps": int(info.num_iters),
                "relative_error": float(cp.relative_error(data.intensity, fit)),
                "core_consistency": float(cp.core_consistency(data.intensity, fit)),
                "concentration_cosines": [float(c) for c in cosines.max(axis=0)],
            }
        )
    return rows


def _il2(size: str) -> Rows:
    return _rank_rows(datasets.il2_response().response, 2 if _is_small(size) else 6)


def _serology(size: str) -> Rows:
    return _rank_rows(datasets.covid_serology().binding, 2 if _is_small(size) else 8)


def _rank_rows(x, most: int) -> Rows:
    """Score the ranks up to `most` on held-out entries of a tensor with NaN where it is missing."""
    data, mask = masking.from_nan(x)
    scores = cp.cross_validate(data, most, mask=mask, key=jax.random.key(0))
    return [
        {
            "rank": rank + 1,
            "held_out_error": float(scores.mean[rank]),
            "standard_error": float(scores.standard_error[rank]),
            "chosen": rank + 1 == int(scores.one_standard_error_rank),
        }
        for rank in range(most)
    ]


TABLES: dict[str, Callable[[str], Rows]] = {
    "sweeps": sweeps,
    "pipeline": pipeline,
    "acceleration": acceleration,
    "scaling": scaling,
    "single": single,
    "recovery": recovery,
    "imputation": imputation,
    "stability": stability,
    "real": real,
}


def run(size: str, only: Sequence[str] | None = None) -> Rows:
    """Run all tables at "small" or "full" size, or those named, and return their rows."""
    return [row for name in only or TABLES for row in TABLES[name](size)]
