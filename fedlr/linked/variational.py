"""The linked CP model by variational Bayes: ranks and noise without cross-validation."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedlr import _alternating, _cholesky, _partials, _precision, iteration
from fedlr.linked import fitting, model

__all__ = ["VariationalFit", "variational_multifac"]

# Mean square of the data over the variance of the noise, at the start. From 1 more starts end in
# poor minima, from 100 no fewer than from 10.
_START_RATIO = 10.0
# What a sweep leaves at least of the variance of the noise. Without it, starts at a signal-to-noise
# ratio of 100 or more lock into components that share one; 0.8 and 0.9 are in between.
_LEAST_LEFT = 0.95
# Share of the posterior mean in the expected squared norm, from which a component is one. Of those
# that die, what is left after convergence had shares up to 0.23, of the others from 0.53.
_DETERMINED = 0.5


class VariationalFit(NamedTuple):
    """Posterior of the linked model; all leaves may have leading batch axes.

    Attributes:
        fit: Posterior means of the factors, with zero columns where a component is not in a tensor.
        noise: Standard deviation tau_k of the noise of every tensor, shape (K,).
        precisions: Prior precisions alpha_kr of the tensors' own factors, shape (K, R).
        shared_precisions: Prior precisions alpha_0r of the shared factor, shape (R,).
    """

    fit: model.LinkedCP
    noise: Float[Array, " tensors"]
    precisions: Float[Array, "tensors rank"]
    shared_precisions: Float[Array, " rank"]


class _Data(NamedTuple):
    """Tensors with zeros for what is hidden, their masks as numbers or None, and the model's form.

    `modes` are the factors of every tensor, `rows` the row of `active` and of the precisions of
    every factor: 0 for the shared one, k + 1 for those of tensor k.
    """

    tensors: tuple[Array, ...]
    weights: tuple[Array | None, ...]
    norms: Array
    counts: Array
    floors: Array
    active: Array
    modes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]


class _State(NamedTuple):
    """Means, covariances (R, R) or (R, R, rows), precisions (1 + K, R), noise variances (K,)."""

    factors: tuple[Array, ...]
    covariances: tuple[Array, ...]
    precisions: Array
    variances: Array


@_precision.highest
def variational_multifac(
    tensors: Sequence[Float[Array, "samples ..."]],
    *,
    init: model.LinkedCP,
    masks: Sequence[Bool[Array, "samples ..."]] | None = None,
    max_iters: int = 500,
    tol: float = 1e-6,
) -> tuple[VariationalFit, iteration.IterationInfo]:
    """Fit the linked model with a precision for every component and tensor, which decides on it.

    The model is Gaussian throughout,

        ``X_k = [[A_0, A_1^k, ..]] + noise of variance tau_k^2``,
        ``rows of A_0 ~ N(0, diag(alpha_0)^-1)``, ``rows of A_n^k ~ N(0, diag(alpha_k)^-1)``,

    and the posterior is taken to be a product over the factors, hence of Gaussian rows with mean
    a_i and covariance S_i. The evidence lower bound is raised over one block after another; with
    M_k the MTTKRP of the means and H_k the Hadamard product of the other modes' ``E[A^T A]``,

        ``S_0 = (sum_k H_k / tau_k^2 + diag(alpha_0))^-1``,  ``A_0 = (sum_k M_k / tau_k^2) S_0``,
        ``S_n = (H_k / tau_k^2 + diag(alpha_k))^-1``,  ``A_n = (M_k / tau_k^2) S_n``,
        ``alpha_kr = sum_n I_n / E sum_n |a_nr|^2``,  ``tau_k^2 = E|X_k - model|^2 / |observed|``,

    where ``E[A^T A] = A^T A + I S`` for I rows. The objective is the negative bound,

        ``1/2 sum_k (P_k log(2 pi tau_k^2) + E|X_k - model|^2 / tau_k^2)``
        ``+ 1/2 sum_g sum_r (alpha_gr E|a_gr|^2 - I_g log alpha_gr - I_g)``
        ``- 1/2 sum_g sum_i log det S_gi``

    with P_k observed entries. It never rises but by rounding, and tells fits from different starts
    apart: take the lowest of several. A sweep lowers tau_k^2 by at most a twentieth, which leaves
    components time to part before small noise holds them where they are; so short a step raises
    the bound as well.

    The precision of a component that the data do not support in a tensor grows without bound, and
    its mean vanishes; in a matrix that is slow. So a component counts as none in a tensor, and its
    columns there are set to zero, where the means hold no more than half of the expected squared
    norm, ``sum_n |a_nr|^2 <= E sum_n |a_nr|^2 / 2``: what is left of it is the prior. A_0 has zero
    columns for components that are in no tensor.

    **Missing data** drop out: under masks every row has a covariance of its own,
    ``S_i = (sum over observed entries of E[k k^T] / tau^2 + diag(alpha))^-1`` with k the product of
    the other modes' rows. Nothing is imputed, and the objective is the bound on the evidence of
    what is observed. Work and memory grow with R^2.

    Columns may be scaled against each other, so that only ``alpha_0r alpha_kr^(N_k - 1)`` is
    determined. `linked.normalize` balances the means.

    Args:
        tensors: K >= 1 tensors X_k of two modes or more with a common first mode of n samples,
            float32 or float64. Orders, other sizes and scales may differ. Hidden entries may hold
            anything, also NaN.
        init: Start, `LinkedCP` of the tensors' shapes and dtype, best with more components than
            expected. The factors of every tensor are scaled to the norm of its data, precisions
            begin at those of the scaled columns, and the variance of the noise at a tenth of the
            mean square of the data. A column that is zero in one of a tensor's own factors stays
            zero in all of them. `shared` only has a say in the scale.
        masks: True = observed, a bool array for every tensor; all observed if None.
        max_iters: Largest number of sweeps, at least 1; *static*.
        tol: Relative change of the objective at which to stop; *static*; at least 1e-6 in float32.
            0 runs all sweeps in a scan.

    Returns:
        The posterior, and the record of the objective after every sweep. The variance of the noise
        is at least eps times the mean square of the data, and at least 1 in a tensor in which
        nothing but zeros is observed.

    Raises:
        ValueError: If there is no tensor, one has fewer than two modes, or first modes, dtypes, the
            shapes of `init` or the masks do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> tensors = tuple(1 + jax.random.normal(key, (20, 5, 4)) / 4 for key in keys[:2])
        >>> start = linked.random_init(tensors, 3, key=keys[2])
        >>> posterior, info = linked.variational_multifac(tensors, init=start)
        >>> linked.active_components(posterior.fit).sum(axis=1).tolist()
        [1, 1]

    Reference: derived here for the linked model. Zhao, Zhang and Cichocki 2015, "Bayesian CP
        factorization of incomplete tensors with automatic rank determination", arXiv 1401.6497, for
        one tensor, with Gamma priors on one vector of precisions for all modes; precisions and
        noise are maximized over here. Lock 2024, "Empirical Bayes linked matrix decomposition",
        arXiv 2408.00237, for linked matrices with a module for every pattern of sharing; here the
        pattern is what the precisions leave.
    """
    tensors, masks = model.check_fit("variational_multifac", init, tensors, masks)
    in_tensor = jnp.stack([model.used_columns(own) for own in init.factors])
    factors, modes = fitting.flatten(init)
    data = _prepare(tensors, masks, in_tensor, modes)
    start = _start(data, factors)
    step = functools.partial(_sweep, data)
    state, info = iteration.iterate(step, start, max_iters=max_iters, tol=tol)
    squares = _by_row(data, [jnp.sum(a * a, axis=0) for a in state.factors])
    determined = state.precisions * squares > _DETERMINED * _lengths(data, factors)[:, None]
    in_tensor = determined[1:] & in_tensor
    keep = jnp.concatenate([jnp.any(in_tensor, axis=0)[None], in_tensor])
    means = tuple(
        jnp.where(keep[row][None], a, 0) for row, a in zip(data.rows, state.factors, strict=True)
    )
    fit = fitting.unflatten(means, init)
    noise = jnp.sqrt(state.variances)
    return VariationalFit(fit, noise, state.precisions[1:], state.precisions[0]), info


def _prepare(
    tensors: tuple[Array, ...],
    masks: tuple[Array, ...] | None,
    in_tensor: Array,
    modes: tuple[tuple[int, ...], ...],
) -> _Data:
    """Clear what is hidden, and collect what stays the same."""
    dtype = tensors[0].dtype
    weights: tuple[Array | None, ...] = (None,) * len(tensors)
    counts = jnp.array([x.size for x in tensors], dtype)
    if masks is not None:
        tensors = tuple(jnp.where(mask, x, 0) for x, mask in zip(tensors, masks, strict=True))
        weights = tuple(mask.astype(dtype) for mask in masks)
        counts = jnp.maximum(jnp.stack([jnp.sum(mask, dtype=dtype) for mask in masks]), 1)
    norms = jnp.stack([_alternating.squares(x) for x in tensors])
    floors = jnp.where(norms > 0, jnp.finfo(dtype).eps * norms / counts, 1)
    active = jnp.concatenate([jnp.any(in_tensor, axis=0)[None], in_tensor])
    rows = (0, *(1 + k for k, ids in enumerate(modes) for _ in ids[1:]))
    return _Data(tensors, weights, norms, counts, floors, active, modes, rows)


def _start(data: _Data, factors: Sequence[Array]) -> _State:
    """Scale the start to the data; take no variance, precisions of the columns, and much signal."""
    scaled = [
        jnp.where(data.active[row][None], a, 0) for row, a in zip(data.rows, factors, strict=True)
    ]
    for k, ids in enumerate(data.modes):
        energy = jnp.sum(_alternating.gram_product([scaled[g] for g in ids]))
        share = data.counts[k] / data.tensors[k].size
        usable = (energy > 0) & (data.norms[k] > 0)
        ratio = jnp.where(usable, data.norms[k] / jnp.where(usable, share * energy, 1), 1)
        for g in ids[1:]:
            scaled[g] = scaled[g] * ratio ** (0.5 / (len(ids) - 1))
    rank = factors[0].shape[1]
    by_row = [() if data.weights[0] is None else (a.shape[0],) for a in scaled]
    covariances = tuple(jnp.zeros((rank, rank, *rows), factors[0].dtype) for rows in by_row)
    precisions = _precisions(data, scaled, [jnp.sum(a * a, axis=0) for a in scaled])
    variances = jnp.maximum(data.norms / data.counts / _START_RATIO, data.floors)
    return _State(tuple(scaled), covariances, precisions, variances)


def _sweep(data: _Data, state: _State) -> tuple[_State, Array]:
    """Update every block once; return the negative evidence lower bound after it."""
    factors, covariances = list(state.factors), list(state.covariances)
    moments = [_moment(a, s) for a, s in zip(factors, covariances, strict=True)]
    log_dets = [jnp.zeros((), a.dtype) for a in factors]

    def contract(k: int, start: int, stop: int) -> tuple[Array, Array | None]:
        x, weight, ids = data.tensors[k], data.weights[k], data.modes[k]
        partial = _partials.contract(x, [factors[g] for g in ids], start, stop)
        if weight is None:
            return partial, None
        return partial, _partials.contract(weight, [moments[g] for g in ids], start, stop)

    def equations(k: int, partials: tuple[Array, Array | None], kept: range, mode: int) -> tuple:
        own, seconds = ([values[g] for g in data.modes[k]] for values in (factors, moments))
        rhs = _partials.finish(partials[0], own, kept, mode)
        if partials[1] is None:
            gram = functools.reduce(jnp.multiply, [m for n, m in enumerate(seconds) if n != mode])
        else:
            rows = _partials.finish(partials[1], seconds, kept, mode)
            gram = rows.T.reshape(rhs.shape[1], rhs.shape[1], -1)
        return gram, rhs

    def update(g: int, gram: Array, rhs: Array) -> None:
        row = data.rows[g]
        found = _posterior(gram, rhs, state.precisions[row], data.active[row])
        factors[g], covariances[g], log_dets[g] = found
        moments[g] = _moment(factors[g], covariances[g])

    systems = []
    for k, x in enumerate(data.tensors):
        gram, rhs = equations(k, contract(k, 1, x.ndim), range(1), 0)
        systems.append((gram / state.variances[k], rhs / state.variances[k]))
    update(0, *(functools.reduce(jnp.add, parts) for parts in zip(*systems, strict=True)))
    residuals = []
    for k, x in enumerate(data.tensors):
        partials = contract(k, 0, 1)
        for n, g in enumerate(data.modes[k][1:], start=1):
            gram, rhs = equations(k, partials, range(1, x.ndim), n)
            update(g, gram / state.variances[k], rhs / state.variances[k])
        own = [[values[g] for g in data.modes[k]] for values in (factors, covariances, moments)]
        residuals.append(_residual(x, data.weights[k], own, gram))
    residuals = jnp.stack(residuals)
    energies = [_energy(m, a.shape[1]) for m, a in zip(moments, factors, strict=True)]
    precisions = _precisions(data, factors, energies)
    variances = jnp.maximum(residuals / data.counts, _LEAST_LEFT * state.variances)
    variances = jnp.maximum(variances, data.floors)
    new = _State(tuple(factors), tuple(covariances), precisions, variances)
    return new, _negative_bound(data, new, residuals, energies, log_dets)


def _negative_bound(
    data: _Data,
    state: _State,
    residuals: Array,
    energies: Sequence[Array],
    log_dets: Sequence[Array],
) -> Array:
    """Add up the terms of the bound; a column that is kept at zero has none."""
    fits = data.counts * jnp.log(2 * math.pi * state.variances) + residuals / state.variances
    lengths = _lengths(data, state.factors)[:, None]
    priors = state.precisions * _by_row(data, energies) - lengths * jnp.log(state.precisions)
    priors = jnp.where(data.active, priors - lengths, 0)
    return (jnp.sum(fits) + jnp.sum(priors) - functools.reduce(jnp.add, log_dets)) / 2


def _posterior(
    gram: Array, rhs: Array, precision: Array, active: Array
) -> tuple[Array, Array, Array]:
    """Return means, covariances and the sum of their log determinants over the rows."""
    trailing = tuple(range(2, gram.ndim))
    kept = jnp.expand_dims(active[:, None] & active[None, :], trailing)
    prior = jnp.expand_dims(jnp.diag(jnp.where(active, precision, 1)), trailing)
    rhs = jnp.where(active[None], rhs, 0)
    inverse = _cholesky.inverse_factor(jnp.where(kept, gram, 0) + prior)
    covariance = jnp.einsum("ki...,kj...->ij...", inverse, inverse)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(inverse)))
    if trailing:
        mean = _cholesky.solve_each(inverse, rhs)
    else:
        mean, log_det = _cholesky.solve_rows(inverse, rhs), rhs.shape[0] * log_det
    return mean, jnp.where(kept, covariance, 0), log_det


def _moment(factor: Array, covariance: Array) -> Array:
    """Return ``E[A^T A]``, or ``E[a_i a_i^T]`` of every row as (rows, R R)."""
    if covariance.ndim == 2:
        return factor.T @ factor + factor.shape[0] * covariance
    products = factor.T[:, None] * factor.T[None, :] + covariance
    return products.reshape(-1, factor.shape[0]).T


def _energy(moment: Array, rank: int) -> Array:
    """Return ``E|a_r|^2`` of the columns from either form of `_moment`."""
    total = jnp.sum(moment.reshape(-1, rank, rank), axis=0)
    return jnp.diagonal(total)


def _residual(x: Array, weight: Array | None, own: Sequence[Sequence[Array]], gram: Array) -> Array:
    """Return ``E|X - model|^2``: that of the means, and the variance of the model.

    The bound weighs it by the precision of the noise, so that what the formula by norms and an
    inner product loses would show. Without a mask the variance is a sum over the modes; as
    ``E|model|^2 - |mean|^2``, from the matrices `gram` of the last mode, it cancels.
    """
    factors, covariances, moments = own
    squares = _alternating.residual_squares(x, weight, factors)
    if weight is None:
        grams = [a.T @ a for a in factors]
        variance = jnp.zeros_like(gram)
        for n, (a, s) in enumerate(zip(factors, covariances, strict=True)):
            parts = [*moments[:n], a.shape[0] * s, *grams[n + 1 :]]
            variance = variance + functools.reduce(jnp.multiply, parts)
        return squares + jnp.sum(variance)
    expected = jnp.sum(gram.reshape(-1, gram.shape[2]).T * moments[-1])
    energy = _alternating.residual_squares(jnp.zeros_like(x), weight, factors)
    return squares + jnp.maximum(expected - energy, 0)


def _precisions(data: _Data, factors: Sequence[Array], energies: Sequence[Array]) -> Array:
    """Return ``sum_n I_n / E sum_n |a_nr|^2``; 1 for a column that is kept at zero."""
    totals = _by_row(data, energies)
    usable = data.active & (totals > 0)
    return jnp.where(usable, _lengths(data, factors)[:, None] / jnp.where(usable, totals, 1), 1)


def _by_row(data: _Data, values: Sequence[Array]) -> Array:
    """Add up what belongs to the shared factor, and to the own factors of every tensor."""
    groups = [[0], *(ids[1:] for ids in data.modes)]
    return jnp.stack([functools.reduce(jnp.add, [values[g] for g in ids]) for ids in groups])


def _lengths(data: _Data, factors: Sequence[Array]) -> Array:
    """Add up the sizes of these factors in the same way."""
    sizes = [jnp.asarray(a.shape[0], factors[0].dtype) for a in factors]
    return _by_row(data, sizes)
