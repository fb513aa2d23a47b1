import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import cp, linked
from fedlr.linked import coupled

EPS = float(np.finfo(np.float64).eps)
CHAIN = (("subject", "gene", "time"), ("gene", "voxel"), ("voxel", "probe"))
SIZES = {"subject": 7, "gene": 6, "time": 5, "voxel": 8, "probe": 9}
# Two matrices around a ring of four modes: the product of opposite constraints is the same.
RING = (("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"))


def shapes(modes=CHAIN):
    return [tuple(SIZES[name] for name in ids) for ids in modes]


def dense(fit, modes=CHAIN):
    """The dense tensors, by NumPy."""
    factors = dict(zip(coupled.mode_ids(modes), map(np.asarray, fit.factors), strict=True))
    letters = {name: chr(97 + i) for i, name in enumerate(factors)}
    found = []
    for ids in modes:
        left = ",".join(letters[name] + "z" for name in ids)
        right = "".join(letters[name] for name in ids)
        found.append(np.einsum(f"{left}->{right}", *(factors[name] for name in ids)))
    return found


def start_of(tensors, modes=CHAIN, rank=3, seed=1):
    rng = np.random.default_rng(seed)
    sizes = {}
    for x, ids in zip(tensors, modes, strict=True):
        sizes |= dict(zip(ids, x.shape, strict=True))
    names = coupled.mode_ids(modes)
    return coupled.CoupledCP(tuple(jnp.asarray(rng.normal(size=(sizes[g], rank))) for g in names))


def planted(rank=2, seed=0, noise=0.0):
    """Coupled data, and the dense tensors without noise."""
    rng = np.random.default_rng(seed)
    truth = dense(start_of([np.zeros(shape) for shape in shapes()], rank=rank, seed=seed))
    noisy = [x + noise * x.std() * rng.normal(size=x.shape) for x in truth]
    return tuple(jnp.asarray(x) for x in noisy), truth


def without(fit, place, component):
    """Clear a column of one factor."""
    factors = [np.array(factor) for factor in fit.factors]
    factors[place][:, component] = 0
    return coupled.CoupledCP(tuple(jnp.asarray(factor) for factor in factors))


def make_masks(tensors, seed=2, share=0.2):
    """Hide some entries, and all of a gene in the second tensor; the last one is complete."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(x.shape) > share for x in tensors[:2]]
    masks[1][1] = False
    return (*(jnp.asarray(mask) for mask in masks), None)


@functools.cache
def fitter(modes=CHAIN, max_iters=300, tol=0.0, extrapolate=False):
    """One compiled function for every form of the call."""

    def run(tensors, init, penalty, masks=None):
        return coupled.coupled_als(
            tensors,
            modes,
            init=init,
            penalty=penalty,
            masks=masks,
            max_iters=max_iters,
            tol=tol,
            extrapolate=extrapolate,
        )

    return jax.jit(run)


@functools.cache
def balancer(modes):
    return jax.jit(functools.partial(coupled.balance_coupled, modes=modes))


weights_of = jax.jit(coupled.weights, static_argnames="modes")


@functools.partial(jax.jit, static_argnames="modes")
def observed_objective(factors, tensors, penalty, masks=None, modes=CHAIN):
    estimates = coupled.to_dense(coupled.CoupledCP(tuple(factors)), modes)
    total = penalty * sum(jnp.sum(factor**2) for factor in factors)
    for k, (x, estimate) in enumerate(zip(tensors, estimates, strict=True)):
        difference = x - estimate
        if masks is not None and masks[k] is not None:
            difference = jnp.where(masks[k], difference, 0)
        total = total + jnp.sum(difference**2)
    return total


def penalty_of(fit):
    return sum(np.sum(np.asarray(factor) ** 2) for factor in fit.factors)


# The fit.


def test_one_common_first_mode_is_the_linked_model():
    modes = (("i", "j", "k"), ("i", "l"))
    rng = np.random.default_rng(3)
    tensors = (jnp.asarray(rng.normal(size=(7, 5, 4))), jnp.asarray(rng.normal(size=(7, 6))))
    start = start_of(tensors, modes)
    same = linked.LinkedCP(start.factors[0], (start.factors[1:3], start.factors[3:]))
    fit, info = fitter(modes, 15)(tensors, start, 0.7)
    multifac = functools.partial(linked.multifac, penalty=0.7, max_iters=15, tol=0.0)
    other, other_info = jax.jit(multifac)(tensors, init=same)
    np.testing.assert_allclose(info.objective, other_info.objective, rtol=1e-12)
    for one, two in zip(fit.factors, jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-11)


def test_tensors_without_a_common_mode_are_fitted_apart():
    modes = (("i", "j", "k"), ("l", "m", "n"))
    rng = np.random.default_rng(4)
    tensors = tuple(jnp.asarray(rng.normal(size=(5, 4, 3))) for _ in range(2))
    start = start_of(tensors, modes)
    fit, info = fitter(modes, 10)(tensors, start, 0.3)
    als = jax.jit(functools.partial(cp.als, ridge=0.3, max_iters=10, tol=0.0))
    total = 0
    for k, x in enumerate(tensors):
        own = slice(3 * k, 3 * k + 3)
        init = cp.CPTensor(jnp.asarray(np.ones(3)), start.factors[own])
        apart, record = als(x, init=init)
        total = total + np.asarray(record.objective)
        for one, two in zip(fit.factors[own], apart.factors, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-11)
    np.testing.assert_allclose(info.objective, total, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_objective_is_that_of_the_observed_data_and_never_rises(masked):
    tensors, _ = planted(noise=0.5)
    masks = make_masks(tensors) if masked else None
    fit, info = fitter()(tensors, start_of(tensors), 0.5, masks)
    objective = np.asarray(info.objective)
    assert np.all(np.diff(objective) <= 100 * EPS * objective[0])
    assert objective[-1] < 0.9 * objective[0]
    expected = observed_objective(fit.factors, tensors, 0.5, masks)
    np.testing.assert_allclose(objective[-1], expected, rtol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_last_block_update_zeroes_its_gradient(masked):
    tensors, _ = planted(noise=0.5)
    masks = make_masks(tensors) if masked else None
    start = start_of(tensors)
    fit, _ = fitter()(tensors, start, 0.5, masks)

    def by_last(factor, factors):
        return observed_objective((*factors[:-1], factor), tensors, 0.5, masks)

    at_fit = jax.grad(by_last)(fit.factors[-1], fit.factors)
    elsewhere = jax.grad(by_last)(start.factors[-1], fit.factors)
    assert float(jnp.max(jnp.abs(at_fit))) < 1e-12 * float(jnp.max(jnp.abs(elsewhere)))


def test_hidden_values_do_not_matter():
    tensors, _ = planted(noise=0.5)
    masks = make_masks(tensors)
    start = start_of(tensors)
    lost = [jnp.where(mask, x, jnp.nan) for x, mask in zip(tensors, masks[:2], strict=False)]
    lost = (*lost, tensors[2])
    one, two = (fitter()(data, start, 0.5, masks) for data in (tensors, lost))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(left, right)


def test_masks_that_hide_nothing_are_no_masks():
    tensors, _ = planted(noise=0.5)
    start = start_of(tensors)
    full = [jnp.asarray(np.ones(x.shape, bool)) for x in tensors[:2]]
    plain, _ = fitter()(tensors, start, 0.5)
    fit, _ = fitter()(tensors, start, 0.5, (*full, None))
    for one, two in zip(fit.factors, plain.factors, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-8)


def test_hidden_sample_of_a_tensor_drops_out_of_its_row():
    tensors, _ = planted(noise=0.5)
    masks = make_masks(tensors, share=0.0)
    fit, _ = fitter()(tensors, start_of(tensors), 0.5, masks)
    subject, gene, time = fit.factors[:3]
    gram = (subject.T @ subject) * (time.T @ time) + 0.5 * jnp.eye(3)
    rhs = jnp.einsum("it,ir,tr->r", tensors[0][:, 1], subject, time)
    np.testing.assert_allclose(gene[1], jnp.linalg.solve(gram, rhs), atol=1e-4)


def test_planted_chain_is_recovered():
    errors = []
    for seed in range(3):
        tensors, truth = planted(seed=seed, noise=0.01)
        start = start_of(tensors, rank=2, seed=seed + 10)
        fit, _ = fitter()(tensors, start, 1e-3)
        estimates = dense(fit)
        errors += [
            np.linalg.norm(x - y) / np.linalg.norm(x) for x, y in zip(truth, estimates, strict=True)
        ]
    # Of noise of 1 %, the fit keeps sqrt(parameters / entries) < 1.
    assert np.median(errors) < 0.01


def test_zero_columns_stay_and_change_nothing_else():
    tensors, _ = planted(noise=0.5)
    start = start_of(tensors, rank=2)
    padded = jax.tree.map(lambda a: jnp.asarray(np.pad(a, ((0, 0), (0, 1)))), start)
    fit, _ = fitter()(tensors, start, 0.5)
    wide, _ = fitter()(tensors, padded, 0.5)
    for one, two in zip(fit.factors, wide.factors, strict=True):
        np.testing.assert_allclose(one, two[:, :2], atol=1e-10)
        np.testing.assert_array_equal(two[:, 2], 0)


def test_component_that_starts_outside_a_tensor_stays_outside():
    tensors, _ = planted(noise=0.5)
    start = start_of(tensors)
    fit, _ = fitter()(tensors, without(start, 2, 0), 0.5)
    table = np.asarray(weights_of(fit, modes=CHAIN)) > 0
    assert table.tolist() == [[False, True, True], [True, True, True], [True, True, True]]
    np.testing.assert_array_equal(fit.factors[0][:, 0], 0)


def test_large_penalty_leaves_nothing():
    tensors, _ = planted(noise=0.5)
    fit, info = fitter()(tensors, start_of(tensors), 1e4)
    total = sum(float(jnp.sum(x**2)) for x in tensors)
    assert float(jnp.max(weights_of(fit, modes=CHAIN))) < 1e-5
    np.testing.assert_allclose(info.objective[-1], total, rtol=1e-12)


def test_extrapolation_never_rises():
    tensors, _ = planted(noise=0.5)
    start = start_of(tensors)
    _, plain = fitter()(tensors, start, 0.5)
    _, info = fitter(extrapolate=True)(tensors, start, 0.5)
    objective = np.asarray(info.objective)
    assert np.all(np.diff(objective) <= 100 * EPS * objective[0])
    assert objective[-1] < plain.objective[-1] * (1 + 1e-3)


def test_vmap_over_starts_is_a_loop_over_starts():
    tensors, _ = planted(noise=0.5)
    starts = [start_of(tensors, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *starts)
    fits, infos = jax.jit(jax.vmap(lambda start: fitter()(tensors, start, 0.5)))(stacked)
    fit, info = fitter()(tensors, starts[1], 0.5)
    np.testing.assert_allclose(infos.objective[1], info.objective, rtol=1e-10)
    for one, two in zip(fits.factors, fit.factors, strict=True):
        np.testing.assert_allclose(one[1], two, atol=1e-8)


def test_two_calls_trace_once():
    traces = []
    tensors, _ = planted()

    @functools.partial(jax.jit, static_argnames="modes")
    def run(tensors, start, penalty, modes):
        traces.append(1)
        return coupled.coupled_als(tensors, modes, init=start, penalty=penalty, max_iters=2)

    for seed in range(2):
        run.lower(tensors, start_of(tensors, seed=seed), 0.1 + seed, CHAIN)
    assert len(traces) == 1


def test_single_precision_stays_and_agrees():
    tensors, _ = planted(noise=0.5)
    start = start_of(tensors)
    _, double = fitter()(tensors, start, 0.5)
    single = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float32)), (tensors, start))
    fit, info = fitter()(*single, 0.5)
    assert {factor.dtype for factor in fit.factors} == {jnp.dtype("float32")}
    assert info.objective.dtype == jnp.float32
    np.testing.assert_allclose(info.objective[-1], double.objective[-1], rtol=1e-4)
    even = balancer(CHAIN)(fit)
    assert {factor.dtype for factor in even.factors} == {jnp.dtype("float32")}
    for x, y in zip(dense(fit), dense(even), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


# Balance.


@functools.cache
def random_fit(modes, seed, rank=3):
    """Columns of very unequal lengths."""
    rng = np.random.default_rng(seed)
    ids = coupled.mode_ids(modes)
    factors = [
        rng.normal(size=(3 + i, rank)) * np.exp(2 * rng.normal(size=rank)) for i in range(len(ids))
    ]
    return coupled.CoupledCP(tuple(jnp.asarray(factor) for factor in factors))


@pytest.mark.parametrize("modes", [CHAIN, RING, ("ab", "ab", "bcd", "ef")])
@pytest.mark.parametrize("seed", range(3))
def test_balance_is_optimal_leaves_the_tensors_and_repeats(modes, seed):
    fit = random_fit(modes, seed)
    even = balancer(modes)(fit)
    for x, y in zip(dense(fit, modes), dense(even, modes), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12 * np.max(np.abs(x)))
    assert penalty_of(even) < penalty_of(fit)
    # |a_g|^2 is a combination of the rows of the constraints: no feasible direction descends.
    ids = coupled.mode_ids(modes)
    rows = np.array([[name in own for name in ids] for own in modes], float)
    squares = np.array([np.sum(np.asarray(factor) ** 2, axis=0) for factor in even.factors])
    multipliers = np.linalg.lstsq(rows.T, squares, rcond=None)[0]
    np.testing.assert_allclose(rows.T @ multipliers, squares, rtol=1e-8)
    again = balancer(modes)(even)
    for one, two in zip(even.factors, again.factors, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8)


def test_balance_with_one_shared_mode_is_that_of_the_linked_model():
    modes = (("i", "j", "k"), ("i", "l"), ("i", "m", "n", "o"))
    fit = without(random_fit(modes, 0), 3, 1)
    shared, *others = fit.factors
    own = (tuple(others[:2]), (others[2],), tuple(others[3:]))
    expected = jax.jit(linked.balance)(linked.LinkedCP(shared, own))
    for one, two in zip(balancer(modes)(fit).factors, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8)


def test_balance_of_a_matrix_is_even():
    modes = ("ab", "ab", "bcd", "ef")
    even = balancer(modes)(random_fit(modes, 1))
    one, two = (np.sum(np.asarray(factor) ** 2, axis=0) for factor in even.factors[4:])
    np.testing.assert_allclose(one, two, rtol=1e-10)


def test_balance_clears_what_is_in_no_tensor_and_only_that():
    # Without time, the first tensor has no component 0, and then subject is in none.
    before = without(random_fit(CHAIN, 0), 2, 0)
    even = balancer(CHAIN)(before)
    np.testing.assert_array_equal(even.factors[0][:, 0], 0)
    assert np.all(np.any(np.asarray(even.factors[1]) != 0, axis=0))
    for x, y in zip(dense(before), dense(even), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12 * np.max(np.abs(x)))
    empty = balancer(CHAIN)(jax.tree.map(lambda a: jnp.asarray(np.zeros(a.shape)), before))
    assert all(np.all(np.asarray(factor) == 0) for factor in empty.factors)


def test_balance_survives_columns_of_extreme_length():
    modes, fit = RING, random_fit(RING, 0)
    scales = (1e-30, 1e12, 1e-12, 1e6)
    scaled = [s * np.asarray(a) for s, a in zip(scales, fit.factors, strict=True)]
    fit = coupled.CoupledCP(tuple(jnp.asarray(a) for a in scaled))
    even = balancer(modes)(fit)
    assert all(np.all(np.isfinite(np.asarray(factor))) for factor in even.factors)
    assert penalty_of(even) < penalty_of(fit)
    for x, y in zip(dense(fit, modes), dense(even, modes), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


def test_converged_fit_is_balanced():
    tensors, _ = planted(rank=3, noise=0.5)
    fit, _ = fitter()(tensors, start_of(tensors), 0.5)
    even = balancer(CHAIN)(fit)
    np.testing.assert_allclose(penalty_of(even), penalty_of(fit), rtol=1e-6)


def test_weights_are_the_norms_of_the_components():
    fit = random_fit(CHAIN, 0)
    table = weights_of(fit, modes=CHAIN)
    for r in range(3):
        alone = coupled.CoupledCP(tuple(factor[:, r : r + 1] for factor in fit.factors))
        norms = [np.linalg.norm(x) for x in dense(alone)]
        np.testing.assert_allclose(table[:, r], norms, rtol=1e-12)


# Refusals.


def test_wrong_ids_are_refused():
    with pytest.raises(ValueError, match=r"mode_ids: got mode ids .* expected distinct"):
        coupled.mode_ids((("a", "b"), ("b", "b")))
    with pytest.raises(ValueError, match=r"mode_ids: got mode ids .* hashable"):
        coupled.mode_ids((("a", ["b"]),))
    with pytest.raises(ValueError, match=r"mode_ids: got modes \(\)"):
        coupled.mode_ids(())


def test_wrong_arguments_are_refused():
    modes = ("ij", "jk")
    tensors = (jnp.ones((3, 4)), jnp.ones((4, 5)))
    start = start_of(tensors, modes)

    def fit(tensors=tensors, modes=modes, init=start, penalty=1.0, **options):
        coupled.coupled_als(tensors, modes, init=init, penalty=penalty, **options)

    with pytest.raises(ValueError, match="size 5 of mode 'j' in tensor 1, expected 4"):
        fit((tensors[0], jnp.ones((5, 5))))
    with pytest.raises(ValueError, match="expected distinct ones"):
        fit(modes=("ii", "jk"))
    with pytest.raises(ValueError, match="expected 3 axes as it has mode ids"):
        fit(modes=("ijl", "jk"))
    with pytest.raises(ValueError, match="tensors of type tuple, expected a tuple of 2"):
        fit(tensors[:1])
    with pytest.raises(ValueError, match="tensor 1 of dtype float32"):
        fit((tensors[0], tensors[1].astype(jnp.float32)))
    with pytest.raises(ValueError, match="a model of dtype float32"):
        fit(init=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start))
    with pytest.raises(ValueError, match="tensor 0 of dtype int"):
        fit((jnp.ones((3, 4), int), tensors[1]))
    with pytest.raises(ValueError, match=r"tensor 0 of shape \(3,\)"):
        fit((jnp.ones(3), tensors[1]), modes=("i", "jk"))
    with pytest.raises(ValueError, match="a model of 2 factors"):
        fit(init=coupled.CoupledCP(start.factors[:2]))
    with pytest.raises(ValueError, match="a model of sizes"):
        fit(init=coupled.CoupledCP((start.factors[1], start.factors[0], start.factors[2])))
    with pytest.raises(ValueError, match="expected 3 columns"):
        fit(init=coupled.CoupledCP((*start.factors[:2], jnp.ones((5, 2)))))
    with pytest.raises(ValueError, match=r"penalty -1\.0"):
        fit(penalty=-1.0)
    with pytest.raises(ValueError, match="masks of type tuple, expected a tuple of 2"):
        fit(masks=(jnp.ones((3, 4), bool),))
    with pytest.raises(ValueError, match="mask of shape"):
        fit(masks=(jnp.ones((4, 3), bool), None))
    with pytest.raises(ValueError, match="mask of dtype"):
        fit(masks=(jnp.ones((3, 4)), None))
    with pytest.raises(ValueError, match="rank 0"):
        coupled.random_coupled_init(tensors, modes, 0, key=jax.random.key(0))
