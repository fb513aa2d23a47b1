"""Alternating least squares over CP models that may share factors: one sweep of it.

Several tensors X_k are modelled by factors A_g, each in one mode of one or more tensors. `modes`
says which: ``modes[k][n] = g``. The objective is

    f = sum_k |W_k * (X_k - [[A_g : g in modes[k]]])|^2 + ridge sum_g |A_g|^2.

A block is solved exactly by its normal equations, which add up over the tensors that hold it: with
M_kn the MTTKRP and H_kn the Hadamard product of the Gram matrices of the other modes,

    A_g (sum_k H_kn + ridge I) = sum_k M_kn.

Under a mask W_k every row has normal equations of its own. Their matrices are the MTTKRP of W_k
with the products of any two columns of every factor, so they come from the same contractions.

Two contractions of the full tensor serve all its modes in a sweep: its modes are split into first
and last ones, and the partial over one group serves the other as long as the group stands still.

Singular systems are made regular by a proximal term, ``sum_r mu_r |a_gr - a_gr before|^2`` with
mu_r a few eps of the diagonal: the objective still never rises, a stationary point stays one, and a
block that no observed entry depends on keeps its values.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fedlr import _cholesky, _partials

# Below this relative residual, in units of sqrt(eps), the fast formula has lost its digits.
_FLOOR = 30.0
_JITTER = 2.0
_BLOCK_ENTRIES = 2**18


class Fit(NamedTuple):
    """Per tensor <X, Xhat> and |Xhat|^2 on observed entries, of the factors after a sweep."""

    inner: tuple[Array, ...]
    energy: tuple[Array, ...]


def squares(x: Array) -> Array:
    """Sum the squares of all entries, row by row: one sum would store the squares on a CPU."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.sum(lax.dot_general(rows, rows, (((1,), (1,)), ((0,), (0,)))))


def sweep(
    tensors: Sequence[Array],
    weights: Sequence[Array | None],
    modes: Sequence[Sequence[int]],
    factors: Sequence[Array],
    *,
    order: Sequence[int],
    ridge: Array,
    active: Sequence[Array] | None = None,
) -> tuple[tuple[Array, ...], Fit]:
    """Update the factors in `order`, each by exact minimization over it, and measure the fit.

    `weights[k]` is None, or the mask of tensor k as numbers; its hidden entries are then zero in
    `tensors[k]`. `active[g]` marks the columns of factor g that are solved for; the others are
    made zero.
    """
    factors = list(factors)
    places = {
        g: [(k, n) for k, ids in enumerate(modes) for n, h in enumerate(ids) if h == g]
        for g in range(len(factors))
    }
    splits = [_split(x.shape) for x in tensors]
    partials: dict[tuple, Array] = {}
    fit: dict[int, tuple[Array, Array]] = {}

    def normal_equations(k: int, n: int) -> tuple[Array, Array]:
        own = [factors[g] for g in modes[k]]
        split, ndim = splits[k], tensors[k].ndim
        is_first = n < split
        contracted = (split, ndim) if is_first else (0, split)
        kept = range(split) if is_first else range(split, ndim)
        parts = [("data", tensors[k], own)]
        weight = weights[k]
        if weight is not None:
            parts.append(("mask", weight, [_pairs(factor) for factor in own]))
        found = []
        for name, array, columns in parts:
            slot = (name, k, is_first)
            if slot not in partials:
                partials[slot] = _partials.contract(array, columns, *contracted)
            found.append(_partials.finish(partials[slot], columns, kept, n))
        if weight is not None:
            return unpack(found[1], own[0].shape[1]), found[0]
        others = [factor for m, factor in enumerate(own) if m != n]
        return gram_product(others), found[0]

    for g in order:
        systems = [normal_equations(k, n) for k, n in places[g]]
        columns = None if active is None else active[g]
        factors[g] = solve(systems, factors[g], ridge, columns)
        for (k, n), (gram, rhs) in zip(places[g], systems, strict=True):
            fit[k] = _measure(gram, rhs, factors[g])
            # The partial that this mode was contracted in is stale.
            for name in ("data", "mask"):
                partials.pop((name, k, n >= splits[k]), None)
    for k, ids in enumerate(modes):
        if k not in fit:
            fit[k] = _measure(*normal_equations(k, 0), factors[ids[0]])
    inner, energy = zip(*(fit[k] for k in range(len(modes))), strict=True)
    return tuple(factors), Fit(inner, energy)


def residual(
    x: Array, weight: Array | None, factors: Sequence[Array], norm: Array, fit: tuple[Array, Array]
) -> Array:
    """Return ``|W * (X - Xhat)|^2`` from the fit of a sweep, or from the entries if that is lost.

    ``|X|^2 - 2 <X, Xhat> + |Xhat|^2`` cancels: it holds to about sqrt(eps) of |X|. Below that the
    residual itself is summed. A loop of no or one turn does it, so that under vmap nothing is
    computed unless one member needs it. The derivative is that of the formula, which is exact.
    """
    inner, energy = fit
    fast = norm - 2 * inner + energy
    limit = _FLOOR**2 * jnp.finfo(x.dtype).eps * norm
    fast_now, limit, *frozen = jax.tree.map(lax.stop_gradient, (fast, limit, x, weight, *factors))

    def is_lost(carry: tuple) -> Array:
        _, done = carry
        return ~done & (fast_now < limit)

    def measure(carry: tuple) -> tuple:
        _, done = carry
        return residual_squares(frozen[0], frozen[1], frozen[2:]), ~done

    value, _ = lax.while_loop(is_lost, measure, (fast_now, jnp.array(False)))
    return fast + lax.stop_gradient(value - fast_now)


def residual_squares(x: Array, weight: Array | None, factors: Sequence[Array]) -> Array:
    """Sum ``(W * (X - Xhat))^2`` block by block; no dense model is stored."""
    split = _split(x.shape)
    left, right = (_partials.khatri_rao(side) for side in (factors[:split], factors[split:]))
    rows, flat = left.shape[0], x.reshape(left.shape[0], right.shape[0])
    mask = None if weight is None else weight.reshape(flat.shape)
    height = max(1, min(rows, _BLOCK_ENTRIES // max(1, flat.shape[1])))

    def of_block(start: Array | int, size: int) -> Array:
        block = lax.dynamic_slice_in_dim(flat, start, size)
        model = lax.dynamic_slice_in_dim(left, start, size) @ right.T
        difference = block - model
        if mask is not None:
            difference = difference * lax.dynamic_slice_in_dim(mask, start, size)
        return jnp.sum(difference * difference)

    if height == rows:
        return of_block(0, rows)
    whole = lax.map(lambda start: of_block(start, height), height * jnp.arange(rows // height))
    rest = rows % height
    return jnp.sum(whole) + (of_block(rows - rest, rest) if rest else 0)


def penalty(factors: Sequence[Array]) -> Array:
    """Sum ``|A_g|^2``."""
    return sum((jnp.sum(factor * factor) for factor in factors), jnp.zeros((), factors[0].dtype))


def _split(shape: Sequence[int]) -> int:
    """Split the modes into first and last ones of nearly equal size; the first are the fewer."""
    sizes = [int(np.prod(shape[:s])) + int(np.prod(shape[s:])) for s in range(1, len(shape))]
    return 1 + int(np.argmin(sizes)) if sizes else 1


def _measure(gram: Array, rhs: Array, factor: Array) -> tuple[Array, Array]:
    """Return <X, Xhat> and |Xhat|^2 from the normal equations of one mode and its factor."""
    if gram.ndim == 2:
        return jnp.sum(rhs * factor), jnp.sum(gram * (factor.T @ factor))
    columns = factor.T
    return jnp.sum(rhs * factor), jnp.sum(jnp.sum(gram * columns[None], axis=1) * columns)


def solve(
    systems: Sequence[tuple[Array, Array]], before: Array, ridge: Array, active: Array | None
) -> Array:
    """Solve ``A (sum H + ridge I) = sum M``, made regular by a proximal term of a few eps.

    A matrix H of every row is held as (R, R, rows).
    """
    by_row = any(gram.ndim == 3 for gram, _ in systems)
    grams = [gram[..., None] if by_row and gram.ndim == 2 else gram for gram, _ in systems]
    gram = functools.reduce(jnp.add, grams)
    rhs = functools.reduce(jnp.add, [rhs for _, rhs in systems])
    rank = gram.shape[0]
    if active is not None:
        both = (active[:, None] & active[None, :]).reshape(rank, rank, *(1,) * (gram.ndim - 2))
        gram = jnp.where(both, gram, 0)
        rhs, before = jnp.where(active[None], rhs, 0), jnp.where(active[None], before, 0)
    diagonal = jnp.diagonal(gram).T  # (R,) or (R, rows)
    scale = _JITTER * rank * jnp.finfo(gram.dtype).eps
    proximal = jnp.maximum(scale * diagonal - ridge, 0)
    proximal = jnp.where(diagonal + ridge > 0, proximal, 1)
    identity = np.eye(rank, dtype=gram.dtype).reshape(rank, rank, *(1,) * (gram.ndim - 2))
    inverse = _cholesky.inverse_factor(gram + identity * (ridge + proximal)[None])
    if by_row:
        return _cholesky.solve_each(inverse, rhs + proximal.T * before)
    return _cholesky.solve_rows(inverse, rhs + proximal[None] * before)


def gram_product(factors: Sequence[Array]) -> Array:
    """Multiply the Gram matrices of factors entry by entry."""
    grams = [factor.T @ factor for factor in factors]
    return functools.reduce(jnp.multiply, grams)


def _pairs(factor: Array) -> Array:
    """Multiply any two columns: (rows, R (R + 1) / 2), the upper triangle row by row."""
    first, second = np.triu_indices(factor.shape[1])
    return factor[:, first] * factor[:, second]


def unpack(rows: Array, rank: int) -> Array:
    """Spread the upper triangles of symmetric matrices: (R, R, rows)."""
    index = np.zeros((rank, rank), np.int32)
    upper = np.triu_indices(rank)
    index[upper] = index[upper[::-1]] = np.arange(len(upper[0]))
    return rows.T[index]
