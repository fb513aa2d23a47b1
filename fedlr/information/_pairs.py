"""Which entries of a score matrix are joint pairs and which are negatives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedlr import _checks


class Pairs(NamedTuple):
    """The parts of a score matrix of n pairs.

    Attributes:
        joint: The diagonal, scores of the joint pairs, shape (n,); zero where no pair is real.
        product: The scores of the negatives, shape (n, n), zero elsewhere and on the diagonal.
        real: Which joint pairs are real, bool, shape (n,).
        negatives: Which entries are negatives, bool, shape (n, n), False on the diagonal.
        counts: Numbers of negatives in every column and in every row, integers, two of shape (n,).
    """

    joint: Float[Array, " n"]
    product: Float[Array, "n n"]
    real: Bool[Array, " n"]
    negatives: Bool[Array, "n n"]
    counts: tuple[Int[Array, " n"], Int[Array, " n"]]


def select(function: str, scores: Array, mask: Array | None) -> Pairs:
    """Take a score matrix apart, with zeros for everything that is masked."""
    _checks.check_floating(function, scores=scores)
    _checks.check_ndim(function, "scores", scores, 2)
    size = jnp.shape(scores)[0]
    if jnp.shape(scores) != (size, size):
        raise _checks.fail(function, f"scores of shape {jnp.shape(scores)}", "a square matrix")
    scores = jnp.asarray(scores)
    real = real_pairs(function, mask, size)
    negatives = real[:, None] & real[None, :] & ~jnp.eye(size, dtype=bool)
    if mask is not None and jnp.ndim(mask) == 2:
        negatives &= mask
        counts = jnp.sum(negatives, axis=0), jnp.sum(negatives, axis=1)
    else:
        # the same without a pass over the matrix
        others = jnp.where(real, jnp.sum(real) - 1, 0)
        counts = others, others
    joint = jnp.where(real, jnp.diagonal(scores), 0)
    return Pairs(joint, jnp.where(negatives, scores, 0), real, negatives, counts)


def real_pairs(function: str, mask: Array | None, size: int) -> Bool[Array, " n"]:
    """Return which of `size` pairs are real: the mask of pairs, or the diagonal of that matrix."""
    if mask is None:
        return jnp.ones(size, dtype=bool)
    _checks.check_ndim(function, "mask", mask, 1, 2)
    _checks.check_mask(function, mask, (size,) * jnp.ndim(mask))
    return mask if jnp.ndim(mask) == 1 else jnp.diagonal(mask)


def mean_joint(values: Array, pairs: Pairs) -> Float[Array, ""]:
    """Average values (n,) over the real pairs; 0 without negatives."""
    used = pairs.real & jnp.any(pairs.counts[1] > 0)
    return jnp.sum(jnp.where(used, values, 0)) / jnp.maximum(jnp.sum(used), 1).astype(values.dtype)


def mean_product(values: Array, pairs: Pairs) -> Float[Array, ""]:
    """Average values (n, n) over the negatives; 0 if there are none."""
    count = jnp.maximum(jnp.sum(pairs.counts[1]), 1).astype(values.dtype)
    return jnp.sum(jnp.where(pairs.negatives, values, 0)) / count


def log_mean_exp(values: Array, pairs: Pairs) -> Float[Array, ""]:
    """Take the logarithm of the mean of exp over the negatives; 0 if there are none."""
    count = jnp.sum(pairs.counts[1])
    total = jax.nn.logsumexp(jnp.where(pairs.negatives, values, -jnp.inf))
    return jnp.where(count > 0, total - jnp.log(count.astype(values.dtype)), 0)


def log_normalizers(pairs: Pairs, axis: int = 1) -> Float[Array, " n"]:
    """Return log-sum-exp over the joint pair and the negatives, of every row for axis 1."""
    negatives = jnp.where(pairs.negatives, pairs.product, -jnp.inf)
    eye = jnp.eye(pairs.real.size, dtype=bool)
    # the joint pair is always there, so none is all -inf
    return jax.nn.logsumexp(jnp.where(eye, pairs.joint[:, None], negatives), axis=axis)
