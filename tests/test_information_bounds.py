import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import information

DTYPES = [np.float32, np.float64]
N = 7
CLIP = 1.5
ESTIMATORS = {
    "info_nce": information.info_nce_bound,
    "symmetric": information.symmetric_info_nce_bound,
    "nwj": information.nwj,
    "dv": information.donsker_varadhan,
    "jsd": information.jensen_shannon,
    "jsd_nwj": information.jensen_shannon_as_nwj,
    "jsd_smile": functools.partial(information.jensen_shannon_as_smile, clip=CLIP),
    "smile": functools.partial(information.smile, clip=CLIP),
    "club": information.club,
    "mine": lambda scores, mask=None: information.mine(scores, 2.0, rate=0.25, mask=mask)[0],
}
# exp of a score of 1e4 is beyond float32
OVERFLOWING = {"nwj", "jsd_nwj"}


@jax.jit
def estimates(scores, mask=None):
    return {name: function(scores, mask=mask) for name, function in ESTIMATORS.items()}


@jax.jit
def gradients(scores, mask):
    return {
        name: jax.grad(lambda scores, function=function: function(scores, mask=mask))(scores)
        for name, function in ESTIMATORS.items()
    }


def draw(seed, dtype=np.float64, scale=1.0, size=N):
    return (scale * np.random.default_rng(seed).standard_normal((size, size))).astype(dtype)


def softplus(t):
    return max(t, 0.0) + math.log1p(math.exp(-abs(t)))


def naive(scores, mask=None):
    """Go over all pairs in Python floats."""
    size = len(scores)
    s = scores.astype(np.float64)
    usable = np.ones((size, size), bool) if mask is None else mask
    if usable.ndim == 1:
        usable = usable[:, None] & usable[None, :]
    real = [i for i in range(size) if usable[i, i]]
    off = [(i, j) for i in real for j in real if i != j and usable[i, j]]

    def rows(t, off):
        total = 0.0
        for i in real:
            terms = [math.exp(t[i, i])] + [math.exp(t[i, j]) for k, j in off if k == i]
            total += t[i, i] - math.log(sum(terms)) + math.log(len(terms))
        return total / len(real)

    def mean_off(function):
        return sum(function(s[i, j]) for i, j in off) / len(off)

    joint = sum(s[i, i] for i in real) / len(real)
    by_columns = rows(s.T, [(j, i) for i, j in off])
    clipped = joint - math.log(mean_off(lambda t: math.exp(min(max(t, -CLIP), CLIP))))
    dv = joint - math.log(mean_off(math.exp))
    return {
        "info_nce": rows(s, off),
        "symmetric": (rows(s, off) + by_columns) / 2,
        "nwj": joint - mean_off(lambda t: math.exp(t - 1)),
        "dv": dv,
        "jsd": -sum(softplus(-s[i, i]) for i in real) / len(real) - mean_off(softplus),
        "jsd_nwj": joint + 1 - mean_off(math.exp),
        "jsd_smile": clipped,
        "smile": clipped,
        "club": joint - mean_off(lambda t: t),
        "mine": dv,
    }


def compare(found, expected, scale=1.0, factor=50.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = factor * np.finfo(found[name].dtype).eps * max(1.0, scale, abs(value))
        np.testing.assert_allclose(found[name], value, atol=atol, rtol=0, err_msg=name)


def log_mean_exp_off(scores):
    return math.log(np.mean(np.exp(scores[~np.eye(len(scores), dtype=bool)])))


ROWS = np.array([True, True, False, True, True, False, True])
# two labels in turn: a pair with an equal label is no negative
LABELS = np.arange(N) % 2
UNEQUAL = (LABELS[:, None] != LABELS[None, :]) | np.eye(N, dtype=bool)
RAGGED = UNEQUAL & (np.eye(N, dtype=bool) <= ROWS[:, None])
RAGGED[0, [1, 3]] = False


# Values.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 5, 8])
def test_scores_of_a_multiple_of_the_identity_give_the_closed_forms(size, dtype):
    for c in (0.0, 1.0, 2.0, 100.0):
        found = estimates(c * np.eye(size, dtype=dtype))
        expected = {
            "info_nce": c - math.log(math.exp(c) + size - 1) + math.log(size),
            "nwj": c - math.exp(-1),
            "dv": c,
            "jsd": -softplus(-c) - math.log(2),
            "jsd_nwj": c,
            "jsd_smile": c,
            "smile": c,
            "club": c,
            "mine": c,
        }
        expected["symmetric"] = expected["info_nce"]
        assert {value.dtype for value in found.values()} == {np.dtype(dtype)}
        compare(found, expected, scale=c, factor=10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, ROWS, RAGGED], ids=["all", "rows", "entries"])
def test_estimates_are_those_of_a_loop_over_pairs(dtype, mask):
    for seed in range(3):
        scores = draw(seed, dtype)
        compare(estimates(scores, mask), naive(scores, mask))


def test_barber_agakov_is_entropy_and_mean():
    values = draw(0)[0]
    for mask in (None, ROWS):
        expected = 1.5 + np.mean(values if mask is None else values[ROWS])
        filled = values if mask is None else np.where(ROWS, values, np.nan)
        found = information.barber_agakov(filled, 1.5, mask=mask)
        np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert information.barber_agakov(values, 1.5, mask=np.zeros(N, bool)) == 0


def test_shifts_that_estimates_do_not_see():
    rng = np.random.default_rng(3)
    scores, shift = draw(3), rng.standard_normal((N, 1))
    before, by_row, by_all = (estimates(s) for s in (scores, scores + shift, scores + 2.0))
    np.testing.assert_allclose(by_row["info_nce"], before["info_nce"], atol=1e-14)
    for name in ("info_nce", "symmetric", "dv", "mine", "club"):
        np.testing.assert_allclose(by_all[name], before[name], atol=1e-14)


def test_order_of_pairs_does_not_matter():
    scores, order = draw(4), np.random.default_rng(4).permutation(N)
    moved = estimates(scores[order][:, order], RAGGED[order][:, order])
    for name, value in estimates(scores, RAGGED).items():
        np.testing.assert_allclose(moved[name], value, atol=1e-14, err_msg=name)


def test_exchanging_x_and_y_changes_infonce_alone():
    scores = draw(5)
    before, after = estimates(scores), estimates(scores.T)
    assert abs(after["info_nce"] - before["info_nce"]) > 1e-2
    np.testing.assert_allclose(
        before["symmetric"], (before["info_nce"] + after["info_nce"]) / 2, atol=1e-15
    )
    for name in before.keys() - {"info_nce"}:
        np.testing.assert_allclose(after[name], before[name], atol=1e-14, err_msg=name)


def test_nwj_is_never_above_donsker_varadhan_and_meets_it_at_the_best_shift():
    for seed in range(3):
        scores = draw(seed)
        found = estimates(scores)
        assert found["nwj"] < found["dv"]
        best = estimates(scores + 1 - log_mean_exp_off(scores))
        np.testing.assert_allclose(best["nwj"], found["dv"], atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_infonce_is_at_most_log_n_and_the_jensen_shannon_objective_negative(scale):
    limit = math.log(N) * (1 + 4 * np.finfo(np.float64).eps)
    for seed in range(3):
        for scores in (draw(seed, scale=scale), scale * np.eye(N) + draw(seed)):
            found = estimates(scores)
            assert max(found["info_nce"], found["symmetric"]) <= limit
            assert found["jsd"] <= 0


def test_club_over_all_entries_is_smaller_by_a_factor():
    log_conditional = draw(6)
    over_all = np.mean(np.diag(log_conditional)) - np.mean(log_conditional)
    found = estimates(log_conditional)["club"]
    np.testing.assert_allclose(found, over_all * N / (N - 1), rtol=1e-13)


def test_leaving_out_equal_labels_overstates_the_information():
    # x = y is one of two labels, of six real pairs three each: the information is log 2
    rows = np.arange(N) < 6
    scores = 200.0 * (LABELS[:, None] == LABELS[None, :])
    found = estimates(scores, rows)
    np.testing.assert_allclose(found["info_nce"], math.log(2), rtol=1e-14)
    found = estimates(scores, UNEQUAL & rows[:, None])
    np.testing.assert_allclose(found["info_nce"], math.log(4), rtol=1e-14)


# Correlated Gaussians, whose information is known.


@functools.cache
def monte_carlo(d, correlation, size=256, draws=40):
    """Return mean estimates of the best critic for three seeds."""

    def one(key):
        x, e = jax.random.normal(key, (2, size, d), jnp.float32)
        y = correlation * x + math.sqrt(1 - correlation**2) * e
        scores = information.gaussian_scores(x, y, correlation)
        found = {name: ESTIMATORS[name](scores) for name in ("info_nce", "dv", "jsd", "club")}
        return found | {
            "symmetric": information.symmetric_info_nce_bound(scores),
            "nwj": information.nwj(scores + 1),
            "smile": information.smile(scores, clip=5.0),
        }

    @jax.jit
    def mean(key):
        found = jax.lax.map(one, jax.random.split(key, draws))
        return jax.tree.map(jnp.mean, found)

    return [mean(jax.random.key(seed)) for seed in range(3)]


@pytest.mark.parametrize(
    ("d", "correlation", "tolerance"),
    # four standard errors of a mean over 40 draws
    [(1, 0.9, 0.035), pytest.param(4, 0.8, 0.065, marks=pytest.mark.slow)],
)
def test_best_critic_of_gaussians_finds_their_information(d, correlation, tolerance):
    truth = d * float(information.correlation_information(jnp.array(correlation)))
    club = d * float(information.correlation_club(jnp.array(correlation)))
    # first order of the bias of InfoNCE: half the chi-square divergence over the batch
    bias = ((1 - correlation**2) ** -d - 1) / (2 * 256)
    for found in monte_carlo(d, correlation):
        for name in ("dv", "nwj", "smile"):
            assert abs(found[name] - truth) < tolerance
        for name in ("info_nce", "symmetric"):
            assert truth - bias - tolerance < found[name] < truth + tolerance
        assert -2 * math.log(2) < found["jsd"] < 0
        assert abs(found["club"] - club) < 0.25
        assert found["club"] > truth


# Gradients.


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_scores_change_neither_value_nor_gradient(dtype):
    scores = draw(7, dtype)
    usable = RAGGED & ROWS[:, None] & ROWS[None, :]
    assert 0 < usable.sum() < (ROWS[:, None] & ROWS[None, :]).sum()
    expected, slopes = estimates(scores, RAGGED), gradients(scores, RAGGED)
    for fill in (np.nan, np.inf, 1e30, -1e30):
        filled = np.where(usable, scores, np.asarray(fill, dtype))
        found, found_slopes = estimates(filled, RAGGED), gradients(filled, RAGGED)
        for name in ESTIMATORS:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
            np.testing.assert_array_equal(found_slopes[name], slopes[name], err_msg=name)
            np.testing.assert_array_equal(found_slopes[name][~usable], 0)
            assert np.any(found_slopes[name] != 0)


def test_rows_that_are_not_real_are_as_if_they_were_not_there():
    scores = draw(8)
    small = scores[ROWS][:, ROWS]
    assert small.shape == (5, 5)
    expected, found = estimates(small), estimates(scores, ROWS)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-14, err_msg=name)


def test_without_negatives_there_is_no_estimate_and_no_gradient():
    one = np.zeros((N, N), bool)
    one[2, 2] = True
    for scores in (draw(9), np.full((N, N), np.nan)):
        # nothing is real; no entry is a negative; one pair is real
        for mask in (np.zeros((N, N), bool), np.eye(N, dtype=bool), one):
            filled = np.where(mask, draw(9), scores)
            for name, value in estimates(filled, mask).items():
                assert value == 0, name
            for name, slope in gradients(filled, mask).items():
                np.testing.assert_array_equal(slope, 0, err_msg=name)
    average = information.mine(draw(9), 3.0, mask=np.zeros((N, N), bool))[1]
    assert average == 3.0


def test_huge_scores_of_float32_keep_values_and_gradients_finite():
    everything = np.ones((N, N), bool)
    signs = np.sign(draw(10, np.float32))
    cases = [1e4 * signs, np.full_like(signs, 1e4), np.full_like(signs, -1e4)]
    for scores in cases:
        found, slopes = estimates(scores), gradients(scores, everything)
        exact = 1e4 if scores.min() == scores.max() else None
        for name, value in found.items():
            if name not in OVERFLOWING or scores.max() < 0:
                assert np.isfinite(value), name
            if name != "nwj" or scores.max() < 0:
                assert np.isfinite(slopes[name]).all(), name
        if exact:
            np.testing.assert_allclose(found["dv"], 0, atol=2e-3)
            np.testing.assert_allclose(found["info_nce"], 0, atol=2e-3)


def test_straight_through_forms_have_the_gradient_of_the_objective():
    everything = np.ones((N, N), bool)
    scores = draw(11, scale=2.0)
    found, slopes = estimates(scores), gradients(scores, everything)
    for name in ("jsd_nwj", "jsd_smile"):
        np.testing.assert_allclose(slopes[name], slopes["jsd"], rtol=1e-15)
    np.testing.assert_allclose(found["jsd_nwj"], estimates(scores + 1)["nwj"], rtol=1e-14)
    np.testing.assert_array_equal(found["jsd_smile"], found["smile"])
    sigmoid = 1 / (1 + np.exp(-scores))
    expected = np.where(np.eye(N), (1 - sigmoid) / N, -sigmoid / (N * (N - 1)))
    np.testing.assert_allclose(slopes["jsd"], expected, rtol=1e-13)


def test_mine_divides_by_the_moving_average():
    step = jax.jit(jax.grad(information.mine, has_aux=True), static_argnames="rate")
    everything = np.ones((N, N), bool)
    off = ~np.eye(N, dtype=bool)
    scores, ema = draw(12), 4.0
    mean = np.mean(np.exp(scores[off]))
    slope, new = step(scores, ema, rate=0.25)
    np.testing.assert_allclose(new, 0.75 * 4 + 0.25 * mean, rtol=1e-14)
    expected = np.where(off, -np.exp(scores) / new / (N * (N - 1)), 1 / N)
    np.testing.assert_allclose(slope, expected, rtol=1e-13)

    plain = gradients(scores, everything)["dv"]
    assert np.abs(slope - plain).max() > 1e-3
    np.testing.assert_allclose(step(scores, mean, rate=0.25)[0], plain, rtol=1e-12)
    np.testing.assert_allclose(step(scores, ema, rate=1.0)[0], plain, rtol=1e-12)
    # an average from zero, and one that overflows
    slope, new = step(scores, 0.0, rate=0.25)
    np.testing.assert_allclose(slope[off], 4 * plain[off], rtol=1e-12)
    slope, new = step(scores + 1e4, ema, rate=0.25)
    np.testing.assert_allclose(slope[off], 4 * plain[off], rtol=1e-10)
    assert new == np.finfo(np.float64).max
    slope, new = step(scores - 1e4, 0.0, rate=0.25)
    np.testing.assert_allclose(slope[off], 4 * plain[off], rtol=1e-10)
    assert new == 0


# Transformations.


def test_jit_and_vmap_change_nothing_and_trace_once():
    stack, masks = np.stack([draw(seed) for seed in range(3)]), np.stack([RAGGED, UNEQUAL, RAGGED])
    traces = []

    @jax.jit
    @jax.vmap
    def batch(scores, mask):
        traces.append(scores)
        return {name: function(scores, mask=mask) for name, function in ESTIMATORS.items()}

    found = [batch(stack, masks), batch(stack[::-1], masks[::-1])]
    assert len(traces) == 1
    for k in range(3):
        for name, value in estimates(stack[k], masks[k]).items():
            np.testing.assert_allclose(found[0][name][k], value, atol=1e-14, err_msg=name)
            np.testing.assert_allclose(found[1][name][2 - k], value, atol=1e-14, err_msg=name)
    for name, function in ESTIMATORS.items():
        eager = function(jnp.asarray(stack[0]), mask=jnp.asarray(masks[0]))
        np.testing.assert_allclose(eager, found[0][name][0], atol=1e-14, err_msg=name)


def test_clip_may_be_traced():
    scores = draw(13)
    found = jax.jit(jax.grad(lambda clip: information.smile(scores, clip=clip)))(1.5)
    step = 1e-6
    ends = [float(information.smile(scores, clip=1.5 + h)) for h in (step, -step)]
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


# Errors.

SCORES = jnp.zeros((3, 3))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: information.nwj(jnp.zeros((3, 4))),
            r"nwj: got scores of shape \(3, 4\), expected a square matrix",
        ),
        (
            lambda: information.donsker_varadhan(jnp.zeros(3)),
            r"donsker_varadhan: got scores of shape \(3,\), expected 2 axes",
        ),
        (
            lambda: information.jensen_shannon(jnp.zeros((3, 3), jnp.bfloat16)),
            "jensen_shannon: got scores of dtype bfloat16, expected float32 or float64",
        ),
        (
            lambda: information.club(jnp.zeros((3, 3), jnp.int32)),
            "club: got scores of dtype int32",
        ),
        (
            lambda: information.info_nce_bound(SCORES, mask=jnp.ones(3)),
            "info_nce_bound: got mask of dtype float64, expected bool",
        ),
        (
            lambda: information.symmetric_info_nce_bound(SCORES, mask=jnp.ones(4, bool)),
            r"symmetric_info_nce_bound: got mask of shape \(4,\), expected shape \(3,\)",
        ),
        (
            lambda: information.jensen_shannon_as_nwj(SCORES, mask=jnp.ones((3, 2), bool)),
            r"jensen_shannon_as_nwj: got mask of shape \(3, 2\), expected shape \(3, 3\)",
        ),
        (
            lambda: information.jensen_shannon_as_smile(SCORES, clip=-1.0),
            "jensen_shannon_as_smile: got clip -1.0, expected a non-negative number",
        ),
        (
            lambda: information.smile(SCORES, clip=jnp.ones(2)),
            r"smile: got clip of shape \(2,\), expected 0 axes",
        ),
        (
            lambda: information.mine(SCORES, -1.0),
            "mine: got ema -1.0, expected a non-negative number",
        ),
        (
            lambda: information.mine(SCORES, jnp.ones(3)),
            r"mine: got ema of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: information.mine(SCORES, 1.0, rate=0.0),
            "mine: got rate 0.0, expected a number above 0 and at most 1",
        ),
        (
            lambda: information.barber_agakov(SCORES, 1.0),
            r"barber_agakov: got log_likelihoods of shape \(3, 3\), expected 1 axes",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        call()
