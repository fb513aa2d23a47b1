import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import information

DTYPES = [np.float32, np.float64]
N, D, M = 5, 4, 3
LOSSES = {
    "info_nce": information.info_nce,
    "symmetric": information.symmetric_info_nce,
    "barlow": information.barlow_twins,
    "vicreg": information.vicreg,
}
ROWS = np.array([True, False, True, True, True])
# rows 0 and 3 have one label
UNEQUAL = np.ones((N, N), bool)
UNEQUAL[0, 3] = UNEQUAL[3, 0] = False

model_contrastive = jax.jit(information.model_contrastive)
model_slopes = jax.jit(jax.grad(information.model_contrastive, (0, 1, 2)))
info_nce = jax.jit(information.info_nce)


@jax.jit
def losses(a, b, mask=None):
    return {name: function(a, b, mask=mask) for name, function in LOSSES.items()}


@jax.jit
def slopes(a, b, mask=None):
    return {
        name: jax.grad(functools.partial(function, mask=mask), (0, 1))(a, b)
        for name, function in LOSSES.items()
    }


def views(seed, dtype=np.float64):
    a, b = np.random.default_rng(seed).standard_normal((2, N, D))
    return (a + 1).astype(dtype), (a + 0.5 * b + 1).astype(dtype)


def negatives(seed, dtype=np.float64, shape=(M, D)):
    return np.random.default_rng(seed + 100).standard_normal(shape).astype(dtype)


def cosine(x, y):
    return sum(x * y) / math.sqrt(sum(x * x) * sum(y * y))


def cross_entropy(positive, others):
    return math.log(math.exp(positive) + sum(math.exp(t) for t in others)) - positive


def naive_info_nce(a, p, temperature, rows, allowed=None, extra=None):
    """Go over all pairs; `extra` holds more negatives of every anchor."""
    total, real = 0.0, [i for i in range(len(a)) if rows[i]]
    for i in real:
        use = [j for j in real if j != i and (allowed is None or allowed[i, j])]
        others = [cosine(a[i], p[j]) / temperature for j in use]
        others += [] if extra is None else [cosine(a[i], n) / temperature for n in extra[i]]
        total += cross_entropy(cosine(a[i], p[i]) / temperature, others)
    return total / len(real)


def naive_barlow(a, b):
    size = a.shape[1]
    loss = 0.0
    for i in range(size):
        for j in range(size):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            c = np.mean(x * y) / math.sqrt((np.mean(x**2) + 1e-5) * (np.mean(y**2) + 1e-5))
            loss += (1 - c) ** 2 if i == j else 5e-3 * c**2
    return loss


def naive_vicreg(a, b):
    size = a.shape[1]
    loss = 25 * np.mean((a - b) ** 2)
    for view in (a, b):
        for i in range(size):
            deviation = math.sqrt(np.var(view[:, i], ddof=1) + 1e-4)
            loss += 25 * max(0.0, 1 - deviation) / size
            for j in range(size):
                if i != j:
                    loss += np.cov(view[:, i], view[:, j])[0, 1] ** 2 / size
    return loss


# Losses within a batch.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, ROWS], ids=["all", "rows"])
def test_losses_are_those_of_loops(dtype, mask):
    rows = np.ones(N, bool) if mask is None else mask
    for seed in range(3):
        a, b = views(seed, dtype)
        x, y = a.astype(np.float64), b.astype(np.float64)
        forward = naive_info_nce(x, y, 0.1, rows)
        expected = {
            "info_nce": forward,
            "symmetric": (forward + naive_info_nce(y, x, 0.1, rows)) / 2,
            "barlow": naive_barlow(x[rows], y[rows]),
            "vicreg": naive_vicreg(x[rows], y[rows]),
        }
        for name, found in losses(a, b, mask).items():
            assert found.dtype == dtype
            # similarities are divided by 0.1
            atol = 100 * np.finfo(dtype).eps * max(1.0, expected[name])
            np.testing.assert_allclose(found, expected[name], atol=atol, rtol=0, err_msg=name)


def test_pairs_that_may_not_be_negatives_are_left_out():
    a, b = views(3)
    allowed = UNEQUAL & ROWS[None, :]
    found = info_nce(a, b, mask=allowed)
    np.testing.assert_allclose(found, naive_info_nce(a, b, 0.1, ROWS, allowed), rtol=1e-13)
    one_way = np.triu(UNEQUAL) & ROWS[None, :]
    forward = naive_info_nce(a, b, 0.1, ROWS, one_way)
    backward = naive_info_nce(b, a, 0.1, ROWS, one_way.T)
    found = jax.jit(information.symmetric_info_nce)(a, b, mask=one_way)
    np.testing.assert_allclose(found, (forward + backward) / 2, rtol=1e-13)


def test_more_negatives_join_those_of_the_batch():
    a, b = views(4)
    for shape in ((M, D), (N, M, D)):
        extra = negatives(4, shape=shape)
        found = info_nce(a, b, negatives=extra, mask=ROWS)
        every = np.broadcast_to(extra, (N, M, D))
        expected = naive_info_nce(a, b, 0.1, ROWS, extra=every)
        np.testing.assert_allclose(found, expected, rtol=1e-13)
    # a batch of one pair has no others
    found = info_nce(a[:1], b[:1], negatives=negatives(4))
    expected = naive_info_nce(a[:1], b[:1], 0.1, ROWS[:1], extra=negatives(4)[None])
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_infonce_is_cross_entropy_of_similarities_and_the_distance_of_its_bound_to_log_n():
    a, b = views(5)
    similarities = np.array([[cosine(x, y) for y in b] for x in a]) / 0.1

    @jax.jit
    def peers(scores):
        cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        return cross_entropy(scores, jnp.arange(N)).mean(), information.info_nce_bound(scores)

    cross_entropy, bound = peers(similarities)
    found = losses(a, b)["info_nce"]
    np.testing.assert_allclose(found, cross_entropy, rtol=1e-13)
    np.testing.assert_allclose(found, math.log(N) - bound, rtol=1e-13)


def test_order_of_rows_does_not_matter_and_length_not_to_the_contrastive_ones():
    a, b = views(6)
    order = np.random.default_rng(6).permutation(N)
    moved = losses(a[order], b[order])
    scaled = losses(3 * a, np.arange(1, N + 1)[:, None] * b)
    for name, value in losses(a, b).items():
        np.testing.assert_allclose(moved[name], value, rtol=1e-13, err_msg=name)
        if name in ("info_nce", "symmetric"):
            np.testing.assert_allclose(scaled[name], value, rtol=1e-13, err_msg=name)


def test_embeddings_that_are_all_the_same_give_log_n():
    same = np.ones((N, D))
    found = losses(same, same)
    np.testing.assert_allclose([found["info_nce"], found["symmetric"]], math.log(N), rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_real_change_neither_values_nor_gradients(dtype):
    a, b = views(7, dtype)
    expected, expected_slopes = losses(a, b, ROWS), slopes(a, b, ROWS)
    for fill in (np.nan, 1e30):
        x, y = (np.where(ROWS[:, None], view, np.asarray(fill, dtype)) for view in (a, b))
        found, found_slopes = losses(x, y, ROWS), slopes(x, y, ROWS)
        for name in LOSSES:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
            for slope, wanted in zip(found_slopes[name], expected_slopes[name], strict=True):
                np.testing.assert_array_equal(slope, wanted, err_msg=name)
                np.testing.assert_array_equal(slope[~ROWS], 0, err_msg=name)
                assert np.any(slope != 0)
    nothing = np.zeros(N, bool)
    for name, value in losses(x, y, nothing).items():
        assert value == 0, name
    for slope in jax.tree.leaves(slopes(x, y, nothing)):
        np.testing.assert_array_equal(slope, 0)


def test_derivatives_are_finite_where_embeddings_are_zero_or_equal():
    rng = np.random.default_rng(8)
    zero, same = np.zeros((N, D), np.float32), np.ones((N, D), np.float32)
    other = rng.standard_normal((N, D)).astype(np.float32)
    everything = np.ones(N, bool)
    for a, b in ((zero, zero), (same, same), (zero, other), (other, other), (1e4 * other, -other)):
        found = losses(a, b, everything), slopes(a, b, everything)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        found = model_slopes(a, b, zero[:M]), model_slopes(a, b, same[:M])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_whitening_losses_are_least_where_the_views_agree_and_features_are_uncorrelated():
    signs = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    barlow, vicreg = jax.jit(information.barlow_twins), jax.jit(information.vicreg)
    # the 1e-5 beside the variance 1 is all that is left
    assert barlow(signs, signs) <= 2 * 1e-5**2
    assert barlow(signs, 5 * signs + 3) <= 2 * 1e-5**2
    assert barlow(signs, signs[:, ::-1]) > 1
    assert vicreg(signs, signs) == 0
    assert vicreg(signs, signs[:, ::-1]) > 1


def test_weights_of_vicreg_belong_to_their_terms():
    a, b = views(9)
    vicreg = jax.jit(information.vicreg)
    names = ("invariance", "variance", "covariance")
    terms = [vicreg(a, b, **{other: float(other == name) for other in names}) for name in names]
    whole = vicreg(a, b, invariance=2.0, variance=3.0, covariance=4.0)
    np.testing.assert_allclose(np.dot([2.0, 3.0, 4.0], terms), whole, rtol=1e-14)
    np.testing.assert_allclose(terms[0], np.mean((a - b) ** 2), rtol=1e-14)
    small = 0.1 * a
    assert vicreg(small, small, invariance=0.0, variance=1.0, covariance=0.0) > 1


# Losses with given negatives.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(M, D), (N, M, D)], ids=["shared", "own"])
def test_model_contrastive_is_that_of_a_loop(shape, dtype):
    a, p = views(10, dtype)
    n = negatives(10, dtype, shape)
    use = np.random.default_rng(10).random((N, M)) < 0.6
    found = model_contrastive(a, p, n, mask=use, rows=ROWS)
    assert found.dtype == dtype
    a, p, n = (x.astype(np.float64) for x in (a, p, np.broadcast_to(n, (N, M, D))))
    total = 0.0
    for i in np.flatnonzero(ROWS):
        others = [cosine(a[i], n[i, k]) / 0.5 for k in range(M) if use[i, k]]
        total += cross_entropy(cosine(a[i], p[i]) / 0.5, others)
    atol = 50 * np.finfo(dtype).eps
    np.testing.assert_allclose(found, total / ROWS.sum(), atol=atol)


def test_model_contrastive_of_known_angles():
    a = np.ones((N, D))
    np.testing.assert_allclose(model_contrastive(a, a, a[:M]), math.log(1 + M), rtol=1e-14)
    anchors = np.repeat([[1.0, 0, 0, 0]], N, axis=0)
    across = np.array([[0.0, 1, 0, 0], [0, -1, 0, 0], [0, 0, 2, 0]])
    found = model_contrastive(anchors, anchors, across)
    np.testing.assert_allclose(found, math.log1p(M * math.exp(-2)), rtol=1e-14)
    found = model_contrastive(anchors, anchors, -anchors[:M])
    np.testing.assert_allclose(found, math.log1p(M * math.exp(-4)), rtol=1e-13)


def test_shared_negatives_are_those_of_every_anchor():
    a, p = views(11)
    n = negatives(11)
    mask = np.array([True, False, True])
    expected = model_contrastive(a, p, n, mask=mask)
    every = np.broadcast_to(n, (N, M, D))
    for found in (
        model_contrastive(a, p, every, mask=mask),
        model_contrastive(a, p, every, mask=np.broadcast_to(mask, (N, M))),
        model_contrastive(a, p, n, mask=np.broadcast_to(mask, (N, M))),
        model_contrastive(a, p, n[mask]),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("shape", [(M, D), (N, M, D)], ids=["shared", "own"])
def test_what_model_contrastive_does_not_use_changes_nothing(shape):
    a, p = views(12)
    n = negatives(12, shape=shape)
    use = np.ones((N, M), bool)
    use[:, 1] = False
    # the fake row is the only one that would use the hidden negative
    use[~ROWS, 1] = True
    expected = model_contrastive(a, p, n, mask=use, rows=ROWS)
    wanted = model_slopes(a, p, n, mask=use, rows=ROWS)
    for fill in (np.nan, 1e30):
        x, y = (np.where(ROWS[:, None], view, fill) for view in (a, p))
        z = n.copy()
        z[..., 1, :] = fill
        np.testing.assert_array_equal(model_contrastive(x, y, z, mask=use, rows=ROWS), expected)
        found = model_slopes(x, y, z, mask=use, rows=ROWS)
        for slope, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(slope, other)
    for mask, rows in ((np.zeros((N, M), bool), ROWS), (use, np.zeros(N, bool))):
        z = np.full(shape, np.nan)
        x, y = (np.where(rows[:, None], view, np.nan) for view in (a, p))
        assert model_contrastive(x, y, z, mask=mask, rows=rows) == 0
        for slope in model_slopes(x, y, z, mask=mask, rows=rows):
            np.testing.assert_array_equal(slope, 0)


def test_two_views_of_simclr_are_a_case_of_given_negatives():
    a, b = views(13)
    both, partners = np.concatenate([a, b]), np.concatenate([b, a])
    index = np.arange(2 * N)
    others = index[:, None] % N != index[None, :] % N
    # the partner is the positive, the rest of both views the negatives
    found = jax.jit(information.model_contrastive)(both, partners, both, mask=others)
    total = 0.0
    for i in index:
        rest = [cosine(both[i], both[j]) / 0.5 for j in index if j not in (i, (i + N) % (2 * N))]
        total += cross_entropy(cosine(both[i], partners[i]) / 0.5, rest)
    np.testing.assert_allclose(found, total / (2 * N), rtol=1e-13)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        peer = jax.jit(optax.losses.ntxent)(jnp.asarray(both), jnp.asarray(index % N), 0.5)
    np.testing.assert_allclose(found, peer, rtol=1e-13)


# Transformations.


def test_jit_and_vmap_change_nothing_and_trace_once():
    stack = [np.stack(each) for each in zip(*(views(seed) for seed in range(3)), strict=True)]
    masks = np.stack([ROWS, ROWS[::-1], np.ones(N, bool)])
    others = np.stack([negatives(seed) for seed in range(3)])
    traces = []

    @jax.jit
    @jax.vmap
    def batch(a, b, mask, n):
        traces.append(a)
        found = {name: function(a, b, mask=mask) for name, function in LOSSES.items()}
        return found | {"model": information.model_contrastive(a, b, n, rows=mask)}

    found = batch(*stack, masks, others)
    again = batch(*stack[::-1], masks, others)
    assert len(traces) == 1
    assert np.any(again["info_nce"] != found["info_nce"])
    for k in range(3):
        expected = losses(stack[0][k], stack[1][k], masks[k])
        expected["model"] = model_contrastive(stack[0][k], stack[1][k], others[k], rows=masks[k])
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][k], value, rtol=1e-13, err_msg=name)
    arrays = [jnp.asarray(x[0]) for x in (*stack, masks, others)]
    for name, function in LOSSES.items():
        eager = function(*arrays[:2], mask=arrays[2])
        np.testing.assert_allclose(eager, found[name][0], rtol=1e-13, err_msg=name)
    eager = information.model_contrastive(*arrays[:2], arrays[3], rows=arrays[2])
    np.testing.assert_allclose(eager, found["model"][0], rtol=1e-13)


def test_temperature_may_be_learnt():
    a, b = views(14)

    @jax.jit
    def loss(log_temperature):
        temperature = jnp.maximum(jnp.exp(log_temperature), 0.01)
        return information.symmetric_info_nce(a, b, temperature=temperature)

    step = 1e-5
    slope = (loss(step - 1.0) - loss(-step - 1.0)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(-1.0), slope, rtol=1e-8)


# Errors.

A = jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: information.info_nce(A, jnp.ones((3, 4))),
            r"info_nce: got other embeddings of shape \(3, 4\), expected shape \(3, 2\)",
        ),
        (
            lambda: information.symmetric_info_nce(A[0], A[0]),
            r"symmetric_info_nce: got embeddings of shape \(2,\), expected 2 axes",
        ),
        (
            lambda: information.info_nce(A.astype(jnp.float16), A.astype(jnp.float16)),
            "info_nce: got embeddings of dtype float16, expected float32 or float64",
        ),
        (
            lambda: information.vicreg(A, A.astype(jnp.float32)),
            "vicreg: got embeddings of dtypes float64, float32, expected one dtype",
        ),
        (
            lambda: information.info_nce(A, A, temperature=0.0),
            "info_nce: got temperature 0.0, expected a positive number",
        ),
        (
            lambda: information.symmetric_info_nce(A, A, temperature=jnp.array(-0.1)),
            "symmetric_info_nce: got temperature -0.1, expected a positive number",
        ),
        (
            lambda: information.model_contrastive(A, A, A, temperature=np.nan),
            "model_contrastive: got temperature nan, expected a positive number",
        ),
        (
            lambda: information.info_nce(A, A, temperature=jnp.ones(3)),
            r"info_nce: got temperature of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: information.info_nce(A, A, negatives=jnp.ones((4, 3))),
            r"info_nce: got negatives of shape \(4, 3\), expected shape \(4, 2\)",
        ),
        (
            lambda: information.info_nce(A, A, negatives=A.astype(jnp.float32)),
            "info_nce: got embeddings of dtypes float64, float32, expected one dtype",
        ),
        (
            lambda: information.model_contrastive(A, A, jnp.ones((2, 4, 2))),
            r"model_contrastive: got negatives of shape \(2, 4, 2\), expected shape \(3, 4, 2\)",
        ),
        (
            lambda: information.model_contrastive(A, A, jnp.ones((4, 2)), mask=jnp.ones(3, bool)),
            r"model_contrastive: got mask of shape \(3,\), expected shape \(4,\)",
        ),
        (
            lambda: information.model_contrastive(A, A, A, mask=jnp.ones((2, 3), bool)),
            r"model_contrastive: got mask of shape \(2, 3\), expected shape \(3, 3\)",
        ),
        (
            lambda: information.model_contrastive(A, A, A, rows=jnp.ones(3)),
            "model_contrastive: got mask of dtype float64, expected bool",
        ),
        (
            lambda: information.barlow_twins(A, A, mask=jnp.ones(2, bool)),
            r"barlow_twins: got mask of shape \(2,\), expected shape \(3,\)",
        ),
        (
            lambda: information.info_nce(A, A, mask=jnp.ones((3, 2), bool)),
            r"info_nce: got mask of shape \(3, 2\), expected shape \(3, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        call()
