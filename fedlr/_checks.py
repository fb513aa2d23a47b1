"""Checks of arguments that fail while tracing, with one form of message.

Every check raises ``ValueError("function: got ..., expected ...")`` from static information alone
(shapes, dtypes, Python numbers), so it works under jit, vmap and grad.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array


def fail(function: str, got: object, expected: str) -> ValueError:
    """Build the ValueError of this package: ``function: got ..., expected ...``."""
    return ValueError(f"{function}: got {got}, expected {expected}")


def check_floating(function: str, **arrays: Array) -> None:
    """Refuse every array that is not float32 or float64."""
    for name, array in arrays.items():
        dtype = jnp.result_type(array)
        if dtype not in (jnp.float32, jnp.float64):
            raise fail(function, f"{name} of dtype {dtype}", "float32 or float64")


def check_ndim(function: str, name: str, array: Array, minimum: int, maximum: int | None = None):
    """Refuse an array with fewer than `minimum` or more than `maximum` axes."""
    maximum = minimum if maximum is None else maximum
    if not minimum <= jnp.ndim(array) <= maximum:
        wanted = str(minimum) if minimum == maximum else f"{minimum} to {maximum}"
        raise fail(function, f"{name} of shape {jnp.shape(array)}", f"{wanted} axes")


def check_shape(function: str, name: str, array: Array, expected: tuple[int, ...]) -> None:
    """Refuse an array whose shape is not `expected`."""
    if jnp.shape(array) != tuple(expected):
        raise fail(function, f"{name} of shape {jnp.shape(array)}", f"shape {tuple(expected)}")


def check_mode(function: str, mode: int, ndim: int) -> None:
    """Refuse a mode that is not an integer in ``0 .. ndim - 1``."""
    if isinstance(mode, bool) or not isinstance(mode, (int, np.integer)) or not 0 <= mode < ndim:
        raise fail(function, f"mode {mode!r}", f"an integer from 0 to {ndim - 1}")


def check_count(function: str, name: str, count: int, minimum: int = 1) -> None:
    """Refuse a count that is not an integer from `minimum`."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < minimum:
        raise fail(function, f"{name} {count!r}", f"an integer from {minimum}")


def check_non_negative(function: str, name: str, value: float | Array) -> None:
    """Refuse a concrete number or array with an entry that is negative or NaN; tracers pass."""
    if not isinstance(value, core.Tracer) and not np.all(np.asarray(value) >= 0):
        raise fail(function, f"{name} {value}", "a non-negative number")


def check_positive(function: str, name: str, value: float | Array) -> None:
    """Refuse a concrete number that is not above 0; tracers pass."""
    if not isinstance(value, core.Tracer) and not np.all(np.asarray(value) > 0):
        raise fail(function, f"{name} {value}", "a positive number")


def check_fraction(function: str, name: str, value: float) -> None:
    """Refuse a Python number that is not within 0 and 1."""
    if not 0.0 <= value <= 1.0:
        raise fail(function, f"{name} {value}", "a fraction from 0 to 1")


def check_rank(function: str, rank: int, maximum: int, name: str = "rank") -> None:
    """Refuse a rank that is not an integer in ``1 .. maximum``."""
    if (
        isinstance(rank, bool)
        or not isinstance(rank, (int, np.integer))
        or not 1 <= rank <= maximum
    ):
        raise fail(function, f"{name} {rank!r}", f"an integer from 1 to {maximum}")


def check_ranks(function: str, ranks: tuple[int, ...], shape: Sequence[int]) -> None:
    """Refuse ranks that are not a tuple with one integer in ``1 .. size`` for every mode."""
    if not isinstance(ranks, tuple):
        raise fail(function, f"ranks {ranks!r} of type {type(ranks).__name__}", "a tuple of ints")
    if len(ranks) != len(shape):
        raise fail(function, f"ranks {ranks}", f"{len(shape)} ranks for shape {tuple(shape)}")
    for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True)):
        check_rank(function, rank, size, name=f"ranks {ranks} with rank of mode {mode}")


def check_mask(function: str, mask: Array, shape: Sequence[int]) -> None:
    """Refuse a mask that is not bool or whose shape is not `shape`."""
    if jnp.result_type(mask) != jnp.bool_:
        raise fail(function, f"mask of dtype {jnp.result_type(mask)}", "bool (True = observed)")
    check_shape(function, "mask", mask, tuple(shape))


def check_finite(function: str, name: str, array: Array) -> None:
    """Refuse NaN and Inf in concrete data; for host-side drivers only."""
    finite = np.isfinite(np.asarray(array))
    if not finite.all():
        bad = int(finite.size - finite.sum())
        raise fail(function, f"{name} with {bad} NaN or Inf entries", "finite data or a mask")
