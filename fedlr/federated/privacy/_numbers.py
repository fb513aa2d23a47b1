"""Checks of the numbers of a private run."""

import math

import numpy as np
from jax import core
from jaxtyping import Array, Float

from fedlr import _checks


def check_size(function: str, name: str, value: float | Float[Array, ""]) -> None:
    """Refuse what is no finite number above 0; tracers pass."""
    if not isinstance(value, core.Tracer) and not (np.ndim(value) == 0 and 0 < value < math.inf):
        raise _checks.fail(function, f"{name} {value}", "a finite number above 0")


def check_multiplier(function: str, value: float | Float[Array, ""]) -> None:
    """Refuse a noise multiplier that is no finite number from 0; tracers pass."""
    if not isinstance(value, core.Tracer) and not (np.ndim(value) == 0 and 0 <= value < math.inf):
        raise _checks.fail(function, f"noise_multiplier {value}", "a finite number from 0")


def check_delta(function: str, delta: float) -> None:
    """Refuse a delta that is no probability inside of 0 and 1."""
    if not 0 < delta < 1:
        raise _checks.fail(function, f"delta {delta}", "a number between 0 and 1")
