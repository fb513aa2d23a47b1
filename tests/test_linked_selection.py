import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import linked
from fedlr.linked import selection, theory

SHAPES = ((8, 4, 3), (8, 5, 2))
GRID = jnp.array([0.05, 0.5, 5.0])
OPTIONS = {
    "rank": 3,
    "penalties": GRID,
    "num_folds": 4,
    "num_starts": 2,
    "max_iters": 40,
    "tol": 1e-7,
    "progress": False,
}


def planted(rng, rank=2, noise=0.1):
    factors = [[rng.standard_normal((size, rank)) for size in shape[1:]] for shape in SHAPES]
    truth = linked.LinkedCP(
        jnp.asarray(rng.standard_normal((8, rank))),
        tuple(tuple(map(jnp.asarray, own)) for own in factors),
    )
    return tuple(
        x + noise * jnp.asarray(rng.standard_normal(x.shape)) for x in linked.to_dense(truth)
    )


@pytest.fixture(scope="module")
def chosen():
    tensors = planted(np.random.default_rng(0))
    return tensors, linked.select_penalty(tensors, key=jax.random.key(0), **OPTIONS)


def test_the_choice_follows_from_the_scores(chosen):
    _, choice = chosen
    assert choice.scores.shape == (2, 3, 4)
    np.testing.assert_allclose(choice.mean_scores, np.mean(choice.scores, axis=2))
    errors = np.std(choice.scores, axis=2) / np.sqrt(4)
    np.testing.assert_allclose(choice.standard_errors, errors)
    first, second = np.asarray(choice.mean_scores)
    least = np.argmin(first)
    within = np.flatnonzero(first <= first[least] + errors[0, least])
    assert choice.penalty_1se == GRID[within[-1]]
    assert choice.penalty == GRID[np.argmin(second)]
    assert first.min() < 0.5  # the planted components predict what was hidden


def test_the_pattern_is_kept_and_the_fits_are_minima(chosen):
    tensors, choice = chosen
    np.testing.assert_array_equal(choice.active, linked.active_components(choice.free_fit))
    assert not np.any(np.asarray(linked.active_components(choice.fit)) & ~np.asarray(choice.active))
    for fit, penalty in ((choice.free_fit, choice.penalty_1se), (choice.fit, choice.penalty)):
        _, info = linked.multifac(tensors, init=fit, penalty=penalty, max_iters=40, tol=1e-7)
        start = sum(
            jnp.sum((x - e) ** 2) for x, e in zip(tensors, linked.to_dense(fit), strict=True)
        ) + penalty * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(fit))
        assert info.objective[-1] >= (1 - 1e-2) * start


def test_the_key_decides_everything(chosen):
    tensors, choice = chosen
    again = linked.select_penalty(tensors, key=jax.random.key(0), **OPTIONS)
    np.testing.assert_array_equal(again.scores, choice.scores)
    other = linked.select_penalty(tensors, key=jax.random.key(1), **OPTIONS)
    assert np.any(np.asarray(other.scores) != np.asarray(choice.scores))


def test_hidden_cells_of_a_fold_influence_no_fit(chosen):
    """Change what a fold hides: the fits of its lane are the same, its score is not."""
    tensors, _ = chosen
    masks = tuple(jnp.ones(x.shape, bool) for x in tensors)
    hidden = linked.draw_folds(masks, 4, key=jax.random.key(2))
    starts = jax.vmap(jax.vmap(lambda k: linked.random_init(tensors, 3, key=k)))(
        jax.random.split(jax.random.key(3), (2, 2))
    )
    lanes = tuple(h[:2] for h in hidden)
    path = jnp.array([0.0, 0.05, 0.5])
    run = lambda data: selection._program(  # noqa: E731
        data, masks, lanes, starts, path, options=(40, 1e-7, False)
    )
    before = run(tensors)
    changed = run(tuple(jnp.where(h[0], x + 1e3, x) for x, h in zip(tensors, hidden, strict=True)))
    for a, b in zip(jax.tree.leaves(before.last), jax.tree.leaves(changed.last), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert np.any(a[1] != b[1])
    assert np.all(np.asarray(before.scores[0]) != np.asarray(changed.scores[0]))


@pytest.mark.parametrize("num_tensors", [1, 2, 3])
def test_folds_hide_what_the_paper_says(num_tensors, rng):
    shapes = ((9, 4, 3), (9, 5), (9, 2, 2, 2))[:num_tensors]
    masks = [rng.random(shape) > 0.1 for shape in shapes]
    if num_tensors > 1:
        masks[0][2] = False
    hidden = linked.draw_folds([jnp.asarray(m) for m in masks], 4, key=jax.random.key(0))
    for hide, mask in zip(hidden, masks, strict=True):
        assert hide.shape == (4, *mask.shape)
        assert not np.any(np.asarray(hide) & ~mask)
        rows = np.asarray(hide).reshape(4, 9, -1).sum(axis=2)
        observed = mask.reshape(9, -1).sum(axis=1)
        if num_tensors == 1:  # the entries are divided
            np.testing.assert_array_equal(np.asarray(hide).sum(axis=0), mask)
            continue
        whole = (rows == observed) & (observed > 0)
        # Every complete sample is hidden as a whole by some fold, in no fold by all tensors.
        complete = np.arange(9) != 2
        assert np.all(whole.any(axis=0)[complete])
        for fold in range(4):
            samples = observed[whole[fold]].sum()
            assert samples <= rows[fold].sum() <= 2 * observed[complete].sum()
            together = [
                (np.asarray(h)[fold].reshape(9, -1).sum(1) == m.reshape(9, -1).sum(1))
                for h, m in zip(hidden, masks, strict=True)
            ]
            assert not np.any(np.all(together, axis=0))


BAD = {
    "too many folds": ({"num_folds": 9}, "got 9 folds, expected at most the 8 complete samples"),
    "one fold": ({"num_folds": 1}, "num_folds 1"),
    "rank 0": ({"rank": 0}, "rank 0"),
    "no starts": ({"num_starts": 0}, "num_starts 0"),
    "falling penalties": ({"penalties": jnp.array([1.0, 0.5])}, "increasing"),
    "negative penalties": ({"penalties": jnp.array([-1.0, 0.5])}, "from 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name, rng):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        linked.select_penalty(planted(rng), key=jax.random.key(0), **(OPTIONS | change))


def test_bad_data_are_refused(rng):
    tensors = planted(rng)
    full = [jnp.ones(shape, bool) for shape in SHAPES]

    def select(tensors, masks):
        return linked.select_penalty(tensors, masks=masks, key=jax.random.key(0), **OPTIONS)

    with pytest.raises(ValueError, match="a mask of tensor 1 that is False everywhere"):
        select(tensors, (full[0], ~full[1]))
    with pytest.raises(ValueError, match="sample 3 hidden in every tensor"):
        select(tensors, tuple(mask.at[3].set(False) for mask in full))
    with pytest.raises(ValueError, match="tensor 0 with 1 NaN"):
        select((tensors[0].at[0, 0, 0].set(jnp.nan), tensors[1]), None)
    with pytest.raises(ValueError, match="8 samples in mode 0"):
        select((tensors[0], tensors[1][:7]), None)


def test_nan_under_a_mask_is_harmless():
    tensors = planted(np.random.default_rng(0))
    masks = (jnp.ones(SHAPES[0], bool).at[0, 0, 0].set(False), jnp.ones(SHAPES[1], bool))
    found = [
        linked.select_penalty(
            (tensors[0].at[0, 0, 0].set(value), tensors[1]),
            masks=masks,
            key=jax.random.key(0),
            **OPTIONS,
        )
        for value in (0.0, jnp.nan)
    ]
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_theory_penalties_of_the_spec():
    np.testing.assert_allclose(linked.theory_penalty([(10, 10, 8)]), 7.6, atol=0.05)
    np.testing.assert_allclose(linked.theory_penalty([(10, 14, 5, 3)]), 9.76, atol=0.005)
    both = [(10, 10, 8), (10, 14, 5, 3)]
    each = [linked.theory_penalty([shape]) for shape in both]
    np.testing.assert_allclose(linked.theory_penalty(both), np.mean(each))
    matrix = 2 * (np.sqrt(9) + np.sqrt(4))
    np.testing.assert_allclose(linked.theory_penalty([(9, 4)], 2.0), matrix)
    weighted = linked.theory_penalty(both, jnp.array([1.0, 2.0]))
    parts = [linked.theory_penalty([s], t) for s, t in zip(both, (1.0, 2.0), strict=True)]
    np.testing.assert_allclose(weighted, np.mean(parts))
    grid = linked.theory_grid(both)
    np.testing.assert_allclose(grid[4], linked.theory_penalty(both), rtol=1e-6)
    np.testing.assert_allclose(grid[-1] / grid[0], 100, rtol=1e-6)


def test_a_component_of_that_strength_is_at_the_threshold():
    """The theory penalty is where d_glob equals the norm of the noise."""
    for shape in ((6, 5, 4), (3, 4, 5, 6)):
        order, tau = len(shape), 0.7
        sigma = float(linked.theory_penalty([shape], tau))
        strength = tau * sum(np.sqrt(shape))
        glob = (order - 1) / (order - 2) * (sigma * (order - 2)) ** (order / (2 * order - 2))
        np.testing.assert_allclose(glob, strength, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1])
def test_marchenko_pastur_median(ratio, rng):
    """Against the singular values of large Gaussian matrices."""
    large = 600
    draws = rng.standard_normal((round(ratio * large), large))
    median = np.median(np.linalg.svd(draws, compute_uv=False) ** 2 / large)
    np.testing.assert_allclose(theory._marchenko_pastur_median(ratio), median, rtol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_found_under_a_signal(seed):
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal((size, 2)) for size in (30, 20, 12)]
    signal = np.einsum("ir,jr,kr->ijk", *factors)
    x = signal + 0.5 * rng.standard_normal(signal.shape)
    found = float(linked.noise_scale(jnp.asarray(x)))
    assert 0.47 < found < 0.6
    narrow = linked.noise_scale(jnp.asarray(x, jnp.float32))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, found, rtol=1e-4)


def test_bad_noise_is_refused():
    with pytest.raises(ValueError, match="no shapes"):
        linked.theory_penalty([])
    with pytest.raises(ValueError, match=r"noise of shape \(3,\)"):
        linked.theory_penalty([(4, 3)], jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(4,\), expected two modes"):
        linked.theory_penalty([(4,)])
    with pytest.raises(ValueError, match="num_penalties 0"):
        linked.theory_grid([(4, 3)], num_penalties=0)
