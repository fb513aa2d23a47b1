import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import published_multifac
from fedlr import cp, linked
from fedlr.linked import model

STORED = Path(__file__).resolve().parents[2] / "shared" / "reference" / "multifac"
SHAPES = ((6, 4, 3), (6, 5, 2, 3))
RANK = 3


@functools.cache
def compiled(max_iters=8, tol=0.0, extrapolate=False, masked=False):
    def fit(tensors, init, penalty, masks):
        return linked.multifac(
            tensors,
            init=init,
            penalty=penalty,
            masks=masks if masked else None,
            max_iters=max_iters,
            tol=tol,
            extrapolate=extrapolate,
        )

    return jax.jit(fit)


def multifac(tensors, init, penalty, masks=None, **options):
    return compiled(masked=masks is not None, **options)(tensors, init, penalty, masks)


def draw(rng, shapes=SHAPES, rank=RANK):
    """A start, and tensors of rank two plus noise."""
    start = linked.LinkedCP(
        jnp.asarray(rng.standard_normal((shapes[0][0], rank))),
        tuple(
            tuple(jnp.asarray(rng.standard_normal((size, rank))) for size in shape[1:])
            for shape in shapes
        ),
    )
    truth = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf[:, :2].shape)), start)
    tensors = tuple(
        x + 0.1 * jnp.asarray(rng.standard_normal(x.shape)) for x in linked.to_dense(truth)
    )
    return tensors, start


def objective(tensors, fit, penalty):
    squares = sum(jnp.sum((x - e) ** 2) for x, e in zip(tensors, linked.to_dense(fit), strict=True))
    return squares + penalty * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(fit))


def assert_close(left, right, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b)) + 1e-30))


def reference_masks():
    """Single entries, one sample of each tensor, hidden."""
    masks = [np.ones(shape, bool) for shape in SHAPES]
    masks[0][1] = masks[1][4] = False
    masks[0][0, 2, 1] = masks[1][2, 3, 0, 2] = False
    return tuple(jnp.asarray(mask) for mask in masks)


def test_the_published_trajectory_is_reproduced():
    if not STORED.exists():
        pytest.skip(f"the reference arrays are not at {STORED}")
    stored = np.load(STORED / "als_R6_sig2_50it.npz")
    tensors = tuple(jnp.asarray(stored[name]) for name in ("tensor1", "tensor2"))
    start = linked.LinkedCP(
        jnp.asarray(stored["init_A1_0"]),
        (
            tuple(jnp.asarray(stored[f"init_A1_{n}"]) for n in (1, 2)),
            tuple(jnp.asarray(stored[f"init_A2_{n}"]) for n in (1, 2, 3)),
        ),
    )
    fit, info = multifac(tensors, start, 2.0, max_iters=50)
    np.testing.assert_allclose(info.objective, stored["obj"][1:], rtol=1e-12)
    assert_close(linked.to_dense(fit), (stored["est1"], stored["est2"]))
    assert_close(linked.weights(fit), np.stack([stored["weights1"], stored["weights2"]]))
    np.testing.assert_allclose(linked.explained(fit, tensors).shared, stored["var_shared"])
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (tensors, start))
    _, info = multifac(*single, 2.0, max_iters=50)
    assert info.objective.dtype == jnp.float32
    np.testing.assert_allclose(info.objective, stored["obj"][1:], rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_sweeps_agree_with_the_published_recipe(masked, rng):
    tensors, start = draw(rng)
    masks = reference_masks() if masked else None
    fit, info = multifac(tensors, start, 0.7, masks)
    models = [[np.array(start.shared), *map(np.array, own)] for own in start.factors]
    data, hidden = [np.array(x) for x in tensors], None
    if masked:
        hidden = [np.asarray(mask) for mask in masks]
        data = [np.where(mask, x, 0) for x, mask in zip(data, hidden, strict=True)]
    expected = [published_multifac.sweep(data, models, 0.7, hidden) for _ in range(8)]
    np.testing.assert_allclose(info.objective, expected, rtol=1e-10)
    assert_close(fit, linked.LinkedCP(models[0][0], tuple(tuple(m[1:]) for m in models)))
    if masked:
        assert_close(linked.impute(fit, tensors, masks), data)


def test_one_tensor_is_a_ridge_decomposition(rng):
    (x,), start = draw(rng, SHAPES[:1])
    fit, info = multifac((x,), start, 0.5)
    init = cp.CPTensor(jnp.ones(RANK), (start.shared, *start.factors[0]))
    other, expected = cp.als(x, init=init, ridge=0.5, max_iters=8, tol=0)
    np.testing.assert_allclose(info.objective, expected.objective, rtol=1e-12)
    assert_close((fit.shared, *fit.factors[0]), other.factors)


def test_matrices_have_their_singular_values_shrunk(rng):
    """For N = 2 the penalty is twice the nuclear norm of the concatenation."""
    shapes = ((6, 4), (6, 3))
    tensors, start = draw(rng, shapes, rank=6)
    fit, _ = multifac(tensors, start, 0.4, max_iters=3000)
    left, values, right = np.linalg.svd(np.concatenate(tensors, axis=1), full_matrices=False)
    expected = (left * np.maximum(values - 0.4, 0)) @ right
    np.testing.assert_allclose(np.concatenate(linked.to_dense(fit), axis=1), expected, atol=1e-5)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    samples=st.integers(1, 5),
    others=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    rank=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 0.5, 20.0]),
    seed=st.integers(0, 9),
)
def test_a_sweep_never_raises_the_objective(samples, others, rank, penalty, seed):
    rng = np.random.default_rng(seed)
    tensors, start = draw(rng, tuple((samples, *sizes) for sizes in others), rank)
    _, info = linked.multifac(tensors, init=start, penalty=penalty, max_iters=6, tol=0)
    values = np.asarray(info.objective)
    scale = float(sum(jnp.sum(x**2) for x in tensors))
    assert np.all(np.diff(values) <= 1e-10 * scale)
    assert values[0] <= objective(tensors, start, penalty) + 1e-10 * scale


def test_every_last_block_is_stationary(rng):
    tensors, start = draw(rng)
    fit, info = multifac(tensors, start, 0.3)
    np.testing.assert_allclose(info.objective[-1], objective(tensors, fit, 0.3), rtol=1e-10)
    slope = jax.grad(lambda last: objective(
        tensors, fit._replace(factors=(fit.factors[0], (*fit.factors[1][:-1], last))), 0.3
    ))(fit.factors[1][-1])  # fmt: skip
    assert jnp.max(jnp.abs(slope)) < 1e-9


def test_balance_is_where_the_penalty_is_least(rng):
    _, fit = draw(rng)
    fit = model.LinkedCP(fit.shared, (fit.factors[0], tuple(
        factor.at[:, 1].set(0) for factor in fit.factors[1]
    )))  # fmt: skip
    even = linked.balance(fit)
    assert_close(linked.to_dense(even), linked.to_dense(fit))
    assert_close(linked.balance(even), even)
    lengths = model.tensor.column_norms(even.shared)
    own = [[model.tensor.column_norms(f) for f in factors] for factors in even.factors]
    for norms in own:  # within a tensor all other columns are equally long
        assert_close(norms, [norms[0]] * len(norms))
    np.testing.assert_allclose(lengths**2, sum(norms[0] ** 2 for norms in own), rtol=1e-10)

    def penalty_after(log_scales):
        scales = jnp.exp(log_scales)
        moved = even.shared * scales[0][None] / jnp.prod(scales[1:3], axis=0)[None]
        first = tuple(f * s[None] for f, s in zip(even.factors[0], scales[1:3], strict=True))
        stretched = jnp.prod(scales[1:3], axis=0) / scales[0]
        second = (even.factors[1][0] * stretched[None], *even.factors[1][1:])
        first = (first[0] / scales[0][None], *first[1:])
        return sum(jnp.sum(f**2) for f in (moved, *first, *second))

    least = penalty_after(jnp.zeros((3, RANK)))
    assert jnp.max(jnp.abs(jax.grad(penalty_after)(jnp.zeros((3, RANK))))) < 1e-9
    for seed in range(5):
        step = 0.3 * np.random.default_rng(seed).standard_normal((3, RANK))
        assert penalty_after(jnp.asarray(step)) >= least
    dead = linked.balance(jax.tree.map(jnp.zeros_like, fit))
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(dead))


def test_a_converged_fit_is_balanced(rng):
    tensors, start = draw(rng)
    fit, _ = multifac(tensors, start, 1.0, max_iters=3000)
    assert_close(linked.balance(fit), fit, rtol=1e-5)


def test_normalize_sorts_and_turns(rng):
    _, fit = draw(rng)
    found = linked.normalize(fit)
    assert_close(linked.to_dense(found), linked.to_dense(fit))
    sizes = jnp.sum(linked.weights(found) ** 2, axis=0)
    assert jnp.all(jnp.diff(sizes) <= 0)
    for factor in (found.shared, *found.factors[0][:-1], *found.factors[1][:-1]):
        assert jnp.all(jnp.max(factor, axis=0) >= jnp.max(-factor, axis=0))
    assert_close(linked.normalize(found), found)


def test_zero_columns_stay_zero_and_padding_changes_nothing(rng):
    tensors, start = draw(rng)
    masks = reference_masks()
    pattern = start._replace(
        factors=(tuple(f.at[:, 0].set(0) for f in start.factors[0]), start.factors[1])
    )
    for own in (None, masks):
        fit, _ = multifac(tensors, pattern, 0.4, own)
        assert all(jnp.all(f[:, 0] == 0) for f in fit.factors[0])
        assert not linked.active_components(fit)[0, 0]
        padded = jax.tree.map(lambda f: jnp.pad(f, ((0, 0), (0, 1))), pattern)
        wider, _ = multifac(tensors, padded, 0.4, own)
        assert_close(jax.tree.map(lambda f: f[:, :RANK], wider), fit)
        assert all(jnp.all(leaf[:, RANK] == 0) for leaf in jax.tree.leaves(wider))


def test_one_zero_factor_takes_the_component_out_of_its_tensor(rng):
    """Matrices too: their only other factor would come back from the shared one."""
    tensors, start = draw(rng, ((6, 4), (6, 3)))
    pattern = start._replace(factors=((start.factors[0][0].at[:, 1].set(0),), start.factors[1]))
    fit, _ = multifac(tensors, pattern, 0.1)
    assert jnp.all(fit.factors[0][0][:, 1] == 0)


def test_disjoint_components_are_separate_fits(rng):
    tensors, start = draw(rng, rank=4)
    keep = [np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])]
    pattern = start._replace(
        factors=tuple(
            tuple(f * jnp.asarray(own, float)[None] for f in factors)
            for own, factors in zip(keep, start.factors, strict=True)
        )
    )
    fit, info = multifac(tensors, pattern, 0.3)
    total = 0
    for k in range(2):
        alone = linked.LinkedCP(pattern.shared, pattern.factors[k : k + 1])
        own, own_info = multifac(tensors[k : k + 1], alone, 0.3)
        assert_close(linked.to_dense(own)[0], linked.to_dense(fit)[k])
        total = total + own_info.objective
    np.testing.assert_allclose(info.objective, total, rtol=1e-10)


@pytest.mark.parametrize("order", [3, 4])
def test_thresholds_of_a_rank_one_tensor(order):
    """Between d_loc and d_glob a component may live or die; it is worth less than nothing."""
    sigma, n = 1.3, order
    local = (2 * n - 2) / (n - 2) * (sigma * (n - 2) / n) ** (n / (2 * n - 2))
    glob = (n - 1) / (n - 2) * (sigma * (n - 2)) ** (n / (2 * n - 2))
    units = [np.eye(4)[:, :1] for _ in range(n)]
    direction = published_multifac.dense(units)

    def run(d, scale):
        start = linked.LinkedCP(
            jnp.asarray(scale * units[0]), (tuple(jnp.asarray(scale * u) for u in units[1:]),)
        )
        fit, info = multifac((jnp.asarray(d * direction),), start, sigma, max_iters=2000)
        return float(linked.weights(fit)[0, 0]), float(info.objective[-1])

    assert local < glob
    for scale in (0.2, (0.9 * local) ** (1 / n), 3.0):
        assert run(0.9 * local, scale)[0] < 1e-5
    between = (local + glob) / 2
    dead, alive = run(between, 0.2), run(between, between ** (1 / n))
    assert dead[0] < 1e-5
    np.testing.assert_allclose(between, alive[0] + sigma * alive[0] ** (2 / n - 1), rtol=1e-8)
    assert alive[1] > dead[1]
    above = 1.3 * glob
    lam, value = run(above, above ** (1 / n))
    np.testing.assert_allclose(above, lam + sigma * lam ** (2 / n - 1), rtol=1e-8)
    np.testing.assert_allclose(value, (above - lam) ** 2 + sigma * n * lam ** (2 / n), rtol=1e-8)
    assert value < above**2


def test_a_large_penalty_kills_everything(rng):
    tensors, start = draw(rng)
    fit, info = multifac(tensors, start, 1e4)
    assert not jnp.any(linked.active_components(fit))
    np.testing.assert_allclose(info.objective[-1], sum(jnp.sum(x**2) for x in tensors), rtol=1e-9)


def test_orders_of_samples_and_tensors_do_not_matter(rng):
    tensors, start = draw(rng)
    fit, _ = multifac(tensors, start, 0.5)
    order = np.array([3, 0, 5, 1, 4, 2])
    moved, _ = multifac(
        tuple(x[order] for x in tensors), start._replace(shared=start.shared[order]), 0.5
    )
    assert_close(moved, fit._replace(shared=fit.shared[order]))
    swapped, _ = multifac(tensors[::-1], start._replace(factors=start.factors[::-1]), 0.5)
    assert_close(swapped, fit._replace(factors=fit.factors[::-1]))


def test_scaling_the_data_scales_the_penalty(rng):
    """X -> c X and sigma -> c^(2 - 2/N) sigma scale the weights by c, for equal orders."""
    tensors, start = draw(rng, ((6, 4, 3), (6, 5, 2)))
    scale = 1.7
    fit, _ = multifac(tensors, start, 0.5)
    larger, _ = multifac(
        tuple(scale * x for x in tensors),
        jax.tree.map(lambda leaf: scale ** (1 / 3) * leaf, start),
        scale ** (4 / 3) * 0.5,
    )
    np.testing.assert_allclose(linked.weights(larger), scale * linked.weights(fit), rtol=1e-9)


def test_masks_of_true_change_nothing(rng):
    tensors, start = draw(rng)
    full = tuple(jnp.ones(x.shape, bool) for x in tensors)
    fit, info = multifac(tensors, start, 0.5)
    other, other_info = multifac(tensors, start, 0.5, full)
    assert_close(other, fit)
    np.testing.assert_allclose(other_info.objective, info.objective, rtol=1e-10)


def test_hidden_values_do_not_matter(rng):
    tensors, start = draw(rng)
    masks = reference_masks()
    broken = tuple(jnp.where(mask, x, jnp.nan) for x, mask in zip(tensors, masks, strict=True))
    fit, info = multifac(tensors, start, 0.5, masks)
    other, other_info = multifac(broken, start, 0.5, masks)
    assert_close(other, fit, rtol=0)
    np.testing.assert_array_equal(other_info.objective, info.objective)
    slope = jax.grad(
        lambda tensors: multifac(tensors, start, 0.5, masks)[1].objective[-1]
    )(broken)  # fmt: skip
    for gradient, mask in zip(slope, masks, strict=True):
        assert jnp.all(jnp.isfinite(gradient))
        assert jnp.all(jnp.where(mask, 0, gradient) == 0)
    for filled in (linked.impute(fit, broken, masks), linked.impute(fit, tensors, masks)):
        assert_close(filled, linked.impute(fit, tensors, masks), rtol=0)
    assert_close(
        linked.explained(fit, broken, masks), linked.explained(fit, tensors, masks), rtol=0
    )


def test_a_hidden_sample_is_imputed_by_what_is_shared(rng):
    tensors, start = draw(rng)
    masks = reference_masks()
    pattern = start._replace(
        factors=(start.factors[0], tuple(f.at[:, 0].set(0) for f in start.factors[1]))
    )
    fit, _ = multifac(tensors, pattern, 0.1, masks)
    filled = linked.impute(fit, tensors, masks)
    shared, full = linked.shared_part(fit), linked.to_dense(fit)
    assert jnp.max(jnp.abs(full[0][1] - shared[0][1])) > 1e-6
    assert_close(filled[0][1], shared[0][1])
    assert_close(filled[0][0, 2, 1], full[0][0, 2, 1])
    observed = np.asarray(masks[0])
    np.testing.assert_array_equal(np.asarray(filled[0])[observed], np.asarray(tensors[0])[observed])


def test_a_sample_of_three_tensors_takes_the_components_of_those_that_have_it(rng):
    shapes = ((4, 3), (4, 2), (4, 5))
    _, fit = draw(rng, shapes, rank=3)
    # Component 0 is in all tensors, 1 in the first two, 2 in the first alone.
    table = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    fit = fit._replace(
        factors=tuple(
            tuple(f * jnp.asarray(row, float)[None] for f in own)
            for row, own in zip(table, fit.factors, strict=True)
        )
    )
    masks = [np.ones(shape, bool) for shape in shapes]
    masks[0][:2] = False
    masks[1][1] = False
    masks = tuple(jnp.asarray(mask) for mask in masks)
    filled = linked.impute(fit, linked.to_dense(fit), masks)[0]
    wide = np.asarray(fit.shared)[:, None, :] * np.asarray(fit.factors[0][0])[None]
    np.testing.assert_allclose(filled[0], wide[0][:, :2].sum(axis=1))  # tensor 1 has sample 0
    np.testing.assert_allclose(filled[1], wide[1][:, 0])  # only the last one has sample 1


def test_predicted_rows_of_the_training_samples_are_their_rows(rng):
    tensors, start = draw(rng)
    fit, _ = multifac(tensors, start, 0.5, max_iters=3000)
    assert_close(linked.predict_rows(fit, tensors, penalty=0.5), fit.shared, rtol=1e-6)
    masks = reference_masks()
    rows = linked.predict_rows(fit, tensors, masks, penalty=0.5)
    one = linked.LinkedCP(fit.shared[1:2], fit.factors)
    only = linked.predict_rows(
        one._replace(factors=fit.factors[1:]), (tensors[1][1:2],), penalty=0.5
    )
    assert_close(rows[1], only[0])  # sample 1 is hidden in tensor 0
    nothing = tuple(jnp.zeros(x.shape, bool) for x in tensors)
    assert jnp.all(linked.predict_rows(fit, tensors, nothing, penalty=0.0) == 0)


def test_explained_shares_are_those_of_the_observed_entries(rng):
    tensors, start = draw(rng)
    masks = reference_masks()
    fit, _ = multifac(tensors, start, 0.5, masks)
    found = linked.explained(fit, tensors, masks)
    for k, (x, mask) in enumerate(zip(tensors, masks, strict=True)):
        seen = np.asarray(mask)
        norm = np.sum(np.asarray(x)[seen] ** 2)
        rest = np.sum(np.asarray(x - linked.to_dense(fit)[k])[seen] ** 2)
        np.testing.assert_allclose(found.total[k], 1 - rest / norm)
        for r in range(RANK):
            chosen = jnp.zeros((2, RANK), bool).at[k, r].set(True)
            part = np.asarray(linked.selected_part(fit, chosen)[k])[seen]
            np.testing.assert_allclose(found.components[k, r], np.sum(part**2) / norm)


def test_extrapolation_needs_fewer_sweeps(rng):
    tensors, start = draw(rng)
    options = {"max_iters": 3000, "tol": 1e-10}
    _, plain = multifac(tensors, start, 0.5, **options)
    _, fast = multifac(tensors, start, 0.5, extrapolate=True, **options)
    assert fast.num_iters < plain.num_iters
    assert fast.objective[-1] <= plain.objective[-1] * (1 + 1e-6)
    assert jnp.all(jnp.diff(fast.objective) <= 0)


def test_a_path_is_a_chain_of_balanced_fits(rng):
    tensors, start = draw(rng)
    fits, info = linked.penalty_path(
        tensors, jnp.array([0.1, 1.0, 1e4]), init=start, max_iters=8, tol=0
    )
    assert info.objective.shape == (3, 8)
    expected = start
    for k, penalty in enumerate((0.1, 1.0, 1e4)):
        expected, _ = multifac(tensors, linked.balance(expected), penalty)
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], fits), expected)
    assert not jnp.any(linked.active_components(expected))


def test_batches_equal_loops_and_compile_once(rng):
    cases = [draw(rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    masks = reference_masks()

    def fit(tensors, start, penalty):
        return linked.multifac(
            tensors, init=start, penalty=penalty, masks=masks, max_iters=8, tol=0
        )[0]

    counted = jax.jit(jax.vmap(chex.assert_max_traces(fit, n=1)))
    chex.clear_trace_counter()
    found = counted(*stacked, jnp.array([0.1, 0.5, 2.0]))
    counted(*stacked, jnp.array([0.3, 0.5, 2.0]))
    for k, (case, penalty) in enumerate(zip(cases, (0.1, 0.5, 2.0), strict=True)):
        alone, _ = multifac(*case, penalty, masks)
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], found), alone)


def test_gradients_agree_with_differences(rng):
    tensors, start = draw(rng)

    def last(penalty, scale):
        scaled = tuple(scale * x for x in tensors)
        return multifac(scaled, start, penalty)[1].objective[-1]

    slopes = jax.grad(last, argnums=(0, 1))(0.5, 1.0)
    step = 1e-5
    for slope, (a, b) in zip(
        slopes, (((0.5 + step, 1.0), (0.5 - step, 1.0)), ((0.5, 1 + step), (0.5, 1 - step))),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(slope, (last(*a) - last(*b)) / (2 * step), rtol=1e-6)


def test_random_starts_are_standard_normal(key):
    tensors = (jnp.ones((400, 30, 2), jnp.float32), jnp.ones((400, 25), jnp.float32))
    start = linked.random_init(tensors, 4, key=key)
    assert start.shapes == ((400, 30, 2), (400, 25))
    assert start.rank == 4
    values = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(start)])
    assert values.dtype == jnp.float32
    assert abs(float(jnp.mean(values))) < 5 / np.sqrt(values.size)
    assert abs(float(jnp.var(values)) - 1) < 5 * np.sqrt(2 / values.size)


def good(rng):
    tensors, start = draw(rng)
    return {"tensors": tensors, "init": start, "penalty": 0.1, "max_iters": 1}


BAD = {
    "other samples": (
        lambda a: {"tensors": (a["tensors"][0], a["tensors"][1][:5])},
        r"multifac: got tensor 1 of shape \(5, 5, 2, 3\), expected 6 samples",
    ),
    "no tensors": (lambda _: {"tensors": ()}, "expected one or more"),
    "a vector": (
        lambda _: {"tensors": (jnp.ones(6),)},
        r"tensor 0 of shape \(6,\), expected 2 axes",
    ),
    "other dtype": (
        lambda a: {"tensors": (a["tensors"][0], a["tensors"][1].astype(jnp.float32))},
        "tensor 1 of dtype float32, expected float64",
    ),
    "integers": (lambda _: {"tensors": (jnp.ones((6, 4), int),)}, "dtype int"),
    "other model": (
        lambda a: {"init": a["init"]._replace(factors=a["init"].factors[:1])},
        "multifac: got a model of shapes",
    ),
    "masks of another shape": (
        lambda _: {"masks": (jnp.ones((6, 4), bool), jnp.ones(SHAPES[1], bool))},
        r"mask of shape \(6, 4\), expected shape \(6, 4, 3\)",
    ),
    "one mask": (lambda _: {"masks": (jnp.ones(SHAPES[0], bool),)}, "a tuple of 2"),
    "numbers as mask": (
        lambda _: {"masks": tuple(jnp.ones(shape) for shape in SHAPES)},
        "expected bool",
    ),
    "negative penalty": (lambda _: {"penalty": -1.0}, r"penalty -1.0, expected a non-negative"),
    "no sweeps": (lambda _: {"max_iters": 0}, "max_iters 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, rng):
    change, message = BAD[name]
    arguments = good(rng)
    arguments |= change(arguments)
    with pytest.raises(ValueError, match=message):
        linked.multifac(arguments.pop("tensors"), **arguments)


def test_rank_zero_is_refused(rng):
    tensors, _ = draw(rng)
    with pytest.raises(ValueError, match="random_init: got rank 0"):
        linked.random_init(tensors, 0, key=jax.random.key(0))


def test_hidden_entries_begin_at_a_good_start_or_at_zero(rng):
    """The first sweep from a converged fit leaves it; from a bad one it is that of zeros."""
    tensors, start = draw(rng)
    masks = tuple(jnp.asarray(rng.random(shape) > 0.2) for shape in SHAPES)
    fit, info = multifac(tensors, start, 0.5, masks, max_iters=3000, tol=1e-13)
    again, more = multifac(tensors, fit, 0.5, masks, max_iters=1)
    np.testing.assert_allclose(more.objective[0], info.objective[-1], rtol=1e-8)
    assert_close(again, fit, rtol=1e-4)
    bad = jax.tree.map(lambda leaf: 3 * leaf, start)
    zeros = tuple(jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True))
    first, _ = multifac(tensors, bad, 0.5, masks, max_iters=1)
    expected, _ = multifac(zeros, bad, 0.5, max_iters=1)
    assert_close(first, expected)
