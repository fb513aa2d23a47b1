import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import linked
from fedlr.linked import variational

EPS = float(np.finfo(np.float64).eps)
SHAPES = ((8, 4, 3), (8, 5))
LARGE = ((60, 8, 7), (60, 9))
LETTERS = "abc"


def dense(factors):
    names = LETTERS[: len(factors)]
    terms = ",".join(name + "z" for name in names)
    return np.einsum(f"{terms}->{names}", *factors)


def model_factors(fit):
    """The factors of every tensor, the shared one first."""
    return [[np.asarray(a) for a in (fit.shared, *own)] for own in fit.factors]


def planted(shapes, table, ratio, seed=0):
    """Data with components where `table` (K, R) says, noise of unit variance over `ratio`."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(shapes[0][0], len(table[0])))
    truth, data = [], []
    for shape, chosen in zip(shapes, table, strict=True):
        factors = [rng.normal(size=(size, len(chosen))) for size in shape[1:]]
        factors[0] = factors[0] * np.asarray(chosen, float)
        signal = dense([shared, *factors])
        truth.append(signal / signal.std())
        data.append(truth[-1] + rng.normal(size=shape) / np.sqrt(ratio))
    return tuple(jnp.asarray(x) for x in data), truth


def start_of(shapes, rank, seed=1):
    rng = np.random.default_rng(seed)
    own = tuple(
        tuple(jnp.asarray(rng.normal(size=(size, rank))) for size in shape[1:]) for shape in shapes
    )
    return linked.LinkedCP(jnp.asarray(rng.normal(size=(shapes[0][0], rank))), own)


def small(seed=0):
    """Data that support both components everywhere."""
    return planted(SHAPES, [[1, 1], [1, 1]], 20.0, seed)[0]


def make_masks(shapes, seed=2):
    """Hide some entries of every tensor, a sample of the second, and the last one of both."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(shape) > 0.15 for shape in shapes]
    masks[1][1] = False
    for mask in masks:
        mask[-1] = False
    return tuple(jnp.asarray(mask) for mask in masks)


@functools.cache
def fitter(max_iters=2000, tol=0.0):
    """One compiled function for every form of the call."""

    def run(tensors, init, masks=None):
        return variational.variational_multifac(
            tensors, init=init, masks=masks, max_iters=max_iters, tol=tol
        )

    return jax.jit(run)


@functools.cache
def many_fitter(max_iters=400, tol=1e-6):
    return jax.jit(jax.vmap(fitter(max_iters, tol), in_axes=(None, 0)))


def fit_best(tensors, rank, num_starts=4, seed=10):
    """Fit from several starts and take the one of the largest bound."""
    shapes = tuple(x.shape for x in tensors)
    starts = [start_of(shapes, rank, seed + i) for i in range(num_starts)]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *starts)
    fits, infos = many_fitter()(tensors, stacked)
    best = int(np.argmin(np.asarray(infos.objective)[:, -1]))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[best], fits)


def table_of(fit):
    """Where the components are, as sorted columns."""
    active = np.asarray([np.all([a.any(axis=0) for a in own], axis=0) for own in fit.factors])
    return sorted(column for column in active.T.astype(int).tolist() if any(column))


# The bound, written down for every row and every entry.


def naive_negative_bound(means, covariances, precisions, variances, tensors, masks):
    """From means (I, R) and covariances (I, R, R): `means[0]` is shared, the others are nested."""

    def of_prior(mean, covariance, alpha):
        seconds = jnp.einsum("irr->ir", covariance) + mean**2
        _, log_dets = jnp.linalg.slogdet(covariance)
        # KL divergence of a row from its prior.
        kl = jnp.sum(alpha[None] * seconds - jnp.log(alpha)[None] - 1, axis=1) - log_dets
        return jnp.sum(kl) / 2

    total = of_prior(means[0], covariances[0], precisions[0])
    for k, (x, mask) in enumerate(zip(tensors, masks, strict=True)):
        own = [means[0], *means[1][k]]
        spread = [covariances[0], *covariances[1][k]]
        for mean, covariance in zip(own[1:], spread[1:], strict=True):
            total = total + of_prior(mean, covariance, precisions[1][k])
        seconds = [
            jnp.einsum("ir,is->irs", mean, mean) + covariance
            for mean, covariance in zip(own, spread, strict=True)
        ]
        names = LETTERS[: x.ndim]
        left = ",".join(name + "yz" for name in names)
        square = jnp.einsum(f"{left}->{names}", *seconds)
        estimate = jnp.einsum(",".join(name + "z" for name in names) + f"->{names}", *own)
        expected = jnp.where(mask, x**2 - 2 * x * estimate + square, 0)
        size = jnp.sum(mask, dtype=x.dtype)
        total = total + size / 2 * jnp.log(2 * jnp.pi * variances[k])
        total = total + jnp.sum(expected) / (2 * variances[k])
    return total


def naive_covariances(means, precisions, variances, masks, sweeps=100):
    """Solve for the covariances that the means, precisions and variances imply."""

    def system(k, mode, own, spread):
        seconds = [np.einsum("ir,is->irs", a, a) + s for a, s in zip(own, spread, strict=True)]
        names = LETTERS[: masks[k].ndim]
        others = [n for n in range(masks[k].ndim) if n != mode]
        left = ",".join([names, *(names[n] + "yz" for n in others)])
        weight = np.asarray(masks[k], float)
        gram = np.einsum(f"{left}->{names[mode]}yz", weight, *(seconds[n] for n in others))
        return gram / variances[k]

    spread = jax.tree.map(lambda a: np.zeros((*a.shape, a.shape[1])), means)
    shared, nested = spread
    nested = [list(group) for group in nested]
    for _ in range(sweeps):
        gram = sum(
            system(k, 0, [means[0], *means[1][k]], [shared, *nested[k]]) for k in range(len(masks))
        )
        shared = np.linalg.inv(gram + np.diag(precisions[0]))
        for k, group in enumerate(means[1]):
            for n in range(len(group)):
                gram = system(k, n + 1, [means[0], *group], [shared, *nested[k]])
                nested[k][n] = np.linalg.inv(gram + np.diag(precisions[1][k]))
    return shared, tuple(tuple(group) for group in nested)


@pytest.mark.parametrize("masked", [False, True])
def test_objective_is_the_negative_bound_and_every_block_is_its_maximum(masked):
    tensors = small()
    masks = make_masks(SHAPES) if masked else None
    posterior, info = fitter()(tensors, start_of(SHAPES, 2), masks)
    assert table_of(posterior.fit) == [[1, 1], [1, 1]]
    posterior, tensors = jax.tree.map(np.asarray, (posterior, tensors))
    seen = [np.ones(shape, bool) for shape in SHAPES] if masks is None else masks
    means = tuple(posterior.fit)
    precisions = (posterior.shared_precisions, tuple(posterior.precisions))
    variances = posterior.noise**2
    covariances = naive_covariances(means, precisions, variances, seen)
    blocks = jax.tree.map(jnp.asarray, (means, covariances, precisions, tuple(variances)))

    @jax.jit
    def bound_and_slopes(blocks):
        # Slopes on a relative scale.
        def scaled(factors):
            grown = jax.tree.map(lambda a, f: a * f, blocks, factors)
            return naive_negative_bound(*grown, tensors, seen)

        return jax.value_and_grad(scaled)(jax.tree.map(jnp.ones_like, blocks))

    bound, slopes = bound_and_slopes(blocks)
    np.testing.assert_allclose(info.objective[-1], bound, rtol=1e-8)
    entries = sum(x.size for x in tensors)
    for slope in jax.tree.leaves(slopes):
        assert float(np.max(np.abs(slope))) < 1e-4 * entries


@pytest.mark.parametrize("masked", [False, True])
def test_objective_never_rises(masked):
    masks = make_masks(SHAPES) if masked else None
    for seed in range(3):
        _, info = fitter()(small(seed), start_of(SHAPES, 2, seed), masks)
        objective = np.asarray(info.objective)
        assert np.all(np.diff(objective) <= 1000 * EPS * np.max(np.abs(objective)))
        assert objective[-1] < objective[0] - 10


def test_bound_is_below_the_evidence():
    # With one component and two samples, the evidence is an integral over two numbers.
    shapes = ((2, 6),)
    (x,) = planted(shapes, [[1]], 10.0, seed=3)[0]
    posterior, info = fitter()((x,), start_of(shapes, 1))
    alpha, beta = float(posterior.shared_precisions[0]), float(posterior.precisions[0, 0])
    variance = float(posterior.noise[0]) ** 2
    axis = np.linspace(-8, 8, 801) / np.sqrt(alpha)
    one, two = np.meshgrid(axis, axis, indexing="ij")
    squares = one**2 + two**2
    # A column is N(0, tau^2 I + a a^T / beta): Sherman-Morrison and the determinant lemma.
    projections = sum((one * a + two * b) ** 2 for a, b in np.asarray(x).T)
    forms = np.sum(np.asarray(x) ** 2) / variance - projections / (
        variance * (variance * beta + squares)
    )
    log_det = 2 * np.log(2 * np.pi * variance) + np.log1p(squares / (variance * beta))
    logs = -(forms + 6 * log_det) / 2 - alpha * squares / 2 + np.log(alpha / (2 * np.pi))
    evidence = np.log(np.sum(np.exp(logs - logs.max())) * (axis[1] - axis[0]) ** 2) + logs.max()
    bound = -float(info.objective[-1])
    assert bound < evidence
    # The two posteriors of the sign, and the scale that a product of two Gaussians fixes.
    assert evidence - bound < 3


# Recovery.


@pytest.mark.parametrize("ratio", [2.0, 1e4])
def test_planted_components_and_noise_are_found(ratio):
    table = [[1, 1, 0], [1, 0, 1]]
    errors = []
    for seed in range(3):
        tensors, truth = planted(LARGE, table, ratio, seed)
        posterior = fit_best(tensors, 5)
        assert table_of(posterior.fit) == [[0, 1], [1, 0], [1, 1]]
        # The noise has the relative error of a variance of some thousand entries.
        np.testing.assert_allclose(posterior.noise, 1 / np.sqrt(ratio), rtol=0.1)
        for x, factors in zip(truth, model_factors(posterior.fit), strict=True):
            errors.append(np.sqrt(np.mean((x - dense(factors)) ** 2) * ratio))
    # Of the noise, sqrt(parameters / entries) is fitted: 0.21 in the tensor, 0.5 in the matrix.
    assert np.median(errors) < 0.5


def test_noise_has_no_components():
    rng = np.random.default_rng(0)
    tensors = tuple(jnp.asarray((1 + k) * rng.normal(size=s)) for k, s in enumerate(LARGE))
    posterior = fit_best(tensors, 5)
    assert table_of(posterior.fit) == []
    np.testing.assert_array_equal(posterior.fit.shared, 0)
    np.testing.assert_allclose(posterior.noise, [np.std(x) for x in tensors], rtol=0.02)


# Missing data.


def test_masks_that_hide_nothing_are_no_masks():
    tensors, start = small(), start_of(SHAPES, 2)
    full = tuple(jnp.asarray(np.ones(shape, bool)) for shape in SHAPES)
    (one, info), (two, other) = fitter()(tensors, start), fitter()(tensors, start, full)
    np.testing.assert_allclose(info.objective, other.objective, rtol=1e-9)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-8)


def test_hidden_values_do_not_matter():
    tensors, start, masks = small(), start_of(SHAPES, 2), make_masks(SHAPES)
    lost = tuple(jnp.where(mask, x, jnp.nan) for x, mask in zip(tensors, masks, strict=True))
    one, two = fitter()(tensors, start, masks), fitter()(lost, start, masks)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(left, right)


def test_sample_that_is_nowhere_observed_is_the_mean_of_the_prior():
    posterior, _ = fitter()(small(), start_of(SHAPES, 2), make_masks(SHAPES))
    np.testing.assert_array_equal(posterior.fit.shared[-1], 0)
    assert float(np.min(np.abs(posterior.fit.shared[1]))) > 0


def test_tensor_without_observations_gets_no_components():
    tensors, start = small(), start_of(SHAPES, 2)
    masks = (jnp.asarray(np.ones(SHAPES[0], bool)), jnp.asarray(np.zeros(SHAPES[1], bool)))
    posterior, info = fitter()(tensors, start, masks)
    assert np.all(np.isfinite(info.objective))
    assert table_of(posterior.fit) == [[1, 0], [1, 0]]
    assert float(posterior.noise[1]) == 1.0


# Invariance.


def test_scales_of_the_tensors_only_scale_the_fit():
    tensors, start = small(), start_of(SHAPES, 2)
    scales = (1e3, 1e-2)
    one, info = fitter()(tensors, start)
    two, other = fitter()(tuple(c * x for c, x in zip(scales, tensors, strict=True)), start)
    np.testing.assert_allclose(two.noise, one.noise * np.asarray(scales), rtol=1e-6)
    for c, left, right in zip(scales, model_factors(one.fit), model_factors(two.fit), strict=True):
        np.testing.assert_allclose(c * dense(left), dense(right), rtol=1e-5, atol=1e-6 * c)
    shift = sum(x.size * np.log(c) for c, x in zip(scales, tensors, strict=True))
    np.testing.assert_allclose(other.objective - shift, info.objective, atol=1e-5)


def test_lengths_of_the_start_do_not_matter():
    tensors, start = small(), start_of(SHAPES, 2)
    own = (tuple(20 * a for a in start.factors[0]), tuple(a / 10 for a in start.factors[1]))
    one, info = fitter()(tensors, start)
    two, other = fitter()(tensors, linked.LinkedCP(300 * start.shared, own))
    np.testing.assert_allclose(other.objective, info.objective, rtol=1e-8)
    for left, right in zip(model_factors(one.fit), model_factors(two.fit), strict=True):
        np.testing.assert_allclose(dense(left), dense(right), atol=1e-5)


def test_zero_columns_stay_and_change_nothing_else():
    tensors, start = small(), start_of(SHAPES, 2)
    padded = jax.tree.map(lambda a: jnp.asarray(np.pad(a, ((0, 0), (0, 1)))), start)
    one, info = fitter()(tensors, start)
    two, other = fitter()(tensors, padded)
    np.testing.assert_allclose(other.objective, info.objective, rtol=1e-8)
    for left, right in zip(jax.tree.leaves(one.fit), jax.tree.leaves(two.fit), strict=True):
        np.testing.assert_allclose(left, right[:, :2], atol=1e-6)
        np.testing.assert_array_equal(right[:, 2], 0)


def test_component_that_starts_outside_a_tensor_stays_outside():
    start = start_of(SHAPES, 2)
    own = (start.factors[0], (start.factors[1][0].at[:, 0].set(0),))
    posterior, _ = fitter()(small(), start._replace(factors=own))
    np.testing.assert_array_equal(posterior.fit.factors[1][0][:, 0], 0)
    assert float(np.linalg.norm(posterior.fit.factors[0][0][:, 0])) > 0


def test_tensor_of_zeros_is_no_trouble():
    tensors = (small()[0], jnp.asarray(np.zeros(SHAPES[1])))
    posterior, info = fitter()(tensors, start_of(SHAPES, 2))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((posterior, info)))
    assert table_of(posterior.fit) == [[1, 0], [1, 0]]


# Form.


def test_vmap_over_starts_is_a_loop_over_starts():
    tensors = small()
    starts = [start_of(SHAPES, 2, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *starts)
    fits, infos = many_fitter(2000, 0.0)(tensors, stacked)
    posterior, info = fitter()(tensors, starts[1])
    np.testing.assert_allclose(infos.objective[1], info.objective, rtol=1e-8)
    np.testing.assert_allclose(fits.noise[1], posterior.noise, rtol=1e-6)


def test_two_calls_trace_once():
    traces = []

    @jax.jit
    def run(tensors, start):
        traces.append(1)
        return variational.variational_multifac(tensors, init=start, max_iters=2)

    for seed in range(2):
        run.lower(small(seed), start_of(SHAPES, 2, seed))
    assert len(traces) == 1


def test_single_precision_stays_and_agrees():
    tensors, start = small(), start_of(SHAPES, 2)
    double, info = fitter()(tensors, start)
    single, other = fitter()(*jax.tree.map(lambda a: a.astype(jnp.float32), (tensors, start)))
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}
    assert other.objective.dtype == jnp.float32
    np.testing.assert_allclose(other.objective[-1], info.objective[-1], atol=1e-2)
    np.testing.assert_allclose(single.noise, double.noise, rtol=1e-2)


def test_wrong_arguments_are_refused():
    tensors, start = small(), start_of(SHAPES, 2)
    with pytest.raises(ValueError, match="variational_multifac: got a model of shapes"):
        variational.variational_multifac(tensors[:1], init=start)
    with pytest.raises(ValueError, match="variational_multifac: got mask of dtype"):
        variational.variational_multifac(tensors, init=start, masks=tensors)
    with pytest.raises(ValueError, match="variational_multifac: got a model of dtype float64"):
        variational.variational_multifac(tuple(x.astype(jnp.float32) for x in tensors), init=start)
    with pytest.raises(ValueError, match="max_iters 0"):
        fitter(0)(tensors, start)
