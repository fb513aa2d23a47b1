import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from fedlr.federated import local, protocol
from tests.reference import rounds as reference


def squared_error(weights, inputs, target):
    return (inputs @ weights - target) ** 2 / 2


def apply_rows(image, matrix):
    return matrix @ image


@pytest.fixture
def data(rng):
    mask = np.array([True, False, True, True, False])
    return protocol.ClientData(rng.normal(size=(5, 3)), rng.normal(size=5), mask)


@pytest.fixture
def weights(rng):
    return jnp.asarray(rng.normal(size=3))


def test_full_batch_steps_are_gradient_descent_on_the_present_examples(data, weights, key):
    update = local.local_sgd(squared_error, optax.sgd(0.1), num_steps=4)
    difference, state, metrics = jax.jit(update)(weights, (), data, key=key)
    expected = reference.least_squares_descent(
        np.asarray(weights), *data, step_size=0.1, num_steps=4
    )
    np.testing.assert_allclose(weights + difference, expected, rtol=1e-12)
    errors = (data.inputs @ weights - data.targets)[data.mask]
    np.testing.assert_allclose(metrics.loss, np.mean(errors**2) / 2, rtol=1e-12)
    assert metrics.num_examples == 3
    assert state == ()


@pytest.mark.parametrize("garbage", [1e30, np.nan])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_masked_examples_may_hold_anything(data, weights, key, garbage, batch_size):
    update = jax.jit(
        local.local_sgd(squared_error, optax.sgd(0.1), num_steps=3, batch_size=batch_size)
    )
    hidden = ~data.mask
    spoilt = data._replace(
        inputs=np.where(hidden[:, None], garbage, data.inputs),
        targets=np.where(hidden, garbage, data.targets),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        update(weights, (), spoilt, key=key),
        update(weights, (), data, key=key),
    )


def test_client_without_examples_stays_where_it_is(data, weights, key):
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    update = local.local_sgd(squared_error, optimizer, num_steps=3)
    empty = data._replace(
        mask=np.zeros(5, bool), targets=np.full(5, np.nan), inputs=np.full((5, 3), np.nan)
    )
    difference, _, metrics = update(weights, (), empty, key=key)
    np.testing.assert_array_equal(difference, np.zeros(3))
    assert metrics.loss == 0


def test_batches_read_every_present_example_before_any_twice(key):
    """With a loss linear in the params the update counts how often each example was read."""
    mask = jnp.array([True, False, True, True, True, False, True])
    data = protocol.ClientData(jnp.eye(7), jnp.zeros(7), mask)

    def counts(num_steps):
        update = local.local_sgd(
            lambda w, x, _: -jnp.sum(w * x), optax.sgd(2.0), num_steps=num_steps, batch_size=2
        )
        return np.asarray(jax.jit(update)(jnp.zeros(7), (), data, key=key)[0])

    np.testing.assert_array_equal(counts(5), 2 * np.asarray(mask))
    seen = counts(2)
    assert sorted(seen[np.asarray(mask)]) == [0, 1, 1, 1, 1]


def test_batch_larger_than_the_client_is_a_full_batch(data, weights, key):
    large = local.local_sgd(squared_error, optax.sgd(0.1), num_steps=2, batch_size=4)
    full = local.local_sgd(squared_error, optax.sgd(0.1), num_steps=2)
    np.testing.assert_allclose(
        large(weights, (), data, key=key)[0], full(weights, (), data, key=key)[0], rtol=1e-12
    )


def test_adaptive_optimizers_keep_float32(data, weights, key):
    params, data = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), (weights, (data.inputs, data.targets))
    )
    clients = protocol.ClientData(*data, jnp.ones(5, bool))
    update = local.local_sgd(squared_error, optax.adam(0.1), num_steps=2)
    difference, _, metrics = update(params, (), clients, key=key)
    assert difference.dtype == metrics.loss.dtype == jnp.float32


@pytest.mark.parametrize("counts", [{"num_steps": 0}, {"num_steps": 1, "batch_size": 0}])
def test_counts_below_one_are_refused(counts):
    with pytest.raises(ValueError, match=r"local_sgd: got .* 0, expected an integer from 1"):
        local.local_sgd(squared_error, optax.sgd(0.1), **counts)


def test_masks_of_single_entries_are_refused_in_training(data, weights, key):
    update = local.local_sgd(squared_error, optax.sgd(0.1), num_steps=1)
    with pytest.raises(ValueError, match=r"local_sgd: got mask of shape \(5, 1\)"):
        update(weights, (), data._replace(mask=data.mask[:, None]), key=key)


def test_inputs_with_another_number_of_rows_are_refused_in_training(data, weights, key):
    update = local.local_sgd(squared_error, optax.sgd(0.1), num_steps=1)
    with pytest.raises(ValueError, match=r"local_sgd: got inputs of shape \(4, 3\) for 5 targets"):
        update(weights, (), data._replace(inputs=data.inputs[:4]), key=key)


def test_projected_gradient_is_a_clipped_step_on_the_present_rows(data, weights, key):
    image = jnp.abs(weights)
    update = jax.jit(local.projected_gradient(apply_rows, step_size=0.2))
    difference, _, metrics = update(image, (), data, key=key)
    expected, norm = reference.projected_gradient_step(np.asarray(image), *data, step_size=0.2)
    np.testing.assert_allclose(image + difference, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(metrics.residual_norm, norm, rtol=1e-12)
    np.testing.assert_allclose(metrics.loss, norm**2 / 2, rtol=1e-12)


def test_gradient_step_follows_the_gradient_of_the_misfit(data, weights):
    def misfit(image):
        return jnp.sum(jnp.where(data.mask, data.inputs @ image - data.targets, 0.0) ** 2) / 2

    moved, _ = local.gradient_step(apply_rows, weights, data, 0.3)
    np.testing.assert_allclose(moved, weights - 0.3 * jax.grad(misfit)(weights), rtol=1e-12)


def test_record_of_a_perfect_image_has_a_zero_gradient(data, weights, key):
    update = local.projected_gradient(apply_rows, step_size=0.2)
    perfect = data._replace(targets=data.inputs @ weights)

    def loss(image):
        return update(image, (), perfect, key=key)[2].loss

    np.testing.assert_array_equal(jax.grad(loss)(weights), 0)


def test_step_size_is_finite_where_no_client_has_data(data, weights, key):
    empty = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], data)
    empty = empty._replace(mask=jnp.zeros_like(empty.mask))
    step = local.initial_step_size(None, apply_rows, empty, weights, key=key)
    assert step == 1
    moved, _ = local.gradient_step(apply_rows, weights, data._replace(mask=empty.mask[0]), step)
    np.testing.assert_array_equal(moved, weights)


def test_masked_measurements_may_hold_anything(data, weights):
    spoilt = data._replace(
        inputs=np.where(data.mask[:, None], data.inputs, 1e30),
        targets=np.where(data.mask, data.targets, np.nan),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        local.gradient_step(apply_rows, weights, spoilt, 0.3),
        local.gradient_step(apply_rows, weights, data, 0.3),
    )


def test_masks_hide_whole_views_or_single_entries(rng):
    image, targets = jnp.asarray(rng.normal(size=(4, 3))), rng.normal(size=(4, 3))
    views = np.array([True, False, True, True])
    by_view = protocol.ClientData((), targets, views)
    by_entry = by_view._replace(mask=np.broadcast_to(views[:, None], (4, 3)))
    jax.tree.map(
        np.testing.assert_array_equal,
        local.gradient_step(lambda w, _: 2.0 * w, image, by_view, 0.1),
        local.gradient_step(lambda w, _: 2.0 * w, image, by_entry, 0.1),
    )


def test_clip_and_proximal_map_are_applied_in_this_order(data, weights, key):
    def result(**options):
        update = local.projected_gradient(apply_rows, step_size=0.2, **options)
        return weights + update(weights, (), data, key=key)[0]

    moved, _ = local.gradient_step(apply_rows, weights, data, 0.2)
    np.testing.assert_allclose(result(lower=None), moved, rtol=1e-12)
    np.testing.assert_allclose(result(lower=-0.1), jnp.maximum(moved, -0.1), rtol=1e-12)
    shifted = result(proximal=lambda image: image - 1.0)
    np.testing.assert_allclose(shifted, jnp.maximum(moved, 0.0) - 1.0, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_reconstruction_keeps_its_dtype(data, weights, key, dtype):
    data = data._replace(
        inputs=jnp.asarray(data.inputs, dtype), targets=jnp.asarray(data.targets, dtype)
    )
    update = local.projected_gradient(apply_rows, step_size=np.float64(0.1))
    results = update(weights.astype(dtype), (), data, key=key)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(dtype)}


def test_operator_norm_is_the_largest_singular_value_of_any_client(rng, key):
    matrices, masks = rng.normal(size=(3, 5, 4)), rng.uniform(size=(3, 5)) < 0.7
    masks[1] = False
    spoilt = np.where(masks[:, :, None], matrices, 1e30)
    clients = protocol.ClientData(spoilt, np.full((3, 5), np.nan), masks)
    found = jax.jit(
        lambda clients: local.operator_norm(
            apply_rows, clients, jnp.zeros(4), key=key, num_iters=200
        )
    )(clients)
    np.testing.assert_allclose(found, reference.largest_squared_norm(matrices, masks), rtol=1e-9)


def test_initial_step_size_is_the_inverse_norm_unless_given(rng, key):
    clients = protocol.ClientData((), jnp.zeros((2, 4)), jnp.ones((2, 4), bool))
    arguments = (lambda w, _: 3.0 * w, clients, jnp.zeros(4))
    found = local.initial_step_size(None, *arguments, key=key)
    np.testing.assert_allclose(found, 1 / 9, rtol=1e-14)
    assert local.initial_step_size(0.5, *arguments, key=key) == 0.5


def test_data_that_do_not_fit_the_forward_model_are_refused(data, weights, key):
    def step(image=weights, **changes):
        return local.gradient_step(apply_rows, image, data._replace(**changes), 0.1)

    with pytest.raises(ValueError, match=r"gradient_step: got prediction of shape \(5,\)"):
        step(targets=np.zeros(4), mask=np.ones(4, bool))
    with pytest.raises(ValueError, match=r"gradient_step: got prediction of dtype float64"):
        step(targets=np.zeros(5, np.float32))
    with pytest.raises(ValueError, match=r"gradient_step: got mask of dtype float64"):
        step(mask=np.ones(5))
    with pytest.raises(ValueError, match=r"gradient_step: got image of dtype int"):
        step(image=jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r"operator_norm: got num_iters 0"):
        local.operator_norm(apply_rows, data, weights, key=key, num_iters=0)


def test_convolutions_in_the_loop_of_a_cpu_go_by_patches():
    def loss(kernel, image, target):
        return jnp.mean((lax.conv(image[None], kernel, (1, 1), "SAME")[0] - target) ** 2)

    images = jax.random.normal(jax.random.key(0), (4, 2, 6, 5))
    data = protocol.ClientData(images, images[:, :1], jnp.ones(4, bool))
    kernel = jnp.ones((1, 2, 3, 3)) / 18
    update = local.local_sgd(loss, optax.sgd(0.1), num_steps=3)
    step = jax.jit(lambda kernel, data: update(kernel, (), data, key=jax.random.key(1))[0])
    program = step.lower(kernel, data).compile()
    assert " convolution(" not in program.as_text()
    expected = kernel
    for _ in range(3):
        batch = jax.vmap(loss, in_axes=(None, 0, 0))
        slope = jax.grad(lambda k, batch=batch: jnp.mean(batch(k, images, images[:, :1])))(expected)
        expected = expected - 0.1 * slope
    np.testing.assert_allclose(program(kernel, data), expected - kernel, rtol=1e-10, atol=1e-13)
