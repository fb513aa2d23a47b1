"""How the server joins the messages of a cohort into one update.

An aggregator receives the *messages* and `decompress`, so that averaging the factors of compressed
messages by mistake cannot be written.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedlr import _checks, curvature, lowrank
from fedlr.federated import protocol

__all__ = [
    "coordinate_median",
    "from_fold",
    "measured_factor_mean",
    "trimmed_mean",
    "weighted_mean",
    "weighted_sum",
]


def from_fold(fold: protocol.Fold) -> protocol.Aggregator:
    """Build a linear aggregator without state from the way it sums messages as they come.

    Args:
        fold: How it begins, adds and ends.

    Returns:
        The aggregator, which also aggregates a whole stack of messages at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import aggregators, protocol
        >>> count = protocol.Fold(
        ...     jnp.zeros_like,
        ...     lambda total, messages, weights, *, decompress: total + jnp.sum(weights),
        ...     lambda total: total,
        ... )
        >>> counted = aggregators.from_fold(count)
        >>> counted.aggregate(jnp.ones(3), jnp.ones(3), (), decompress=lambda message: message)[0]
        Array(3., dtype=float32)
    """

    def aggregate(messages, weights, state, *, decompress):
        first = jax.eval_shape(decompress, jax.tree.map(lambda leaf: leaf[0], messages))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        carry = fold.add(fold.init(zeros), messages, weights, decompress=decompress)
        return fold.finish(carry), state

    return protocol.Aggregator(lambda _: (), aggregate, fold)


def weighted_mean() -> protocol.Aggregator:
    """Build the weighted mean of the decompressed updates.

        update = sum_k n_k d_k / sum_k n_k

    It is linear, so it folds into a running sum and no stack of updates is kept. Messages of weight
    zero are ignored whatever they hold; total weight zero gives zeros.

    Returns:
        An aggregator without state.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import aggregators
        >>> mean = aggregators.weighted_mean()
        >>> messages, weights = jnp.array([[1.0], [4.0]]), jnp.array([2.0, 1.0])
        >>> mean.aggregate(messages, weights, (), decompress=lambda message: message)[0]
        Array([2.], dtype=float32)

    Reference:
        McMahan et al. 2017, arXiv 1602.05629, Algorithm 1.
    """

    def fold_init(update):
        return jax.tree.map(jnp.zeros_like, update), jnp.zeros((), jnp.result_type(float))

    def add(carry, messages, weights, *, decompress):
        sums, total = carry
        sums = _add_weighted(sums, messages, weights, decompress=decompress)
        return sums, total + jnp.sum(weights, dtype=total.dtype)

    def finish(carry):
        sums, total = carry
        share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
        return jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), sums)

    return from_fold(protocol.Fold(fold_init, add, finish))


def weighted_sum() -> protocol.Aggregator:
    """Build the weighted sum of the decompressed updates, whatever the weights sum to.

        update = sum_k w_k d_k

    With the weights of `clients.horvitz_thompson` it is an unbiased estimate of the mean over all
    clients, where `weighted_mean`, which divides by the weights of those that came, is a ratio
    estimate: of smaller variance, and biased. It folds, and messages of weight zero are ignored
    whatever they hold.

    Returns:
        An aggregator without state.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import aggregators
        >>> messages, weights = jnp.array([[1.0], [4.0]]), jnp.array([2.0, 1.0])
        >>> aggregators.weighted_sum().aggregate(messages, weights, (), decompress=lambda m: m)[0]
        Array([6.], dtype=float32)

    Reference:
        Horvitz and Thompson 1952, J. Am. Stat. Assoc. 47, 663.
    """
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return from_fold(protocol.Fold(zeros, _add_weighted, lambda sums: sums))


def _add_weighted(sums, messages, weights, *, decompress):
    """Add the weighted updates of a chunk; what has weight zero may hold anything."""
    updates = jax.vmap(decompress)(messages)

    def accumulate(partial, leaf):
        scale = _like_rows(weights, leaf).astype(leaf.dtype)
        return partial + jnp.sum(jnp.where(scale != 0, scale * leaf, 0.0), axis=0)

    return jax.tree.map(accumulate, sums, updates)


def measured_factor_mean() -> protocol.Aggregator:
    """Build the weighted mean of factors that also measures what is lost by averaging factors.

        |sum_k p_k U_k D_k - Ubar Dbar|_F / |sum_k p_k U_k D_k|_F   for every factorized leaf

    The norm below needs the factors themselves, so clients send `local.trained_values` and the
    server is one `servers.of_values`. It needs the factors of all members at once. The state is the
    pytree of the errors of the last round, zeros before the first; ``state.server.aggregator`` in
    the evaluation function of `rounds.with_evaluation`.

    Returns:
        An aggregator of `lowrank.Trainable` values, which does not fold.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import aggregators
        >>> factors = jnp.array([[[1.0]], [[2.0]]])
        >>> values = lowrank.Trainable(lowrank.LowRank(factors, factors), None)
        >>> mean, error = aggregators.measured_factor_mean().aggregate(
        ...     values, jnp.ones(2), (), decompress=lambda message: message
        ... )
        >>> float(mean.factors.up[0, 0]), round(float(error), 4)
        (1.5, 0.1)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, average the factors. The measure is
        `curvature.aggregation_error`.
    """
    mean = weighted_mean()

    def init(update):
        return lowrank.map_updates(lambda own: jnp.zeros((), own.up.dtype), update.factors)

    def aggregate(messages, weights, state, *, decompress):
        del state
        values = jax.vmap(decompress)(messages)
        update, _ = mean.aggregate(values, weights, (), decompress=lambda value: value)
        errors = lowrank.map_updates(
            lambda own: curvature.aggregation_error(own.up, own.down, weights), values.factors
        )
        return update, errors

    return protocol.Aggregator(init, aggregate)


def trimmed_mean(fraction: float) -> protocol.Aggregator:
    """Build the mean of every coordinate without its largest and its smallest values.

    Of the n updates that arrived, ``floor(fraction n)`` values are left out at either end of every
    coordinate, and the mean of the others is taken. It is robust: with no more than so many bad
    messages, whatever they hold, every coordinate lies between the smallest and the largest value
    of the good ones. NaN counts as the largest value.

    Weights say only who arrived: members of weight zero are left out, all others count equally.
    Nobody arrived gives zeros. It needs the values of all members at once, so the decoded updates
    of the whole cohort are kept in memory.

    Args:
        fraction: Share left out at either end, from 0 up to but without 1/2, *static*.

    Returns:
        An aggregator without state, which does not fold.

    Raises:
        ValueError: If `fraction` is not in that range.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import aggregators
        >>> trimmed = aggregators.trimmed_mean(0.25)
        >>> messages, weights = jnp.array([[1.0], [-1e9], [4.0], [2.0]]), jnp.ones(4)
        >>> trimmed.aggregate(messages, weights, (), decompress=lambda message: message)[0]
        Array([1.5], dtype=float32)

    Reference:
        Yin et al. 2018, arXiv 1803.01498, Definition 2 and Algorithm 1. There the messages are
        gradients of equally many examples, hence no weights.
    """
    if not 0 <= fraction < 0.5:
        raise _checks.fail("trimmed_mean", f"fraction {fraction}", "a fraction from 0, below 1/2")

    def join(ordered, count):
        counts = np.arange(ordered.shape[0] + 1)
        # Rounding must not make 28 of 0.29 * 100, and one value is always left.
        trims = np.minimum(np.floor(fraction * counts + 1e-9), np.maximum(counts - 1, 0) // 2)
        trim = jnp.asarray(trims, jnp.int32)[count]
        place = jnp.arange(ordered.shape[0], dtype=jnp.int32)
        kept = (place >= trim) & (place < count - trim)
        # Summed in the order of their sizes, and with no NaN from a value left out.
        total = jnp.sum(jnp.where(_like_rows(kept, ordered), ordered, 0), axis=0)
        return total / jnp.maximum(count - 2 * trim, 1).astype(ordered.dtype)

    return _of_order(join)


def coordinate_median() -> protocol.Aggregator:
    """Build the median of every coordinate.

    Of an even number of updates it is the mean of the two in the middle. It is robust: as long as
    fewer than half of the messages are bad, whatever they hold, every coordinate lies between the
    smallest and the largest value of the good ones. NaN counts as the largest value.

    Weights say only who arrived: members of weight zero are left out, all others count equally.
    Nobody arrived gives zeros. It needs the values of all members at once, so the decoded updates
    of the whole cohort are kept in memory.

    Returns:
        An aggregator without state, which does not fold.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import aggregators
        >>> median = aggregators.coordinate_median()
        >>> messages, weights = jnp.array([[1.0], [1e9], [4.0], [2.0]]), jnp.array([1.0, 1, 0, 1])
        >>> median.aggregate(messages, weights, (), decompress=lambda message: message)[0]
        Array([2.], dtype=float32)

    Reference:
        Yin et al. 2018, arXiv 1803.01498, Definition 1 and Algorithm 1. There the messages are
        gradients of equally many examples, hence no weights.
    """

    def join(ordered, count):
        low, high = (ordered[jnp.maximum(place, 0)] for place in ((count - 1) // 2, count // 2))
        return low / 2 + high / 2

    return _of_order(join)


def _of_order(
    join: Callable[[Float[Array, "cohort ..."], Int[Array, ""]], Array],
) -> protocol.Aggregator:
    """Build the aggregator of order statistics.

    `join` is `(ordered, count) -> update` for one array: the first `count` of the rows are the
    values of the members that arrived, in increasing order.
    """

    def aggregate(messages, weights, state, *, decompress):
        arrived = weights > 0
        count = jnp.sum(arrived, dtype=jnp.int32)

        def one(leaf):
            # NaN is sorted behind all numbers, so that one of an update stays with the arrived.
            present = jnp.where(_like_rows(arrived, leaf), leaf, jnp.nan)
            return jnp.where(count > 0, join(jnp.sort(present, axis=0), count), 0)

        return jax.tree.map(one, jax.vmap(decompress)(messages)), state

    return protocol.Aggregator(lambda _: (), aggregate)


def _like_rows(flags: Array, leaf: Array) -> Array:
    """Give a vector over the rows of an array the number of axes of that array."""
    return flags.reshape(-1, *[1] * (leaf.ndim - 1))
