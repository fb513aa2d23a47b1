import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr.federated import servers


def test_unit_sgd_adds_the_update(rng, key):
    server = servers.from_optax(optax.sgd(1.0))
    params, update = {"a": rng.normal(size=(2, 3))}, {"a": rng.normal(size=(2, 3))}
    moved, _ = server.apply(params, update, server.init(params), key=key)
    np.testing.assert_array_equal(moved["a"], params["a"] + update["a"])


def test_momentum_accumulates_updates(rng, key):
    server = servers.from_optax(optax.sgd(0.5, momentum=0.9))
    params, updates = jnp.zeros(3), rng.normal(size=(2, 3))
    state = server.init(params)
    for update in updates:
        params, state = server.apply(params, update, state, key=key)
    expected = 0.5 * updates[0] + 0.5 * (updates[1] + 0.9 * updates[0])
    np.testing.assert_allclose(params, expected, rtol=1e-14)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.yogi(0.1), optax.adagrad(0.1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_adaptive_servers_climb_along_the_update_and_keep_dtypes(optimizer, dtype, key):
    server = servers.from_optax(optimizer)
    params = jnp.zeros(3, dtype)
    update = jnp.array([1.0, -2.0, 3.0], dtype)
    state = server.init(params)
    moved, new_state = server.apply(params, update, state, key=key)
    assert moved.dtype == dtype
    np.testing.assert_array_equal(jnp.sign(moved), jnp.sign(update))
    kinds = jax.tree.map(jnp.result_type, (state, new_state))
    assert kinds[0] == kinds[1]
