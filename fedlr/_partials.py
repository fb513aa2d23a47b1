"""Contractions of a tensor with the columns of CP factors, from its ends, arguments unchecked.

A run of first or last modes is contracted by one matrix product with the Khatri-Rao product of
their factors. What is left, the partial, keeps its rank axis in front after first modes and at
the end after last modes, where the matrix product leaves it: no copy is made. All modes that stay
can be served from one partial.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def khatri_rao(factors: Sequence[Array]) -> Array:
    """Multiply column by column, the last row index running fastest."""
    product = factors[0]
    for factor in factors[1:]:
        rows = product.shape[0] * factor.shape[0]
        product = (product[:, None, :] * factor[None, :, :]).reshape(rows, factor.shape[1])
    return product


def contract(x: Array, factors: Sequence[Array], start: int, stop: int) -> Array:
    """Contract the modes start .. stop - 1, which are a run of first or of last modes."""
    side = khatri_rao(factors[start:stop])
    length, rank = side.shape
    if start == 0:
        # The rank axis stays in front: half the time of the transposed product on a CPU.
        kept = x.shape[stop:]
        return (side.T @ x.reshape(length, math.prod(kept))).reshape(rank, *kept)
    kept = x.shape[:start]
    return (x.reshape(math.prod(kept), length) @ side).reshape(*kept, rank)


def finish(partial: Array, factors: Sequence[Array], kept: range, mode: int) -> Array:
    """Contract all modes of a partial but one: (size of `mode`, rank).

    `kept` are the modes that the partial still has; the rank axis is in front unless they begin
    with mode 0.
    """
    if kept.start == 0:
        for other in reversed([m for m in kept if m != mode]):
            partial = _weighted_sum(partial, factors[other], partial.ndim - 1, other)
        return partial
    for other in reversed([m for m in kept if m != mode]):
        partial = _weighted_sum(partial, factors[other].T, 0, other - kept.start + 1)
    return partial.T


def _weighted_sum(partial: Array, factor: Array, rank_axis: int, axis: int) -> Array:
    """Sum `partial` over `axis` with the weights of `factor`, sharing the rank axis."""
    weights = lax.broadcast_in_dim(factor, partial.shape, sorted((rank_axis, axis)))
    return jnp.sum(partial * weights, axis=axis)
