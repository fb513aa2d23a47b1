import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedlr import subspace, tucker
from tests.reference import tucker as reference

SHAPE, RANKS = (6, 4, 5), (3, 2, 3)
BASES = {"gram": subspace.gram(), "lq": subspace.lq(), "svd": subspace.svd()}


@functools.cache
def compiled(name, ranks, basis="gram"):
    return jax.jit(lambda x: getattr(tucker, name)(x, ranks, basis=BASES[basis]))


@functools.cache
def compiled_masked(ranks):
    return jax.jit(lambda x, effective: tucker.sthosvd(x, ranks, effective_ranks=effective))


@functools.cache
def compiled_hooi(ranks, max_iters, tol=0.0):
    return jax.jit(lambda x: tucker.hooi(x, ranks, max_iters=max_iters, tol=tol))


error_of = jax.jit(tucker.relative_error)


def low_rank(rng, shape=SHAPE, ranks=RANKS):
    factors = [rng.standard_normal((size, rank)) for size, rank in zip(shape, ranks, strict=True)]
    return reference.dense(rng.standard_normal(ranks), factors)


def squared_error(x, fit):
    return np.sum((x - reference.dense(np.asarray(fit.core), map(np.asarray, fit.factors))) ** 2)


def assert_orthonormal(fit):
    for factor in fit.factors:
        limit = 10 * factor.shape[0] * np.finfo(factor.dtype).eps
        assert np.abs(factor.T @ factor - jnp.eye(factor.shape[1])).max() <= limit


def assert_same_tensor(left, right, atol=1e-12):
    """Compare decompositions by what does not depend on the choice of the bases."""
    for a, b in zip(left.factors, right.factors, strict=True):
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=atol)
    np.testing.assert_allclose(tucker.to_dense(left), tucker.to_dense(right), atol=atol)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", ["hosvd", "sthosvd"])
def test_direct_methods_agree_with_the_reference(name, basis, rng):
    x = rng.standard_normal(SHAPE)
    fit = compiled(name, RANKS, basis)(x)
    if name == "hosvd":
        core, factors = reference.hosvd(x, RANKS)
    else:
        core, factors, _ = reference.sthosvd(x, RANKS, tucker.mode_order(SHAPE))
    assert fit.shape == SHAPE
    assert fit.ranks == fit.core.shape == RANKS
    assert_orthonormal(fit)
    assert_same_tensor(fit, tucker.TuckerTensor(jnp.asarray(core), tuple(factors)))


@pytest.mark.parametrize("name", ["hosvd", "sthosvd"])
def test_error_is_bounded_by_the_tails(name, rng):
    x = rng.standard_normal(SHAPE)
    fit = compiled(name, RANKS)(x)
    error = squared_error(x, fit)
    tails = reference.tails(x, RANKS)
    best = max(tails)  # no approximation of these ranks does better in its worst mode
    assert best <= error <= sum(tails) <= len(SHAPE) * squared_error(x, compiled_best(x))
    np.testing.assert_allclose(error, np.sum(x**2) - np.sum(fit.core**2), rtol=1e-12)


def compiled_best(x):
    return compiled_hooi(RANKS, 100)(x)[0]


def test_modes_left_out_of_sthosvd_keep_their_size(rng):
    x = jnp.asarray(rng.standard_normal(SHAPE))
    ranks = (RANKS[0], SHAPE[1], RANKS[2])
    fit = jax.jit(lambda x: tucker.sthosvd(x, ranks, modes=(2, 0)))(x)
    np.testing.assert_array_equal(fit.factors[1], np.eye(SHAPE[1]))
    # A full basis only turns the core.
    assert_same_tensor(fit, compiled("sthosvd", ranks)(x))
    with pytest.raises(ValueError, match=r"sthosvd: got rank .* of mode 1, which is left out"):
        tucker.sthosvd(x, RANKS, modes=(0, 2))
    with pytest.raises(ValueError, match=r"sthosvd: got modes \(0, 0\), expected distinct"):
        tucker.sthosvd(x, ranks, modes=(0, 0))


def test_sthosvd_error_is_the_sum_of_the_discarded_tails(rng):
    x = rng.standard_normal(SHAPE)
    _, _, discarded = reference.sthosvd(x, RANKS, tucker.mode_order(SHAPE))
    found = squared_error(x, compiled("sthosvd", RANKS)(x))
    np.testing.assert_allclose(found, sum(discarded), rtol=1e-12)


@pytest.mark.parametrize("name", ["hosvd", "sthosvd"])
def test_exact_at_full_rank_and_on_low_rank_tensors(name, rng):
    for x, ranks in ((rng.standard_normal(SHAPE), SHAPE), (low_rank(rng), RANKS)):
        assert squared_error(x, compiled(name, ranks)(x)) <= 1e-24 * np.sum(x**2)


@pytest.mark.parametrize("name", ["hosvd", "sthosvd"])
def test_two_modes_give_the_truncated_svd_with_a_diagonal_core(name, rng):
    x = rng.standard_normal((6, 5))
    fit = compiled(name, (3, 3))(x)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    np.testing.assert_allclose(tucker.to_dense(fit), best, atol=1e-12)
    np.testing.assert_allclose(np.abs(fit.core), np.diag(values[:3]), atol=1e-12)


def test_permuting_the_modes_permutes_the_hosvd(rng):
    x, order = rng.standard_normal(SHAPE), (2, 0, 1)
    fit = compiled("hosvd", RANKS)(x)
    permuted = compiled("hosvd", tuple(RANKS[m] for m in order))(x.transpose(order))
    assert_same_tensor(
        permuted,
        tucker.TuckerTensor(fit.core.transpose(order), tuple(fit.factors[m] for m in order)),
    )


def test_rotating_a_mode_rotates_its_factor_only(rng):
    x = rng.standard_normal(SHAPE)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    fit = compiled("sthosvd", RANKS)(x)
    rotated = compiled("sthosvd", RANKS)(reference.multiply(x, rotation, 1))
    factors = (fit.factors[0], rotation @ fit.factors[1], fit.factors[2])
    assert_same_tensor(rotated, tucker.TuckerTensor(fit.core, factors))


def test_randomized_finder_comes_close_to_the_exact_one(rng):
    x = low_rank(rng, (12, 10, 11), (3, 3, 3))
    noise = rng.standard_normal(x.shape)
    x = x + 0.05 * np.linalg.norm(x) / np.linalg.norm(noise) * noise
    exact = squared_error(x, compiled("sthosvd", (3, 3, 3))(x))
    fit = jax.jit(
        lambda x, key: tucker.sthosvd(
            x, (3, 3, 3), basis=subspace.randomized(key=key, oversampling=4)
        )
    )
    for seed in range(3):
        assert squared_error(x, fit(x, jax.random.key(seed))) <= 1.01 * exact


@pytest.mark.parametrize("shape", [(5,), (1, 4, 3), (2, 3, 2, 4)])
def test_other_numbers_of_modes(shape, rng):
    x = rng.standard_normal(shape)
    for fit in (compiled("sthosvd", shape)(x), compiled_hooi(shape, 2)(x)[0]):
        assert squared_error(x, fit) < 1e-25
        assert error_of(x, fit) < 1e-13


def test_order_starts_at_the_smaller_end_and_goes_up():
    assert tucker.mode_order((200, 200, 200)) == (0, 1, 2)
    assert tucker.mode_order((40, 20, 30)) == (2, 1, 0)
    assert tucker.mode_order((7, 3, 9, 5)) == (3, 1, 0, 2)


def test_effective_ranks_give_the_decomposition_of_the_client_itself(rng):
    x = rng.standard_normal(SHAPE)
    for effective in ((2, 1, 3), (3, 2, 2), (1, 1, 1), RANKS):
        padded = compiled_masked(RANKS)(x, jnp.array(effective))
        own = compiled("sthosvd", effective)(x)
        kept = tuple(slice(rank) for rank in effective)
        cut = tucker.TuckerTensor(
            padded.core[kept],
            tuple(f[:, :rank] for f, rank in zip(padded.factors, effective, strict=True)),
        )
        assert_same_tensor(cut, own)
        np.testing.assert_allclose(tucker.to_dense(padded), tucker.to_dense(own), atol=1e-12)
        for factor, rank in zip(padded.factors, effective, strict=True):
            assert np.all(factor[:, rank:] == 0)


def test_truncate_keeps_the_leading_part_with_traced_ranks(rng):
    x = rng.standard_normal(SHAPE)
    fit = compiled("hosvd", RANKS)(x)
    cut = jax.jit(tucker.truncate)(fit, jnp.array((2, 1, 9)))
    chex.assert_trees_all_equal_shapes(cut, fit)
    own = compiled("hosvd", (2, 1, 3))(x)
    np.testing.assert_allclose(tucker.to_dense(cut), tucker.to_dense(own), atol=1e-12)
    assert np.count_nonzero(cut.core) == 2 * 1 * 3
    assert [np.count_nonzero(np.any(f != 0, axis=0)) for f in cut.factors] == [2, 1, 3]


def test_hooi_never_worsens_its_start_nor_a_sweep(rng):
    x = rng.standard_normal(SHAPE)
    start = compiled("sthosvd", RANKS)(x)
    fit, info = compiled_hooi(RANKS, 12)(x)
    errors = np.concatenate([[squared_error(x, start) / np.sum(x**2)], info.objective])
    assert np.all(np.diff(errors) <= 1e-15)
    assert errors[-1] < errors[0]
    assert_orthonormal(fit)
    np.testing.assert_allclose(squared_error(x, fit), info.objective[-1] * np.sum(x**2))
    np.testing.assert_allclose(fit.core, reference.project(x, fit.factors), atol=1e-13)


def test_hooi_reaches_the_fixed_point_of_exact_sweeps(rng):
    x = low_rank(rng) + 0.1 * rng.standard_normal(SHAPE)
    core, factors = reference.hooi(x, RANKS, 200)
    fit, _ = compiled_hooi(RANKS, 100)(x)
    np.testing.assert_allclose(np.sum(fit.core**2), np.sum(core**2), rtol=1e-12)
    for found, expected in zip(fit.factors, factors, strict=True):
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-6)


def test_hooi_stops_by_its_tolerance_and_starts_where_it_is_told(rng):
    x = rng.standard_normal(SHAPE)
    fit, info = compiled_hooi(RANKS, 100, 1e-3)(x)
    assert bool(info.converged)
    assert 1 < int(info.num_iters) < 100
    again, info = jax.jit(lambda x, t: tucker.hooi(x, RANKS, init=t, max_iters=3, tol=1e-3))(x, fit)
    assert int(info.num_iters) == 2
    assert np.sum(again.core**2) >= np.sum(fit.core**2)


def test_hooi_survives_a_zero_tensor_and_one_of_lower_rank(rng):
    fit, info = compiled_hooi(RANKS, 12)(np.zeros(SHAPE))
    assert_orthonormal(fit)
    assert np.all(info.objective == 0)
    low = low_rank(rng, ranks=(2, 1, 2))
    assert squared_error(low, compiled_hooi(RANKS, 12)(low)[0]) < 1e-22


def test_relative_error_is_that_of_the_dense_residual(rng, monkeypatch):
    x = rng.standard_normal(SHAPE)
    fit = compiled("sthosvd", RANKS)(x)
    scaled = fit._replace(core=3 * fit.core)
    for model in (fit, scaled):
        expected = np.sqrt(squared_error(x, model) / np.sum(x**2))
        np.testing.assert_allclose(error_of(x, model), expected, rtol=1e-13)
    monkeypatch.setattr(tucker, "_BLOCK_ENTRIES", 4 * 20)  # blocks of four rows and two left
    np.testing.assert_allclose(
        tucker.relative_error(x, scaled),
        np.sqrt(squared_error(x, scaled) / np.sum(x**2)),
        rtol=1e-13,
    )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_errors_and_chosen_ranks_do_not_depend_on_the_scale(rng, scale):
    x = rng.standard_normal((4, 5, 6)).astype(np.float32)
    fit = tucker.sthosvd(jnp.asarray(x), (2, 2, 2))
    scaled = jnp.asarray(x * np.float32(scale))
    error = tucker.relative_error(jnp.asarray(x), fit)
    scaled_fit = fit._replace(core=fit.core * np.float32(scale))
    np.testing.assert_allclose(tucker.relative_error(scaled, scaled_fit), error, rtol=1e-5)
    assert tucker.choose_ranks(scaled, 0.5) == tucker.choose_ranks(jnp.asarray(x), 0.5)


def test_numpy_input_is_taken_at_the_precision_of_the_session(rng):
    x = rng.standard_normal(SHAPE)
    with jax.enable_x64(False):
        for fit in (
            tucker.hosvd(x, (2, 2, 2)),
            tucker.sthosvd(x, (2, 2, 2), basis=subspace.randomized(key=jax.random.key(0))),
            tucker.hooi(x, (2, 2, 2), max_iters=2)[0],
        ):
            assert fit.core.dtype == jnp.float32
            assert float(tucker.relative_error(x, fit)) < 1


def test_relative_error_of_zero(rng):
    zero = jax.tree.map(jnp.zeros_like, compiled("sthosvd", RANKS)(np.ones(SHAPE)))
    assert error_of(np.zeros(SHAPE), zero) == 0
    assert error_of(np.ones(SHAPE), zero) == 1
    assert error_of(np.zeros(SHAPE), compiled("sthosvd", RANKS)(np.ones(SHAPE))) == np.inf
    assert np.isnan(error_of(np.zeros(SHAPE), zero._replace(core=zero.core + np.nan)))


def test_float32_error_agrees_with_the_residual_in_float64(rng):
    exact = low_rank(rng)
    for noise in (1e-1, 1e-3, 1e-6):
        x = (exact + noise * rng.standard_normal(SHAPE)).astype(np.float32)
        fit = compiled("sthosvd", RANKS, "lq")(x)
        model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fit)
        wide = x.astype(np.float64)
        expected = np.sqrt(squared_error(wide, model) / np.sum(wide**2))
        # The model itself is evaluated in float32.
        np.testing.assert_allclose(
            error_of(x, fit), expected, rtol=1e-3, atol=4 * np.finfo(np.float32).eps
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_keep_the_dtype(dtype, rng):
    x = rng.standard_normal(SHAPE).astype(dtype)
    fit, info = compiled_hooi(RANKS, 3, 1e-3)(x)
    results = (compiled("hosvd", RANKS)(x), compiled("sthosvd", RANKS)(x), fit, error_of(x, fit))
    assert {leaf.dtype for leaf in jax.tree.leaves((results, info.objective))} == {np.dtype(dtype)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chosen_ranks_meet_the_tolerance_and_grow_as_it_shrinks(dtype, rng):
    values = 0.1 ** np.arange(5)
    core = rng.standard_normal((5, 5, 5)) * np.einsum("a,b,c->abc", values, values, values)
    factors = [np.linalg.qr(rng.standard_normal((size, 5)))[0] for size in (7, 5, 6)]
    x = reference.dense(core, factors).astype(dtype)
    previous = (1, 1, 1)
    for tolerance in (2.0, 0.1, 1e-3):
        ranks = tucker.choose_ranks(jnp.asarray(x), tolerance)
        assert all(isinstance(rank, int) for rank in ranks)
        assert np.all(np.array(ranks) >= previous)
        error = squared_error(x, compiled("sthosvd", ranks, "lq")(x))
        assert error <= tolerance**2 * np.sum(x**2)
        previous = ranks
    assert (1, 1, 1) != previous != (5, 5, 5)


def test_chosen_ranks_spend_what_earlier_modes_left_over(rng):
    x = low_rank(rng) + 1e-3 * rng.standard_normal(SHAPE)
    for tolerance in (0.1, 0.5):
        budget, total, core = 0.0, np.sum(x**2), x
        expected = {}
        for mode in tucker.mode_order(SHAPE):
            budget += tolerance**2 * total / 3
            matrix = reference.unfold(core, mode)
            tails = [reference.leading(matrix, rank)[1] for rank in range(1, SHAPE[mode] + 1)]
            expected[mode] = 1 + int(np.argmax(np.array(tails) <= budget))
            budget -= tails[expected[mode] - 1]
            core = reference.multiply(core, reference.leading(matrix, expected[mode])[0].T, mode)
        assert tucker.choose_ranks(jnp.asarray(x), tolerance) == tuple(
            expected[m] for m in range(3)
        )


def test_full_rank_is_reported_when_the_tolerance_is_out_of_reach(rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    assert tucker.choose_ranks(jnp.asarray(x), 0.0) == SHAPE
    low = jnp.asarray(low_rank(rng), jnp.float32)
    assert tucker.choose_ranks(low, 1e-8) == SHAPE
    assert tucker.choose_ranks(low, 1e-4) == RANKS
    assert tucker.choose_ranks(low.astype(np.float64), 1e-6) == RANKS
    assert tucker.choose_ranks(jnp.zeros(SHAPE), 1e-3) == (1, 1, 1)


def client_tensors(rng, shape, ranks_of_clients, ranks):
    """Stacked decompositions at the clients' own ranks, padded with zeros, and the tensors."""
    padded, dense = [], []
    for own in ranks_of_clients:
        factors = [
            np.linalg.qr(rng.standard_normal((size, rank)))[0]
            for size, rank in zip(shape, own, strict=True)
        ]
        core = rng.standard_normal(own)
        dense.append(reference.dense(core, factors))
        widths = [(0, rank - small) for rank, small in zip(ranks, own, strict=True)]
        padded.append(
            tucker.TuckerTensor(
                jnp.asarray(np.pad(core, widths)),
                tuple(
                    jnp.asarray(np.pad(factor, [(0, 0), width]))
                    for factor, width in zip(factors, widths, strict=True)
                ),
            )
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded), dense


CLIENTS = {
    "matrices": ((8, 7), [(2, 2), (3, 3), (1, 1)], (3, 3)),
    "tensors": ((8, 7, 6), [(2, 1, 2), (3, 2, 2), (1, 1, 1)], (3, 2, 2)),
    "wide cores": ((8, 7, 6), [(1, 2, 2), (2, 3, 3)], (2, 3, 3)),
}


@pytest.mark.parametrize("case", CLIENTS.values(), ids=CLIENTS)
def test_stacked_cores_have_the_gram_matrix_of_the_stacked_tensors(case, rng):
    # Lemma II.1, with clients of different ranks padded with zeros.
    shape, ranks_of_clients, ranks = case
    stacked, dense = client_tensors(rng, shape, ranks_of_clients, ranks)
    seen = {}

    def record(matrix, rank, *, mode):
        seen[mode] = np.asarray(matrix)
        return subspace.gram()(matrix, rank, mode=mode)

    tucker.joint_factors(stacked, ranks, basis=record)
    for mode in range(len(shape)):
        side_by_side = np.concatenate([reference.unfold(x, mode) for x in dense], axis=1)
        expected = side_by_side @ side_by_side.T
        np.testing.assert_allclose(seen[mode] @ seen[mode].T, expected, atol=1e-12)
        assert seen[mode].shape[1] <= len(dense) * ranks[mode]


@pytest.mark.parametrize("case", CLIENTS.values(), ids=CLIENTS)
def test_joint_factors_lead_the_stacked_tensors(case, rng):
    shape, ranks_of_clients, ranks = case
    stacked, dense = client_tensors(rng, shape, ranks_of_clients, ranks)
    factors = jax.jit(lambda t: tucker.joint_factors(t, ranks))(stacked)
    for mode, factor in enumerate(factors):
        side_by_side = np.concatenate([reference.unfold(x, mode) for x in dense], axis=1)
        expected, _ = reference.leading(side_by_side, ranks[mode])
        np.testing.assert_allclose(factor @ factor.T, expected @ expected.T, atol=1e-12)


def test_zero_padding_leaves_joint_factors_and_cores_unchanged(rng):
    shape, own, more = (8, 7, 6), (2, 2, 2), (4, 3, 4)
    narrow, _ = client_tensors(rng, shape, [own, own], own)
    widths = [(0, large - small) for large, small in zip(more, own, strict=True)]
    wide = tucker.TuckerTensor(
        jnp.pad(narrow.core, [(0, 0), *widths]),
        tuple(
            jnp.pad(f, [(0, 0), (0, 0), width])
            for f, width in zip(narrow.factors, widths, strict=True)
        ),
    )
    ranks = (3, 3, 3)
    before, after = (tucker.joint_factors(t, ranks) for t in (narrow, wide))
    for first, second in zip(before, after, strict=True):
        np.testing.assert_allclose(first @ first.T, second @ second.T, atol=1e-12)
    project = jax.vmap(lambda t: tucker.project_core(t, before))
    np.testing.assert_allclose(project(narrow), project(wide), atol=1e-12)


def test_joint_factors_of_enough_rank_lose_nothing(rng):
    shape, own = (8, 7), [(2, 2), (3, 3), (1, 1)]
    stacked, dense = client_tensors(rng, shape, own, (3, 3))
    for basis in (subspace.gram(), subspace.lq(), subspace.randomized(key=jax.random.key(0))):
        factors = tucker.joint_factors(stacked, (6, 6), basis=basis)
        cores = jax.vmap(lambda t, factors=factors: tucker.project_core(t, factors))(stacked)
        for core, x in zip(cores, dense, strict=True):
            found = reference.dense(np.asarray(core), [np.asarray(f) for f in factors])
            np.testing.assert_allclose(found, x, atol=1e-12)


def test_projected_core_is_that_of_the_dense_projection(rng):
    x = rng.standard_normal(SHAPE)
    fit = compiled("sthosvd", RANKS)(x)
    factors = tuple(np.linalg.qr(rng.standard_normal((size, 2)))[0] for size in SHAPE)
    expected = reference.project(np.asarray(tucker.to_dense(fit)), factors)
    np.testing.assert_allclose(tucker.project_core(fit, factors), expected, atol=1e-13)


HOOI = pytest.param("hooi", marks=pytest.mark.slow)


def reconstruction_loss(function, target):
    return lambda x: jnp.sum((tucker.to_dense(function(x)) - target) ** 2)


GRADIENTS = {
    "hosvd": lambda x: tucker.hosvd(x, (2, 2, 2)),
    "sthosvd": lambda x: tucker.sthosvd(x, (2, 2, 2)),
    "lq": lambda x: tucker.sthosvd(x, (2, 2, 2), basis=subspace.lq()),
    "hooi": lambda x: tucker.hooi(x, (2, 2, 2), max_iters=2, tol=0.0)[0],
}


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


projection_error = jax.jit(tucker.projection_error)


@pytest.mark.parametrize("kept", [(2, 1, 2), (6, 1, 5), (4, 4, 3)])
def test_projection_error_is_that_of_the_dense_projection(kept, rng):
    factors = [orthonormal(rng, size, rank) for size, rank in zip(SHAPE, RANKS, strict=True)]
    t = tucker.TuckerTensor(rng.standard_normal(RANKS), tuple(factors))
    others = [orthonormal(rng, size, rank) for size, rank in zip(SHAPE, kept, strict=True)]
    x = reference.dense(t.core, factors)
    projected = reference.dense(reference.project(x, others), others)
    expected = np.linalg.norm(x - projected) / np.linalg.norm(x)
    np.testing.assert_allclose(projection_error(t, tuple(others)), expected, rtol=1e-13)
    # Zero columns, as of masked ranks, change nothing on either side.
    padded = tuple(np.pad(factor, ((0, 0), (0, 1))) for factor in factors)
    t = tucker.TuckerTensor(np.pad(t.core, (0, 1)), padded)
    others = tuple(np.pad(factor, ((0, 0), (0, 1))) for factor in others)
    np.testing.assert_allclose(projection_error(t, others), expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projection_error_of_a_span_that_holds_the_tensor_is_rounding(dtype):
    """Not its square root, where the core is deficient either, so that its factors stick out."""
    eps = np.finfo(dtype).eps
    for seed in range(10):
        rng = np.random.default_rng(seed)
        factors = [orthonormal(rng, size, 3) for size in SHAPE]
        inner = [orthonormal(rng, 3, 2) for _ in SHAPE]
        core = reference.dense(rng.standard_normal((2, 2, 2)), inner).astype(dtype)
        spans = tuple((f @ part).astype(dtype) for f, part in zip(factors, inner, strict=True))
        t = tucker.TuckerTensor(core, tuple(factor.astype(dtype) for factor in factors))
        assert projection_error(t, spans) <= 10 * eps
        turned = tuple((f @ orthonormal(rng, 3, 3)).astype(dtype) for f in factors)
        assert projection_error(t, turned) <= 10 * eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projection_error_resolves_a_millionth(dtype, rng):
    """A basis turned by an angle out of the span of a rank-one tensor loses the sine."""
    basis = orthonormal(rng, 6, 2)
    other = orthonormal(rng, 4, 1).astype(dtype)
    t = tucker.TuckerTensor(np.full((1, 1), 3.0, dtype), (basis[:, :1].astype(dtype), other))
    for sine in (1e-2, 1e-4, 1e-6):
        turned = np.sqrt(1 - sine**2) * basis[:, :1] + sine * basis[:, 1:]
        found = projection_error(t, (turned.astype(dtype), other))
        np.testing.assert_allclose(found, sine, rtol=1e-5, atol=5 * np.finfo(dtype).eps)


def test_projection_error_of_zero_and_of_nothing_kept(rng):
    factors = tuple(orthonormal(rng, size, 2) for size in (6, 4))
    zero = tucker.TuckerTensor(jnp.zeros((2, 2)), factors)
    assert projection_error(zero, factors) == 0
    gradient = jax.grad(lambda core: tucker.projection_error(zero._replace(core=core), factors))
    np.testing.assert_array_equal(gradient(zero.core), 0)
    t = tucker.TuckerTensor(jnp.ones((2, 2)), factors)
    nothing = tuple(jnp.zeros_like(factor) for factor in factors)
    assert projection_error(t, nothing) == pytest.approx(1.0, rel=1e-14)
    for lost in (t._replace(core=t.core * jnp.nan), t._replace(core=t.core.at[0, 0].set(jnp.nan))):
        assert jnp.isnan(projection_error(lost, factors))
    assert jnp.isnan(projection_error(t, (factors[0] * jnp.nan, factors[1])))
    with pytest.raises(ValueError, match=r"projection_error: got 1 factors, expected 2"):
        tucker.projection_error(t, factors[:1])
    with pytest.raises(ValueError, match=r"projection_error: got factor 0 of shape .4, 2., expec"):
        tucker.projection_error(t, factors[::-1])


def test_averaged_factors_are_the_orthonormalized_mean(rng):
    core = rng.standard_normal((3, *RANKS))
    factors = [
        rng.standard_normal((3, size, rank)) for size, rank in zip(SHAPE, RANKS, strict=True)
    ]
    stacked = tucker.TuckerTensor(jnp.asarray(core), tuple(map(jnp.asarray, factors)))
    found = jax.jit(tucker.average_factors, static_argnames="ranks")(stacked, ranks=(2, 2, 3))
    for factor, new, rank in zip(factors, found, (2, 2, 3), strict=True):
        expected, _ = reference.leading(factor.mean(axis=0), rank)
        np.testing.assert_allclose(new @ new.T, expected @ expected.T, atol=1e-12)
        np.testing.assert_allclose(new.T @ new, np.eye(rank), atol=1e-13)


def test_averaged_factors_of_clients_with_opposite_signs_lose_the_tensors(rng):
    """What `joint_factors` does not: one client's singular vectors are free in sign."""
    factors = [orthonormal(rng, size, 2) for size in (6, 4)]
    both = [np.stack([f, np.stack([-f[:, 0], f[:, 1]], axis=1)]) for f in factors]
    core = np.broadcast_to(np.diag([3.0, 2.0]), (2, 2, 2))
    stacked = tucker.TuckerTensor(jnp.asarray(core), tuple(map(jnp.asarray, both)))
    first = jax.tree.map(lambda leaf: leaf[0], stacked)
    joint = tucker.joint_factors(stacked, (2, 2))
    averaged = tucker.average_factors(stacked, (2, 2))
    assert projection_error(first, joint) < 1e-14
    # Only the second singular pair survives the mean.
    assert projection_error(first, averaged) > 0.5
    with pytest.raises(ValueError, match=r"average_factors: got ranks .7, 2."):
        tucker.average_factors(stacked, (7, 2))
    with pytest.raises(ValueError, match=r"average_factors: got core of shape"):
        tucker.average_factors(first, (2, 2))


@pytest.mark.parametrize("name", ["hosvd", "sthosvd", "lq", HOOI])
def test_gradient_of_the_reconstruction(name, rng):
    target = rng.standard_normal((4, 3, 5))
    loss = jax.jit(reconstruction_loss(GRADIENTS[name], target))
    low = low_rank(rng, (4, 3, 5), (2, 2, 2))
    for x in (target, low):
        check_grads(loss, (x,), order=1, modes=["fwd", "rev"], eps=1e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sthosvd", "hooi"])
def test_gradient_is_finite_for_zero_and_tied_tensors(name):
    gradient = jax.jit(jax.grad(reconstruction_loss(GRADIENTS[name], jnp.ones((4, 3, 5)))))
    for x in (np.zeros((4, 3, 5)), np.ones((4, 3, 5))):
        assert np.all(np.isfinite(gradient(x)))


def test_gradient_through_effective_ranks_is_refused():
    def loss(x):
        return jnp.sum(tucker.sthosvd(x, (2, 2), effective_ranks=jnp.array([1, 1])).core)

    with pytest.raises(ValueError, match=r"^sthosvd: got a derivative through effective_ranks"):
        jax.grad(loss)(jnp.eye(3))


def test_gradient_of_the_relative_error_is_finite_at_a_perfect_fit(rng):
    fit = compiled("sthosvd", RANKS)(np.ones(SHAPE))
    gradient = jax.grad(tucker.relative_error)(jnp.asarray(tucker.to_dense(fit)), fit)
    assert np.all(np.isfinite(gradient))


def test_gradient_flows_through_the_joint_factors(rng):
    stacked, _ = client_tensors(rng, (5, 4), [(2, 2), (2, 2)], (2, 2))

    def loss(core):
        factors = tucker.joint_factors(stacked._replace(core=core), (3, 3))
        return sum(jnp.sum((f @ f.T) ** 3) for f in factors)

    check_grads(
        jax.jit(loss), (stacked.core,), order=1, modes=["rev"], eps=1e-6, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["hosvd", "sthosvd", HOOI])
def test_batch_is_the_loop_and_its_gradient_compiles(name, rng):
    batch = rng.standard_normal((3, 4, 3, 5))
    loss = reconstruction_loss(GRADIENTS[name], jnp.ones((4, 3, 5)))
    both = jax.value_and_grad(loss)
    values, gradients = jax.jit(jax.vmap(both))(batch)
    one = jax.jit(both)
    for x, value, gradient in zip(batch, values, gradients, strict=True):
        expected = one(x)
        np.testing.assert_allclose(value, expected[0], rtol=1e-11)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-8, atol=1e-9)


def test_shape_and_ranks_stay_right_under_vmap(rng):
    stacked = jax.vmap(lambda x: tucker.sthosvd(x, RANKS))(rng.standard_normal((2, *SHAPE)))
    assert (stacked.shape, stacked.ranks) == (SHAPE, RANKS)


def test_one_trace_for_equal_shapes(rng):
    fit = jax.jit(chex.assert_max_traces(lambda x: tucker.sthosvd(x, RANKS), n=1))
    fit(rng.standard_normal(SHAPE))
    fit(rng.standard_normal(SHAPE))


@pytest.mark.parametrize("name", ["hosvd", "sthosvd", "hooi"])
@pytest.mark.parametrize(
    ("x", "ranks", "message"),
    [
        (np.ones(SHAPE), [3, 2, 3], r"ranks \[3, 2, 3\] of type list, expected a tuple"),
        (np.ones(SHAPE), (3, 2), r"ranks \(3, 2\), expected 3 ranks for shape \(6, 4, 5\)"),
        (np.ones(SHAPE), (3, 5, 3), r"rank of mode 1 5, expected an integer from 1 to 4"),
        (np.ones(SHAPE), (3, 0, 3), r"rank of mode 1 0, expected an integer from 1 to 4"),
        (np.ones(SHAPE, int), RANKS, r"x of dtype int64, expected float32 or float64"),
        (np.ones(SHAPE, np.float16), RANKS, r"x of dtype float16, expected float32 or float64"),
        (np.float64(1.0), (), r"x of shape \(\), expected 1"),
    ],
)
def test_bad_tensors_and_ranks_are_refused(name, x, ranks, message):
    with pytest.raises(ValueError, match=f"^{name}: got .*{message}"):
        getattr(tucker, name)(jnp.asarray(x), ranks)


@pytest.mark.parametrize(
    ("effective", "message"),
    [
        (jnp.array([1, 1]), r"of shape \(2,\), expected shape \(3,\)"),
        (jnp.array([1.0, 1.0, 1.0]), r"of dtype float64, expected integers"),
    ],
)
def test_bad_effective_ranks_are_refused(effective, message):
    x = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match=f"^sthosvd: got effective_ranks {message}"):
        tucker.sthosvd(x, RANKS, effective_ranks=effective)
    with pytest.raises(ValueError, match=f"^truncate: got ranks {message}"):
        tucker.truncate(compiled("sthosvd", RANKS)(x), effective)


def test_bad_models_are_refused():
    x = jnp.ones(SHAPE)
    fit = compiled("sthosvd", RANKS)(x)
    with pytest.raises(ValueError, match=r"^relative_error: got a Tucker tensor of shape"):
        tucker.relative_error(x[:5], fit)
    with pytest.raises(ValueError, match=r"^relative_error: got a Tucker tensor of dtype"):
        tucker.relative_error(x.astype(np.float32), fit)
    with pytest.raises(ValueError, match=r"^hooi: got .*ranks \(3, 2, 3\).*expected .*\(2, 2, 2\)"):
        tucker.hooi(x, (2, 2, 2), init=fit)
    with pytest.raises(ValueError, match=r"^project_core: got 2 factors, expected 3"):
        tucker.project_core(fit, fit.factors[:2])
    with pytest.raises(ValueError, match=r"^project_core: got factor 0 of shape \(4, 2\)"):
        tucker.project_core(fit, (fit.factors[1], *fit.factors[1:]))
    with pytest.raises(ValueError, match=r"^joint_factors: got core of shape \(3, 2, 3\)"):
        tucker.joint_factors(fit, RANKS)
    stacked = jax.tree.map(lambda leaf: leaf[None], fit)
    with pytest.raises(ValueError, match=r"^joint_factors: got ranks .*expected an integer from 1"):
        tucker.joint_factors(stacked, (7, 2, 3))


@pytest.mark.parametrize(
    ("x", "tolerance", "message"),
    [
        (np.array([[1.0, np.nan]]), 0.1, r"x with 1 NaN or Inf entries, expected finite data"),
        (np.array([[1.0, np.inf]]), 0.1, r"x with 1 NaN or Inf entries, expected finite data"),
        (np.ones((2, 3)), -0.1, r"tolerance -0.1, expected a number of at least 0"),
        (np.ones((2, 3)), np.nan, r"tolerance nan, expected a number of at least 0"),
        (np.ones((2, 3), int), 0.1, r"x of dtype int64, expected float32 or float64"),
    ],
)
def test_choose_ranks_refuses_bad_data(x, tolerance, message):
    with pytest.raises(ValueError, match=f"^choose_ranks: got {message}"):
        tucker.choose_ranks(jnp.asarray(x), tolerance)
