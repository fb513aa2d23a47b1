"""Contractions of a tensor with the columns of CP factors, from its ends, arguments unchecked.

A run of first or last modes is contracted by a matrix product with the Khatri-Rao product of their
factors. What is left, the partial, keeps its rank axis in front after first modes and at the end
after last modes, where the matrix product leaves it: the tensor is not copied. All modes that stay
can be served from one partial.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_MANY_ROWS = 4096
_PIECE = 512


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
        return _sum_of_rows(side, x.reshape(length, math.prod(kept))).reshape(rank, *kept)
    kept = x.shape[:start]
    wide = jnp.pad(side, ((0, 0), (0, _full_width(rank) - rank)))
    return (x.reshape(math.prod(kept), length) @ wide)[:, :rank].reshape(*kept, rank)


def _sum_of_rows(side: Array, matrix: Array) -> Array:
    """Compute ``side^T matrix``, on a CPU in pieces from the last row on if there are many.

    The product before it, over last modes, read the rows from the first on: the last ones are still
    in the cache, as are then the first ones for the product after it. In float32 a sweep over 40 MB
    took 9.0 ms on one core, and 10.5 with one piece; in float64 20.1 and 22.8.
    """
    if len(matrix) < _MANY_ROWS:
        return side.T @ matrix

    def in_pieces(side: Array, matrix: Array) -> Array:
        count, rest = divmod(len(matrix), _PIECE)

        def add(i: Array, total: Array) -> Array:
            first = (count - 1 - i) * _PIECE
            own, rows = (lax.dynamic_slice_in_dim(a, first, _PIECE) for a in (side, matrix))
            return total + own.T @ rows

        last = side[len(matrix) - rest :].T @ matrix[len(matrix) - rest :]
        return lax.fori_loop(0, count, add, last)

    return lax.platform_dependent(
        side, matrix, cpu=in_pieces, default=lambda side, matrix: side.T @ matrix
    )


def _full_width(columns: int) -> int:
    """Round up to 1, 2, 4, 8 or 16 columns, with which a product takes a CPU less time.

    For a float32 matrix of 10000 x 1000 on one core 16 columns took 4.1 ms and 10 took 5.2, 8 took
    3.2 and 5 took 3.8; in float64 7.5 and 9.3, 5.3 and 5.4. Beyond 16 nothing is gained.
    """
    return 1 << (columns - 1).bit_length() if 0 < columns <= 16 else columns


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
