import functools

import jax
import numpy as np
import pytest

from fedlr.cp import diagnostics, fitting, tensor, uncertainty

SHAPE, NOISE = (5, 6, 7), 0.01
# Slices of the middle mode are left out.
SLICES, MODE, OTHERS = (3, 40, 4), 1, (0, 2)


compiled_errors = jax.jit(uncertainty.standard_errors)


def leave_out(x, t, mask=None):
    return uncertainty.jackknife(x, t, MODE, mask=mask, max_iters=100)


batched_jackknife = jax.jit(jax.vmap(leave_out))
masked_jackknife = jax.jit(leave_out)


def stacked_problems():
    """Three noisy tensors, and the CP tensors below the noise."""
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    truths = [random_cp(rng, shape=SLICES) for rng in rngs]
    problems = [(noisy(rng, t), t) for rng, t in zip(rngs, truths, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *problems)


def take(stacked, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], stacked)


@jax.jit
def refit_part(x, start):
    return diagnostics.permute_to_match(fitting.als(x, init=start, max_iters=100)[0], start)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def refits(x, truth):
    fit, _ = fitting.als(x, init=truth, max_iters=100, tol=1e-10)
    return diagnostics.permute_to_match(fit, truth)


def random_cp(rng, rank=2, shape=SHAPE):
    """Draw a CP tensor with unit columns and decreasing weights."""
    factors = [rng.standard_normal((size, rank)) for size in shape]
    norms = [np.linalg.norm(factor, axis=0) for factor in factors]
    order = np.argsort(-np.prod(norms, axis=0))
    units = tuple((f / n)[:, order] for f, n in zip(factors, norms, strict=True))
    return tensor.CPTensor(np.prod(norms, axis=0)[order], units)


def dense(t):
    components = zip(t.weights, *(factor.T for factor in t.factors), strict=True)
    return sum(w * functools.reduce(np.multiply.outer, vectors) for w, *vectors in components)


def noisy(rng, t, noise=NOISE):
    return dense(t) + noise * rng.standard_normal(t.shape)


def tangent(t):
    """Derivative of the entries by weights and unit columns: orthonormal coordinates per column.

    Returns the derivative (entries, coordinates), and that of the numbers of `t` (weights, then
    factors) by the coordinates.
    """
    rank, columns, numbers = len(t.weights), [], []
    sizes = [rank, *(factor.size for factor in t.factors)]
    starts = np.cumsum(sizes)

    def add(vectors, scale, place):
        product = functools.reduce(np.multiply.outer, vectors)
        columns.append(scale * product.reshape(-1))
        numbers.append(np.zeros(starts[-1]))
        numbers[-1][place[0]] = place[1]

    for r in range(rank):
        vectors = [factor[:, r] for factor in t.factors]
        add(vectors, 1, (r, 1))
        for n, a in enumerate(vectors):
            complement = np.linalg.svd(a[None])[2][1:]
            for b in complement:
                place = starts[n] + rank * np.arange(len(a)) + r
                add([*vectors[:n], b, *vectors[n + 1 :]], t.weights[r], (place, b))
    return np.stack(columns, axis=1), np.stack(numbers, axis=1)


def naive_errors(x, t, mask):
    """Compute the standard errors from the dense derivative, in NumPy."""
    derivative, numbers = tangent(t)
    seen = mask.reshape(-1)
    residual = (x - dense(t)).reshape(-1)[seen]
    noise = np.sqrt(np.sum(residual**2) / (seen.sum() - derivative.shape[1]))
    covariance = np.linalg.inv(derivative[seen].T @ derivative[seen])
    errors = noise * np.sqrt(np.einsum("np,pq,nq->n", numbers, covariance, numbers))
    sizes = [len(t.weights), *(factor.size for factor in t.factors)]
    weights, *factors = np.split(errors, np.cumsum(sizes)[:-1])
    return (
        weights,
        [e.reshape(f.shape) for e, f in zip(factors, t.factors, strict=True)],
        noise,
    )


def assert_errors(found, expected, rtol=1e-9):
    weights, factors, noise = expected
    np.testing.assert_allclose(found.noise, noise, rtol=rtol)
    np.testing.assert_allclose(found.weights, weights, rtol=rtol)
    for a, b in zip(found.factors, factors, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)


@pytest.mark.parametrize(("shape", "rank"), [(SHAPE, 2), ((3, 2, 4, 3), 2)])
def test_errors_are_those_of_the_dense_derivative(shape, rank, rng):
    t = random_cp(rng, rank, shape)
    x, mask = noisy(rng, t), rng.random(shape) < 0.8
    everything = np.ones(shape, bool)
    assert_errors(compiled_errors(x, t), naive_errors(x, t, everything))
    assert_errors(compiled_errors(x, t, mask=mask), naive_errors(x, t, mask))
    assert_errors(compiled_errors(x, t, mask=everything), naive_errors(x, t, everything))


def test_errors_of_one_component_have_a_closed_form(rng):
    t = random_cp(rng, 1, (4, 5))
    found = compiled_errors(noisy(rng, t), t, mask=np.ones((4, 5), bool))
    np.testing.assert_allclose(found.weights, found.noise[None], rtol=1e-12)
    for errors, factor in zip(found.factors, t.factors, strict=True):
        expected = found.noise / t.weights[0] * np.sqrt(1 - factor**2)
        np.testing.assert_allclose(errors, expected, rtol=1e-10)


def test_hidden_entries_do_not_matter(rng):
    t = random_cp(rng)
    x, mask = noisy(rng, t), rng.random(SHAPE) < 0.8
    found = compiled_errors(x, t, mask=mask)
    other = compiled_errors(np.where(mask, x, np.nan), t, mask=mask)
    jax.tree.map(np.testing.assert_array_equal, found, other)


def test_errors_follow_the_scale_and_the_order_of_the_fit(rng):
    t = random_cp(rng)
    x = noisy(rng, t)
    found = compiled_errors(x, t)
    shuffled = tensor.CPTensor(
        -3 * t.weights[::-1], (t.factors[0][:, ::-1] / -3, *(f[:, ::-1] for f in t.factors[1:]))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13),
        compiled_errors(x, shuffled),
        found,
    )
    scaled = compiled_errors(4 * x, t._replace(weights=4 * t.weights))
    np.testing.assert_allclose(scaled.noise, 4 * found.noise, rtol=1e-10)
    np.testing.assert_allclose(scaled.weights, 4 * found.weights, rtol=1e-10)
    np.testing.assert_allclose(scaled.factors[1], found.factors[1], rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_the_spread_of_refits(seed):
    rng, repeats = np.random.default_rng(seed), 200
    truth = random_cp(rng)
    batch = dense(truth) + NOISE * rng.standard_normal((repeats, *SHAPE))
    fits = refits(batch, truth)
    found = compiled_errors(batch[0], truth)
    # A standard deviation of M draws has a relative spread of 1 / sqrt(2 (M - 1)); five of them
    # for each of the 38 numbers. The curvature is compared, so the estimated noise drops out.
    tolerance = 5 / np.sqrt(2 * (repeats - 1))
    spreads = jax.tree.map(lambda leaf: np.std(leaf, axis=0, ddof=1), fits)
    expected = jax.tree.map(
        lambda leaf: leaf * NOISE / found.noise, tensor.CPTensor(found.weights, found.factors)
    )
    for a, b in zip(jax.tree.leaves(spreads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance)
    freedom = np.prod(SHAPE) - 2 * (sum(SHAPE) - 2)
    noise = compiled_errors(batch[0], jax.tree.map(lambda leaf: leaf[0], fits)).noise
    np.testing.assert_allclose(noise, NOISE, rtol=5 / np.sqrt(2 * freedom))


def test_jackknife_is_the_loop_over_tensors_and_slices():
    problems, count = stacked_problems(), SLICES[MODE]
    found = batched_jackknife(*problems)
    for k in range(3):
        x, t = take(problems, k)
        estimates = []
        for i in range(count):
            rows = tuple(np.delete(f, i, 0) if n == MODE else f for n, f in enumerate(t.factors))
            start = t._replace(factors=rows)
            part = refit_part(np.delete(x, i, MODE), start)
            estimates.append([np.asarray(part.factors[n]) for n in OTHERS])
        for errors, values in zip(found.factors, zip(*estimates, strict=True), strict=True):
            deviations = np.stack(values) - np.mean(values, axis=0)
            expected = np.sqrt((count - 1) / count * np.sum(deviations**2, axis=0))
            np.testing.assert_allclose(errors[k], expected, rtol=1e-8)


def test_jackknife_of_exact_data_is_zero():
    _, truths = stacked_problems()
    exact = np.stack([dense(take(truths, k)) for k in range(3)])
    for errors in batched_jackknife(exact, truths).factors:
        assert np.max(errors) < 1e-12


def test_jackknife_hides_what_the_mask_hides(rng):
    problems = stacked_problems()
    x, t = take(problems, 0)
    mask = rng.random(SLICES) < 0.9
    found = masked_jackknife(x, t, mask)
    other = masked_jackknife(np.where(mask, x, np.nan), t, mask)
    jax.tree.map(np.testing.assert_array_equal, found, other)
    whole = masked_jackknife(x, t, np.ones(SLICES, bool))
    plain = take(batched_jackknife(*problems), 0)
    # Both stop where a sweep lowers the objective by 1e-8 of it, perhaps one sweep apart.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), whole, plain)


def test_jackknife_agrees_with_the_curvature_for_independent_slices():
    problems = stacked_problems()
    found = batched_jackknife(*problems)
    for k in range(3):
        _, curvature, _ = naive_errors(*take(problems, k), np.ones(SLICES, bool))
        ratio = np.concatenate(
            [
                np.ravel(errors[k] / curvature[n])
                for n, errors in zip(OTHERS, found.factors, strict=True)
            ]
        )
        # A slice contributes the square of (its score) (its noise), of kurtosis 9: the variance
        # over 40 slices spreads by sqrt(8 / 40) of it, of which sqrt(2 / 40) is common to all.
        spread = np.sqrt(2 / 40 + (8 - 2) / 40 / len(ratio))
        assert 1 - 3 * spread < np.mean(ratio**2) < 1 / (1 - 3 * spread)


def test_batch_is_the_loop(rng):
    problems = [(noisy(rng, t), t) for t in (random_cp(rng) for _ in range(3))]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    found = jax.jit(jax.vmap(uncertainty.standard_errors))(*batch)
    for k, problem in enumerate(problems):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
            take(found, k),
            take(compiled_errors(*problem), ...),
        )


def test_single_precision_stays(rng):
    t = random_cp(rng)
    x, mask = noisy(rng, t, 0.1), rng.random(SHAPE) < 0.8
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (x, t))
    found, exact = compiled_errors(*single, mask=mask), compiled_errors(x, t, mask=mask)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for function in (uncertainty.standard_errors, leave_out):
        leaves = jax.tree.leaves(jax.eval_shape(function, *single))
        assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_what_the_data_do_not_determine_has_no_finite_error(rng):
    t = random_cp(rng)
    x, mask = noisy(rng, t), np.zeros(SHAPE, bool)
    mask[:3, :2, :3] = True
    assert np.isnan(compiled_errors(x, t, mask=mask).noise)
    silent = t._replace(weights=t.weights * np.array([1.0, 0.0]))
    assert not np.any(np.isfinite(compiled_errors(x, silent).factors[0][:, 1]))


def test_bad_arguments_are_refused(rng):
    t = random_cp(rng)
    x = np.ones(SHAPE)
    for name, function in {
        "standard_errors": uncertainty.standard_errors,
        "jackknife": functools.partial(uncertainty.jackknife, mode=0),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: got a CP tensor of shape"):
            function(x[:4], t)
        with pytest.raises(ValueError, match=f"^{name}: got a CP tensor of dtype"):
            function(x.astype(np.float32), t)
        with pytest.raises(ValueError, match=f"^{name}: got mask of dtype float64"):
            function(x, t, mask=x)
        with pytest.raises(ValueError, match=rf"^{name}: got mask of shape \(4, 6, 7\)"):
            function(x, t, mask=np.ones((4, 6, 7), bool))
    with pytest.raises(ValueError, match=r"^standard_errors: got a matrix and a fit of rank 2"):
        uncertainty.standard_errors(np.ones((5, 6)), random_cp(rng, 2, (5, 6)))
    with pytest.raises(
        ValueError, match=r"^standard_errors: got 8 entries, expected more than.* 8"
    ):
        uncertainty.standard_errors(np.ones((2, 2, 2)), random_cp(rng, 2, (2, 2, 2)))
    with pytest.raises(ValueError, match=r"^jackknife: got mode 3, expected an integer from 0 to"):
        uncertainty.jackknife(x, t, 3)
    with pytest.raises(ValueError, match=r"^jackknife: got mode 1 of size 1, expected two slices"):
        uncertainty.jackknife(np.ones((3, 1, 4)), random_cp(rng, 1, (3, 1, 4)), 1)
