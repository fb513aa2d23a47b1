import functools
import itertools
import pathlib

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.test_util import check_jvp, check_vjp

from fedlr import _alternating, cp
from tests.reference import cp as reference

SHAPE, RANK = (5, 4, 3), 2
SHAPES = [(5, 4), SHAPE, (3, 4, 2, 5)]
MODES = range(len(SHAPE))
SUBSETS = [s for size in (1, 2, 3) for s in itertools.combinations(MODES, size)]
MULTIFAC = pathlib.Path(__file__).parents[2] / "shared/reference/multifac/single_R6_sig5_100it.npz"


@functools.cache
def sweeps(number, *, fixed=(), tol=0.0, extrapolate=False):
    """A compiled fit `(x, init, mask, ridge) -> (fit, info)`, one program for every shape."""

    def fit(x, init, mask, ridge):
        return cp.als(
            x,
            init=init,
            mask=mask,
            ridge=ridge,
            fixed_modes=fixed,
            max_iters=number,
            tol=tol,
            extrapolate=extrapolate,
        )

    return jax.jit(fit)


def converge(x, init, mask=None, ridge=0.0, *, extrapolate=False):
    return sweeps(3000, tol=1e-12, extrapolate=extrapolate)(x, init, mask, ridge)


error_of = jax.jit(cp.relative_error)
dense_of = jax.jit(cp.to_dense)
singular_start = jax.jit(lambda x, key: cp.svd_init(x, 4, key=key))
normalized = jax.jit(cp.normalize)


def draw(rng, shape=SHAPE, rank=RANK):
    return [rng.standard_normal((size, rank)) for size in shape]


def model(factors, weights=None):
    weights = np.ones(factors[0].shape[1], factors[0].dtype) if weights is None else weights
    return cp.CPTensor(jnp.asarray(weights), tuple(map(jnp.asarray, factors)))


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), tree)


def wide(t):
    """The factors of a fit, whose weights are 1, in float64."""
    np.testing.assert_array_equal(t.weights, 1)
    return [np.asarray(factor, np.float64) for factor in t.factors]


def quarter_hidden(shape):
    """Hide every fourth diagonal: every row keeps three entries of four or more."""
    return np.indices(shape).sum(axis=0) % 4 != 3


def noisy(rng, factors, noise):
    x = reference.dense(factors)
    more = rng.standard_normal(x.shape)
    return x + noise * np.linalg.norm(x) / np.linalg.norm(more) * more


def assert_factors(found, expected, atol=1e-10):
    for one, other in zip(found.factors, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def rounding(x, factors, ridge, mask=None):
    """A bound for the rounding of an objective: components may be larger than their sum."""
    lengths = np.prod([np.linalg.norm(factor, axis=0) for factor in factors], axis=0)
    total = np.sum((x if mask is None else x[mask]) ** 2) + np.sum(lengths) ** 2
    return 10 * np.finfo(x.dtype).eps * (total + ridge * reference.penalty(factors))


# The sweep against its definition


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sweeps_are_the_naive_ones(shape, is_masked, rng):
    x, factors = rng.standard_normal(shape), draw(rng, shape)
    mask = quarter_hidden(shape) if is_masked else None
    for ridge in (0.0, 0.3):
        fit, info = sweeps(4)(x, model(factors), mask, ridge)
        expected, objectives = reference.als(x, factors, 4, ridge=ridge, mask=mask)
        assert_factors(fit, expected)
        np.testing.assert_allclose(info.objective, objectives, rtol=1e-11)
        np.testing.assert_array_equal(fit.weights, 1)
        assert info.num_iters == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_without_hidden_entries_changes_nothing(shape, rng):
    x, init = rng.standard_normal(shape), model(draw(rng, shape))
    plain = sweeps(4)(x, init, None, 0.3)
    masked = sweeps(4)(x, init, np.ones(shape, bool), 0.3)
    chex.assert_trees_all_close(masked, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fixed", SUBSETS)
def test_fixed_modes_stay_and_the_others_solve_their_least_squares(fixed, rng):
    x, weights = rng.standard_normal(SHAPE), np.array([2.0, -0.3])
    init = model(draw(rng), weights)
    fit, info = sweeps(2, fixed=fixed)(x, init, None, 0.3)
    for mode in fixed:
        np.testing.assert_array_equal(fit.factors[mode], init.factors[mode])
    free = [mode for mode in MODES if mode not in fixed]
    if not free:
        chex.assert_trees_all_equal(fit, init)
        np.testing.assert_allclose(
            sweeps(2, fixed=fixed)(x, init, None, 0.0)[1].objective,
            2 * [np.sum((x - dense_of(init)) ** 2)],
            rtol=1e-12,
        )
        return
    start = reference.absorb(weights, map(np.asarray, init.factors), free)
    expected, objectives = reference.als(x, start, 2, ridge=0.3, fixed=fixed)
    assert_factors(fit, expected)
    np.testing.assert_allclose(info.objective, objectives, rtol=1e-11)


def test_fixed_modes_under_a_mask(rng):
    x, factors, mask = rng.standard_normal(SHAPE), draw(rng), quarter_hidden(SHAPE)
    fit, info = sweeps(2, fixed=(0, 2))(x, model(factors), mask, 0.0)
    expected, objectives = reference.als(x, factors, 2, mask=mask, fixed=(0, 2))
    assert_factors(fit, expected)
    np.testing.assert_allclose(info.objective, objectives, rtol=1e-11)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 1e-3)])
def test_a_hundred_sweeps_of_a_published_implementation(dtype, rtol):
    if not MULTIFAC.exists():
        pytest.skip("the reference values lie beside the project, not in it")
    with np.load(MULTIFAC, allow_pickle=False) as values:
        init = model([values[f"init_{mode}"].astype(dtype) for mode in MODES])
        x = values["tensor"].astype(dtype)
        fit, info = sweeps(100)(x, init, None, float(values["sigma"]))
        np.testing.assert_allclose(info.objective, values["obj"][1:], rtol=rtol)
        for mode in MODES:
            expected = values[f"final_{mode}"]
            np.testing.assert_allclose(
                fit.factors[mode], expected, atol=rtol * np.abs(expected).max()
            )


# Descent


@pytest.mark.slow
@hypothesis.settings(max_examples=10, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    shape=strategies.lists(strategies.integers(1, 5), min_size=2, max_size=4),
    rank=strategies.integers(1, 4),
    ridge=strategies.sampled_from([0.0, 0.3]),
    hidden=strategies.sampled_from(["none", "some", "rows", "all"]),
    seed=strategies.integers(0, 99),
)
def test_a_sweep_never_raises_the_objective(shape, rank, ridge, hidden, seed):
    rng = np.random.default_rng(seed)
    x, fit = rng.standard_normal(shape), model(draw(rng, shape, rank))
    mask = None if hidden == "none" else rng.random(shape) < (0 if hidden == "all" else 0.6)
    if hidden == "rows":
        for mode, size in enumerate(shape):
            np.moveaxis(mask, mode, 0)[rng.integers(size)] = False
    before = reference.objective(x, wide(fit), ridge, mask)
    slack = rounding(x, wide(fit), ridge, mask)
    for _ in range(4):
        fit, info = sweeps(1)(x, fit, mask, ridge)
        assert np.all(np.isfinite(jnp.concatenate(fit.factors)))
        now = float(info.objective[0])
        slack, last = rounding(x, wide(fit), ridge, mask), slack
        assert now <= before + max(slack, last)
        np.testing.assert_allclose(
            now, reference.objective(x, wide(fit), ridge, mask), rtol=1e-8, atol=slack
        )
        before = now


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_equal", [False, True])
def test_singular_systems_descend_to_rounding_of_the_components(dtype, is_equal):
    """More components than the tensor has, or a start whose components are all the same."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = reference.dense(draw(rng)).astype(dtype)
        factors = draw(rng, rank=4)
        if is_equal:
            factors = [np.tile(factor[:, :1], 4) for factor in factors]
        fit, before, last = cast(model(factors), dtype), np.inf, 0.0
        for _ in range(30):
            fit, info = sweeps(1)(x, fit, None, 0.0)
            slack = rounding(x, [np.asarray(factor) for factor in fit.factors], 0.0)
            assert float(info.objective[0]) <= before + max(slack, last)
            before, last = float(info.objective[0]), slack
        assert error_of(x, fit) < 0.5


# One program for the three masked and unmasked gradients of a block.
@jax.jit
def block_gradients(x, factors, mask, ridge):
    def objective(factors):
        residual = jnp.where(mask, x - cp.to_dense(model_of(factors)), 0)
        return jnp.sum(residual**2) + ridge * sum(jnp.sum(factor**2) for factor in factors)

    return jax.grad(objective)(factors)


def model_of(factors):
    return cp.CPTensor(jnp.ones(factors[0].shape[1], factors[0].dtype), factors)


@pytest.mark.parametrize("mode", MODES)
def test_every_block_update_zeroes_its_gradient(mode, rng):
    x, init = rng.standard_normal(SHAPE), model(draw(rng))
    others = tuple(other for other in MODES if other != mode)
    seen = np.ones(SHAPE, bool)
    fit, _ = sweeps(2, fixed=others)(x, init, None, 0.3)
    before = block_gradients(x, init.factors, seen, 0.3)
    after = block_gradients(x, fit.factors, seen, 0.3)
    assert np.abs(before[mode]).max() > 0.1
    np.testing.assert_allclose(after[mode], 0, atol=1e-12)


def test_a_masked_sweep_zeroes_the_gradient_of_its_last_factor(rng):
    x, mask = rng.standard_normal(SHAPE), quarter_hidden(SHAPE)
    for ridge in (0.0, 0.3):
        fit, _ = sweeps(4)(x, model(draw(rng)), mask, ridge)
        np.testing.assert_allclose(block_gradients(x, fit.factors, mask, ridge)[-1], 0, atol=1e-12)


# Hidden entries


def fit_loss(x, ridge, init, mask):
    """The objective of three sweeps, and another function of the model."""
    fit, info = cp.als(x, init=init, mask=mask, ridge=ridge, max_iters=3, tol=0.0)
    return info.objective[-1] + jnp.sum(jnp.sin(cp.to_dense(fit)))


fit_gradients = jax.jit(jax.grad(fit_loss, argnums=(0, 1)))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_hidden_values_change_nothing_and_have_no_gradient(ridge, rng):
    x, init, mask = rng.standard_normal(SHAPE), model(draw(rng)), quarter_hidden(SHAPE)
    mask[2] = False
    expected = sweeps(4)(x, init, mask, ridge)
    for value in (np.nan, np.inf, -1e30):
        changed = np.where(mask, x, value)
        chex.assert_trees_all_equal(sweeps(4)(changed, init, mask, ridge), expected)
        gradient, _ = fit_gradients(changed, ridge, init, mask)
        np.testing.assert_array_equal(gradient[~mask], 0)
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[mask] != 0)


def test_rows_without_observations_are_zero_with_a_ridge_and_stay_without(rng):
    x, factors, mask = rng.standard_normal(SHAPE), draw(rng), np.ones(SHAPE, bool)
    mask[2] = mask[:, 1] = False
    for seen in (mask, np.zeros(SHAPE, bool)):
        empty = [~np.moveaxis(seen, mode, 0).reshape(SHAPE[mode], -1).any(axis=1) for mode in MODES]
        kept, info = sweeps(4)(x, model(factors), seen, 0.0)
        zeroed, penalized = sweeps(4)(x, model(factors), seen, 0.3)
        for mode, rows in enumerate(empty):
            np.testing.assert_array_equal(kept.factors[mode][rows], factors[mode][rows])
            np.testing.assert_array_equal(zeroed.factors[mode][rows], 0)
        chex.assert_tree_all_finite((kept, info, zeroed, penalized))
    np.testing.assert_array_equal(info.objective, 0)
    np.testing.assert_array_equal(penalized.objective, 0)


def test_a_block_that_the_fit_does_not_depend_on_keeps_its_start(rng):
    x, factors = rng.standard_normal(SHAPE), draw(rng)
    init = model([factors[0], 0 * factors[1], 0 * factors[2]])
    for mask in (None, quarter_hidden(SHAPE)):
        fit, info = sweeps(4)(x, init, mask, 0.0)
        chex.assert_trees_all_equal(fit, init)
        np.testing.assert_allclose(info.objective, np.sum(x[() if mask is None else mask] ** 2))
        fit, _ = sweeps(4)(x, init, mask, 0.3)
        assert all(np.all(factor == 0) for factor in fit.factors)


# Optima


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_planted_tensor_is_recovered_up_to_permutation_and_scale(is_masked, rng):
    truth = model(draw(rng))
    mask = quarter_hidden(SHAPE) if is_masked else None
    x = np.asarray(dense_of(truth))
    seen = x if mask is None else np.where(mask, x, 9.0)
    fits = [converge(seen, model(draw(rng)), mask) for _ in range(5)]
    fit, info = min(fits, key=lambda pair: pair[1].objective[-1])
    assert bool(info.converged)
    assert error_of(x, fit) < 1e-7
    chex.assert_trees_all_close(normalized(fit), normalized(truth), rtol=1e-6, atol=1e-6)


def test_a_ridge_balances_the_columns_over_the_modes(rng):
    truth = draw(rng)
    x = noisy(rng, truth, 0.2)
    fit, info = converge(x, model(truth), ridge=0.3)
    assert bool(info.converged)
    lengths = np.array([np.linalg.norm(factor, axis=0) for factor in fit.factors])
    assert lengths.min() > 0.5
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[:1], lengths.shape), rtol=1e-5)


def test_a_ridge_on_a_matrix_shrinks_the_singular_values(rng):
    left, right = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (5, 4))
    values, ridge = np.array([5.0, 3.0, 1.0, 0.4]), 1.5
    fit, _ = sweeps(100)(left * values @ right.T, model(draw(rng, (5, 4), 4)), None, ridge)
    shrunk = np.maximum(values - ridge, 0)
    np.testing.assert_allclose(dense_of(fit), left * shrunk @ right.T, atol=1e-12)


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_zero_component_changes_nothing(is_masked, rng):
    x, factors = rng.standard_normal(SHAPE), draw(rng)
    mask = quarter_hidden(SHAPE) if is_masked else None
    for ridge in (0.0, 0.3):
        fit, info = sweeps(4)(x, model(factors), mask, ridge)
        more = model([np.pad(factor, [(0, 0), (0, 2)]) for factor in factors])
        for objective in info.objective:
            more, same = sweeps(1)(x, more, mask, ridge)
            np.testing.assert_allclose(same.objective, [objective], rtol=1e-11)
        assert_factors(more, [np.pad(factor, [(0, 0), (0, 2)]) for factor in fit.factors])
        assert all(np.all(factor[:, 2:] == 0) for factor in more.factors)


def test_the_optimum_does_not_depend_on_the_order_of_the_modes(rng):
    truth, order = draw(rng), (2, 0, 1)
    x = noisy(rng, truth, 0.1)
    fit, info = converge(x, model(truth), ridge=0.1)
    moved, again = converge(x.transpose(order), model([truth[m] for m in order]), ridge=0.1)
    np.testing.assert_allclose(again.objective[-1], info.objective[-1], rtol=1e-9)
    np.testing.assert_allclose(dense_of(moved), dense_of(fit).transpose(order), atol=1e-5)


def test_weights_of_the_start_are_spread_over_all_modes(rng):
    x, weights, factors = rng.standard_normal(SHAPE), np.array([8.0, -0.125]), draw(rng)
    fit = sweeps(4)(x, model(factors, weights), None, 0.3)
    spread = sweeps(4)(x, model(reference.absorb(weights, factors, MODES)), None, 0.3)
    chex.assert_trees_all_close(fit, spread, rtol=1e-12)


# Precision


def near_exact(seed, noise):
    """A float32 tensor, and a start at its optimum in float64, which takes the dtype of it."""
    rng = np.random.default_rng(seed)
    factors = draw(rng)
    x = noisy(rng, factors, noise).astype(np.float32)
    fit, _ = converge(x.astype(np.float64), model(factors))
    return x, fit


def fast_formula(x, factors):
    """The residual by norms and an inner product in the dtype of `x`."""
    xhat = (factors[0] @ reference.design(factors, 0).T).reshape(x.shape).astype(x.dtype)
    grams = np.prod([factor.T @ factor for factor in factors], axis=0)
    squares = np.sum(x * x) - 2 * np.sum(x * xhat) + np.sum(grams)
    return np.sqrt(np.maximum(squares, 0))


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_the_float32_objective_is_the_float64_residual(noise):
    eps, lost = np.finfo(np.float32).eps, []
    for seed in range(3):
        x, init = near_exact(seed, noise)
        norm = np.linalg.norm(x)
        fit, info = sweeps(4)(x, init, None, 0.0)
        assert info.objective.dtype == fit.weights.dtype == np.float32
        true = np.sqrt(reference.objective(x.astype(np.float64), wide(fit))) / norm
        reported = np.sqrt(float(info.objective[-1])) / norm
        assert noise / 10 < true < noise * 1.1
        # Entries of the model are rounded; above the threshold so are norm and inner product.
        bound = 10 * eps if noise < 0.01 else 10 * eps / noise
        assert abs(reported - true) <= bound
        np.testing.assert_allclose(error_of(x, fit), true, atol=10 * eps)
        fast = fast_formula(x, [np.asarray(factor) for factor in fit.factors]) / norm
        lost.append(abs(fast - true) / (10 * eps))
    assert max(lost) > 5 or noise > 1e-2


def test_batched_objectives_and_gradients_are_those_of_the_residual():
    cases = [near_exact(seed, noise) for seed, noise in enumerate((1e-1, 1e-4, 1e-5))]
    xs = np.stack([x for x, _ in cases])
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[init for _, init in cases])

    def loss(x, init):
        fit, info = cp.als(x, init=init, max_iters=2, tol=0.0)
        return info.objective[-1], fit

    both = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))
    (values, fits), gradients = both(xs, starts)
    eps = np.finfo(np.float32).eps
    for member, x in enumerate(xs):
        residual = x.astype(np.float64) - reference.dense(
            wide(jax.tree.map(lambda leaf, member=member: leaf[member], fits))
        )
        true, norm = np.linalg.norm(residual), np.linalg.norm(x)
        assert abs(np.sqrt(float(values[member])) - true) <= 100 * eps * norm
        # At an optimum the fit does not move to first order.
        np.testing.assert_allclose(gradients[member], 2 * residual, atol=20 * eps * norm)


@jax.jit
def fit_derivative(arguments, tangents, init, mask):
    return jax.jvp(lambda x, ridge: fit_loss(x, ridge, init, mask), arguments, tangents)


@pytest.mark.parametrize("is_masked", [False, True])
def test_derivatives_of_the_fit_in_both_modes(is_masked, rng):
    shape = SHAPE if is_masked else SHAPE[:2]  # the smaller program compiles much faster
    x, init = rng.standard_normal(shape), model(draw(rng, shape))
    mask = quarter_hidden(shape) if is_masked else None
    value = jax.jit(fit_loss)

    def loss(x, ridge):
        return value(x, ridge, init, mask)

    def push(arguments, tangents):
        return fit_derivative(arguments, tangents, init, mask)

    def pull(x, ridge):
        gradients = fit_gradients(x, ridge, init, mask)
        return loss(x, ridge), lambda scale: tuple(scale * part for part in gradients)

    options = {"args": (x, 0.3), "eps": 1e-5, "rtol": 1e-6, "atol": 1e-6}
    check_jvp(loss, push, **options)
    check_vjp(loss, pull, **options)


# Extrapolation and stopping


def collinear(seed):
    """A noisy tensor of similar components, which takes many sweeps."""
    rng = np.random.default_rng(seed)
    factors = [0.5 * factor + factor[:, :1] for factor in draw(rng)]
    return rng, factors, noisy(rng, factors, 0.05)


def test_extrapolation_descends_and_arrives_in_fewer_sweeps():
    for seed in range(3):
        rng, factors, x = collinear(seed)
        init = model([factor + 0.3 * rng.standard_normal(factor.shape) for factor in factors])
        _, plain = converge(x, init, ridge=0.05)
        fit, info = converge(x, init, ridge=0.05, extrapolate=True)
        arrived = np.flatnonzero(info.objective <= plain.objective[400])
        assert len(arrived)
        assert 1 < arrived[0] < 400 / 2
        slack = rounding(x, wide(fit), 0.05)
        assert np.all(np.diff(info.objective) <= slack)
        # The first rejected sweep repeats the objective, exactly.
        assert np.any(np.diff(info.objective[:100]) == 0)
        np.testing.assert_allclose(
            info.objective[-1], reference.objective(x, wide(fit), 0.05), atol=slack
        )


def test_a_converged_extrapolation_is_one_for_plain_sweeps():
    rng, _, x = collinear(3)
    fit, info = converge(x, model(draw(rng)), ridge=0.05, extrapolate=True)
    assert bool(info.converged)
    _, more = sweeps(4)(x, fit, None, 0.05)
    decrease = 1 - float(more.objective[0] / info.objective[-1])
    assert decrease <= 10 * 1e-12


def test_a_tolerance_stops_at_the_first_small_decrease(rng):
    x, init = noisy(rng, draw(rng), 0.3), model(draw(rng))
    fit, info = sweeps(50, tol=1e-3)(x, init, None, 0.0)
    num_iters = int(info.num_iters)
    assert bool(info.converged)
    expected, objectives = reference.als(x, [np.asarray(f) for f in init.factors], num_iters)
    decreases = -np.diff(objectives) / objectives[:-1]
    assert np.all(decreases[:-1] > 1e-3)
    assert decreases[-1] <= 1e-3
    assert_factors(fit, expected, atol=1e-9)


# Compression


@functools.cache
def compressed(max_iters, polish_iters, oversampling, tol=0.0):
    return jax.jit(
        lambda x, init, ridge: cp.compressed_als(
            x,
            init=init,
            key=jax.random.key(0),
            ridge=ridge,
            oversampling=oversampling,
            max_iters=max_iters,
            polish_iters=polish_iters,
            tol=tol,
        )
    )


LARGER = (6, 5, 7)


@pytest.mark.parametrize("shape", [LARGER, (6, 3, 7), (4, 3, 2)])  # all, some and no modes
def test_compression_without_loss_is_als_from_the_projected_start(rng, shape):
    sizes = [min(4, size) for size in shape]
    bases = [
        np.linalg.qr(rng.standard_normal(sides))[0] for sides in zip(shape, sizes, strict=True)
    ]
    x = np.einsum("abc,ia,jb,kc->ijk", rng.standard_normal(sizes), *bases)
    factors, weights = draw(rng, shape), np.array([2.0, -0.5])
    projected = [u @ u.T @ a for u, a in zip(bases, factors, strict=True)]
    fit, info = compressed(5, 2, 2)(x, model(factors, weights), 0.3)
    expected, objectives = reference.als(
        x, reference.absorb(weights, projected, MODES), 7, ridge=0.3
    )
    assert_factors(fit, expected)
    np.testing.assert_allclose(info.objective, objectives[5:], rtol=1e-11)
    np.testing.assert_array_equal(fit.weights, 1)


def test_compression_is_polished_to_the_optimum_of_the_full_tensor(rng):
    truth = draw(rng, LARGER)
    x = noisy(rng, truth, 0.1)
    fit, info = compressed(5, 2, 2)(x, model(truth), 0.3)
    best, _ = reference.als(x, truth, 50, ridge=0.3)
    np.testing.assert_allclose(
        info.objective[-1], reference.objective(x, wide(fit), 0.3), rtol=1e-12
    )
    assert np.all(np.diff(info.objective) <= 0)
    assert error_of(x, fit) <= 1.01 * error_of(x, model(best))


def test_compression_keeps_the_dtype_and_reports_the_core(rng):
    x = noisy(rng, draw(rng), 0.1).astype(np.float32)
    init = cast(model(draw(rng)), np.float32)
    fit, info = compressed(200, 3, 5, 1e-4)(x, init, 0.0)
    assert {leaf.dtype for leaf in jax.tree.leaves((fit, info.objective))} == {jnp.dtype("float32")}
    assert info.objective.shape == (3,)
    assert info.num_iters == 3
    assert bool(info.converged)
    assert error_of(x, fit) < 0.11


# Starts


@pytest.mark.parametrize("dtype", [None, np.float32])
def test_random_starts_are_normal_and_given_by_their_key(dtype, key):
    shape = (1000, 1000)
    start = cp.random_init(shape, 2, key=key, dtype=dtype)
    assert (start.shape, start.rank) == (shape, 2)
    expected = np.dtype(np.float64 if dtype is None else dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {expected}
    np.testing.assert_array_equal(start.weights, 1)
    first, second = (np.ravel(factor) for factor in start.factors)
    entries = np.concatenate([first, second])
    # Five standard errors of a mean and a variance of N(0, 1) draws.
    assert abs(entries.mean()) < 5 / np.sqrt(entries.size)
    assert abs(entries.var() - 1) < 5 * np.sqrt(2 / entries.size)
    assert np.mean(np.isin(first, second)) < 0.01  # float32 draws meet by chance
    chex.assert_trees_all_equal(cp.random_init(shape, 2, key=key, dtype=dtype), start)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_singular_starts_lead_the_unfoldings_and_have_any_rank(dtype, rng, key):
    x = rng.standard_normal(SHAPE).astype(dtype)
    start = singular_start(x, key)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(start.weights, 1)
    for mode, factor in enumerate(start.factors):
        size, atol = SHAPE[mode], 1e4 * np.finfo(dtype).eps
        left = np.linalg.svd(reference.unfold(x, mode))[0][:, : min(4, size)]
        leading = factor[:, : min(4, size)]
        np.testing.assert_allclose(leading @ leading.T, left @ left.T, atol=atol)
        for column in factor.T[size:]:
            assert 0.1 < np.linalg.norm(column) < 3
    assert start.factors[2].shape == (3, 4)
    other = singular_start(x, jax.random.key(1))
    chex.assert_trees_all_equal(other.factors[0][:, :4], start.factors[0][:, :4])
    assert np.all(other.factors[2][:, 3:] != start.factors[2][:, 3:])


# Transformations


def test_a_batch_of_starts_is_the_loop_in_one_trace(rng):
    x, mask = rng.standard_normal(SHAPE), quarter_hidden(SHAPE)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def restart(x, starts):
        def fit(init):
            return cp.als(x, init=init, mask=mask, ridge=0.3, max_iters=4, tol=0.0)

        return jax.vmap(fit)(starts)

    members = [model(draw(rng)) for _ in range(3)]
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    restart(x + 1, starts)
    batch = restart(x, starts)
    loop = [sweeps(4)(x, init, mask, 0.3) for init in members]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    chex.assert_trees_all_close(batch, expected, rtol=1e-10, atol=1e-10)
    assert (batch[0].shape, batch[0].rank) == (SHAPE, RANK)


@pytest.mark.parametrize("is_masked", [False, True])
def test_no_copy_of_the_tensor_is_made(is_masked):
    shape, rank = (200, 180, 160), 4
    x = jax.ShapeDtypeStruct(shape, np.float32)
    init = jax.eval_shape(
        lambda key: cp.random_init(shape, rank, key=key, dtype=np.float32), jax.random.key(0)
    )
    mask = jax.ShapeDtypeStruct(shape, bool) if is_masked else None
    memory = sweeps(10).lower(x, init, mask, 0.0).compile().memory_analysis()
    num_bytes = 4 * np.prod(shape)
    # Under a mask the filled tensor and the mask in numbers are made once, and the largest
    # partial of the mask has R (R + 1) / 2 columns.
    partial = 4 * shape[1] * shape[2] * (rank * (rank + 1) // 2)
    limit = 2 * num_bytes + 2 * partial + num_bytes / 4 if is_masked else num_bytes / 4
    assert memory.temp_size_in_bytes < limit


# The CP tensor


@pytest.mark.parametrize("shape", [(6,), *SHAPES])
def test_dense_tensors_are_sums_of_outer_products(shape, rng):
    factors, weights = draw(rng, shape, 3), rng.standard_normal(3)
    expected = sum(
        w * functools.reduce(np.multiply.outer, columns)
        for w, *columns in zip(weights, *[factor.T for factor in factors], strict=True)
    )
    t = model(factors, weights)
    assert (t.shape, t.rank) == (shape, 3)
    np.testing.assert_allclose(dense_of(t), expected, atol=1e-13)


@pytest.mark.parametrize(("shape", "dtype"), [((6,), np.float64), (SHAPE, np.float32)])
def test_normalized_tensors_are_canonical_and_the_same(shape, dtype, rng):
    factors, weights = draw(rng, shape, 4), np.array([0.3, -2.0, 1.0, -0.5])
    factors[0][:, 2] = 0
    t, eps = cast(model(factors, weights), dtype), np.finfo(dtype).eps
    unit = normalized(t)
    assert {leaf.dtype for leaf in jax.tree.leaves(unit)} == {np.dtype(dtype)}
    np.testing.assert_allclose(dense_of(unit), dense_of(t), atol=100 * eps)
    assert np.all(np.diff(unit.weights) <= 0)
    assert np.all(unit.weights[:3] > 0)
    assert unit.weights[3] == 0
    assert np.all(unit.factors[0][:, 3] == 0)
    for mode, factor in enumerate(unit.factors):
        lengths = np.linalg.norm(factor, axis=0)
        np.testing.assert_allclose(lengths[:3], 1, atol=4 * eps)
        if mode < len(shape) - 1:
            assert np.all(np.max(factor, axis=0) >= np.max(-factor, axis=0))
    chex.assert_trees_all_close(normalized(unit), unit, rtol=8 * eps)


def test_normalization_is_blind_to_permutation_scale_and_sign(rng):
    factors, weights = draw(rng, rank=3), rng.standard_normal(3)
    expected, order = normalized(model(factors, weights)), [2, 0, 1]
    scales = rng.standard_normal((len(SHAPE), 3))
    moved = [(factor * scale)[:, order] for factor, scale in zip(factors, scales, strict=True)]
    again = normalized(model(moved, (weights / scales.prod(axis=0))[order]))
    chex.assert_trees_all_close(again, expected, atol=1e-12)


def test_columns_without_a_common_scale_are_normalized():
    tiny, huge = np.float32(1e-30), np.float32(1e30)
    factors = [np.array([[3.0], [4.0]], np.float32) * scale for scale in (tiny, huge)]
    unit = normalized(model(factors))
    np.testing.assert_allclose(unit.weights, 25, rtol=1e-6)
    for factor in unit.factors:
        np.testing.assert_allclose(factor[:, 0], [0.6, 0.8], rtol=1e-6)


def test_relative_error_is_that_of_the_dense_residual(rng, monkeypatch):
    x, weights, mask = rng.standard_normal(SHAPE), np.array([2.0, -0.5]), quarter_hidden(SHAPE)
    t = model(draw(rng), weights)
    difference, hidden = x - np.asarray(dense_of(t)), np.where(mask, x, np.nan)
    expected = np.linalg.norm(difference) / np.linalg.norm(x)
    observed = np.linalg.norm(difference[mask]) / np.linalg.norm(x[mask])
    np.testing.assert_allclose(error_of(x, t), expected, rtol=1e-13)
    np.testing.assert_allclose(error_of(hidden, t, mask=mask), observed, rtol=1e-13)
    monkeypatch.setattr(_alternating, "_BLOCK_ENTRIES", 2 * 12)  # two rows, and one left
    np.testing.assert_allclose(cp.relative_error(x, t), expected, rtol=1e-13)
    np.testing.assert_allclose(cp.relative_error(hidden, t, mask=mask), observed, rtol=1e-13)


def test_relative_error_of_zero(rng):
    zero, one = model([np.zeros((size, 1)) for size in SHAPE]), model(draw(rng))
    assert error_of(np.zeros(SHAPE), zero) == 0
    assert error_of(np.ones(SHAPE), zero) == 1
    assert error_of(np.zeros(SHAPE), one) == np.inf
    assert error_of(np.ones(SHAPE), one, mask=np.zeros(SHAPE, bool)) == 0


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_relative_error_does_not_depend_on_the_scale(scale, rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    t = cast(model(draw(rng)), np.float32)
    scaled = t._replace(weights=t.weights * np.float32(scale))
    expected = error_of(x, t)
    np.testing.assert_allclose(error_of(x * np.float32(scale), scaled), expected, rtol=1e-5)


def test_gradient_of_the_relative_error_is_finite_at_a_perfect_fit():
    t = model([np.ones((size, 1)) for size in SHAPE])
    gradients = jax.jit(jax.grad(cp.relative_error, argnums=(0, 1)))(jnp.ones(SHAPE), t)
    chex.assert_tree_all_finite(gradients)


# Errors

T = model([np.ones((size, RANK)) for size in SHAPE])
X = np.ones(SHAPE)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones(3)}, r"x of shape \(3,\), expected 2"),
        ({"x": np.float64(3.0)}, r"x of shape \(\), expected 2 axes"),
        ({"x": np.ones(SHAPE, int)}, "x of dtype int64, expected float32 or float64"),
        ({"x": np.ones(SHAPE, np.float16)}, "x of dtype float16, expected float32 or float64"),
        ({"x": np.ones((5, 4))}, r"a CP tensor of shape \(5, 4, 3\), expected \(5, 4\) as x"),
        ({"init": T._replace(factors=())}, "no factors, expected one for every mode"),
        ({"init": T._replace(weights=np.ones(3))}, r"factor 0 of shape \(5, 2\), expected 3 col"),
        ({"mask": np.ones(SHAPE)}, "mask of dtype float64, expected bool"),
        ({"mask": np.ones((5, 4), bool)}, r"mask of shape \(5, 4\), expected shape \(5, 4, 3\)"),
        ({"ridge": -0.1}, "ridge -0.1, expected a non-negative number"),
        ({"ridge": np.nan}, "ridge nan, expected a non-negative number"),
        ({"fixed_modes": (3,)}, "mode 3, expected an integer from 0 to 2"),
        ({"fixed_modes": (-1,)}, "mode -1, expected an integer from 0 to 2"),
        ({"fixed_modes": (0, 0)}, r"fixed_modes \(0, 0\), expected distinct modes"),
    ],
)
def test_als_refuses_bad_input(change, message):
    options = {"x": X, "init": T} | change
    with pytest.raises(ValueError, match=f"^als: got {message}"):
        cp.als(options.pop("x"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones(3)}, r"^compressed_als: got x of shape \(3,\), expected 2"),
        ({"x": np.ones(SHAPE, int)}, "^compressed_als: got x of dtype int64, expected float32"),
        ({"x": np.ones((5, 4))}, r"^compressed_als: got a CP tensor of shape \(5, 4, 3\), expec"),
        ({"oversampling": -1}, "^compressed_als: got oversampling -1, expected an integer from 0"),
        ({"polish_iters": 0}, "^compressed_als: got polish_iters 0, expected an integer from 1"),
        ({"ridge": -1.0}, "als: got ridge -1.0, expected a non-negative number"),
        ({"max_iters": 0}, "got max_iters 0, expected an integer from 1"),
        ({"tol": -1.0}, "got tol -1.0, expected a finite Python number from 0"),
    ],
)
def test_compressed_als_refuses_bad_input(change, message):
    options = {"x": X, "init": T, "key": KEY} | change
    x = options.pop("x")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: cp.compressed_als(x, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_iters": 0}, "got max_iters 0, expected an integer from 1"),
        ({"tol": -1.0}, "got tol -1.0, expected a finite Python number from 0"),
        ({"tol": np.nan}, "got tol nan, expected a finite Python number from 0"),
    ],
)
def test_als_refuses_a_bad_number_of_sweeps_or_tolerance(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: cp.als(X, init=T, **change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cp.random_init((), 2, key=KEY), r"random_init: got shape \(\), expected one size"),
        (lambda: cp.random_init(SHAPE, 0, key=KEY), "random_init: got rank 0, expected an integer"),
        (lambda: cp.random_init(SHAPE, 2.0, key=KEY), "random_init: got rank 2.0, expected an int"),
        (
            lambda: cp.random_init(SHAPE, 2, key=KEY, dtype=np.float16),
            "random_init: got dtype float16, expected float32 or float64",
        ),
        (
            lambda: cp.svd_init(np.ones(SHAPE, int), 2, key=KEY),
            "svd_init: got x of dtype int64, expected float32 or float64",
        ),
        (lambda: cp.svd_init(np.float64(1.0), 2, key=KEY), r"svd_init: got shape \(\), expected"),
        (lambda: cp.svd_init(X, 0, key=KEY), "svd_init: got rank 0, expected an integer from 1"),
    ],
)
def test_bad_starts_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


BAD_MODELS = [
    (T._replace(weights=np.ones((1, 2))), r"weights of shape \(1, 2\), expected 1 axes"),
    (T._replace(weights=np.ones(2, int)), "weights of dtype int64, expected float32 or float64"),
    (T._replace(factors=()), "no factors, expected one for every mode"),
    (model([np.ones((5, 0)), np.ones((4, 0))]), "rank 0, expected an integer from 1"),
    (
        T._replace(factors=(np.ones(2), *T.factors[1:])),
        r"factor 0 of shape \(2,\), expected 2 axes",
    ),
    (
        T._replace(factors=(*T.factors[:2], np.ones((3, 1)))),
        r"factor 2 of shape \(3, 1\), expected 2 columns as there are weights",
    ),
    (
        T._replace(factors=(*T.factors[:2], np.ones((3, 2), np.float32))),
        "factor 2 of dtype float32, expected float64 as the weights",
    ),
]


@pytest.mark.parametrize("name", ["to_dense", "normalize", "relative_error"])
@pytest.mark.parametrize(("bad", "message"), BAD_MODELS)
def test_bad_models_are_refused(name, bad, message):
    arguments = (X, bad) if name == "relative_error" else (bad,)
    with pytest.raises(ValueError, match=f"^{name}: got {message}"):
        getattr(cp, name)(*arguments)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (np.ones(5), None, r"x of shape \(5,\), expected 2"),
        (np.ones((4, 5, 3)), None, r"a CP tensor of shape \(5, 4, 3\), expected \(4, 5, 3\) as x"),
        (np.ones(SHAPE, np.float32), None, "a CP tensor of dtype float64, expected float32 as x"),
        (X, np.ones(SHAPE), "mask of dtype float64, expected bool"),
        (X, np.ones((3, 4, 5), bool), r"mask of shape \(3, 4, 5\), expected shape \(5, 4, 3\)"),
    ],
)
def test_relative_error_refuses_bad_input(x, mask, message):
    with pytest.raises(ValueError, match=f"^relative_error: got {message}"):
        cp.relative_error(x, T, mask=mask)


def matrix_multiplication():
    """The tensor of the product of two 2 x 2 matrices."""
    tensor = np.zeros((4, 4, 4))
    for i, j, k in np.ndindex(2, 2, 2):
        tensor[2 * i + j, 2 * j + k, 2 * k + i] = 1
    return jnp.asarray(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [6, 7])
def test_strassen_is_found_and_nothing_smaller(rank):
    """Rank and border rank are 7. A ridge that fades keeps the components from diverging."""
    x = matrix_multiplication()
    ridges = jnp.repeat(jnp.array([1e-3, 1e-5, 1e-8, 0.0]), np.array([20, 10, 5, 5]))

    def fit(key):
        def stage(t, ridge):
            return cp.als(x, init=t, ridge=ridge, max_iters=100, tol=0, extrapolate=True)[0], None

        start = cp.random_init(x.shape, rank, key=key)
        return cp.relative_error(x, jax.lax.scan(stage, start, ridges)[0])

    errors = jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(1), 64))
    if rank == 7:
        assert np.sum(errors < 1e-6) > 48
    else:
        assert np.min(errors) > 0.1
