import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr.federated import aggregators


def double(message):
    return jax.tree.map(lambda leaf: 2 * leaf, message)


@pytest.fixture
def messages(rng):
    return {"a": rng.normal(size=(3, 4, 5)), "b": rng.normal(size=3)}


def test_mean_weighs_the_decompressed_updates(messages):
    mean, weights = aggregators.weighted_mean(), jnp.array([1.0, 0.0, 3.0])
    update, state = mean.aggregate(messages, weights, mean.init(messages), decompress=double)
    for name, leaf in messages.items():
        np.testing.assert_allclose(update[name], 2 * (leaf[0] + 3 * leaf[2]) / 4, rtol=1e-14)
    assert state == ()


def test_folding_chunk_by_chunk_gives_the_aggregate(messages):
    mean, weights = aggregators.weighted_mean(), jnp.array([1.0, 0.5, 3.0])
    whole, _ = mean.aggregate(messages, weights, (), decompress=double)
    carry = mean.fold.init(jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), messages))
    for chunk in (slice(0, 2), slice(2, 3)):
        rows = jax.tree.map(lambda leaf: leaf[chunk], messages)  # noqa: B023
        carry = mean.fold.add(carry, rows, weights[chunk], decompress=double)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), mean.fold.finish(carry), whole
    )


def test_no_weight_at_all_gives_zeros_whatever_was_sent():
    mean = aggregators.weighted_mean()
    messages = jnp.array([jnp.nan, jnp.inf])
    update, _ = mean.aggregate(messages, jnp.zeros(2), (), decompress=double)
    assert update == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_mean_keeps_the_dtype(dtype):
    mean = aggregators.weighted_mean()
    update, _ = mean.aggregate(jnp.ones((2, 3), dtype), jnp.ones(2), (), decompress=double)
    assert update.dtype == dtype
