"""Fitting the linked CP model: penalized alternating least squares, missing data, and its use."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from fedlr import _alternating, _checks, _partials, _precision, iteration, masking
from fedlr.linked import model

__all__ = ["Explained", "explained", "impute", "multifac", "penalty_path", "predict_rows"]


class Explained(NamedTuple):
    """Shares of the squared norm of the observed entries, of every tensor.

    Components correlate, so shares do not add up.

    Attributes:
        total: ``1 - |X_k - Xhat_k|^2 / |X_k|^2``, shape (K,).
        shared: ``|shared part|^2 / |X_k|^2``, shape (K,).
        individual: ``|individual part|^2 / |X_k|^2``, shape (K,).
        components: The same of every component, shape (K, R).
    """

    total: Float[Array, " tensors"]
    shared: Float[Array, " tensors"]
    individual: Float[Array, " tensors"]
    components: Float[Array, "tensors rank"]


@_precision.highest
def multifac(
    tensors: Sequence[Float[Array, "samples ..."]],
    *,
    init: model.LinkedCP,
    penalty: float | Float[Array, ""],
    masks: Sequence[Bool[Array, "samples ..."]] | None = None,
    max_iters: int = 300,
    tol: float = 1e-8,
    extrapolate: bool = False,
) -> tuple[model.LinkedCP, iteration.IterationInfo]:
    """Factorize linked tensors with shared and individual components (MULTIFAC).

    Minimize

        ``sum_k |X_k - [[A_0, A_1^k, ..]]|^2 + penalty (|A_0|^2 + sum_k sum_n |A_n^k|^2)``

    by alternating least squares: A_0 first, then the factors of the first tensor in the order of
    its modes, those of the second, and so on. The penalty alone decides which components are in
    which tensor: for three modes or more it favours exact zeros, so a large one makes components
    vanish from a tensor. It is one stage at one penalty; `penalty_path` follows several, and
    ``penalty_path(..., penalties=jnp.array([1.0, penalty]))`` is the tempering of the paper.

    **Missing data** are imputed (expectation-maximization): after every sweep a hidden entry takes
    the value of the model, but where a whole sample of a tensor is hidden, only that of the
    components which another tensor that has the sample shares: nothing else is known of it. These
    rows are then fitted like the others, so the objective counts ``|imputed - model|^2`` of them,
    and need not fall when a component dies. The hidden entries of a tensor begin at the model of
    `init` if its misfit, as the objective counts it, is below that of zero, and else at zero.

    **Many starts** are a `jax.vmap` over `init`.

    Args:
        tensors: K >= 1 tensors X_k of two modes or more with a common first mode of n samples,
            float32 or float64. Orders and other sizes may differ. Hidden entries may hold
            anything, also NaN.
        init: Start, `LinkedCP` of the tensors' shapes and dtype; its rank R is that of the fit. A
            column that is zero in one of a tensor's own factors stays zero in all of them: so a
            pattern of shared and individual components is kept. `shared` is overwritten by the
            first update.
        penalty: Weight of the squared factors, from 0, without a factor 1/2; traced.
        masks: True = observed, a bool array for every tensor; all observed if None.
        max_iters: Largest number of sweeps, at least 1; *static*.
        tol: Relative change of the objective at which to stop; *static*; at least 1e-6 in float32.
            0 runs all sweeps in a scan, which has a reverse-mode derivative.
        extrapolate: Whether to extrapolate with restart, see `iteration.iterate`; *static*.

    Returns:
        The fit as the sweeps leave it (`normalize` balances, sorts and turns it), and the record of
        the objective after every sweep, that of the start not included.

    Raises:
        ValueError: If there is no tensor, one has fewer than two modes, first modes, dtypes, the
            shapes of `init` or the masks do not fit, or a concrete penalty is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> tensors = (jnp.ones((6, 4, 3)), -jnp.ones((6, 5)))
        >>> start = linked.random_init(tensors, 2, key=jax.random.key(0))
        >>> fit, info = linked.multifac(tensors, init=start, penalty=0.1, tol=1e-6)
        >>> round(float(linked.to_dense(fit)[1][0, 0]), 1)
        -1.0

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, and its published implementation, which
        has two tensors, stops at an absolute change of 1e-5, and begins hidden entries at N(0, 1)
        draws. For more than two tensors a hidden sample takes the components that are active here
        and in at least one tensor that has it.
    """
    tensors, masks = model.check_fit("multifac", init, tensors, masks)
    _checks.check_non_negative("multifac", "penalty", penalty)
    penalty = jnp.asarray(penalty, tensors[0].dtype)
    factors, modes = flatten(init)
    in_tensor = [model.used_columns(own) for own in init.factors]
    active = [jnp.any(jnp.stack(in_tensor), axis=0)] + [
        in_tensor[k] for k, own in enumerate(init.factors) for _ in own
    ]
    factors = tuple(jnp.where(keep[None], f, 0) for keep, f in zip(active, factors, strict=True))
    order = tuple(range(len(factors)))

    def update(data: Sequence[Array], factors: Sequence[Array]) -> tuple:
        return _alternating.sweep(
            data,
            (None,) * len(data),
            modes,
            factors,
            order=order,
            ridge=penalty,
            active=active,
        )

    if masks is None:
        norms = [_alternating.squares(x) for x in tensors]

        def step(factors: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
            factors, fit = update(tensors, factors)
            objective = penalty * _alternating.penalty(factors)
            for k, (x, norm) in enumerate(zip(tensors, norms, strict=True)):
                own = [factors[g] for g in modes[k]]
                pair = (fit.inner[k], fit.energy[k])
                objective = objective + _alternating.residual(x, None, own, norm, pair)
            return factors, objective

        factors, info = iteration.iterate(
            step, factors, max_iters=max_iters, tol=tol, extrapolate=extrapolate
        )
        return unflatten(factors, init), info

    data = tuple(jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True))
    seen = jnp.stack([observed_samples(mask) for mask in masks])

    def imputing_step(state: tuple) -> tuple[tuple, Array]:
        filled, factors = state
        factors, _ = update(filled, factors)
        filled, misfits = _fill(unflatten(factors, init), data, masks, seen)
        objective = jnp.sum(misfits) + penalty * _alternating.penalty(factors)
        return (filled, factors), objective

    filled, misfits = _fill(unflatten(factors, init), data, masks, seen)
    filled = tuple(
        jnp.where(misfit < jnp.sum(x * x), estimate, x)
        for x, estimate, misfit in zip(data, filled, misfits, strict=True)
    )
    (_, factors), info = iteration.iterate(
        imputing_step,
        (filled, factors),
        max_iters=max_iters,
        tol=tol,
        extrapolate=extrapolate,
        may_rise=True,
    )
    return unflatten(factors, init), info


def penalty_path(
    tensors: Sequence[Float[Array, "samples ..."]],
    penalties: Float[Array, " penalties"],
    *,
    init: model.LinkedCP,
    masks: Sequence[Bool[Array, "samples ..."]] | None = None,
    max_iters: int = 300,
    tol: float = 1e-8,
    extrapolate: bool = False,
) -> tuple[model.LinkedCP, iteration.IterationInfo]:
    """Fit at one penalty after another, each from the balanced fit of the one before.

    Upwards, as the paper goes, few components are lost that a fit from a random start at the large
    penalty would lose: zero is absorbing. `multifac` describes a single stage and the data.

    Args:
        tensors: K >= 1 tensors with a common first mode, float32 or float64.
        penalties: Penalties in the order in which to fit, from 0, shape (P,); traced.
        init: Start of the first fit.
        masks: True = observed, a bool array for every tensor; all observed if None.
        max_iters: Largest number of sweeps at every penalty; *static*.
        tol: Relative change of the objective at which to stop; *static*.
        extrapolate: Whether to extrapolate with restart; *static*.

    Returns:
        The fits and the records with a leading axis of penalties.

    Raises:
        ValueError: As for `multifac`, or if `penalties` is no vector.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> tensors = (jnp.ones((6, 4, 3)),)
        >>> start = linked.random_init(tensors, 2, key=jax.random.key(0))
        >>> path, _ = linked.penalty_path(tensors, jnp.array([0.1, 500.0]), init=start, tol=1e-6)
        >>> jax.vmap(linked.active_components)(path).any(axis=(1, 2)).tolist()
        [True, False]

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, tempered regularization.
    """
    tensors, masks = model.check_fit("penalty_path", init, tensors, masks)
    _checks.check_ndim("penalty_path", "penalties", penalties, 1)
    _checks.check_non_negative("penalty_path", "penalties", penalties)

    def stage(start: model.LinkedCP, penalty: Array) -> tuple:
        fit, info = multifac(
            tensors,
            init=model.balance(start),
            penalty=penalty,
            masks=masks,
            max_iters=max_iters,
            tol=tol,
            extrapolate=extrapolate,
        )
        return fit, (fit, info)

    return lax.scan(stage, init, jnp.asarray(penalties, tensors[0].dtype))[1]


@_precision.highest
def impute(
    fit: model.LinkedCP,
    tensors: Sequence[Float[Array, "samples ..."]],
    masks: Sequence[Bool[Array, "samples ..."]],
) -> tuple[Float[Array, "samples ..."], ...]:
    """Fill the hidden entries from a fit; the observed ones stay.

    A hidden entry of a sample that is observed in part takes the value of the whole model. A sample
    that is hidden altogether in a tensor takes that of the components that are active in it and in
    another tensor that has the sample.

    Args:
        fit: Fit of the tensors.
        tensors: The K tensors; hidden entries may hold anything.
        masks: True = observed, a bool array for every tensor.

    Returns:
        Tuple of K tensors without gaps.

    Raises:
        ValueError: If shapes, dtypes or masks do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 1)), ((jnp.ones((3, 1)),),))
        >>> mask = jnp.array([[True, False, True], [True, True, True]])
        >>> linked.impute(fit, (jnp.zeros((2, 3)),), (mask,))[0].tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, for two tensors.
    """
    tensors, _ = model.check_fit("impute", fit, tensors, masks)
    seen = jnp.stack([observed_samples(mask) for mask in masks])
    data = tuple(jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True))
    return _fill(fit, data, masks, seen)[0]


@_precision.highest
def explained(
    fit: model.LinkedCP,
    tensors: Sequence[Float[Array, "samples ..."]],
    masks: Sequence[Bool[Array, "samples ..."]] | None = None,
) -> Explained:
    """Tell how much of every tensor the parts and the components explain, on observed entries.

    Args:
        fit: Fit of the tensors.
        tensors: The K tensors.
        masks: True = observed, a bool array for every tensor; all observed if None.

    Returns:
        The shares; 0 for a tensor of norm 0.

    Raises:
        ValueError: If shapes, dtypes or masks do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 1)), ((jnp.ones((3, 1)),),))
        >>> linked.explained(fit, (2 * jnp.ones((2, 3)),)).total.tolist()
        [0.75]
    """
    tensors, given = model.check_fit("explained", fit, tensors, masks)
    masks = tuple(jnp.ones(x.shape, bool) for x in tensors) if given is None else given

    def energies(parts: Sequence[Array]) -> Array:
        pairs = zip(parts, masks, strict=True)
        return jnp.stack([masking.masked_sum(part**2, mask) for part, mask in pairs])

    norms = energies([jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True)])
    estimates = model.to_dense(fit)
    differences = [
        jnp.where(mask, x - estimate, 0)
        for x, mask, estimate in zip(tensors, masks, estimates, strict=True)
    ]
    safe = jnp.where(norms == 0, 1, norms)
    components = [
        _component_squares(fit.shared, own, mask)
        for own, mask in zip(fit.factors, masks, strict=True)
    ]
    return Explained(
        jnp.where(norms == 0, 0, 1 - energies(differences) / safe),
        energies(model.shared_part(fit)) / safe,
        energies(model.individual_part(fit)) / safe,
        jnp.stack(components) / safe[:, None],
    )


@_precision.highest
def predict_rows(
    fit: model.LinkedCP,
    tensors: Sequence[Float[Array, "new ..."]],
    masks: Sequence[Bool[Array, "new ..."]] | None = None,
    *,
    penalty: float | Float[Array, ""],
) -> Float[Array, "new rank"]:
    """Find the rows of the shared factor for samples, the other factors being given.

    ``a = (sum_k M_k) (sum_k H_k + penalty I)^{-1}``, over the observed entries of every sample, by
    whichever tensors have it. With ``LinkedCP(rows, fit.factors)`` the other functions give the
    dense tensors of the new samples, or impute what is hidden of them.

    Args:
        fit: Fit of other samples, or of the same.
        tensors: The K tensors of the m new samples, float32 or float64 as the fit.
        masks: True = observed, a bool array for every tensor; all observed if None.
        penalty: The penalty of the fit, from 0; traced. With 0 the row of a sample of which
            nothing is observed is 0.

    Returns:
        Rows, shape (m, R).

    Raises:
        ValueError: If shapes, dtypes or masks do not fit, or a concrete penalty is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import linked
        >>> fit = linked.LinkedCP(jnp.ones((2, 1)), ((jnp.ones((3, 1)),),))
        >>> row = linked.predict_rows(fit, (jnp.full((1, 3), 5.0),), penalty=0.0)
        >>> round(float(row[0, 0]), 5)
        5.0
    """
    tensors = model.check_tensors("predict_rows", tensors)
    samples = tensors[0].shape[0]
    start = model.LinkedCP(jnp.zeros((samples, fit.rank), fit.shared.dtype), fit.factors)
    tensors, masks = model.check_fit("predict_rows", start, tensors, masks)
    _checks.check_non_negative("predict_rows", "penalty", penalty)
    weights: Sequence[Array | None] = (None,) * len(tensors)
    if masks is not None:
        tensors = tuple(jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True))
        weights = [mask.astype(x.dtype) for x, mask in zip(tensors, masks, strict=True)]
    factors, modes = flatten(start)
    ridge = jnp.asarray(penalty, fit.shared.dtype)
    found, _ = _alternating.sweep(tensors, weights, modes, factors, order=(0,), ridge=ridge)
    return found[0]


def flatten(fit: model.LinkedCP) -> tuple[tuple[Array, ...], tuple[tuple[int, ...], ...]]:
    """List the factors, the shared one first, and say which are the modes of which tensor."""
    factors, modes = [fit.shared], []
    for own in fit.factors:
        modes.append((0, *range(len(factors), len(factors) + len(own))))
        factors.extend(own)
    return tuple(factors), tuple(modes)


def unflatten(factors: Sequence[Array], like: model.LinkedCP) -> model.LinkedCP:
    """Undo `flatten`."""
    shared, *rest = factors
    own = []
    for group in like.factors:
        own.append(tuple(rest[: len(group)]))
        rest = rest[len(group) :]
    return model.LinkedCP(shared, tuple(own))


def observed_samples(mask: Array) -> Array:
    """Tell of which samples anything is observed, bool (n,)."""
    return jnp.any(mask, axis=tuple(range(1, mask.ndim)))


def fill_tensor(
    shared: Array, own: Sequence[Array], x: Array, mask: Array, keep: Array
) -> tuple[Array, Array]:
    """Impute the hidden entries of a tensor; return that and ``|filled - model|^2``.

    `x` is zero where it is hidden. `keep`, bool (n, R), are the components that fill a sample, all
    where anything is observed of it.
    """
    kept = jnp.where(keep, shared, 0)
    estimate, lost = model.dense_rows(kept, own), shared - kept
    observed = jnp.sum(jnp.where(mask, x - estimate, 0) ** 2)
    misfit = observed + jnp.sum((lost @ _alternating.gram_product(own)) * lost)
    return jnp.where(mask, x, estimate), misfit


def _fill(
    fit: model.LinkedCP, data: Sequence[Array], masks: Sequence[Array], seen: Array
) -> tuple[tuple[Array, ...], Array]:
    """Impute the hidden entries; return that and ``|filled - model|^2`` of every tensor."""
    active = model.active_components(fit)
    found = []
    for k, own in enumerate(fit.factors):
        others = np.delete(np.arange(len(data)), k)
        # Components that another tensor has which has the sample: (n, R).
        vouched = jnp.any(seen[others][:, :, None] & active[others][:, None, :], axis=0)
        keep = seen[k][:, None] | (vouched & active[k][None])
        found.append(fill_tensor(fit.shared, own, data[k], masks[k], keep))
    filled, misfits = zip(*found, strict=True)
    return filled, jnp.stack(misfits)


def _component_squares(shared: Array, own: Sequence[Array], mask: Array) -> Array:
    """Sum the squares of every component over the observed entries: (R,)."""
    squared = [factor**2 for factor in (shared, *own)]
    partial = _partials.contract(mask.astype(shared.dtype), squared, 1, mask.ndim)
    return jnp.sum(partial * squared[0], axis=0)
