"""Choosing the penalty, and with it the ranks, by the two-step cross-validation of MULTIFAC.

A driver for the host: it draws the folds, runs one compiled program over them, and reads the
scores. That program is the same for every step and for whatever ranks come out: components are
dropped by zero columns, and the fits to all data run in the lanes of the folds.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from fedlr import _checks, iteration, masking
from fedlr.linked import fitting, model

__all__ = ["PenaltySelection", "draw_folds", "select_penalty"]

# Two calls of the program run at a time: XLA gives a loop of small operations one core.
_CHUNKS = 2


class PenaltySelection(NamedTuple):
    """What the cross-validation chose, and why.

    Attributes:
        fit: Fit to all data with the chosen pattern at `penalty`, in canonical form.
        free_fit: Fit to all data at `penalty_1se`, whose zeros are the pattern; canonical too.
        penalty: Penalty of least mean score in the second step, a scalar.
        penalty_1se: Largest penalty within one standard error of the least mean score in the
            first step, a scalar.
        active: The pattern, bool (K, R): in which tensors a component of `fit` may be active.
        penalties: The grid, shape (P,).
        scores: Relative error of the hidden entries, mean over the tensors, of both steps, every
            penalty and fold, shape (2, P, folds).
    """

    fit: model.LinkedCP
    free_fit: model.LinkedCP
    penalty: Float[Array, ""]
    penalty_1se: Float[Array, ""]
    active: Bool[Array, "tensors rank"]
    penalties: Float[Array, " penalties"]
    scores: Float[Array, "2 penalties folds"]

    @property
    def mean_scores(self) -> Float[Array, "2 penalties"]:
        """Scores averaged over the folds."""
        return jnp.mean(self.scores, axis=-1)

    @property
    def standard_errors(self) -> Float[Array, "2 penalties"]:
        """Standard errors of the mean scores, by the population standard deviation."""
        return jnp.std(self.scores, axis=-1) / np.sqrt(self.scores.shape[-1])


def select_penalty(
    tensors: Sequence[Float[Array, "samples ..."]],
    *,
    key: Key[Array, ""],
    rank: int = 20,
    penalties: Float[Array, " penalties"] | None = None,
    masks: Sequence[Bool[Array, "samples ..."]] | None = None,
    num_folds: int = 10,
    num_starts: int = 5,
    max_iters: int = 301,
    tol: float = 1e-8,
    extrapolate: bool = False,
    progress: bool = True,
) -> PenaltySelection:
    """Choose the penalty and the ranks of `multifac` by cross-validation in two steps.

    1. For every fold the best of several random starts at penalty 0, by the objective, begins a
       path over increasing penalties, and what was hidden is compared with the fit. The largest
       penalty whose mean score is within one standard error of the least one is used to fit all
       data, tempered: the zeros of that fit are the pattern of shared and individual components.
    2. The same with this pattern kept, from new starts. The penalty of the least mean score is
       used to fit all data from the fit of step 1.

    Args:
        tensors: K >= 1 tensors with a common first mode, float32 or float64.
        key: Random key of the folds and the starts.
        rank: Number R of components to begin with.
        penalties: Increasing penalties, from 0; by default 20, log-spaced from 0.1 to 500, for
            which tensors should have entries of order 1. `theory_grid` is a shorter choice.
        masks: True = observed, a bool array for every tensor; all observed if None.
        num_folds: Number of folds, at least 2 and at least K, at most the number of samples that
            are hidden nowhere.
        num_starts: Number of random starts of every fold. Fits to all data have at least as many.
        max_iters: Largest number of sweeps at every penalty.
        tol: Relative change of the objective at which to stop.
        extrapolate: Whether to extrapolate the sweeps, see `multifac`.
        progress: Whether to show a progress bar.

    Returns:
        The choice, its fits and the scores.

    Raises:
        ValueError: If the tensors or masks do not fit together, an observed entry is not finite,
            nothing is observed of a tensor, a sample is hidden in every tensor, there are fewer
            complete samples than folds, the penalties are no increasing vector, or a count is
            out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> draw = linked.random_init((jnp.ones((9, 4, 3)),), 1, key=jax.random.key(0))
        >>> choice = linked.select_penalty(
        ...     linked.to_dense(draw), key=jax.random.key(1), rank=2, num_folds=2, num_starts=1,
        ...     penalties=jnp.array([0.01, 1.0]), max_iters=50, tol=1e-5, progress=False,
        ... )
        >>> choice.scores.shape
        (2, 2, 2)

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, and its published implementation, whose
        defaults these are, except: the stopping rule is relative, hidden entries do not begin at
        random draws, the fit to all data begins at the best of 25 starts with the defaults, not of
        ten, and the final fit really begins at the fit of step 1. A single tensor has no shared
        part that would predict a hidden sample, so its folds hide entries only.
    """
    data, seen = _check_data(tensors, masks)
    grid = _check_options(data, seen, penalties, num_folds, num_starts, rank)
    dtype = data[0].dtype
    fold_key, first_key, full_key, second_key = jax.random.split(key, 4)
    hidden = draw_folds(seen, num_folds, key=fold_key)
    lanes = -(-num_folds // _CHUNKS)
    program = _compile(data, seen, grid, lanes, num_starts, rank, (max_iters, tol, extrapolate))

    def starts(key: Array, count: int, active: Array) -> model.LinkedCP:
        keys = jax.random.split(key, count * num_starts).reshape(count, num_starts)
        drawn = jax.vmap(jax.vmap(lambda k: model.random_init(data, rank, key=k)))(keys)
        return _with_pattern(drawn, active)

    def over_folds(key: Array, active: Array) -> np.ndarray:
        """Score every penalty on every fold: (P, folds)."""
        drawn = starts(key, num_folds, active)
        path = jnp.concatenate([jnp.zeros(1, dtype), grid])
        chunks = [np.arange(num_folds)[c::_CHUNKS] for c in range(_CHUNKS)]

        def one(chunk: np.ndarray) -> np.ndarray:
            padded = np.resize(chunk, lanes)  # the lanes of a short chunk repeat its folds
            picked = jax.tree.map(lambda leaf: leaf[padded], (hidden, drawn))
            scores = program(data, seen, *picked, path).scores
            bar.update()
            return np.asarray(scores)[: len(chunk)]

        with ThreadPoolExecutor(_CHUNKS) as pool:
            scores = np.empty((num_folds, len(grid)), dtype)
            for chunk, found in zip(chunks, pool.map(one, chunks), strict=True):
                scores[chunk] = found
        return scores.T

    def on_all_data(drawn: model.LinkedCP, stages: Sequence[float]) -> model.LinkedCP:
        """Fit at one penalty after another; of the lanes the best at the first is returned."""
        nothing = tuple(jnp.zeros((lanes, *x.shape), bool) for x in data)
        # Repeated penalties cost two sweeps each and keep the shape of the path.
        path = jnp.asarray([*stages, *[stages[-1]] * (len(grid) + 1 - len(stages))], dtype)
        found = program(data, seen, nothing, drawn, path)
        bar.update()
        best = int(jnp.argmin(jnp.where(jnp.isnan(found.first), jnp.inf, found.first)))
        return model.normalize(jax.tree.map(lambda leaf: leaf[best], found.last))

    everywhere = jnp.ones((len(data), rank), bool)
    with tqdm.tqdm(total=2 * _CHUNKS + 2, disable=not progress, unit="fit") as bar:
        first = over_folds(first_key, everywhere)
        penalty_1se = float(grid[_one_standard_error(first)])
        tempering = [0.0, 1.0, penalty_1se] if penalty_1se > 1 else [0.0, penalty_1se]
        free_fit = on_all_data(starts(full_key, lanes, everywhere), tempering)
        active = model.active_components(free_fit)
        second = over_folds(second_key, active)
        penalty = float(grid[int(np.argmin(second.mean(axis=1)))])
        pattern = _with_pattern(free_fit, active)
        copies = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (lanes, num_starts, *leaf.shape)), pattern
        )
        fit = on_all_data(copies, [penalty])
    return PenaltySelection(
        fit,
        free_fit,
        jnp.asarray(penalty, dtype),
        jnp.asarray(penalty_1se, dtype),
        active,
        grid,
        jnp.asarray(np.stack([first, second])),
    )


def draw_folds(
    masks: Sequence[Bool[Array, "samples ..."]], num_folds: int, *, key: Key[Array, ""]
) -> tuple[Bool[Array, "folds samples ..."], ...]:
    """Draw what every fold hides, on the host.

    The samples that are complete, hidden as a whole in no tensor, are divided into subsets. Fold i
    hides those of subset ``i + k`` (modulo the number of folds) in tensor k, and as many random
    entries of what is left observed in it. Of a single tensor the observed entries are divided.

    Args:
        masks: True = observed, a bool array for every tensor, concrete.
        num_folds: Number of folds, at least 2 and at least the number of tensors.
        key: Random key.

    Returns:
        For every tensor True = hidden by the fold, bool (folds, n, ...).

    Raises:
        ValueError: If there are fewer folds than tensors, than 2, or more than complete samples,
            or a fold would hide nothing, or all that is observed, of a tensor.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> masks = (jnp.ones((6, 3), bool), jnp.ones((6, 2, 2), bool))
        >>> hidden = linked.draw_folds(masks, 3, key=jax.random.key(0))
        >>> [h.sum(axis=tuple(range(1, h.ndim))).tolist() for h in hidden]
        [[12, 12, 12], [16, 16, 16]]

    Reference: the published implementation of Kang, Rao and Lock 2025, for two tensors.
    """
    observed = [np.asarray(mask) for mask in masks]
    _check_folds("draw_folds", observed, num_folds)
    seeds = np.asarray(jax.random.bits(key, (4,)))
    rng = np.random.default_rng(seeds)
    if len(observed) == 1:
        return (jnp.asarray(_divide_entries(observed[0], num_folds, rng)),)
    complete = np.flatnonzero(_complete_samples(observed))
    subsets = np.array_split(rng.permutation(complete), num_folds)
    hidden = [np.zeros((num_folds, *mask.shape), bool) for mask in observed]
    for fold in range(num_folds):
        for k, mask in enumerate(observed):
            hide = hidden[k][fold]
            hide[subsets[(fold + k) % num_folds]] = True
            hide &= mask
            left = np.flatnonzero(mask & ~hide)
            chosen = rng.permutation(left)[: min(hide.sum(), len(left) - 1)]
            hide.reshape(-1)[chosen] = True
            if not hide.any():
                got = f"a fold that hides nothing of tensor {k}"
                raise _checks.fail("draw_folds", got, "observed entries in every complete sample")
    return tuple(jnp.asarray(hide) for hide in hidden)


class _Paths(NamedTuple):
    """Per lane: objective at the first penalty, scores at the others, and the last fit."""

    first: Array
    scores: Array
    last: model.LinkedCP


def _paths(
    tensors: tuple,
    masks: tuple,
    hidden: tuple,
    starts: model.LinkedCP,
    path: Array,
    *,
    options: tuple[int, float, bool],
) -> _Paths:
    """Run every lane: the best of its starts at the first penalty, then the rest of the path."""
    max_iters, tol, extrapolate = options

    def lane(hidden: tuple, starts: model.LinkedCP) -> _Paths:
        seen = tuple(mask & ~hide for mask, hide in zip(masks, hidden, strict=True))

        def fit(start: model.LinkedCP, penalty: Array) -> tuple:
            return fitting.multifac(
                tensors,
                init=start,
                penalty=penalty,
                masks=seen,
                max_iters=max_iters,
                tol=tol,
                extrapolate=extrapolate,
            )

        begun, info = iteration.best(*jax.vmap(lambda start: fit(start, path[0]))(starts))

        def stage(start: model.LinkedCP, penalty: Array) -> tuple[model.LinkedCP, Array]:
            found, _ = fit(model.balance(start), penalty)
            return found, _score(found, tensors, hidden)

        last, scores = lax.scan(stage, begun, path[1:])
        return _Paths(info.objective[-1], scores, last)

    return jax.vmap(lane)(hidden, starts)


_program = jax.jit(_paths, static_argnames="options")


def _compile(
    tensors: tuple,
    masks: tuple,
    grid: Array,
    lanes: int,
    num_starts: int,
    rank: int,
    options: tuple[int, float, bool],
) -> Callable:
    """Compile the program for its lanes here: threads do not inherit the settings of JAX."""

    def stacked(like: Array, *axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*axes, *like.shape), like.dtype)

    start = jax.eval_shape(lambda key: model.random_init(tensors, rank, key=key), jax.random.key(0))
    return _program.lower(
        tensors,
        masks,
        tuple(stacked(mask, lanes) for mask in masks),
        jax.tree.map(lambda leaf: stacked(leaf, lanes, num_starts), start),
        jax.ShapeDtypeStruct((len(grid) + 1,), grid.dtype),
        options=options,
    ).compile()


def _score(fit: model.LinkedCP, tensors: tuple, hidden: tuple) -> Array:
    """Average the relative error of the hidden entries over the tensors; 0 where none is hidden."""
    errors = []
    for x, hide, estimate in zip(tensors, hidden, model.to_dense(fit), strict=True):
        size = masking.masked_norm(x, hide)
        error = masking.masked_norm(x - estimate, hide)
        errors.append(jnp.where(size > 0, error / jnp.where(size > 0, size, 1), 0))
    return jnp.mean(jnp.stack(errors))


def _one_standard_error(scores: np.ndarray) -> int:
    """Return the last penalty whose mean score is within a standard error of the least."""
    mean = scores.mean(axis=1)
    least = int(np.argmin(mean))
    error = scores[least].std() / np.sqrt(scores.shape[1])
    return int(np.flatnonzero(mean <= mean[least] + error)[-1])


def _with_pattern(fit: model.LinkedCP, active: Array) -> model.LinkedCP:
    """Make the columns of a tensor's own factors zero where a component is not active."""

    def keep(factor: Array, columns: Array) -> Array:
        return jnp.where(jnp.expand_dims(columns, tuple(range(factor.ndim - 1))), factor, 0)

    own = [tuple(keep(a, active[k]) for a in factors) for k, factors in enumerate(fit.factors)]
    return fit._replace(factors=tuple(own))


def _complete_samples(observed: Sequence[np.ndarray]) -> np.ndarray:
    """Tell which samples are hidden as a whole in no tensor."""
    rows = [mask.reshape(len(mask), -1).any(axis=1) for mask in observed]
    return np.all(rows, axis=0)


def _divide_entries(mask: np.ndarray, num_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Divide the observed entries of a tensor into folds."""
    parts = np.array_split(rng.permutation(np.flatnonzero(mask)), num_folds)
    hidden = np.zeros((num_folds, mask.size), bool)
    for fold, part in enumerate(parts):
        hidden[fold, part] = True
    return hidden.reshape(num_folds, *mask.shape)


def _check_data(tensors: Sequence[Array], masks: Sequence[Array] | None) -> tuple:
    """Refuse data that no fit can use; return them with masks and zeros under the masks."""
    tensors = model.check_tensors("select_penalty", tensors)
    if masks is None:
        masks = tuple(jnp.ones(x.shape, bool) for x in tensors)
    masks = model.check_masks("select_penalty", tensors, masks)
    data = tuple(jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True))
    for k, (x, mask) in enumerate(zip(data, masks, strict=True)):
        _checks.check_finite("select_penalty", f"tensor {k}", x)
        if not np.asarray(mask).any():
            got = f"a mask of tensor {k} that is False everywhere"
            raise _checks.fail("select_penalty", got, "an observed entry")
    rows = [np.asarray(fitting.observed_samples(mask)) for mask in masks]
    unseen = np.flatnonzero(~np.any(rows, axis=0))
    if unseen.size:
        got = f"sample {unseen[0]} hidden in every tensor"
        raise _checks.fail("select_penalty", got, "an observed entry of every sample")
    return data, masks


def _check_folds(function: str, observed: Sequence[np.ndarray], num_folds: int) -> None:
    """Refuse a number of folds that the masks cannot give."""
    _checks.check_count(function, "num_folds", num_folds, minimum=max(2, len(observed)))
    if len(observed) == 1:
        available, unit = int(observed[0].sum()), "observed entries"
    else:
        available, unit = int(_complete_samples(observed).sum()), "complete samples"
    if num_folds > available:
        raise _checks.fail(function, f"{num_folds} folds", f"at most the {available} {unit}")


def _check_options(
    tensors: tuple, masks: tuple, penalties: Array | None, num_folds: int, starts: int, rank: int
) -> Array:
    """Refuse options that are out of range; return the grid of penalties."""
    _checks.check_count("select_penalty", "rank", rank)
    _checks.check_count("select_penalty", "num_starts", starts)
    _check_folds("select_penalty", [np.asarray(mask) for mask in masks], num_folds)
    grid = np.geomspace(0.1, 500, 20) if penalties is None else np.asarray(penalties)
    if grid.ndim != 1 or len(grid) < 2 or not np.all(np.diff(grid) > 0) or not grid[0] >= 0:
        got = f"penalties {grid.tolist()}"
        raise _checks.fail("select_penalty", got, "two or more increasing numbers from 0")
    return jnp.asarray(grid, tensors[0].dtype)
