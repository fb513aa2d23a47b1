import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import phantoms, proximal

SHAPES = [(40,), (12, 9), (6, 5, 4)]

prox = jax.jit(proximal.total_variation, static_argnames="num_iters")


def noisy(shape, seed=0, dtype=np.float64):
    """A box in noise."""
    box = np.zeros(shape)
    box[tuple(slice(n // 4, 3 * n // 4) for n in shape)] = 1.0
    return (box + 0.2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def naive_norm(image):
    """Sum the lengths of the forward differences pixel by pixel."""
    total = 0.0
    for index in np.ndindex(image.shape):
        square = 0.0
        for axis in range(image.ndim):
            if index[axis] + 1 < image.shape[axis]:
                after = tuple(i + (k == axis) for k, i in enumerate(index))
                square += (image[after] - image[index]) ** 2
        total += np.sqrt(square)
    return total


def objective(x, z, weight):
    return 0.5 * float(jnp.sum((x - z) ** 2)) + weight * float(proximal.total_variation_norm(x))


@jax.jit
def smallest_objective(z, weight):
    """A bound from below of the objective: z's dual problem by plain projection, many steps."""

    def differences(x):
        grids = [jnp.diff(x, axis=k, append=jnp.take(x, jnp.array([-1]), k)) for k in range(x.ndim)]
        return jnp.stack(grids)

    def residual(u):
        return z - jax.linear_transpose(differences, z)(u)[0]

    def step(_, u):
        u = u + differences(residual(u)) / (4 * z.ndim)
        return u / jnp.maximum(jnp.sqrt(jnp.sum(u**2, axis=0)) / weight, 1)[None]

    u = jax.lax.fori_loop(0, 20000, step, jnp.zeros((z.ndim, *z.shape)))
    # every u no vector of which is longer than the weight gives a bound
    return (jnp.sum(z**2) - jnp.sum(residual(u) ** 2)) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_equals_a_loop_over_pixels(shape):
    z = noisy(shape)
    np.testing.assert_allclose(proximal.total_variation_norm(z), naive_norm(z), rtol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_many_steps_close_the_gap_to_the_dual(shape):
    z = noisy(shape)
    for weight in (0.03, 0.3):
        x = prox(z, weight, num_iters=5000)
        bound = float(smallest_objective(z, weight))
        assert bound - 1e-12 <= objective(x, z, weight) <= bound + 1e-6


@pytest.mark.parametrize("weight", [0.05, 0.4])
def test_one_axis_meets_the_conditions_of_the_taut_string(weight):
    z = noisy((40,))
    x = np.asarray(prox(z, weight, num_iters=20000))
    string = np.cumsum(x - z)[:-1]
    assert np.abs(string).max() <= weight + 1e-12
    assert abs((x - z).sum()) <= 1e-12
    jump = np.diff(x)
    moves = np.abs(jump) > 1e-6
    assert 0 < moves.sum() < 39
    np.testing.assert_allclose(string[moves], weight * np.sign(jump[moves]), atol=1e-7)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_edge_across_an_axis_loses_height_as_the_formula_says(axis):
    edge = np.repeat([0.0, 1.0], 3)
    z = np.broadcast_to(np.expand_dims(edge, [k for k in range(3) if k != axis]), (6, 6, 6))
    x = prox(z, 0.3, num_iters=2000)
    np.testing.assert_allclose(x, np.where(z == 0, 0.1, 0.9), atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 9), (6, 5, 4)])
def test_agrees_with_scikit_image(shape):
    restoration = pytest.importorskip("skimage.restoration")
    z = noisy(shape)
    for weight in (0.03, 0.3):
        theirs = restoration.denoise_tv_chambolle(z, weight, eps=0, max_num_iter=3000)
        ours = prox(z, weight, num_iters=5000)
        # strong convexity: 1/2 ||x - x*||^2 is at most the distance to the smallest objective
        excess = objective(theirs, z, weight) - objective(ours, z, weight)
        assert -1e-8 <= excess <= 1e-4 * objective(ours, z, weight)
        distance = float(np.linalg.norm(theirs - ours))
        assert distance <= np.sqrt(2 * excess + 1e-8) + 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_the_objective_is_never_above_that_of_the_image(shape):
    for seed in range(3):
        z = noisy(shape, seed)
        for weight in (0.003, 0.03, 0.3, 3.0):
            for num_iters in (1, 2, 10):
                x = prox(z, weight, num_iters=num_iters)
                assert objective(x, z, weight) < objective(z, z, weight)


def test_ten_steps_come_as_near_as_the_comment_says():
    clean = phantoms.rasterize(phantoms.modified_shepp_logan(dtype=jnp.float64), 100)
    z = clean + 0.05 * jax.random.normal(jax.random.key(0), clean.shape)
    for weight, expected in ((0.003, 0.0010), (0.01, 0.0075)):
        x = prox(z, weight, num_iters=300)
        distance = jnp.linalg.norm(prox(z, weight) - x) / jnp.linalg.norm(z - x)
        assert float(distance) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_does_not_expand_distances(shape):
    smooth = functools.partial(prox, weight=0.2, num_iters=2000)
    for seed in range(3):
        a, b = noisy(shape, seed), noisy(shape, seed + 10)
        moved = float(jnp.linalg.norm(smooth(a) - smooth(b)))
        assert moved <= np.linalg.norm(a - b) * (1 + 1e-6)


@pytest.mark.parametrize("num_iters", [1, 10])
def test_commutes_with_shifts_scalings_and_exchanged_axes(num_iters):
    z = noisy((6, 5, 4))
    smooth = functools.partial(prox, num_iters=num_iters)
    x = smooth(z, 0.1)
    np.testing.assert_allclose(smooth(z + 7.0, 0.1), x + 7.0, atol=1e-13)
    np.testing.assert_allclose(smooth(3.0 * z, 0.3), 3.0 * x, atol=1e-13)
    np.testing.assert_allclose(smooth(-z, 0.1), -x, atol=1e-15)
    turned = smooth(z.transpose(2, 0, 1), 0.1)
    np.testing.assert_allclose(turned, x.transpose(2, 0, 1), atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_dtype_stay(shape, dtype):
    z = noisy(shape, dtype=dtype)
    x = prox(z, 0.3)
    assert x.dtype == dtype
    assert x.shape == shape
    error = 4 * z.size * np.finfo(dtype).eps
    np.testing.assert_allclose(np.sum(x, dtype=np.float64), np.sum(z, dtype=np.float64), atol=error)
    assert proximal.total_variation_norm(x).dtype == dtype


def test_weight_zero_returns_the_image_and_a_large_one_its_mean():
    z = noisy((6, 5, 4))
    np.testing.assert_array_equal(prox(z, 0.0), z)
    flat = prox(z, 100.0, num_iters=500)
    np.testing.assert_allclose(flat, np.full(z.shape, z.mean()), atol=1e-6)


def test_axes_of_one_pixel_change_nothing():
    z = noisy((7, 5))
    # the step depends on the number of axes, so only the limit is the same
    expected = prox(z, 0.1, num_iters=1000)
    found = prox(z[:, None], 0.1, num_iters=1000)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(prox(z[:1, :1], 0.1), z[:1, :1])


def test_vmap_equals_a_loop():
    stack = np.stack([noisy((6, 5), seed) for seed in range(3)])
    weights = np.array([0.0, 0.1, 0.4])
    batch = jax.jit(jax.vmap(proximal.total_variation))(stack, weights)
    for z, weight, x in zip(stack, weights, batch, strict=True):
        np.testing.assert_allclose(x, prox(z, weight), atol=1e-14)


def test_derivative_is_that_of_finite_differences():
    z, direction = noisy((6, 5)), noisy((6, 5), 1)
    target = noisy((6, 5), 2)

    @jax.jit
    def loss(z, weight):
        return jnp.sum((proximal.total_variation(z, weight) - target) ** 2)

    by_image, by_weight = jax.grad(loss, (0, 1))(z, 0.1)
    step = 1e-6
    slope = (loss(z + step * direction, 0.1) - loss(z - step * direction, 0.1)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(by_image * direction), slope, rtol=1e-6)
    slope = (loss(z, 0.1 + step) - loss(z, 0.1 - step)) / (2 * step)
    np.testing.assert_allclose(by_weight, slope, rtol=1e-6)


def test_derivatives_are_finite():
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(z, weight):
        x = proximal.total_variation(z, weight, num_iters=3)
        return jnp.sum(x**2) + proximal.total_variation_norm(x)

    for z in (noisy((6, 5)), np.ones((6, 5)), np.zeros((6, 5))):
        for weight in (0.0, 0.1):
            for gradient in gradients(z, weight):
                assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(jax.grad(proximal.total_variation_norm)(jnp.ones((3, 4))), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: proximal.total_variation(np.ones((4, 3)), -0.1),
            "total_variation: got weight -0.1, expected a non-negative number",
        ),
        (
            lambda: proximal.total_variation(np.ones((4, 3)), np.nan),
            "total_variation: got weight nan, expected a non-negative number",
        ),
        (
            lambda: proximal.total_variation(np.ones((4, 3)), np.ones(3)),
            r"total_variation: got weight of shape \(3,\), expected 0 axes",
        ),
        (
            lambda: proximal.total_variation(np.ones((4, 3), int), 0.1),
            "total_variation: got image of dtype int64",
        ),
        (
            lambda: proximal.total_variation(np.ones((4, 3)), 0.1, num_iters=0),
            "total_variation: got num_iters 0, expected an integer from 1",
        ),
        (
            lambda: proximal.total_variation(np.array(1.0), 0.1),
            r"total_variation: got image of shape \(\), expected at least one pixel and axis",
        ),
        (
            lambda: proximal.total_variation_norm(np.ones((0, 3))),
            r"total_variation_norm: got image of shape \(0, 3\), expected at least one pixel",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
