"""CP decompositions beside TensorLy, pyttb and tensortools: time at equal start and equal error."""

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from fedlr import cp

__all__ = ["CPSizes", "batch_rows", "fit_rows", "masked_rows"]

NOISE = 0.05
# A fit counts as done at the first sweep whose held-out error is within this of the truth's.
NEAR = 1.01
HIDDEN = (0.2, 0.5, 0.8)
STARTS = 8
# Seeds of starts from which the fits with and without compression find the planted models.
GOOD_START = {"float32": 6, "float64": 1}


class CPSizes(NamedTuple):
    shapes: tuple[tuple[int, ...], ...]
    rank: int
    sweeps: int
    batch: int
    batch_size: int
    batch_rank: int
    batch_sweeps: int
    masked_size: int
    masked_rank: int
    masked_sweeps: int
    repeats: int


def planted(shape: tuple[int, ...], rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a tensor of N(0, 1) factors with 5 % white noise; return it and the signal."""
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal((size, rank)) for size in shape]
    signal = dense(factors)
    noise = rng.standard_normal(shape)
    scale = NOISE * np.linalg.norm(signal) / np.linalg.norm(noise)
    return signal + scale * noise, signal


def fit_rows(sizes: CPSizes, dtype: type) -> list[dict[str, Any]]:
    """Time a fixed number of sweeps from one start, plain and compressed."""
    rows, seed = [], GOOD_START[np.dtype(dtype).name]
    for shape in sizes.shapes:
        data = planted(shape, sizes.rank, seed=0)[0].astype(dtype)
        start = [np.asarray(a) for a in draw(shape, sizes.rank, seed, dtype).factors]
        x, init = jnp.asarray(data), as_cp(start)
        fixed = {"max_iters": sizes.sweeps, "tol": 0.0}
        methods = {
            "als": lambda x, init, fixed=fixed: cp.als(x, init=init, **fixed)[0],
            "compressed": lambda x, init, fixed=fixed: cp.compressed_als(
                x, init=init, key=jax.random.key(0), **fixed
            )[0],
        }
        compile_seconds = {name: timing.compile_time(f, x, init) for name, f in methods.items()}
        ours = {name: timing.bind(jax.jit(f), x, init) for name, f in methods.items()}
        peers = fit_peers(data, start, sizes.sweeps)
        times = timing.measure({**ours, **peers}, repeats=sizes.repeats)
        errors = {name: relative_error(data, f()) for name, f in {**ours, **peers}.items()}
        best = min(peers, key=lambda name: times[name].cpu_min, default=None)
        rows += [
            {
                "experiment": f"cp {' x '.join(map(str, shape))} rank {sizes.rank}",
                "dtype": np.dtype(dtype).name,
                "method": name,
                **timing.columns(times[name]),
                "error": errors[name],
                "over best peer": timing.ratio(times, errors, name, best) if name in ours else None,
                "best peer": best,
                "compile_s": compile_seconds.get(name),
            }
            for name in times
        ]
    return rows


def batch_rows(sizes: CPSizes, dtype: type) -> list[dict[str, Any]]:
    """Time many small tensors: one call against a loop over a peer."""
    shape, rank = (sizes.batch_size,) * 3, sizes.batch_rank
    data = np.stack([planted(shape, rank, seed)[0] for seed in range(sizes.batch)]).astype(dtype)
    starts = [
        [np.asarray(a) for a in draw(shape, rank, seed, dtype).factors]
        for seed in range(sizes.batch)
    ]
    x = jnp.asarray(data)
    init = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(as_cp, starts))

    def one(x: jax.Array, init: cp.CPTensor) -> cp.CPTensor:
        return cp.als(x, init=init, max_iters=sizes.batch_sweeps, tol=0.0)[0]

    methods = {
        "als, vmap": jax.vmap(one),
        "als, lax.map": lambda x, init: jax.lax.map(lambda pair: one(*pair), (x, init)),
    }
    compile_seconds = {name: timing.compile_time(f, x, init) for name, f in methods.items()}
    ours = {name: timing.bind(jax.jit(f), x, init) for name, f in methods.items()}
    loops = [
        fit_peers(tensor, start, sizes.batch_sweeps)
        for tensor, start in zip(data, starts, strict=True)
    ]
    peers = {
        f"loop of {name}": lambda name=name: [peer[name]() for peer in loops] for name in loops[0]
    }
    times = timing.measure({**ours, **peers}, repeats=sizes.repeats)
    errors = {}
    for name, function in {**ours, **peers}.items():
        found = function()
        if name in ours:
            found = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(data))]
        pairs = zip(data, found, strict=True)
        errors[name] = float(np.mean([relative_error(a, b) for a, b in pairs]))
    best = min(peers, key=lambda name: times[name].cpu_min, default=None)
    return [
        {
            "experiment": f"cp batch {sizes.batch} x {sizes.batch_size}^3 rank {rank}",
            "dtype": np.dtype(dtype).name,
            "method": name,
            **timing.columns(times[name]),
            "error": errors[name],
            "over best peer": timing.ratio(times, errors, name, best) if name in ours else None,
            "best peer": best,
            "compile_s": compile_seconds.get(name),
        }
        for name in times
    ]


def masked_rows(sizes: CPSizes, dtype: type) -> list[dict[str, Any]]:
    """Time how long a fit with hidden entries takes to the noise floor of the hidden ones.

    Every method begins at one sweep over the zero-filled tensor from a random start, of several
    that which fits best in the end. It is run for the fewest sweeps that bring its error of the
    hidden entries, against the signal, within 1 % of what the exact method reaches; that error is
    the row's.
    """
    shape, rank = (sizes.masked_size,) * 3, sizes.masked_rank
    rows = []
    for hidden in HIDDEN:
        noisy, signal = planted(shape, rank, seed=0)
        mask = np.random.default_rng(1).random(shape) >= hidden
        data = np.where(mask, noisy, 0).astype(dtype)
        start = good_start(jnp.asarray(data), jnp.asarray(mask), sizes)
        begin = [np.asarray(a) for a in start.factors]

        def held_out(model: Any, signal: np.ndarray = signal, mask: np.ndarray = mask) -> float:
            difference = (signal - dense(as_factors(model)))[~mask]
            return float(np.linalg.norm(difference) / np.linalg.norm(signal[~mask]))

        exact = masked_runner(jnp.asarray(data), jnp.asarray(mask), start)
        peer = masked_peer(data, mask, begin)
        candidates = {"als, masked": exact} | ({} if peer is None else {"tensorly EM": peer})
        floor = held_out(exact(sizes.masked_sweeps))
        needed = {
            name: sweeps_needed(f, held_out, NEAR * floor, 16 * sizes.masked_sweeps)
            for name, f in candidates.items()
        }
        functions = {
            name: (lambda f=f, count=needed[name]: f(count)) for name, f in candidates.items()
        }
        times = timing.measure(functions, repeats=sizes.repeats)
        errors = {name: held_out(f()) for name, f in functions.items()}
        rows += [
            {
                "experiment": f"cp masked {sizes.masked_size}^3 rank {rank}, {hidden:.0%} hidden",
                "dtype": np.dtype(dtype).name,
                "method": name,
                **timing.columns(times[name]),
                "error": errors[name],
                "sweeps": needed[name],
                "over tensorly": timing.ratio(times, errors, name, "tensorly EM"),
            }
            for name in functions
        ]
    return rows


def good_start(x: jax.Array, mask: jax.Array, sizes: CPSizes) -> cp.CPTensor:
    """Pick, of several starts, the one whose exact fit is best on the observed entries."""

    def one(key: jax.Array) -> tuple[cp.CPTensor, jax.Array]:
        drawn = cp.random_init(x.shape, sizes.masked_rank, key=key, dtype=x.dtype)
        start, _ = cp.als(x, init=drawn, max_iters=1, tol=0.0)
        _, info = cp.als(x, init=start, mask=mask, max_iters=sizes.masked_sweeps, tol=0.0)
        return start, info.objective[-1]

    keys = jax.random.split(jax.random.key(0), STARTS)
    starts, objectives = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
    return jax.tree.map(lambda leaf: leaf[jnp.argmin(objectives)], starts)


def masked_runner(x: jax.Array, mask: jax.Array, start: cp.CPTensor) -> Callable[[int], Any]:
    """Return a function of the number of sweeps, compiled once for each."""
    compiled: dict[int, Callable] = {}

    def run(sweeps: int) -> cp.CPTensor:
        if sweeps not in compiled:
            compiled[sweeps] = jax.jit(
                lambda x, mask, start: cp.als(x, init=start, mask=mask, max_iters=sweeps, tol=0.0)[
                    0
                ]
            )
        return compiled[sweeps](x, mask, start)

    return run


def masked_peer(
    data: np.ndarray, mask: np.ndarray, start: list[np.ndarray]
) -> Callable[[int], Any] | None:
    """Return TensorLy's imputing fit as a function of the number of sweeps, if it is installed."""
    if not importlib.util.find_spec("tensorly"):
        return None
    decomposition: Any = importlib.import_module("tensorly.decomposition")

    def run(sweeps: int) -> Any:
        return decomposition.parafac(
            data,
            start[0].shape[1],
            n_iter_max=sweeps,
            init=(None, [a.copy() for a in start]),
            tol=0,
            mask=mask.astype(data.dtype),
        )

    return run


def sweeps_needed(
    run: Callable[[int], Any], error: Callable[[Any], float], goal: float, most: int
) -> int:
    """Find the fewest sweeps that reach the goal, by doubling and bisection; `most` if none do."""
    high = 1
    while high < most and error(run(high)) > goal:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if error(run(middle)) > goal:
            low = middle
        else:
            high = middle
    return high


def fit_peers(
    data: np.ndarray, start: list[np.ndarray], sweeps: int
) -> dict[str, Callable[[], Any]]:
    """Return what is installed of the peers; each gives a CP tensor of its own kind."""
    rank, peers = start[0].shape[1], {}
    if importlib.util.find_spec("tensorly"):
        decomposition: Any = importlib.import_module("tensorly.decomposition")

        def tensorly() -> Any:
            init = (None, [a.copy() for a in start])
            return decomposition.parafac(data, rank, n_iter_max=sweeps, init=init, tol=0)

        peers["tensorly"] = tensorly
    if importlib.util.find_spec("pyttb"):
        pyttb: Any = importlib.import_module("pyttb")
        tensor = pyttb.tensor(np.asfortranarray(data))

        def als() -> Any:
            init = pyttb.ktensor([np.array(a, np.float64, order="F") for a in start], np.ones(rank))
            with contextlib.redirect_stdout(io.StringIO()):
                found = pyttb.cp_als(
                    tensor, rank, stoptol=0.0, maxiters=sweeps, init=init, printitn=0
                )[0]
            return found.weights, found.factor_matrices

        peers["pyttb"] = als
    if importlib.util.find_spec("tensortools"):
        tensortools: Any = importlib.import_module("tensortools")

        def loop() -> Any:
            init = tensortools.KTensor([a.copy() for a in start])
            found = tensortools.cp_als(
                data, rank, init=init, tol=0.0, min_iter=sweeps, max_iter=sweeps, verbose=False
            )
            return None, found.factors.factors

        peers["tensortools"] = loop
    return peers


def draw(shape: tuple[int, ...], rank: int, seed: int, dtype: type) -> cp.CPTensor:
    return cp.random_init(shape, rank, key=jax.random.key(seed), dtype=dtype)


def as_cp(factors: list[np.ndarray]) -> cp.CPTensor:
    return cp.CPTensor(
        jnp.ones(factors[0].shape[1], factors[0].dtype), tuple(map(jnp.asarray, factors))
    )


def as_factors(model: Any) -> list[np.ndarray]:
    """Read a (weights, factors) pair in float64, the weights in the first factor."""
    weights, factors = model
    factors = [np.asarray(a, np.float64) for a in factors]
    if weights is not None:
        factors[0] = factors[0] * np.asarray(weights, np.float64)
    return factors


def dense(factors: list[np.ndarray]) -> np.ndarray:
    product = factors[0]
    for factor in factors[1:]:
        product = product[..., None, :] * factor
    return product.sum(axis=-1)


def relative_error(data: np.ndarray, model: Any) -> float:
    """Evaluate the residual in float64, slice by slice."""
    first, *others = as_factors(model)
    squares = 0.0
    for row, block in zip(first, data, strict=True):
        squares += float(np.sum((block - dense([row * others[0], *others[1:]])) ** 2))
    return squares**0.5 / float(np.linalg.norm(data.astype(np.float64)))
