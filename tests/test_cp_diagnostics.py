import functools
import itertools

import jax
import numpy as np
import pytest
import scipy.optimize

from fedlr.cp import diagnostics, fitting, tensor

SHAPE = (4, 5, 6)


def everything(x, t, other):
    return (
        diagnostics.factor_match_score(t, other),
        diagnostics.factor_match_score(t, other, with_weights=True),
        diagnostics.permute_to_match(t, other),
        diagnostics.core_consistency(x, t),
        diagnostics.degeneracy(t),
    )


compute = jax.jit(everything)
greedy_score_of = jax.jit(diagnostics.factor_match_score)
consistency_of = jax.jit(diagnostics.core_consistency)
degeneracy_of = jax.jit(diagnostics.degeneracy)
dense = jax.jit(tensor.to_dense)
normalize = jax.jit(tensor.normalize)
fit = jax.jit(lambda x, init: fitting.als(x, init=init, max_iters=500, tol=1e-10)[0])


def score_of(t, other):
    return compute(np.ones(SHAPE, t.weights.dtype), t, other)[0]


def weighted_score_of(t, other):
    return compute(np.ones(SHAPE, t.weights.dtype), t, other)[1]


def match(t, other):
    return compute(np.ones(SHAPE, t.weights.dtype), t, other)[2]


def random_cp(rng, rank=3, shape=SHAPE, dtype=np.float64):
    factors = tuple(rng.standard_normal((size, rank)).astype(dtype) for size in shape)
    return tensor.CPTensor(rng.uniform(1, 2, rank).astype(dtype), factors)


def disguise(rng, t):
    """Permute the components; scale and flip the columns so that the dense tensor stays."""
    t = jax.tree.map(np.asarray, t)
    order = rng.permutation(t.rank)
    scales = rng.uniform(0.5, 2, (len(t.factors), t.rank)) * rng.choice(
        [-1, 1], (len(t.factors), t.rank)
    )
    weights = (t.weights / np.prod(scales, axis=0))[order]
    factors = [f[:, order] * s[order] for f, s in zip(t.factors, scales, strict=True)]
    return tensor.CPTensor(weights, tuple(factors))


def match_scores(t, other, with_weights):
    """Score all pairs of components, in NumPy."""
    lengths, products = [], np.ones((t.rank, other.rank))
    for a, b in zip(t.factors, other.factors, strict=True):
        sizes = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0)
        products *= np.abs(a.T @ b) / np.outer(*sizes)
        lengths.append(sizes)
    w = np.abs(t.weights) * np.prod([pair[0] for pair in lengths], axis=0)
    v = np.abs(other.weights) * np.prod([pair[1] for pair in lengths], axis=0)
    if with_weights:
        products *= 1 - np.abs(w[:, None] - v) / np.maximum(w[:, None], v)
    return products


def greedy_mean(scores):
    """Take the best pair left until the smaller side is used up."""
    left, taken = scores.copy(), []
    for _ in range(min(scores.shape)):
        row, column = np.unravel_index(np.argmax(left), left.shape)
        taken.append(scores[row, column])
        left[row], left[:, column] = -np.inf, -np.inf
    return np.mean(taken)


@pytest.mark.parametrize("seed", range(3))
def test_score_is_one_whatever_order_sign_and_scale(seed):
    rng = np.random.default_rng(seed)
    t = random_cp(rng)
    for function in (score_of, weighted_score_of):
        np.testing.assert_allclose(function(t, disguise(rng, t)), 1, rtol=1e-14)


def test_score_is_symmetric_and_invariant_to_common_orthogonal_maps(rng):
    t, other = random_cp(rng), random_cp(rng)
    maps = [np.linalg.qr(rng.standard_normal((size, size)))[0] for size in SHAPE]

    def turn(t):
        return t._replace(factors=tuple(q @ f for q, f in zip(maps, t.factors, strict=True)))

    for function in (score_of, weighted_score_of):
        expected = function(t, other)
        np.testing.assert_allclose(function(other, t), expected, rtol=1e-13)
        np.testing.assert_allclose(function(turn(t), turn(other)), expected, rtol=1e-13)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 5), (9, 3), (8, 8)])
def test_assignment_is_that_of_scipy(ranks, rng):
    pairs = [[random_cp(rng, rank) for rank in ranks] for _ in range(10)]
    firsts, seconds = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *side) for side in zip(*pairs, strict=True)
    )

    def both(t, other):
        score = diagnostics.factor_match_score
        return score(t, other), score(t, other, with_weights=True)

    found = zip(*jax.jit(jax.vmap(both))(firsts, seconds), strict=True)
    for each, (t, other) in zip(found, pairs, strict=True):
        for score, with_weights in zip(each, [False, True], strict=True):
            scores = match_scores(t, other, with_weights)
            best = scipy.optimize.linear_sum_assignment(scores, maximize=True)
            np.testing.assert_allclose(score, np.mean(scores[best]), rtol=1e-12)


def test_large_ranks_are_assigned_greedily(rng):
    t, other = random_cp(rng, 10), random_cp(rng, 9)
    expected = greedy_mean(match_scores(other, t, False))
    np.testing.assert_allclose(greedy_score_of(t, other), expected, rtol=1e-12)
    part = jax.tree.map(lambda leaf: leaf[..., :9], disguise(rng, t))
    np.testing.assert_allclose(greedy_score_of(t, part), 1, rtol=1e-14)


def test_weights_lower_the_score_by_their_ratio(rng):
    t = random_cp(rng)
    louder = t._replace(weights=4 * t.weights)
    np.testing.assert_allclose(score_of(t, louder), 1, rtol=1e-14)
    np.testing.assert_allclose(weighted_score_of(t, louder), 1 / 4, rtol=1e-14)


def test_a_zero_component_agrees_with_none(rng):
    t = random_cp(rng)
    padded = t._replace(factors=tuple(f * np.array([1.0, 1.0, 0.0]) for f in t.factors))
    for function in (score_of, weighted_score_of):
        np.testing.assert_allclose(function(padded, padded), 2 / 3, rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_matching_undoes_a_shuffle(seed):
    rng = np.random.default_rng(seed)
    reference = normalize(random_cp(rng))
    disguised = disguise(rng, reference)
    found = match(disguised, reference)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-13, atol=1e-14)
    rescaled = disguise(np.random.default_rng(5), reference)
    other = match(disguised, rescaled)
    np.testing.assert_allclose(dense(other), dense(reference), atol=1e-13)
    for a, b in zip(other.factors, rescaled.factors, strict=True):
        assert np.all(np.sum(a * b, axis=0) > 0)


def test_matching_an_opposite_tensor_turns_the_weights(rng):
    reference = normalize(random_cp(rng))
    found = match(disguise(rng, reference._replace(weights=-reference.weights)), reference)
    np.testing.assert_allclose(found.weights, -reference.weights, rtol=1e-13)
    for a, b in zip(found.factors, reference.factors, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


def test_matching_keeps_the_dense_tensor_and_a_zero_component(rng):
    t, reference = random_cp(rng), random_cp(rng)
    t = t._replace(factors=tuple(f * np.array([1.0, 0.0, 1.0]) for f in t.factors))
    found = match(t, reference)
    np.testing.assert_allclose(dense(found), dense(t), atol=1e-13)
    for a, b in zip(found.factors, reference.factors, strict=True):
        assert np.all(np.sum(a * b, axis=0) >= 0)


def test_core_consistency_of_an_exact_model_is_100(rng):
    t = random_cp(rng)
    np.testing.assert_allclose(consistency_of(dense(t), t), 100, rtol=1e-12)
    np.testing.assert_allclose(consistency_of(dense(t), disguise(rng, t)), 100, rtol=1e-12)


def test_core_is_that_of_least_squares(rng):
    x, t = rng.standard_normal(SHAPE), random_cp(rng)
    normal = normalize(t)
    scaled = (normal.factors[0] * normal.weights[None], *normal.factors[1:])
    core = np.linalg.lstsq(functools.reduce(np.kron, scaled), x.reshape(-1), rcond=None)[0]
    ideal = np.array([float(len(set(index)) == 1) for index in np.ndindex(3, 3, 3)])
    expected = 100 * (1 - np.sum((core - ideal) ** 2) / 3)
    np.testing.assert_allclose(consistency_of(x, t), expected, rtol=1e-11)


def test_core_consistency_of_a_best_rank_1_model_is_100(rng):
    x = rng.standard_normal(SHAPE)
    best = fit(x, random_cp(rng, 1))
    # At a stationary point the core <X, a o b o c> / w is 1; the last sweep has solved for w.
    np.testing.assert_allclose(consistency_of(x, best), 100, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_core_consistency_tells_too_many_components(seed):
    rng = np.random.default_rng(seed)
    truth = random_cp(rng, 2)
    x = dense(truth) + 0.1 * rng.standard_normal(SHAPE)
    assert consistency_of(x, fit(x, truth)) > 90
    assert consistency_of(x, fit(x, random_cp(rng, 4))) < 50


def test_a_zero_component_is_absent_from_the_core(rng):
    t = random_cp(rng, 2)
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, 0 * leaf[..., :1]], -1), t)
    np.testing.assert_allclose(consistency_of(dense(t), padded), 100 * (1 - 1 / 3), rtol=1e-12)


def test_core_consistency_has_a_value_for_dependent_columns(rng):
    t = random_cp(rng, 6)
    value = consistency_of(dense(t), t)
    assert np.isfinite(value)
    assert value <= 100


def test_degeneracy_is_the_smallest_congruence_of_all_pairs(rng):
    t = random_cp(rng, 4)
    found = degeneracy_of(t)
    masked = [t._replace(weights=t.weights * np.eye(4)[r]) for r in range(4)]
    components = [np.asarray(dense(each)) for each in masked]
    norms = [np.linalg.norm(component) for component in components]
    congruence = {
        (r, s): np.sum(components[r] * components[s]) / (norms[r] * norms[s])
        for r, s in itertools.combinations(range(4), 2)
    }
    worst = min(congruence, key=lambda pair: congruence[pair])
    np.testing.assert_allclose(found.congruence, congruence[worst], rtol=1e-12)
    np.testing.assert_allclose(sorted(found.weights), sorted(norms[r] for r in worst), rtol=1e-12)


def test_degeneracy_of_cancelling_components(rng):
    a = [rng.standard_normal(size) for size in SHAPE]
    nearly = [a_n + 1e-3 * rng.standard_normal(a_n.shape) for a_n in a]
    factors = tuple(np.stack(pair, axis=1) for pair in zip(a, nearly, strict=True))
    found = degeneracy_of(tensor.CPTensor(np.array([1e3, -1e3]), factors))
    assert -1 <= found.congruence < -1 + 1e-4
    assert np.all(found.weights > 100)


def test_degeneracy_of_one_component_is_none(rng):
    t = random_cp(rng, 1)
    found = degeneracy_of(t)
    assert found.congruence == 0
    np.testing.assert_allclose(found.weights, np.linalg.norm(dense(t)).repeat(2), rtol=1e-13)


def test_batch_is_the_loop(rng):
    problems = [(rng.standard_normal(SHAPE), random_cp(rng), random_cp(rng)) for _ in range(3)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    found = jax.jit(jax.vmap(everything))(*batch)
    loop = jax.tree.map(lambda *leaves: np.stack(leaves), *[compute(*each) for each in problems])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(loop), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_single_precision_stays(rng):
    problem = rng.standard_normal(SHAPE), random_cp(rng), random_cp(rng)
    found = compute(*jax.tree.map(lambda leaf: leaf.astype(np.float32), problem))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(compute(*problem)), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_large_columns_do_not_overflow(rng):
    t = random_cp(rng, dtype=np.float32)
    large = t._replace(factors=(t.factors[0] * np.float32(1e30), *t.factors[1:]))
    np.testing.assert_array_equal(match(t, large).weights, match(t, t).weights)


@pytest.mark.parametrize("name", ["factor_match_score", "permute_to_match"])
def test_bad_pairs_are_refused(name, rng):
    t, function = random_cp(rng), getattr(diagnostics, name)
    with pytest.raises(ValueError, match=rf"^{name}: got CP tensors of shapes \(4, 5, 6\), \(4, 5"):
        function(t, random_cp(rng, shape=(4, 5)))
    with pytest.raises(ValueError, match=rf"^{name}: got CP tensors of dtypes float64, float32"):
        function(t, random_cp(rng, dtype=np.float32))
    with pytest.raises(ValueError, match=rf"^{name}: got factor 0 of shape \(4, 2\), expected 3"):
        function(t, t._replace(factors=(t.factors[0][:, :2], *t.factors[1:])))


def test_other_bad_arguments_are_refused(rng):
    t = random_cp(rng)
    with pytest.raises(ValueError, match=r"^permute_to_match: got a reference of rank 2, expected"):
        diagnostics.permute_to_match(t, random_cp(rng, 2))
    with pytest.raises(ValueError, match=r"^core_consistency: got a CP tensor of shape"):
        diagnostics.core_consistency(np.ones((4, 5, 7)), t)
    with pytest.raises(ValueError, match=r"^core_consistency: got a CP tensor of dtype"):
        diagnostics.core_consistency(np.ones(SHAPE, np.float32), t)
    with pytest.raises(ValueError, match=r"^degeneracy: got weights of shape \(3, 1\), expected 1"):
        diagnostics.degeneracy(t._replace(weights=t.weights[:, None]))
