"""The loop that all iterative solvers share, and the record it leaves."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedlr import _checks

__all__ = ["IterationInfo", "iterate"]

State = TypeVar("State")


class IterationInfo(NamedTuple):
    """Record of an iterative solver.

    Attributes:
        objective: Objective after every iteration, shape (max_iters,); entries beyond `num_iters`
            repeat the last value.
        num_iters: Number of iterations done, int32 scalar.
        converged: Whether the stopping rule was met, bool scalar.
    """

    objective: Float[Array, " max_iters"]
    num_iters: Int[Array, ""]
    converged: Bool[Array, ""]


def iterate(
    step: Callable[[State], tuple[State, Float[Array, ""]]],
    init: State,
    *,
    max_iters: int,
    tol: float,
) -> tuple[State, IterationInfo]:
    """Repeat a step that lowers an objective, until the objective stops falling.

    The iteration has converged when ``f_{k-1} - f_k <= tol * |f_{k-1}|``. A rise of the objective
    meets this as well: a step that descends rises only by rounding. A step that may rise for other
    reasons returns the lowest objective it has accepted, together with that state. An objective
    that is NaN or infinite ends the iteration as not converged.

    A `tol` below the rounding of the objective, a few eps of its dtype times what cancels in its
    computation, is met by the first such rise.

    Args:
        step: Pure function ``state -> (state, objective)``, with the objective of the new state, a
            float32 or float64 scalar. The structure, shapes and dtypes of the state stay.
        init: State to start from, any pytree of arrays.
        max_iters: Largest number of iterations, at least 1; *static*.
        tol: Relative decrease at which to stop, a Python number; *static*. With 0 all `max_iters`
            iterations run in a scan, which can be differentiated in reverse mode, and the rule
            above is only looked up for the last one. Otherwise a while loop, with forward mode
            only; under vmap every member keeps the state of its own last iteration, while all wait
            for the slowest.

    Returns:
        The last state, and the record of the objective.

    Raises:
        ValueError: If `max_iters` or `tol` is out of range or traced, the objective is no floating
            scalar, or a step changes the structure, a shape or a dtype of the state.

    Example:
        >>> from fedlr import iteration
        >>> halve = lambda x: (x / 2, x**2 / 4 + 1)
        >>> x, info = iteration.iterate(halve, 8.0, max_iters=100, tol=1e-3)
        >>> int(info.num_iters), bool(info.converged), info.objective[:3].tolist()
        (9, True, [17.0, 5.0, 2.0])
    """
    _checks.check_count("iterate", "max_iters", max_iters)
    if isinstance(tol, bool) or not isinstance(tol, (int, float, np.number)) or not _in_range(tol):
        raise _checks.fail("iterate", f"tol {tol!r}", "a finite Python number from 0")
    init = jax.tree.map(jnp.asarray, init)
    dtype = _check_step(step, init)
    if tol == 0:
        return _scan(step, init, int(max_iters))
    return _while(step, init, int(max_iters), float(tol), dtype)


def _scan(step: Callable, init: State, max_iters: int) -> tuple[State, IterationInfo]:
    """Run all iterations, differentiable in both modes."""

    def body(state: State, _: None) -> tuple[State, Array]:
        return step(state)

    state, objective = lax.scan(body, init, None, length=max_iters)
    converged = jnp.array(False)
    if max_iters > 1:
        converged = _has_converged(objective[-2], objective[-1], 0.0)
    return state, IterationInfo(objective, jnp.array(max_iters, jnp.int32), converged)


def _while(
    step: Callable, init: State, max_iters: int, tol: float, dtype: jnp.dtype
) -> tuple[State, IterationInfo]:
    """Iterate until the rule is met, the objective is not finite, or `max_iters` is reached."""

    def is_going(carry: tuple) -> Array:
        _, _, num_iters, objective, converged = carry
        return (num_iters < max_iters) & ~converged & jnp.isfinite(objective)

    def body(carry: tuple) -> tuple:
        state, history, num_iters, previous, _ = carry
        state, objective = step(state)
        history = history.at[num_iters].set(objective)
        converged = (num_iters > 0) & _has_converged(previous, objective, tol)
        return state, history, num_iters + 1, objective, converged

    zero = jnp.zeros((), dtype)
    start = (init, jnp.zeros(max_iters, dtype), jnp.array(0, jnp.int32), zero, jnp.array(False))
    state, history, num_iters, last, converged = lax.while_loop(is_going, body, start)
    objective = jnp.where(jnp.arange(max_iters, dtype=jnp.int32) < num_iters, history, last)
    return state, IterationInfo(objective, num_iters, converged)


def _has_converged(previous: Array, objective: Array, tol: float) -> Array:
    """Whether the relative decrease is at most `tol`; never for an objective that is not finite."""
    return (previous - objective <= tol * jnp.abs(previous)) & jnp.isfinite(objective)


def _in_range(tol: float) -> bool:
    """Whether `tol` is a finite number from 0."""
    return math.isfinite(tol) and tol >= 0


def _check_step(step: Callable, init: PyTree) -> jnp.dtype:
    """Refuse a step whose state or objective has the wrong form; return the objective's dtype."""
    state, objective = jax.eval_shape(step, init)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init)
    after = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    if before != after:
        raise _checks.fail("iterate", f"a step from state {before} to {after}", "the same form")
    if jnp.shape(objective) or objective.dtype not in (jnp.float32, jnp.float64):
        got = f"an objective of shape {objective.shape} and dtype {objective.dtype}"
        raise _checks.fail("iterate", got, "a float32 or float64 scalar")
    return objective.dtype
