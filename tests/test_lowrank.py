import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedlr import lowrank


def model(dtype=jnp.float64):
    """A matrix, a kernel and a bias."""
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "matrix": jax.random.normal(keys[0], (7, 9), dtype),
        "kernel": jax.random.normal(keys[1], (8, 3, 2, 2), dtype),
        "bias": jax.random.normal(keys[2], (7,), dtype),
    }


def factors_of(params, rank=2, **options):
    options = {"start": lowrank.both_random} | options
    return lowrank.init(params, rank, key=jax.random.key(2), **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_merge_adds_the_scaled_product_to_every_factorized_leaf(dtype):
    params = model(dtype)
    factors = factors_of(params, alpha=3.0)
    merged = lowrank.merge(params, factors)
    eps = float(jnp.finfo(dtype).eps)
    for name in ("matrix", "kernel"):
        up, down = np.asarray(factors[name].up), np.asarray(factors[name].down)
        expected = np.asarray(params[name]) + 1.5 * (up @ down).reshape(params[name].shape)
        np.testing.assert_allclose(merged[name], expected, rtol=10 * eps, atol=10 * eps)
        assert merged[name].dtype == dtype
    assert merged["bias"] is params["bias"]
    np.testing.assert_allclose(
        lowrank.dense_delta(factors)["matrix"],
        merged["matrix"] - params["matrix"],
        atol=20 * eps,
    )


def test_factored_matrices_act_like_merged_ones():
    params, x = model(), jax.random.normal(jax.random.key(3), (9,))
    factors = factors_of(params)
    applied, merged = lowrank.apply(params, factors), lowrank.merge(params, factors)
    np.testing.assert_allclose(applied["matrix"] @ x, merged["matrix"] @ x, rtol=1e-12)
    y = jax.random.normal(jax.random.key(4), (5, 7))
    np.testing.assert_allclose(y @ applied["matrix"], y @ merged["matrix"], rtol=1e-12)
    np.testing.assert_array_equal(applied["kernel"], merged["kernel"])
    assert applied["matrix"].shape == (7, 9)
    assert (applied["matrix"].ndim, applied["matrix"].dtype) == (2, jnp.float64)


def test_frozen_matrix_stays_unbatched_under_vmap():
    params, x = model()["matrix"], jnp.ones(9)
    many = jax.vmap(lambda key: lowrank.init(params, 2, key=key))(
        jax.random.split(jax.random.key(5), 4)
    )

    def act(factors):
        return lowrank.apply(params, factors) @ x

    jaxpr = str(jax.make_jaxpr(jax.vmap(act))(many))
    assert "f64[4,7,9]" not in jaxpr
    merged = str(jax.make_jaxpr(jax.vmap(lambda f: lowrank.merge(params, f) @ x))(many))
    assert "f64[4,7,9]" in merged


def test_a_pair_of_convolutions_is_the_merged_convolution():
    kernel = model()["kernel"]
    update = factors_of(kernel)
    x = jax.random.normal(jax.random.key(6), (2, 3, 7, 6))

    def convolve(x, kernel, strides=(2, 1), padding=((1, 0), (1, 2))):
        return lax.conv_general_dilated(x, kernel, strides, padding)

    inner = convolve(x, update.down.reshape(2, *kernel.shape[1:]))
    pair = convolve(inner, update.up[:, :, None, None], (1, 1), "VALID")
    whole = convolve(x, lowrank.merge(jnp.zeros_like(kernel), update))
    np.testing.assert_allclose(pair, whole, rtol=1e-10, atol=1e-12)


def test_starts_have_the_stated_laws():
    shape, rank = (400, 300), 16
    up, down = lowrank.zero_up(shape, rank, key=jax.random.key(0), dtype=jnp.float64)
    assert not up.any()
    # Uniform on +-b has standard deviation b / sqrt(3).
    np.testing.assert_allclose(jnp.std(down), (3 * 300) ** -0.5, rtol=0.03)
    up, down = lowrank.both_random(shape, rank, key=jax.random.key(0), dtype=jnp.float64)
    np.testing.assert_allclose(jnp.std(up @ down), 1 / (3 * np.sqrt(300)), rtol=0.03)


def test_where_and_the_size_rule_choose_the_leaves():
    params = model()
    only = factors_of(params, where=lambda path, leaf: "kernel" in str(path) and leaf.ndim == 4)
    assert only["matrix"] is None
    assert only["kernel"].rank == 2
    # 4 (7 + 9) >= 7 9, but 4 (8 + 12) < 8 12.
    assert factors_of(params, rank=4)["matrix"] is None
    assert factors_of(params, rank=4)["kernel"].rank == 4
    assert lowrank.num_bytes(only) == 2 * (8 + 12) * 8


def test_equinox_models_keep_their_structure():
    network = eqx.nn.MLP(6, 3, 8, 1, use_final_bias=False, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    factors = factors_of(params, rank=1)
    merged = eqx.combine(lowrank.merge(params, factors), static)
    applied = eqx.combine(
        lowrank.apply(params, factors),
        static,
        is_leaf=lambda node: isinstance(node, lowrank.FactoredMatrix),
    )
    x = jnp.ones(6, merged.layers[0].weight.dtype)
    np.testing.assert_allclose(merged(x), applied(x), rtol=1e-6)
    assert np.abs(merged(x) - network(x)).max() > 1e-3


def test_trainable_and_rest_take_the_model_apart():
    adapted = lowrank.adapt(model(), 2, key=jax.random.key(0))
    part = lowrank.trainable(adapted)
    assert [leaf.shape for leaf in jax.tree.leaves(part.rest)] == [(7,)]
    moved = jax.tree.map(lambda leaf: leaf + 1, part)
    base = lowrank.replace_rest(adapted.base, moved.rest)
    np.testing.assert_array_equal(base["bias"], adapted.base["bias"] + 1)
    np.testing.assert_array_equal(base["matrix"], adapted.base["matrix"])


def test_redraw_keeps_shapes_scales_and_keys_of_the_place():
    factors = factors_of(model(), alpha=1.0)
    key = jax.random.key(7)
    drawn = lowrank.redraw(factors, key=key, start=lowrank.both_random)
    assert jax.tree.structure(drawn) == jax.tree.structure(factors)
    again = lowrank.redraw(factors, key=key, start=lowrank.both_random)
    np.testing.assert_array_equal(drawn["matrix"].up, again["matrix"].up)
    assert np.abs(drawn["matrix"].down - factors["matrix"].down).max() > 0.01


def test_what_cannot_be_factorized_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"init: got rank 7 and leaves .*, expected a leaf"):
        lowrank.init(jnp.ones((7, 9)), 7, key=key)
    with pytest.raises(ValueError, match=r"init: got rank 1 and leaves of shapes \[\(4,\)\]"):
        lowrank.init({"bias": jnp.ones(4)}, 1, key=key)
    with pytest.raises(ValueError, match=r"init: got rank 0"):
        lowrank.init(jnp.ones((7, 9)), 0, key=key)
    update = lowrank.init(jnp.ones((7, 9)), 2, key=key)
    for function in (lowrank.merge, lowrank.apply):
        with pytest.raises(ValueError, match=r": got factors of shapes \(7, 2\) and \(2, 9\)"):
            function(jnp.ones((7, 8)), update)


def test_a_detached_adapter_is_the_sum_of_the_merged_pairs():
    base = trained = model()
    for seed in range(2):
        factors = lowrank.init(
            base, 2, key=jax.random.key(seed), start=lowrank.both_random, alpha=3.0
        )
        trained = lowrank.merge(trained, factors)
    trained = trained | {"bias": trained["bias"] + 1.0}
    adapter = lowrank.detach(trained, base, factors, rank=4)
    assert adapter.factors["matrix"].rank == 4
    assert adapter.factors["bias"] is None
    attached = lowrank.merge(lowrank.replace_rest(base, adapter.rest), adapter.factors)
    for name, leaf in trained.items():
        np.testing.assert_allclose(attached[name], leaf, atol=1e-13)
    # Of a lower rank it is the best approximation (Eckart and Young).
    change = np.asarray(trained["matrix"] - base["matrix"])
    lower = lowrank.detach(trained, base, factors, rank=1).factors["matrix"]
    error = np.linalg.norm(change - lower.up @ lower.down)
    left_out = np.linalg.svd(change, compute_uv=False)[1:]
    np.testing.assert_allclose(error, np.linalg.norm(left_out), rtol=1e-12)


def test_detaching_refuses_a_rank_below_one():
    base = model()
    with pytest.raises(ValueError, match="detach: got rank 0, expected an integer from 1"):
        lowrank.detach(base, base, factors_of(base), rank=0)
