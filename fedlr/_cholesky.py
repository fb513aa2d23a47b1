"""Factorization of many small positive definite matrices at once, on a CPU in array operations.

The batched library routines that JAX calls on a CPU wait for tasks in the thread pool they run in.
With jax 0.10.1 on two cores two of them at a time, as in a sweep over 128 starts of rank 20, wait
for each other forever. Elimination that goes over columns and updates all systems at once does not,
and takes less time: 4.2 against 6.6 us a system of 20 unknowns, 0.6 against 1.2 us of 10 (float64,
one core).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Entries that a step of the elimination updates; for more, XLA wakes its threads at every step.
_BLOCK_ENTRIES = 2**15


@jax.custom_jvp
def inverse_factor(matrices: Float[Array, "R R ..."]) -> Float[Array, "R R ..."]:
    """Invert the Cholesky factors of symmetric matrices, which lie along the trailing axes.

    Args:
        matrices: Symmetric positive definite matrices H = L L^T, shape (R, R, ...).

    Returns:
        Lower triangular L^-1, shape (R, R, ...); not finite where H is not positive definite.
    """
    flat = matrices.reshape(*matrices.shape[:2], -1)
    return _inverse_factors(flat).reshape(matrices.shape)


@inverse_factor.defjvp
def _inverse_factor_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Differentiate: ``dL^-1 = -lower(L^-1 dH L^-T) L^-1``, the diagonal of lower() halved."""
    inverse = inverse_factor(primals[0])
    size = inverse.shape[0]
    inner = jnp.einsum("ij...,jk...,lk...->il...", inverse, tangents[0], inverse)
    lower = np.tril(np.ones((size, size), inner.dtype)) - 0.5 * np.eye(size, dtype=inner.dtype)
    lower = lower.reshape(size, size, *(1,) * (inner.ndim - 2))
    return inverse, -jnp.einsum("ij...,jk...->ik...", lower * inner, inverse)


def solve_rows(
    inverse: Float[Array, "R R"], rows: Float[Array, "rows R"]
) -> Float[Array, "rows R"]:
    """Solve ``A L L^T = M`` for A, one matrix for all rows."""
    return (rows @ inverse.T) @ inverse


def solve_each(
    inverses: Float[Array, "R R rows"], rows: Float[Array, "rows R"]
) -> Float[Array, "rows R"]:
    """Solve ``L_i L_i^T a_i = m_i``, a matrix for every row."""
    half = jnp.sum(inverses * rows.T[None], axis=1)
    return jnp.sum(inverses * half[:, None], axis=0).T


@jax.custom_batching.custom_vmap
def _inverse_factors(matrices: Array) -> Array:
    """Invert the factors of (R, R, count) matrices."""
    if matrices.shape[2] == 1:
        return _by_library(matrices)
    return lax.platform_dependent(matrices, cpu=_by_elimination, default=_by_library)


@_inverse_factors.def_vmap
def _inverse_factors_vmap(size: int, in_batched: Sequence[bool], matrices: Array) -> tuple:
    """Put the batch behind the others, where it is contiguous."""
    del size, in_batched
    flat = jnp.moveaxis(matrices, 0, -1)
    found = _inverse_factors(flat.reshape(*flat.shape[:2], -1)).reshape(flat.shape)
    return jnp.moveaxis(found, -1, 0), True


def _by_library(matrices: Array) -> Array:
    lower = lax.linalg.cholesky(jnp.moveaxis(matrices, -1, 0), symmetrize_input=False)
    identity = jnp.broadcast_to(jnp.eye(lower.shape[1], dtype=lower.dtype), lower.shape)
    inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return jnp.moveaxis(inverse, 0, -1)


def _by_elimination(matrices: Array) -> Array:
    """Eliminate block after block of systems."""
    rank, _, count = matrices.shape
    num_blocks = -(-count * rank * rank // _BLOCK_ENTRIES)
    if num_blocks == 1:
        return _eliminate(matrices)
    width = -(-count // num_blocks)
    padded = jnp.pad(matrices, ((0, 0), (0, 0), (0, num_blocks * width - count)))
    blocks = jnp.moveaxis(padded.reshape(rank, rank, num_blocks, width), 2, 0)
    found = jnp.moveaxis(lax.map(_eliminate, blocks), 0, 2)
    return found.reshape(rank, rank, -1)[..., :count]


def _eliminate(matrices: Array) -> Array:
    """Reduce ``[H | I]`` in one table: column j of L^T goes when column j of L^-1 comes.

    The matrices have a unit diagonal first. No pivot is above 1 then, and the entry that is
    eliminated leaves no more than rounding under the multiplier that takes its place.
    """
    rank = matrices.shape[0]
    index = jnp.arange(rank)[:, None]
    scale = lax.rsqrt(jnp.diagonal(matrices).T)
    table = matrices * scale[:, None] * scale[None]

    def step(j: Array, table: Array) -> Array:
        row, column = (lax.dynamic_index_in_dim(table, j, a, keepdims=False) for a in (0, 1))
        pivot = lax.dynamic_index_in_dim(row, j, 0)
        multipliers = jnp.where(index > j, column / pivot, 0)
        return table - multipliers[:, None] * jnp.where(index == j, row + 1, row)[None]

    table = lax.fori_loop(0, rank, step, table)
    roots = lax.rsqrt(jnp.diagonal(table).T)
    places = np.arange(rank)
    below, diagonal = (places[:, None] > places)[..., None], (places[:, None] == places)[..., None]
    unit = jnp.where(diagonal, 1, jnp.where(below, table, 0))
    return unit * roots[:, None] * scale[None]
