import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedlr import iteration


def descend(x):
    """Halve the distance to the minimum of (x - 3)^2 + 1."""
    x = (x + 3) / 2
    return x, (x - 3) ** 2 + 1


def reference(x, max_iters, tol):
    """The stopping rule in plain Python: (x, objectives)."""
    objectives = []
    for _ in range(max_iters):
        x, objective = descend(x)
        objectives.append(objective)
        if len(objectives) > 1 and objectives[-2] - objective <= tol * abs(objectives[-2]):
            break
    return x, objectives


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_a_tolerance_stops_at_the_first_small_relative_decrease(tol):
    x, info = iteration.iterate(descend, jnp.array(20.0), max_iters=40, tol=tol)
    expected, objectives = reference(20.0, 40, tol)
    assert x == expected
    assert info.num_iters == len(objectives) < 40
    assert info.converged
    np.testing.assert_array_equal(info.objective[: len(objectives)], objectives)
    np.testing.assert_array_equal(info.objective[len(objectives) :], objectives[-1])


def test_too_few_iterations_are_not_converged():
    _, info = iteration.iterate(descend, jnp.array(20.0), max_iters=3, tol=1e-6)
    assert info.num_iters == 3
    assert not info.converged
    np.testing.assert_array_equal(info.objective, reference(20.0, 3, 1e-6)[1])


@pytest.mark.parametrize("tol", [0, 1e-30])
def test_scan_and_while_loop_do_the_same_iterations(tol):
    x, info = iteration.iterate(descend, jnp.array(20.0), max_iters=5, tol=tol)
    expected, objectives = reference(20.0, 5, 0)
    assert x == expected
    assert info.num_iters == 5
    assert info.num_iters.dtype == jnp.int32
    assert not info.converged
    np.testing.assert_array_equal(info.objective, objectives)


def test_zero_tolerance_runs_to_the_end_and_reports_a_standstill():
    _, info = iteration.iterate(descend, jnp.array(3.0), max_iters=5, tol=0)
    assert info.num_iters == 5
    assert info.converged
    _, info = iteration.iterate(descend, jnp.array(3.0), max_iters=1, tol=0)
    assert not info.converged


def test_an_objective_of_zero_converges():
    _, info = iteration.iterate(lambda x: (x, x), jnp.array(0.0), max_iters=9, tol=1e-6)
    assert info.num_iters == 2
    assert info.converged


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_objective_that_is_not_finite_stops_as_not_converged(bad):
    def step(state):
        k, value = state
        return (k + 1, value), jnp.where(k == 2, bad, 10.0 - k)

    state, info = iteration.iterate(step, (0, 1.5), max_iters=6, tol=1e-6)
    assert info.num_iters == 3
    assert not info.converged
    assert state[0] == 3
    np.testing.assert_array_equal(info.objective, [10.0, 9.0, bad, bad, bad, bad])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tol", [0, 1e-3])
def test_batch_is_the_loop_in_one_trace_and_keeps_the_dtype(dtype, tol):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(starts):
        return jax.vmap(lambda x: iteration.iterate(descend, x, max_iters=20, tol=tol))(starts)

    starts = jnp.asarray(np.array([20.0, 3.5, -100.0], dtype))
    solve(starts + 1)
    batch = solve(starts)
    assert batch[0].dtype == batch[1].objective.dtype == dtype
    loop = [iteration.iterate(descend, x, max_iters=20, tol=tol) for x in starts]
    chex.assert_trees_all_equal(batch, jax.tree.map(lambda *parts: jnp.stack(parts), *loop))
    assert len(set(batch[1].num_iters.tolist())) == (1 if tol == 0 else 3)


def test_zero_tolerance_is_differentiable_in_both_modes():
    def solve(x):
        x, info = iteration.iterate(descend, x, max_iters=4, tol=0)
        return x, info.objective

    check_grads(solve, (jnp.array(5.0),), order=1)
    assert jax.grad(lambda x: solve(x)[0])(5.0) == 1 / 2**4


def test_a_tolerance_is_differentiable_in_forward_mode():
    def solve(x):
        return iteration.iterate(descend, x, max_iters=40, tol=1e-2)

    (_, info), (tangent, _) = jax.jvp(solve, (jnp.array(20.0),), (jnp.array(1.0),))
    assert tangent == 2.0 ** -int(info.num_iters)


COUPLING = 0.95


def alternate(state):
    """Minimize u^2 - 2 c u v + v^2 + 1 over u, then over v."""
    u = COUPLING * state["v"]
    v = COUPLING * u
    return {"u": u, "v": v}, (u - COUPLING * v) ** 2 + (1 - COUPLING**2) * v**2 + 1


def extrapolated_reference(v, max_iters, tol):
    """Extrapolation with restart in plain Python: (state, objectives, accepted)."""
    current = previous = {"u": 0.0, "v": v}
    objectives, accepted, beta = [], [], 0.0
    for _ in range(max_iters):
        ahead = {name: x + beta * (x - previous[name]) for name, x in current.items()}
        state, objective = alternate(ahead)
        plain = beta == 0
        accepted.append(plain or objective <= objectives[-1])
        if not accepted[-1]:
            objective = objectives[-1]
        else:
            previous, current = current, state
        objectives.append(objective)
        fell = len(objectives) < 2 or objectives[-2] - objective > tol * abs(objectives[-2])
        if plain and not fell and tol > 0:
            break
        if accepted[-1] and (plain or fell):
            beta = 0.3 if plain else min(1.1 * beta, 0.95)
        else:  # go on with a plain step
            beta = 0.0
    return current, objectives, accepted


def extrapolated(v, max_iters, tol):
    start = {"u": jnp.zeros_like(v), "v": v}
    return iteration.iterate(alternate, start, max_iters=max_iters, tol=tol, extrapolate=True)


@pytest.mark.parametrize("start", [20.0, -3.0, 7.5])
@pytest.mark.parametrize("tol", [0, 1e-6])
def test_extrapolation_follows_its_rule(start, tol):
    state, info = extrapolated(jnp.array(start), 50, tol)
    expected, objectives, accepted = extrapolated_reference(start, 50, tol)
    assert not all(accepted)
    assert info.num_iters == len(objectives)
    np.testing.assert_allclose(info.objective[: len(objectives)], objectives, rtol=1e-13)
    np.testing.assert_array_equal(info.objective[len(objectives) :], info.objective[-1])
    for name, value in expected.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-9)


@pytest.mark.parametrize("start", [20.0, -3.0, 7.5])
def test_extrapolation_never_rises_and_arrives_in_fewer_steps(start):
    v = jnp.array(start)
    _, info = extrapolated(v, 100, 0)
    _, plain = iteration.iterate(alternate, {"u": 0 * v, "v": v}, max_iters=100, tol=0)
    assert np.all(np.diff(info.objective) <= 0)
    arrived = int(np.argmax(info.objective <= plain.objective[-1]))
    assert 0 < arrived < 50


def test_a_rejected_step_repeats_the_objective_and_is_not_convergence():
    _, _, accepted = extrapolated_reference(20.0, 50, 0)
    rejected = accepted.index(False)
    before, _ = extrapolated(jnp.array(20.0), rejected, 0)
    state, info = extrapolated(jnp.array(20.0), rejected + 1, 0)
    assert info.objective[rejected] == info.objective[rejected - 1]
    assert not info.converged
    chex.assert_trees_all_equal(state, before)
    _, info = extrapolated(jnp.array(20.0), 50, 1e-6)
    assert info.converged
    assert info.num_iters > rejected + 1


def test_an_extrapolated_objective_that_is_nan_is_rejected():
    def halve(x):
        """Halve a power of two; from any other number the objective is NaN."""
        return x / 2, jnp.where(jnp.frexp(x)[0] == 0.5, x, jnp.nan)

    for tol in (0, 1e-6):
        x, info = iteration.iterate(halve, jnp.array(8.0), max_iters=6, tol=tol, extrapolate=True)
        np.testing.assert_array_equal(info.objective, [8.0, 8.0, 4.0, 4.0, 2.0, 2.0])
        assert x == 1.0
        assert not info.converged


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_plain_step_that_is_not_finite_still_stops_an_extrapolation(bad):
    _, info = iteration.iterate(
        lambda x: (x, bad * x), jnp.array(1.0), max_iters=6, tol=1e-6, extrapolate=True
    )
    assert info.num_iters == 1
    assert not info.converged


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tol", [0, 1e-4])
def test_extrapolated_batch_is_the_loop_in_one_trace_and_keeps_the_dtype(dtype, tol):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(starts):
        return jax.vmap(lambda v: extrapolated(v, 30, tol))(starts)

    starts = jnp.asarray(np.array([20.0, 3.5, -100.0], dtype))
    solve(starts + 1)
    batch = solve(starts)
    assert {leaf.dtype for leaf in jax.tree.leaves((batch[0], batch[1].objective))} == {
        np.dtype(dtype)
    }
    loop = [extrapolated(v, 30, tol) for v in starts]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *loop)
    rtol = 1e3 * np.finfo(dtype).eps
    chex.assert_trees_all_close(batch, expected, rtol=rtol, atol=rtol)


def test_extrapolation_is_differentiable_in_both_modes():
    def solve(v):
        state, info = extrapolated(v, 16, 0)
        return state, info.objective

    assert not all(extrapolated_reference(5.0, 16, 0)[2])
    check_grads(jax.jit(solve), (jnp.array(5.0),), order=1)


BAD_CALLS = [
    ({"max_iters": 0}, "iterate: got max_iters 0, expected an integer from 1"),
    ({"max_iters": 2.0}, "iterate: got max_iters 2.0, expected an integer from 1"),
    ({"max_iters": True}, "iterate: got max_iters True, expected an integer from 1"),
    ({"tol": -1e-3}, "iterate: got tol -0.001, expected a finite Python number from 0"),
    ({"tol": np.nan}, "iterate: got tol nan, expected a finite Python number"),
    ({"tol": jnp.array(0.1)}, "iterate: got tol Array.*, expected a finite Python number"),
    ({"step": lambda x: (x[None], x)}, r"iterate: got a step from state .* to .*, expected the"),
    ({"step": lambda x: ((x, x), x)}, r"iterate: got a step from state .* to .*, expected the"),
    ({"step": lambda x: (x, x[None])}, r"iterate: got an objective of shape \(1,\) and dtype"),
    ({"step": lambda x: (x, x > 0)}, "dtype bool, expected a float32 or float64 scalar"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_bad_input_is_refused(change, message):
    options = {"step": descend, "init": jnp.array(1.0), "max_iters": 3, "tol": 1e-3} | change
    with pytest.raises(ValueError, match=message):
        iteration.iterate(**options)


def test_the_best_start_ends_lowest_and_is_never_nan():
    solve = jax.vmap(lambda x: iteration.iterate(descend, x, max_iters=2, tol=0))
    starts = jnp.array([20.0, jnp.nan, 4.0, -9.0])
    x, info = iteration.best(*solve(starts))
    expected, objectives = reference(4.0, 2, 0)
    assert x == expected
    np.testing.assert_array_equal(info.objective, objectives)
    assert info.num_iters == 2
    with pytest.raises(ValueError, match=r"best: got objectives of shape \(2,\)"):
        iteration.best(x, info)


def test_a_rise_ends_the_iteration_unless_it_may_rise():
    """The objective falls to 1, rises to 2 once, and then rests at 1.5."""
    values = jnp.array([3.0, 1.0, 2.0, 1.5, 1.5])

    def step(k):
        return k + 1, values[k]

    solve = functools.partial(iteration.iterate, step, jnp.array(0), max_iters=5, tol=1e-3)
    assert solve()[1].num_iters == 3
    state, info = solve(may_rise=True)
    assert state == info.num_iters == 5
    assert info.converged
