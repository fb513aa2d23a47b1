"""`python -m fedlr check`: does this backend compute right?

Compiles a handful of kernels for the default device, in float32, and compares them with NumPy in
float64. A compiler that miscompiles says nothing: jax 0.10.2 gives wrong numbers for the first
check below, without an error.
"""

import argparse
import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlr import multilinear, subspace, tomography, tucker

__all__ = ["Outcome", "check", "main"]

EPS = float(np.finfo(np.float32).eps)
TENSOR, RANKS = (30, 40, 50), (3, 4, 5)
GEOMETRY = tomography.ParallelBeam(shape=(256, 255), num_bins=260)
# No view at pi/4 itself, where float32 and float64 may march along different axes.
DEGREES = (0.0, 17.0, 44.9, 45.1, 77.0, 90.0, 123.0, 135.1, 179.0)
# Weights come from positions up to the size of the image, and are as wrong as those are rounded.
TERMS = max(GEOMETRY.shape) ** 2
# Cosine between the two sides of <A x, y> = <x, A^T y> in a single view.
MISMATCH = 4e-6


class Outcome(NamedTuple):
    """How far one kernel is off.

    Attributes:
        name: What was computed.
        error: Largest error relative to the largest expected value.
        allowed: What rounding in float32 explains.
    """

    name: str
    error: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """Whether rounding explains the error; NaN is never right."""
        return self.error <= self.allowed


def check() -> Iterator[Outcome]:
    """Compute each kernel on the default backend and compare it with NumPy in float64.

    Returns:
        One `Outcome` after the other, as they are computed. A kernel that raises is infinitely
        far off.
    """
    for name, compare in CHECKS.items():
        try:
            yield from compare(name)
        except Exception as error:  # whatever stops a kernel here is its failure
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Outcome(f"{name} ({reason})", math.inf, 0.0)


def _batched_norms(name: str) -> Iterator[Outcome]:
    """Squared norms of many small products, the objective of a round with many clients."""
    rows = _random(0, 40_000, 3)
    scale = np.array([1, 2, 3], np.float32)

    def norm(matrix, row):
        return jnp.sum(jnp.matmul(matrix, row, precision="highest") ** 2)

    computed = jax.jit(jax.vmap(norm, in_axes=(None, 0)))(np.diag(scale), rows)
    yield _outcome(name, computed, ((_wide(rows) * scale) ** 2).sum(1), 3)


def _least_squares(name: str) -> Iterator[Outcome]:
    """Losses and gradients of clients with data of their own, vmapped in chunks."""
    matrices, targets, point = _random(1, 24, 33, 8), _random(2, 24, 33), _random(3, 8)

    def loss(x, matrix, target):
        return jnp.sum((jnp.matmul(matrix, x, precision="highest") - target) ** 2) / 2

    def of_client(data):
        return jax.value_and_grad(loss)(point, *data)

    losses, gradients = jax.jit(
        lambda *data: jax.lax.map(of_client, data, batch_size=8),
    )(matrices, targets)
    residuals = _wide(matrices) @ _wide(point) - targets
    yield _outcome(f"{name}, losses", losses, (residuals**2).sum(1) / 2, 33)
    expected = np.einsum("cij,ci->cj", _wide(matrices), residuals)
    yield _outcome(f"{name}, gradients", gradients, expected, 33)


def _mode_products(name: str) -> Iterator[Outcome]:
    x = _random(4, *TENSOR)
    for mode, size in enumerate(TENSOR):
        matrix = _random(5, 7, size)
        computed = jax.jit(multilinear.mode_dot, static_argnums=2)(x, matrix, mode)
        expected = _mode_dot(_wide(x), _wide(matrix), mode)
        yield _outcome(f"{name}, mode {mode}", computed, expected, size)


def _mttkrps(name: str) -> Iterator[Outcome]:
    x, factors = _random(6, *TENSOR), [_random(7 + size, size, 4) for size in TENSOR]
    spelled = ("ijk,jr,kr->ir", "ijk,ir,kr->jr", "ijk,ir,jr->kr")
    for mode, sum_of_products in enumerate(spelled):
        others = [_wide(factor) for factor in factors[:mode] + factors[mode + 1 :]]
        computed = jax.jit(multilinear.mttkrp, static_argnums=2)(x, factors, mode)
        expected = np.einsum(sum_of_products, _wide(x), *others)
        yield _outcome(f"{name}, mode {mode}", computed, expected, x.size // TENSOR[mode])


def _tucker(name: str) -> Iterator[Outcome]:
    """Truncation of a noisy tensor against the same in float64."""
    x = _low_rank() + np.float32(0.1) * _random(8, *TENSOR)
    computed = jax.jit(lambda x: tucker.to_dense(tucker.sthosvd(x, RANKS)))(x)
    expected = _wide(x)
    for mode, rank in enumerate(RANKS):
        unfolded = np.moveaxis(expected, mode, 0).reshape(TENSOR[mode], -1)
        basis = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        expected = _mode_dot(expected, basis @ basis.T, mode)
    yield _outcome(name, computed, expected, x.size // min(TENSOR))


def _randomized_tucker(name: str) -> Iterator[Outcome]:
    """A sketch finds the subspaces of a tensor of low rank, whatever the key."""
    x = _low_rank()
    basis = subspace.randomized(key=jax.random.key(0))
    computed = jax.jit(lambda x: tucker.to_dense(tucker.sthosvd(x, RANKS, basis=basis)))(x)
    yield _outcome(name, computed, _wide(x), x.size // min(TENSOR))


def _projections(name: str) -> Iterator[Outcome]:
    """Every view by itself, as a single wrong one hides in an average; the worst is told."""
    image, angles = _random(9, *GEOMETRY.shape), np.radians(DEGREES).astype(np.float32)
    project = jax.jit(lambda image, angles: tomography.project(GEOMETRY, image, angles))
    outcomes = []
    for degrees, angle, view in zip(DEGREES, angles, project(image, angles), strict=True):
        lines = [_wide(image)[taps] * weights for taps, weights in _joseph(angle)]
        expected = np.sum(lines, axis=(0, 1))
        outcomes.append(_outcome(f"{name}, {degrees} degrees", view, expected, TERMS))
    yield _worst(outcomes)


def _backprojections(name: str) -> Iterator[Outcome]:
    """Every view by itself: against the transpose in float64, and by the dot-product test."""
    image, angles = _random(9, *GEOMETRY.shape), np.radians(DEGREES).astype(np.float32)
    views = _random(10, len(DEGREES), GEOMETRY.num_bins)

    def both_ways(image, view, angle):
        angles = angle[None]
        smeared = tomography.backproject(GEOMETRY, view[None], angles)
        return tomography.project(GEOMETRY, image, angles)[0], smeared

    projected, smeared = jax.jit(jax.vmap(both_ways, in_axes=(None, 0, 0)))(image, views, angles)
    outcomes, adjoint = [], []
    for i, degrees in enumerate(DEGREES):
        expected = np.zeros(GEOMETRY.shape)
        for taps, weights in _joseph(angles[i]):
            np.add.at(expected, taps, weights * views[i])
        outcomes.append(_outcome(f"{name}, {degrees} degrees", smeared[i], expected, TERMS))
        forward, back = _wide(projected[i]), _wide(smeared[i])
        gap = abs(forward @ views[i] - np.sum(back * image))
        cosine = gap / (np.linalg.norm(forward) * np.linalg.norm(views[i]))
        adjoint.append(Outcome(f"{name}, adjoint, {degrees} degrees", float(cosine), MISMATCH))
    yield _worst(outcomes)
    yield _worst(adjoint)


CHECKS: dict[str, Callable[[str], Iterator[Outcome]]] = {
    "vmapped matrix-vector norms (jax-ml/jax#39103)": _batched_norms,
    "vmapped least squares": _least_squares,
    "multilinear.mode_dot": _mode_products,
    "multilinear.mttkrp": _mttkrps,
    "tucker.sthosvd": _tucker,
    "tucker.sthosvd, randomized": _randomized_tucker,
    "tomography.project": _projections,
    "tomography.backproject": _backprojections,
}


def _outcome(name: str, computed: jax.Array, expected: np.ndarray, terms: int) -> Outcome:
    """Compare; an entry that sums up `terms` products may be off by their square root in eps."""
    difference = np.abs(_wide(computed) - expected).max()
    return Outcome(name, float(difference / np.abs(expected).max()), 4 * math.sqrt(terms) * EPS)


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    return max(outcomes, key=lambda outcome: (not outcome.is_right, outcome.error))


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _wide(x: object) -> np.ndarray:
    return np.asarray(x, np.float64)


def _mode_dot(x: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, x, (1, mode)), 0, mode)


def _low_rank() -> np.ndarray:
    """A tensor of multilinear rank `RANKS`, of entries near one."""
    x = _wide(_random(11, *RANKS))
    for mode, size in enumerate(TENSOR):
        x = _mode_dot(x, np.linalg.qr(_wide(_random(12 + mode, size, RANKS[mode])))[0], mode)
    return (x * math.sqrt(math.prod(TENSOR) / math.prod(RANKS))).astype(np.float32)


def _joseph(angle: np.float32) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Yield pixel indices and weights (lines, bins) of the two taps of Joseph's method."""
    rows, columns = GEOMETRY.shape
    cos, sin = math.cos(angle), math.sin(angle)
    t = np.arange(GEOMETRY.num_bins) - (GEOMETRY.num_bins - 1) / 2
    by_rows = abs(cos) >= abs(sin)
    lines, across = (rows, columns) if by_rows else (columns, rows)
    line = np.arange(lines)[:, None]
    offset = line - (lines - 1) / 2
    # A row lies at Y = -offset, a column at X = offset.
    crossing = (t + offset * sin) / cos if by_rows else -(t - offset * cos) / sin
    position = crossing + (across - 1) / 2
    below = np.floor(position).astype(int)
    for tap, share in ((below, 1 - (position - below)), (below + 1, position - below)):
        inside = (tap >= 0) & (tap < across)
        weights = np.where(inside, share, 0) / max(abs(cos), abs(sin))
        along, place = np.broadcast_to(line, tap.shape), np.clip(tap, 0, across - 1)
        yield ((along, place) if by_rows else (place, along)), weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; those of the process if None.

    Returns:
        The exit status: 0 if every kernel is right, 1 if not. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m fedlr")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="compare kernels on this backend with NumPy in float64")
    parser.parse_args(arguments)

    names = ("fedlr", "jax", "jaxlib", "numpy", "equinox", "optax")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    kinds = [device.device_kind for device in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    print(f"backend {jax.default_backend()}: {devices}\n")
    print(f"{'error':>9}  {'allowed':>9}")
    wrong = []
    for outcome in check():
        verdict = "ok   " if outcome.is_right else "WRONG"
        print(
            f"{outcome.error:9.1e}  {outcome.allowed:9.1e}  {verdict}  {outcome.name}", flush=True
        )
        if not outcome.is_right:
            wrong.append(outcome)
    if wrong:
        print(f"\nthis backend computes {len(wrong)} of the above wrong:")
        for outcome in wrong:
            print(f"  {outcome.name}: off by {outcome.error:.1e}, at most {outcome.allowed:.1e}")
        return 1
    print("\nall right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
