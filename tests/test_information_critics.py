import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlr import information

DTYPES = [np.float32, np.float64]
N, M, DX, DY = 4, 5, 3, 2


def samples(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, DX)).astype(dtype), rng.standard_normal((M, DY)).astype(dtype)


def naive_joint(critic, x, y):
    """Two nested vmaps of the network on [x, y]."""

    def score(a, b):
        return critic.network(jnp.concatenate([a, b]))

    return jax.vmap(lambda a: jax.vmap(lambda b: score(a, b))(y))(x)


def total(apply, critic, x, y):
    return jnp.sum(jnp.sin(apply(critic, x, y)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 2])
def test_joint_critic_is_its_network_on_every_pair(depth, dtype):
    x, y = samples(dtype)
    key = jax.random.key(depth)
    critic = information.joint_critic(DX, DY, width=6, depth=depth, dtype=dtype, key=key)

    @eqx.filter_jit
    def both(critic, x, y):
        slopes = [
            eqx.filter_grad(functools.partial(total, apply))(critic, x, y)
            for apply in (lambda critic, x, y: critic(x, y), naive_joint)
        ]
        return critic(x, y), naive_joint(critic, x, y), *slopes

    found, expected, slope, expected_slope = both(critic, x, y)
    assert found.shape == (N, M)
    assert found.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(found, expected, atol=20 * eps)
    leaves = jax.tree.leaves(slope)
    assert len(leaves) == 2 * (depth + 1)
    for leaf, wanted in zip(leaves, jax.tree.leaves(expected_slope), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=100 * eps)
        assert np.any(leaf != 0)


def test_joint_critic_takes_networks_without_bias_or_with_a_scan():
    x, y = samples()
    for options in ({"use_bias": False}, {"scan": True}, {"activation": jnp.tanh}):
        network = eqx.nn.MLP(DX + DY, "scalar", 6, 2, key=jax.random.key(0), **options)
        critic = information.JointCritic(network)
        np.testing.assert_allclose(critic(x, y), naive_joint(critic, x, y), atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_separable_critic_is_a_product_of_features(dtype):
    x, y = samples(dtype)
    key = jax.random.key(1)
    critic = information.separable_critic(DX, DY, 3, width=6, depth=1, dtype=dtype, key=key)
    found = eqx.filter_jit(critic)(x, y)
    assert found.dtype == dtype
    left, right = (jax.vmap(f)(z) for f, z in ((critic.left, x), (critic.right, y)))
    expected = [[np.dot(f, g) for g in np.asarray(right)] for f in np.asarray(left)]
    np.testing.assert_allclose(found, expected, atol=20 * np.finfo(dtype).eps)
    assert np.linalg.matrix_rank(np.asarray(found, np.float64), tol=1e-6) == 3
    plain = information.SeparableCritic(lambda a: a[:DY], lambda b: 2 * b)
    np.testing.assert_allclose(plain(x, y), 2 * x[:, :DY] @ y.T, rtol=1e-6)


def test_drawn_critics_differ_by_key_and_side():
    one, two = (information.separable_critic(2, 2, 3, key=jax.random.key(k)) for k in (0, 1))
    assert np.any(one.left.layers[0].weight != two.left.layers[0].weight)
    assert np.any(one.left.layers[0].weight != one.right.layers[0].weight)


def test_critic_learns_the_information_of_a_correlated_pair():
    correlation, size = 0.8, 64
    truth = float(information.correlation_information(jnp.array(correlation)))
    critic = information.joint_critic(1, 1, width=16, dtype=jnp.float32, key=jax.random.key(0))
    optimizer = optax.adam(1e-2)

    def draw(key):
        x, e = jax.random.normal(key, (2, size, 1), jnp.float32)
        return x, correlation * x + math.sqrt(1 - correlation**2) * e

    @jax.jit
    def train_and_test(arrays):
        def apply(arrays, x, y):
            return eqx.combine(arrays, rest)(x, y)

        def step(carry, key):
            arrays, state = carry
            x, y = draw(key)
            slope = jax.grad(lambda a: -information.jensen_shannon(apply(a, x, y)))(arrays)
            change, state = optimizer.update(slope, state)
            return (optax.apply_updates(arrays, change), state), None

        def test(arrays):
            held_out = jax.vmap(draw)(jax.random.split(jax.random.key(1), 40))
            scores = jax.vmap(functools.partial(apply, arrays))(*held_out)
            return jnp.mean(jax.vmap(information.jensen_shannon_as_nwj)(scores))

        keys = jax.random.split(jax.random.key(2), 300)
        (trained, _), _ = jax.lax.scan(step, (arrays, optimizer.init(arrays)), keys)
        return test(arrays), test(trained)

    arrays, rest = eqx.partition(critic, eqx.is_array)
    # optax raises a float to an integer power
    with jax.numpy_dtype_promotion("standard"):
        before, after = train_and_test(arrays)
    # 40 batches of 64: a standard error below 0.03
    assert before < 0.1 * truth
    assert 0.8 * truth < after < truth + 0.1


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: information.joint_critic(0, 2, key=KEY),
            "joint_critic: got x_size 0, expected an integer from 1",
        ),
        (
            lambda: information.joint_critic(2, 2, depth=0, key=KEY),
            "joint_critic: got depth 0, expected an integer from 1",
        ),
        (
            lambda: information.separable_critic(2, 2, 0, key=KEY),
            "separable_critic: got features 0, expected an integer from 1",
        ),
        (
            lambda: information.JointCritic(eqx.nn.MLP(4, 1, 3, 1, key=KEY)),
            "JointCritic: got a network of depth 1, out_size 1, expected a hidden layer and",
        ),
        (
            lambda: information.joint_critic(2, 2, key=KEY)(jnp.ones((3, 2)), jnp.ones((3, 3))),
            r"JointCritic: got 2 \+ 3 features, expected 4 of x and y together",
        ),
        (
            lambda: information.joint_critic(2, 2, key=KEY)(jnp.ones(2), jnp.ones((3, 2))),
            r"JointCritic: got x of shape \(2,\), expected 2 axes",
        ),
        (
            lambda: information.SeparableCritic(jnp.sin, jnp.sin)(
                jnp.ones((3, 2), jnp.float16), jnp.ones((3, 2))
            ),
            "SeparableCritic: got x of dtype float16, expected float32 or float64",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        call()
