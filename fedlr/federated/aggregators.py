"""How the server joins the messages of a cohort into one update.

An aggregator receives the *messages* and `decompress`, so that averaging the factors of compressed
messages by mistake cannot be written.
"""

import jax
import jax.numpy as jnp

from fedlr.federated import protocol

__all__ = ["weighted_mean"]


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

    def init(params):
        del params
        return ()

    def fold_init(update):
        return jax.tree.map(jnp.zeros_like, update), jnp.zeros((), jnp.result_type(float))

    def add(carry, messages, weights, *, decompress):
        sums, total = carry
        updates = jax.vmap(decompress)(messages)

        def accumulate(partial, leaf):
            scale = weights.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))
            return partial + jnp.sum(jnp.where(scale != 0, scale * leaf, 0.0), axis=0)

        sums = jax.tree.map(accumulate, sums, updates)
        return sums, total + jnp.sum(weights, dtype=total.dtype)

    def finish(carry):
        sums, total = carry
        share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
        return jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), sums)

    def aggregate(messages, weights, state, *, decompress):
        first = jax.tree.map(lambda leaf: leaf[0], messages)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(decompress, first)
        )
        return finish(add(fold_init(zeros), messages, weights, decompress=decompress)), state

    return protocol.Aggregator(init, aggregate, protocol.Fold(fold_init, add, finish))
