"""The loop that all iterative solvers share, and the record it leaves."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedlr import _checks

__all__ = ["IterationInfo", "best", "iterate"]

State = TypeVar("State")

# The extrapolation after a plain step, its growth after every accepted one, and its bound.
_FIRST_BETA, _GROWTH, _LAST_BETA = 0.3, 1.1, 0.95


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
    extrapolate: bool = False,
    may_rise: bool = False,
) -> tuple[State, IterationInfo]:
    """Repeat a step that lowers an objective, until the objective stops falling.

    The iteration has converged when ``f_{k-1} - f_k <= tol * |f_{k-1}|``. A rise of the objective
    meets this as well: a step that descends rises only by rounding. For a step that may rise for
    other reasons, `may_rise` asks for ``|f_{k-1} - f_k| <= tol * |f_{k-1}|`` instead. An objective
    that is NaN or infinite ends the iteration as not converged.

    A `tol` below the rounding of the objective, a few eps of its dtype times what cancels in its
    computation, is met by the first such rise.

    With `extrapolate`, the step is taken from ``y = x_k + beta (x_k - x_(k-1))`` instead of x_k. If
    the objective does not rise, the new state is accepted and beta grows; else x_k stays, and the
    next step is a plain one from it, after which beta begins anew: from 0.3, by a factor of 1.1
    up to 0.95. The objective of the accepted states never rises, however bold beta is. A rejected
    step counts as an iteration and repeats the objective. Only a plain step is taken for
    convergence; an accepted one that falls little is followed by one. The state must then be a
    pytree of floating arrays for which such points make sense, and all that the objective depends
    on.

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
        extrapolate: Whether to extrapolate with restart; *static*.
        may_rise: Whether a rise of the objective is more than rounding; *static*.

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

    Reference: extrapolation with restart as by Ang and Gillis 2019, "Accelerating nonnegative
        matrix factorization algorithms using extrapolation", arXiv 1805.06604, for a whole sweep
        and with one rule for beta.
    """
    _checks.check_count("iterate", "max_iters", max_iters)
    if isinstance(tol, bool) or not isinstance(tol, (int, float, np.number)) or not _in_range(tol):
        raise _checks.fail("iterate", f"tol {tol!r}", "a finite Python number from 0")
    init = jax.tree.map(jnp.asarray, init)
    dtype = _check_step(step, init)
    is_small = _moves_little if may_rise else _falls_little
    converges = functools.partial(is_small, tol=float(tol))
    run = functools.partial(_scan if tol == 0 else _while, max_iters=int(max_iters), dtype=dtype)
    if not extrapolate:
        return run(functools.partial(_plain, step), converges, init)
    start = _Momentum(init, init, jnp.array(jnp.inf, dtype), jnp.zeros((), dtype))
    state, info = run(functools.partial(_extrapolated, step, converges), converges, start)
    return state.current, info


def best(results: State, info: IterationInfo) -> tuple[State, IterationInfo]:
    """Pick, of fits from many starts, the one whose objective ended lowest.

    Args:
        results: What a solver returned under `jax.vmap` over the starts: a pytree whose leaves have
            a leading axis of starts.
        info: Its record, with the same leading axis. Compare ``info.objective[:, -1]`` to see how
            the starts spread.

    Returns:
        Result and record of that start. An objective that is NaN is never the lowest, unless all
        are.

    Raises:
        ValueError: If the record has no axis of starts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import iteration
        >>> halve = lambda x: (x / 2, x**2 / 4 + 1)
        >>> solve = jax.vmap(lambda x: iteration.iterate(halve, x, max_iters=3, tol=0))
        >>> x, info = iteration.best(*solve(jnp.array([8.0, -4.0])))
        >>> float(x), float(info.objective[-1])
        (-0.5, 1.25)
    """
    if jnp.ndim(info.objective) != 2:
        got = f"objectives of shape {jnp.shape(info.objective)}"
        raise _checks.fail("best", got, "a leading axis of starts, (starts, max_iters)")
    last = info.objective[:, -1]
    index = jnp.argmin(jnp.where(jnp.isnan(last), jnp.inf, last))
    return jax.tree.map(lambda leaf: leaf[index], (results, info))


class _Momentum(NamedTuple):
    """The accepted state, the one before it, the objective, and the next extrapolation."""

    current: PyTree
    previous: PyTree
    objective: Array
    beta: Array


def _plain(step: Callable, state: State) -> tuple[State, Array, Array]:
    """Take a step; the objective may always be asked for convergence."""
    state, objective = step(state)
    return state, objective, jnp.array(True)


def _extrapolated(
    step: Callable, converges: Callable, state: _Momentum
) -> tuple[_Momentum, Array, Array]:
    """Take a step from the extrapolated state and accept it if the objective does not rise."""

    def ahead(current: Array, previous: Array) -> Array:
        return current + state.beta.astype(current.dtype) * (current - previous)

    found, objective = step(jax.tree.map(ahead, state.current, state.previous))
    # A plain step is accepted as it is: it rises by rounding at most, or has met NaN.
    is_plain = state.beta == 0
    accept = (objective <= state.objective) | is_plain

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(accept, new, old)

    grown = jnp.where(is_plain, _FIRST_BETA, jnp.minimum(_GROWTH * state.beta, _LAST_BETA))
    goes_on = accept & (is_plain | ~converges(state.objective, objective))
    after = _Momentum(
        jax.tree.map(keep, found, state.current),
        jax.tree.map(keep, state.current, state.previous),
        keep(objective, state.objective),
        jnp.where(goes_on, grown, 0),
    )
    return after, after.objective, is_plain


def _scan(
    step: Callable, converges: Callable, init: State, *, max_iters: int, dtype: jnp.dtype
) -> tuple[State, IterationInfo]:
    """Run all iterations, differentiable in both modes."""

    def body(state: State, _: None) -> tuple[State, tuple[Array, Array]]:
        state, objective, checked = step(state)
        return state, (objective, checked)

    state, (objective, checked) = lax.scan(body, init, None, length=max_iters)
    converged = jnp.array(False)
    if max_iters > 1:
        converged = checked[-1] & converges(objective[-2], objective[-1])
    return state, IterationInfo(objective.astype(dtype), jnp.array(max_iters, jnp.int32), converged)


def _while(
    step: Callable, converges: Callable, init: State, *, max_iters: int, dtype: jnp.dtype
) -> tuple[State, IterationInfo]:
    """Iterate until the rule is met, the objective is not finite, or `max_iters` is reached."""

    def is_going(carry: tuple) -> Array:
        _, _, num_iters, objective, converged = carry
        return (num_iters < max_iters) & ~converged & jnp.isfinite(objective)

    def body(carry: tuple) -> tuple:
        state, history, num_iters, previous, _ = carry
        state, objective, checked = step(state)
        history = history.at[num_iters].set(objective)
        converged = checked & (num_iters > 0) & converges(previous, objective)
        return state, history, num_iters + 1, objective, converged

    zero = jnp.zeros((), dtype)
    start = (init, jnp.zeros(max_iters, dtype), jnp.array(0, jnp.int32), zero, jnp.array(False))
    state, history, num_iters, last, converged = lax.while_loop(is_going, body, start)
    objective = jnp.where(jnp.arange(max_iters, dtype=jnp.int32) < num_iters, history, last)
    return state, IterationInfo(objective, num_iters, converged)


def _falls_little(previous: Array, objective: Array, tol: float) -> Array:
    """Whether the relative decrease is at most `tol`; never for an objective that is not finite."""
    return (previous - objective <= tol * jnp.abs(previous)) & jnp.isfinite(objective)


def _moves_little(previous: Array, objective: Array, tol: float) -> Array:
    """Whether the relative change is at most `tol`; never for an objective that is not finite."""
    return jnp.abs(previous - objective) <= tol * jnp.abs(previous)


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
