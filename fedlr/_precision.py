"""Full matmul precision for factorizations and operators."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def highest(function: Callable[P, R]) -> Callable[P, R]:
    """Trace `function` with matrix products at precision "highest".

    Accelerators round float32 products to tf32 or bfloat16 by default, which a factorization does
    not survive. The setting is local to the call: no global flag is touched.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped
