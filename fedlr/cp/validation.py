"""The rank of a CP decomposition by cross-validation: fits that do not see some of the entries."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jaxtyping import Array, Bool, Float, Int, Key

from fedlr import _checks
from fedlr.cp import fitting, tensor

__all__ = ["RankScores", "cross_validate"]

_TOL = 1e-6


class RankScores(NamedTuple):
    """Errors on held-out entries for the ranks 1 .. max_rank.

    Attributes:
        scores: Held-out relative error of rank r + 1 and fold k, shape (max_rank, num_folds).
        mean: Mean over the folds, shape (max_rank,).
        standard_error: Standard error of that mean, shape (max_rank,).
        best_rank: Rank of smallest mean, int32 scalar.
        one_standard_error_rank: Smallest rank whose mean is within one standard error of the
            smallest one, int32 scalar.
    """

    scores: Float[Array, "max_rank num_folds"]
    mean: Float[Array, " max_rank"]
    standard_error: Float[Array, " max_rank"]
    best_rank: Int[Array, ""]
    one_standard_error_rank: Int[Array, ""]


def cross_validate(
    x: Float[Array, "..."],
    max_rank: int,
    *,
    key: Key[Array, ""],
    mask: Bool[Array, "..."] | None = None,
    num_folds: int = 5,
    num_starts: int = 3,
    ridge: float | Float[Array, ""] = 0.0,
    max_iters: int = 200,
) -> RankScores:
    """Score the ranks 1 .. max_rank of a CP decomposition on entries held out of the fit.

    The observed entries are split at random into disjoint folds whose sizes differ by one at
    most. For every rank and fold, `als` fits the other entries from `num_starts` random starts,
    and the fit of smallest *training* objective is scored on the fold by

        sqrt(sum over the fold of (X - Xhat)^2 / sum over the fold of X^2).

    The means of the ranks come with the standard error of a mean over the folds, which takes the
    folds for independent. The noise is scored as well, so no rank comes below its share.

    Starts are the same for all folds, and that of rank r is the first r columns of that of rank
    `max_rank`, with zeros behind: all fits are one program. A slice that has no training entry
    is predicted as zero. Every fit works with all `max_rank` columns under a mask, see `als` for
    its memory; ranks and folds run one after another, the starts side by side.

    Args:
        x: Tensor of N >= 2 modes, float32 or float64. Hidden entries may hold anything, also NaN.
        max_rank: Largest rank to score, at least 1; *static*.
        key: Random key of the folds and the starts.
        mask: True = observed, the shape of `x`; all if None.
        num_folds: Number of folds, at least 2; *static*.
        num_starts: Number of starts of every fit, at least 1; *static*.
        ridge: Penalty of `als`, which helps where a rank is too large for the entries that are
            left; a number from 0, traced.
        max_iters: Largest number of sweeps of every fit, at least 1; *static*. A fit ends earlier
            where a sweep lowers the objective by less than 1e-6 of it.

    Returns:
        The scores, and the ranks they choose. The one of the one-standard-error rule is the
        cautious choice.

    Raises:
        ValueError: If `x`, the mask or a count does not fit, a concrete `ridge` is negative, or
            there are fewer observed entries than folds, as far as the mask is concrete.

    Example:
        >>> import jax
        >>> from fedlr import cp
        >>> x = cp.to_dense(cp.random_init((6, 7, 8), 2, key=jax.random.key(0)))
        >>> x = x + 0.01 * jax.random.normal(jax.random.key(1), x.shape)
        >>> found = cp.cross_validate(x, 3, key=jax.random.key(2), num_folds=3)
        >>> int(found.one_standard_error_rank)
        2

    Reference: Wold 1978, "Cross-validatory estimation of the number of components in factor and
        principal components models", for entries held out in no order; Hastie, Tibshirani and
        Friedman 2009, "The elements of statistical learning", section 7.10, for the
        one-standard-error rule.
    """
    x, mask = _check(x, mask, max_rank, num_folds, num_starts)
    _checks.check_non_negative("cross_validate", "ridge", ridge)
    _checks.check_count("cross_validate", "max_iters", max_iters)
    fold_key, start_key = jax.random.split(key)
    fold_of = _split(fold_key, mask, num_folds)
    starts = _draw_starts(start_key, x.shape, max_rank, num_starts, x.dtype)

    def score(rank: Array, fold: Array) -> Array:
        held = fold_of == fold
        training = mask & ~held

        def fit(start: tuple[Array, ...]) -> tuple[tensor.CPTensor, Array]:
            init = tensor.CPTensor(jnp.ones(max_rank, x.dtype), _restrict(start, training, rank))
            found, info = fitting.als(
                x, init=init, mask=training, ridge=ridge, max_iters=max_iters, tol=_TOL
            )
            return found, info.objective[-1]

        fits, objectives = jax.vmap(fit)(starts)
        best = jnp.argmin(jnp.where(jnp.isnan(objectives), jnp.inf, objectives))
        return tensor.relative_error(x, jax.tree.map(lambda leaf: leaf[best], fits), mask=held)

    # Fits of different ranks need different numbers of sweeps. On a CPU, vmap over all pairs took
    # 3 times the time and 25 times the memory (30 x 31 x 32, 6 ranks, 5 folds, 3 starts, float32).
    ranks, folds = np.indices((max_rank, num_folds), np.int32).reshape(2, -1)
    scores = lax.map(lambda pair: score(*pair), (jnp.asarray(ranks + 1), jnp.asarray(folds)))
    return _summarize(scores.reshape(max_rank, num_folds))


def _summarize(scores: Array) -> RankScores:
    """Average over the folds and choose the ranks."""
    mean = jnp.mean(scores, axis=1)
    error = jnp.std(scores, axis=1, ddof=1) / np.sqrt(scores.shape[1]).astype(scores.dtype)
    best = jnp.nanargmin(mean)
    simplest = jnp.argmax(mean <= mean[best] + error[best])
    return RankScores(
        scores, mean, error, best.astype(jnp.int32) + 1, simplest.astype(jnp.int32) + 1
    )


def _split(key: Array, mask: Array, num_folds: int) -> Array:
    """Number the observed entries 0, 1, ..., num_folds - 1, 0, ... in random order; hidden -1."""
    order = jax.random.permutation(key, jnp.arange(mask.size, dtype=jnp.int32))
    observed = mask.reshape(-1)[order]
    fold = (jnp.cumsum(observed, dtype=jnp.int32) - 1) % num_folds
    fold = jnp.zeros_like(fold).at[order].set(jnp.where(observed, fold, -1))
    return fold.reshape(mask.shape)


def _draw_starts(
    key: Array, shape: tuple[int, ...], rank: int, num_starts: int, dtype: jnp.dtype
) -> tuple[Array, ...]:
    """Draw factors with N(0, 1) entries, (num_starts, I_n, rank) for every mode."""
    # A draw of three axes takes 2 s to compile on a CPU, one of a single axis 0.4 s.
    size = (num_starts, sum(shape), rank)
    draws = jax.random.normal(key, (math.prod(size),), dtype).reshape(size)
    return tuple(jnp.split(draws, np.cumsum(shape)[:-1], axis=1))


def _restrict(start: tuple[Array, ...], training: Array, rank: Array) -> tuple[Array, ...]:
    """Keep the first `rank` columns, and the rows of slices with a training entry."""
    is_used = jnp.arange(start[0].shape[1], dtype=jnp.int32) < rank
    factors = []
    for mode, factor in enumerate(start):
        seen = jnp.any(training, axis=tuple(m for m in range(training.ndim) if m != mode))
        factors.append(jnp.where(seen[:, None] & is_used[None, :], factor, 0))
    return tuple(factors)


def _check(
    x: Array, mask: Array | None, max_rank: int, num_folds: int, num_starts: int
) -> tuple[Array, Array]:
    """Refuse data that cannot be split so; return them with a mask."""
    _checks.check_floating("cross_validate", x=x)
    x = jnp.asarray(x)
    _checks.check_ndim("cross_validate", "x", x, 2, max(2, x.ndim))
    _checks.check_count("cross_validate", "max_rank", max_rank)
    _checks.check_count("cross_validate", "num_folds", num_folds, minimum=2)
    _checks.check_count("cross_validate", "num_starts", num_starts)
    if mask is not None:
        _checks.check_mask("cross_validate", mask, x.shape)
    is_known = mask is not None and not isinstance(mask, core.Tracer)
    observed = int(np.sum(np.asarray(mask))) if is_known else x.size
    if observed < num_folds:
        got = f"{observed} observed entries"
        raise _checks.fail("cross_validate", got, f"{num_folds} or more as there are folds")
    return x, jnp.ones(x.shape, bool) if mask is None else jnp.asarray(mask)
