import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr.cp import fitting, tensor, validation

SHAPE, MAX_RANK, FOLDS, STARTS = (5, 6, 7), 3, 3, 2
OPTIONS = {"num_folds": FOLDS, "num_starts": STARTS}


def score(x, key, mask=None, max_iters=100):
    return validation.cross_validate(
        x, MAX_RANK, key=key, mask=mask, max_iters=max_iters, **OPTIONS
    )


compiled = jax.jit(score, static_argnames="max_iters")
split = jax.jit(validation._split, static_argnums=2)


def noisy(rng, rank=2, noise=0.05):
    factors = [rng.standard_normal((size, rank)) for size in SHAPE]
    return np.einsum("ir,jr,kr->ijk", *factors) + noise * rng.standard_normal(SHAPE)


def folds_of(key, mask):
    """Return the number of the fold of every entry."""
    return np.asarray(split(jax.random.split(key)[0], jnp.asarray(mask), FOLDS))


@functools.cache
def compiled_fit(rank):
    def fit(x, mask, start):
        init = tensor.CPTensor(jnp.ones(rank), start)
        return fitting.als(x, init=init, mask=mask, max_iters=20, tol=1e-6)

    return jax.jit(fit)


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_rank_is_found(seed):
    rng = np.random.default_rng(seed)
    found = compiled(noisy(rng), jax.random.key(seed))
    assert found.best_rank >= found.one_standard_error_rank == 2
    assert found.mean[0] - found.standard_error[0] > found.mean[1] + found.standard_error[1]


def test_scores_are_those_of_fits_of_each_rank_by_itself(rng, key):
    x, mask = noisy(rng), rng.random(SHAPE) < 0.9
    found = compiled(np.where(mask, x, np.nan), key, mask, max_iters=20)
    fold, start_key = folds_of(key, mask), jax.random.split(key)[1]
    starts = validation._draw_starts(start_key, SHAPE, MAX_RANK, STARTS, x.dtype)
    for rank in range(1, MAX_RANK + 1):
        for k in range(FOLDS):
            held = fold == k
            fits = [
                compiled_fit(rank)(
                    x, mask & ~held, tuple(np.asarray(draw[i, :, :rank]) for draw in starts)
                )
                for i in range(STARTS)
            ]
            best, _ = min(fits, key=lambda fit: fit[1].objective[-1])
            model = np.einsum("ir,jr,kr->ijk", *best.factors)
            expected = np.sqrt(np.sum((x - model)[held] ** 2) / np.sum(x[held] ** 2))
            np.testing.assert_allclose(found.scores[rank - 1, k], expected, rtol=1e-6)


def test_folds_are_disjoint_and_even(key):
    for seed in range(3):
        mask = np.random.default_rng(seed).random(SHAPE) < 0.7
        fold = folds_of(jax.random.key(seed), mask)
        np.testing.assert_array_equal(fold >= 0, mask)
        assert np.ptp(np.bincount(fold[mask], minlength=FOLDS)) <= 1
    assert np.any(folds_of(key, mask) != folds_of(jax.random.key(9), mask))


def test_held_out_values_do_not_reach_their_fit(rng, key):
    x = noisy(rng)
    held = folds_of(key, np.ones(SHAPE, bool)) == 0
    change = np.where(held, rng.standard_normal(SHAPE), 0)

    def error(step):
        data = x + step * change
        return np.asarray(compiled(data, key).scores[:, 0] ** 2 * np.sum(data[held] ** 2))

    # With one and the same fit the squared error is a parabola of curvature 2 |change|^2.
    curvature = error(1) + error(-1) - 2 * error(0)
    np.testing.assert_allclose(curvature, 2 * np.sum(change**2), rtol=1e-9)


def test_hidden_values_do_not_matter(rng, key):
    x, mask = noisy(rng), rng.random(SHAPE) < 0.8
    found = compiled(x, key, mask)
    jax.tree.map(
        np.testing.assert_array_equal, compiled(np.where(mask, x, np.nan), key, mask), found
    )


def test_a_full_mask_is_none(rng, key):
    x = noisy(rng)
    found, plain = compiled(x, key, np.ones(SHAPE, bool)), compiled(x, key)
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-9)


def test_a_slice_without_training_entries_is_predicted_as_zero(rng, key):
    x, mask = noisy(rng), np.ones(SHAPE, bool)
    mask[1] = False
    mask[1, 2, 3] = True
    fold = folds_of(key, mask)[1, 2, 3]
    scores = []
    for value in (-2, 2):
        x[1, 2, 3] = value
        scores.append(compiled(x, key, mask, max_iters=20).scores[:, fold])
    np.testing.assert_allclose(*scores, rtol=1e-12)


def test_ranks_are_chosen_by_mean_and_standard_error():
    scores = np.array([[0.5, 0.5, 0.8], [0.3, 0.3, 0.33], [0.2, 0.3, 0.4], [0.3, 0.3, 0.4]])
    found = jax.jit(validation._summarize)(scores)
    mean, error = scores.mean(axis=1), scores.std(axis=1, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-14)
    assert (found.best_rank, found.one_standard_error_rank) == (3, 2)
    assert mean[1] <= mean[2] + error[2] < mean[0]
    failed = jax.jit(validation._summarize)(np.where(scores == 0.8, np.nan, scores))
    assert (failed.best_rank, failed.one_standard_error_rank) == (3, 2)


def test_batch_is_the_loop(rng, key):
    batch = np.stack([noisy(rng) for _ in range(2)])
    mask = np.ones(SHAPE, bool)
    one = functools.partial(score, key=key, mask=mask, max_iters=20)
    found = jax.jit(jax.vmap(one))(batch)
    for i, x in enumerate(batch):
        expected = compiled(x, key, mask, max_iters=20)
        np.testing.assert_allclose(found.scores[i], expected.scores, rtol=1e-6)


def test_single_precision_stays(rng, key):
    found = jax.eval_shape(score, noisy(rng).astype(np.float32), key)
    assert {leaf.dtype for leaf in found[:3]} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in found[3:]} == {np.dtype(np.int32)}
    assert found.scores.shape == (MAX_RANK, FOLDS)


def test_bad_arguments_are_refused(key):
    x = np.ones((3, 4))
    few = np.zeros((3, 4), bool)
    few[0, :4] = True
    for arguments, message in [
        ((x, 0), "max_rank 0, expected an integer from 1"),
        ((np.ones(3), 1), r"x of shape \(3,\), expected 2 axes"),
        ((np.ones((3, 4), int), 1), "x of dtype int64, expected float32 or float64"),
    ]:
        with pytest.raises(ValueError, match=f"^cross_validate: got {message}"):
            validation.cross_validate(*arguments, key=key)
    for options, message in [
        ({"num_folds": 1}, "num_folds 1, expected an integer from 2"),
        ({"num_starts": 0}, "num_starts 0, expected an integer from 1"),
        ({"max_iters": 0}, "max_iters 0, expected an integer from 1"),
        ({"ridge": -1.0}, "ridge -1.0, expected a non-negative number"),
        ({"mask": np.ones((3, 5), bool)}, r"mask of shape \(3, 5\), expected shape \(3, 4\)"),
        ({"mask": x}, "mask of dtype float64, expected bool"),
        ({"mask": few}, "4 observed entries, expected 5 or more as there are folds"),
        ({"num_folds": 13}, "12 observed entries, expected 13 or more as there are folds"),
    ]:
        with pytest.raises(ValueError, match=f"^cross_validate: got {message}"):
            validation.cross_validate(x, 1, key=key, **options)
