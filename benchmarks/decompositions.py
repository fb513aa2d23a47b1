"""Tucker and CP decompositions beside their peers, on one core, by CPU time at equal error.

Tables, each measured in interleaved runs:

* `tucker`: rank 20 of a 200^3 tensor with a decaying core and 5 % white noise, both dtypes. The
  floor is the time that the multiplications of the plain algorithm take at the speed of a square
  matrix product measured in the same run; a blocked Gram matrix needs fewer.
  Then 64 tensors of 32^3 at rank 5 against a loop over the peers.
* `cp`: 50 sweeps of rank 10 from one start, plain and compressed, beside TensorLy and pyttb, and
  tensortools where it is installed.
* `cp_batch`: many small tensors.
* `cp_masked`: hidden entries, until those are as well predicted as they can be.
* `round`: the low-rank part of a federated round, images 250 x 250 of rank 40 from four clients:
  truncation of all clients and the joint factors, for three basis finders.

A ratio is the time of the peer over ours; it is left out where the errors differ by more than one
in a thousand. Compile time is apart.
"""

import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cp_costs, timing
from fedlr import sketching, subspace, tucker

CORES = 1


class Sizes(NamedTuple):
    size: int
    rank: int
    batch: int
    batch_size: int
    batch_rank: int
    image: int
    image_rank: int
    gemm: int
    repeats: int


SIZES = {
    "small": Sizes(24, 4, 4, 12, 3, 32, 6, 128, 2),
    "full": Sizes(200, 20, 64, 32, 5, 250, 40, 1024, 7),
}
CP_SIZES = {
    "small": cp_costs.CPSizes(((14, 13, 12),), 3, 5, 4, 8, 2, 5, 14, 2, 8, 2),
    "full": cp_costs.CPSizes(
        ((200, 200, 200), (100, 100, 100, 10)), 10, 50, 64, 32, 5, 20, 100, 10, 50, 3
    ),
}
Rows = list[dict[str, Any]]
SWEEPS = 5
CLIENTS = 4
OVERSAMPLING = 10
BATCH_OVERSAMPLING = 3


def pair_rows(sizes: Sizes, dtype: type) -> Rows:
    """Time sthosvd beside pyttb's hosvd alone: among larger jobs the time of the latter grows."""
    n, r = sizes.size, sizes.rank
    data = noisy_tensor(n, r, seed=0).astype(dtype)
    peer = tucker_peers(data, r, slow=False).get("pyttb hosvd")
    if peer is None:
        return []
    ours = timing.bind(jax.jit(lambda x: tucker.sthosvd(x, (r, r, r))), jnp.asarray(data))
    functions = {"sthosvd gram": ours, "pyttb hosvd": peer}
    times = timing.measure(functions, repeats=2 * sizes.repeats)
    errors = {name: relative_error(data, f()) for name, f in functions.items()}
    return [
        {
            "experiment": f"pair {n}^3 rank {r}",
            "dtype": np.dtype(dtype).name,
            "method": name,
            **timing.columns(times[name]),
            "error": errors[name],
            "over the other": timing.ratio(times, errors, name, "pyttb hosvd")
            if f is ours
            else None,
        }
        for name, f in functions.items()
    ]


def tucker_rows(sizes: Sizes, dtype: type, *, slow_peers: bool) -> Rows:
    n, r = sizes.size, sizes.rank
    data = noisy_tensor(n, r, seed=0).astype(dtype)
    x, ranks = jnp.asarray(data), (r, r, r)
    sketch = subspace.randomized(
        key=jax.random.key(0), oversampling=OVERSAMPLING, test_matrix=sketching.sign
    )
    sweeps = {"max_iters": SWEEPS, "tol": 0.0}
    methods = {
        "sthosvd gram": lambda x: tucker.sthosvd(x, ranks),
        "sthosvd randomized": lambda x: tucker.sthosvd(x, ranks, basis=sketch),
        "sthosvd lq": lambda x: tucker.sthosvd(x, ranks, basis=subspace.lq()),
        "hosvd gram": lambda x: tucker.hosvd(x, ranks),
        f"hooi {SWEEPS} sweeps": lambda x: tucker.hooi(x, ranks, **sweeps)[0],
    }
    gram_flops = 2 * n**4 + 4 * n**3 * r
    flops = dict.fromkeys(methods, gram_flops)
    flops["sthosvd randomized"] = 8 * n**3 * (r + OVERSAMPLING)
    flops["hosvd gram"] = 6 * n**4 + 2 * n**3 * r
    flops[f"hooi {SWEEPS} sweeps"] = gram_flops + SWEEPS * 4 * n**3 * r
    compile_seconds = {name: timing.compile_time(f, x) for name, f in methods.items()}
    ours = {name: timing.bind(jax.jit(f), x) for name, f in methods.items()}
    peers = tucker_peers(data, r, slow=slow_peers)
    # Seconds long, and what it leaves in memory slows the peers that follow it.
    slow = {name: peers.pop(name) for name in ("tensorly default",) if name in peers}
    square = jnp.asarray(np.random.default_rng(1).standard_normal((sizes.gemm,) * 2), dtype)
    product = timing.bind(jax.jit(lambda a: a @ a), square)
    times = timing.measure({"gemm": product, **ours, **peers}, repeats=sizes.repeats)
    times |= timing.measure(slow, repeats=2)
    peers |= slow
    gemm_rate = 2 * sizes.gemm**3 / times["gemm"].cpu_min
    errors = {name: relative_error(data, f()) for name, f in {**ours, **peers}.items()}
    rows = []
    for name in (*ours, *peers):
        floor = flops[name] / gemm_rate if name in flops else None
        rows.append(
            {
                "experiment": f"tucker {n}^3 rank {r}",
                "dtype": np.dtype(dtype).name,
                "method": name,
                **timing.columns(times[name]),
                "error": errors[name],
                **{
                    f"over {peer}": timing.ratio(times, errors, name, peer)
                    if name in ours
                    else None
                    for peer in PEERS
                },
                "share of floor": None if floor is None else floor / times[name].cpu_min,
                "gemm_gflops": gemm_rate / 1e9,
                "compile_s": compile_seconds.get(name),
            }
        )
    return rows


PEERS = ("pyttb hosvd", "pyttb tucker_als", "tensorly randomized", "tensorly default")


def tucker_peers(data: np.ndarray, rank: int, *, slow: bool) -> dict[str, Callable[[], Any]]:
    """Return what is installed of the peers, each giving (core, factors)."""
    peers, ranks = {}, [rank] * data.ndim
    if importlib.util.find_spec("pyttb"):
        pyttb: Any = importlib.import_module("pyttb")
        tensor = pyttb.tensor(np.asfortranarray(data))

        def hosvd() -> tuple:
            t = pyttb.hosvd(tensor, 1e-9, ranks=np.array(ranks), verbosity=0)
            return t.core.data, t.factor_matrices

        def als() -> tuple:
            with contextlib.redirect_stdout(io.StringIO()):
                t = pyttb.tucker_als(
                    tensor, np.array(ranks), stoptol=0.0, maxiters=SWEEPS, init="nvecs", printitn=0
                )[0]
            return t.core.data, t.factor_matrices

        peers |= {"pyttb hosvd": hosvd, "pyttb tucker_als": als}
    if importlib.util.find_spec("tensorly"):
        decomposition: Any = importlib.import_module("tensorly.decomposition")

        def randomized() -> tuple:
            return decomposition.tucker(data, ranks, svd="randomized_svd", random_state=0)

        peers["tensorly randomized"] = randomized
        if slow:
            peers["tensorly default"] = lambda: decomposition.tucker(data, ranks)
    return peers


def batch_rows(sizes: Sizes, dtype: type) -> Rows:
    n, r = sizes.batch_size, sizes.batch_rank
    data = np.stack([noisy_tensor(n, r, seed) for seed in range(sizes.batch)]).astype(dtype)
    x, ranks = jnp.asarray(data), (r, r, r)
    sketch = subspace.randomized(
        key=jax.random.key(0), oversampling=BATCH_OVERSAMPLING, test_matrix=sketching.sign
    )
    mapped = {}
    for name, basis in {"gram": subspace.gram(), "randomized": sketch}.items():

        def one(x: jax.Array, basis: subspace.BasisFinder = basis) -> tucker.TuckerTensor:
            return tucker.sthosvd(x, ranks, basis=basis)

        mapped[f"sthosvd {name}, vmap"] = jax.vmap(one)
        mapped[f"sthosvd {name}, lax.map"] = lambda x, one=one: jax.lax.map(one, x)
    compile_seconds = {name: timing.compile_time(f, x) for name, f in mapped.items()}
    ours = {name: timing.bind(jax.jit(f), x) for name, f in mapped.items()}
    loops = [tucker_peers(tensor, r, slow=False) for tensor in data]
    peers = {
        f"loop of {name}": lambda name=name: [peer[name]() for peer in loops] for name in loops[0]
    }
    functions = {**ours, **peers}
    times = timing.measure(functions, repeats=sizes.repeats)
    errors = {}
    for name, function in functions.items():
        found = function()
        models = found
        if name in ours:
            models = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(data))]
        pairs = zip(data, models, strict=True)
        errors[name] = float(np.mean([relative_error(a, b) for a, b in pairs]))
    best = min(peers, key=lambda name: times[name].cpu_min, default=None)
    return [
        {
            "experiment": f"batch {sizes.batch} x {n}^3 rank {r}",
            "dtype": np.dtype(dtype).name,
            "method": name,
            **timing.columns(times[name]),
            "error": errors[name],
            "over best peer": timing.ratio(times, errors, name, best) if name in ours else None,
            "best peer": best,
            "compile_s": compile_seconds.get(name),
        }
        for name in functions
    ]


def round_rows(sizes: Sizes) -> Rows:
    n, r = sizes.image, sizes.image_rank
    shared = noisy_images(n, r)
    images, key = jnp.asarray(shared, jnp.float32), jax.random.key(0)
    start = jax.jit(jax.vmap(lambda image: tucker.sthosvd(image, (r, r))))(images)
    joint = jax.jit(lambda t: tucker.joint_factors(t, (r, r)))(start)
    finders = {
        "gram": subspace.gram(),
        "randomized": subspace.randomized(key=key, oversampling=OVERSAMPLING),
        "plain sketch": subspace.randomized(key=key, oversampling=0, power_iters=0),
        "warm_started": subspace.warm_started(joint),
    }

    def clients(basis: subspace.BasisFinder) -> Callable:
        return lambda images: jax.lax.map(
            lambda image: tucker.sthosvd(image, (r, r), basis=basis), images
        )

    def server(basis: subspace.BasisFinder) -> Callable:
        def project(stacked: tucker.TuckerTensor) -> tuple:
            factors = tucker.joint_factors(stacked, (r, r), basis=basis)
            return factors, jax.vmap(lambda t: tucker.project_core(t, factors))(stacked)

        return project

    parts = {f"clients, {name}": (clients(basis), images) for name, basis in finders.items()}
    parts |= {f"server, {name}": (server(basis), start) for name, basis in finders.items()}
    compile_seconds = {name: timing.compile_time(f, x) for name, (f, x) in parts.items()}
    functions = {name: timing.bind(jax.jit(f), x) for name, (f, x) in parts.items()}
    times = timing.measure(functions, repeats=3 * sizes.repeats)
    return [
        {
            "experiment": f"round {CLIENTS} x {n}^2 rank {r}",
            "dtype": "float32",
            "method": name,
            **timing.columns(times[name]),
            "compile_s": compile_seconds[name],
        }
        for name in functions
    ]


def relative_error(x: np.ndarray, model: Any) -> float:
    """Evaluate the residual in float64 for a pair of core and factors."""
    core, factors = model
    dense = np.asarray(core, np.float64)
    for factor in factors:
        dense = np.tensordot(dense, np.asarray(factor, np.float64), axes=(0, 1))
    return float(np.linalg.norm(x - dense) / np.linalg.norm(x.astype(np.float64)))


def noisy_tensor(size: int, rank: int, seed: int) -> np.ndarray:
    """Draw a cubic tensor with a decaying core of the rank and 5 % white noise."""
    rng = np.random.default_rng(seed)
    index = np.arange(rank)
    decay = 1 / (1 + index[:, None, None] + index[:, None] + index)
    dense = rng.standard_normal((rank,) * 3) * decay
    for _ in range(3):
        factor = np.linalg.qr(rng.standard_normal((size, rank)))[0]
        dense = np.tensordot(dense, factor, axes=(0, 1))
    noise = rng.standard_normal(dense.shape)
    return dense + 0.05 * np.linalg.norm(dense) / np.linalg.norm(noise) * noise


def noisy_images(size: int, rank: int) -> np.ndarray:
    """Draw the clients' images: decaying singular values in a common subspace, and noise."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((size, 2 * rank)))[0] for _ in range(2))
    cores = rng.standard_normal((CLIENTS, 2 * rank, 2 * rank)) * 0.9 ** np.arange(2 * rank)
    images = left @ cores @ right.T
    return images + 0.01 * np.abs(images).max() * rng.standard_normal(images.shape)


def tucker_table(size: str) -> Rows:
    """Time Tucker decompositions of one tensor and of many."""
    sizes = SIZES[size]

    def of_dtype(dtype: type) -> Rows:
        return [
            *pair_rows(sizes, dtype),
            *tucker_rows(sizes, dtype, slow_peers=size == "full"),
            *batch_rows(sizes, dtype),
        ]

    return in_both(of_dtype)


def cp_table(size: str) -> Rows:
    """Time CP decompositions of one tensor, plain and compressed."""
    return in_both(functools.partial(cp_costs.fit_rows, CP_SIZES[size]))


def cp_batch_table(size: str) -> Rows:
    """Time CP decompositions of many tensors."""
    return in_both(functools.partial(cp_costs.batch_rows, CP_SIZES[size]))


def cp_masked_table(size: str) -> Rows:
    """Time CP decompositions of a tensor with hidden entries."""
    return in_both(functools.partial(cp_costs.masked_rows, CP_SIZES[size]))


def round_table(size: str) -> Rows:
    """Time the low-rank part of a federated round."""
    with jax.enable_x64(False):
        return round_rows(SIZES[size])


def in_both(of_dtype: Callable[[type], Rows]) -> Rows:
    """Collect the rows of float32 and of float64."""
    rows = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            rows += of_dtype(dtype)
    return rows


TABLES: dict[str, Callable[[str], Rows]] = {
    "tucker": tucker_table,
    "cp": cp_table,
    "cp_batch": cp_batch_table,
    "cp_masked": cp_masked_table,
    "round": round_table,
}


def run(size: str, only: Sequence[str] | None = None) -> Rows:
    """Run all tables at "small" or "full" size, or those named, and return their rows."""
    return [{"table": name, **row} for name in only or TABLES for row in TABLES[name](size)]
