import dataclasses
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import synthetic

CHANNELS, LATENTS = (7, 6), (3, 2, 1)
RESPONSES = [synthetic.tanh_response, synthetic.softplus_response, synthetic.sech_response]
draw_clients = jax.jit(synthetic.multimodal_clients, static_argnames="num_samples")


@functools.partial(jax.jit, static_argnames="dtype")
def draw_world(key, dtype):
    return synthetic.multimodal_world(CHANNELS, LATENTS, key=key, dtype=dtype)


def make_world(seed=0, dtype=jnp.float64, **options):
    """A world, drawn by one compiled function whatever the options, which move no number."""
    return dataclasses.replace(draw_world(jax.random.key(seed), dtype), **options)


def make_linear(seed=0, **options):
    options = {"noise": (0.2, 0.3), "link": jax.nn.identity} | options
    return make_world(seed, response=synthetic.linear_response, **options)


def sample(world, shifts, num_samples=250_000, seed=2):
    return draw_clients(world, shifts, num_samples, key=jax.random.key(seed))


@pytest.fixture(scope="module")
def shifts():
    return np.asarray(synthetic.client_shifts(make_world(), 2, 0.5, key=jax.random.key(1)))


@pytest.fixture(scope="module")
def curved(shifts):
    """A curved world without noise of the inputs, and 5e5 samples of two clients."""
    world = make_world()
    return world, jax.tree.map(np.asarray, sample(world, shifts))


@pytest.fixture(scope="module")
def linear(shifts):
    """A linear world with noisy inputs, and 5e5 samples of two clients."""
    world = make_linear()
    return world, jax.tree.map(np.asarray, sample(world, shifts))


def expect_curved(world, shared, private):
    """h(u) + c . v_1 as the docstrings have it; nothing is known of v_1 if it is None."""
    a, b = np.asarray(world.directions)
    known = 0 if private is None else private @ np.asarray(world.private)
    return np.tanh(2 * shared @ a) + (shared @ b) ** 2 / 2 + known


def assert_mean_square(errors, expected):
    """The mean square of the errors is the expected one within three standard errors."""
    squares = errors.ravel() ** 2
    assert abs(squares.mean() - expected) < 3 * squares.std() / np.sqrt(squares.size)


def joint_covariance(world, observed):
    """Covariance of (x_m for m in observed, y) of a linear world, entry by entry of the model."""
    a, c = np.asarray(world.directions)[0], np.asarray(world.private)
    r, own = len(a), LATENTS[1:]
    sigma, s = world.noise
    rows, starts = [], r + np.cumsum([0, *own])
    for m in observed:
        for weight in np.asarray(world.weights[m]).T:
            row = np.zeros(sum(LATENTS))
            row[:r], row[starts[m] : starts[m] + own[m]] = weight[:r], weight[r:]
            rows.append(row)
    target = np.zeros(sum(LATENTS))
    target[:r], target[r : r + own[0]] = a, c
    loadings = np.array([*rows, target])
    return loadings @ loadings.T + np.diag([s**2] * len(rows) + [sigma**2])


def regression(world, observed):
    """Coefficients of the best linear predictor of y, and its mean squared error."""
    joint = joint_covariance(world, observed)
    slope = np.linalg.solve(joint[:-1, :-1], joint[:-1, -1])
    return slope, joint[-1, -1] - joint[-1, :-1] @ slope


def test_inputs_and_targets_are_those_of_the_latents(curved, linear):
    for world, data in (curved, linear):
        assert data.targets.shape == (2, 250_000)
        for m, (x, weight) in enumerate(zip(data.inputs, world.weights, strict=True)):
            latents = np.concatenate([data.shared, data.private[m]], axis=2)
            signal = latents @ np.asarray(weight)
            if world.link is jnp.tanh:
                np.testing.assert_allclose(x, np.tanh(signal), rtol=0, atol=1e-14)
            else:
                assert_mean_square(x - signal, world.noise[1] ** 2)
                errors = (x - signal).reshape(-1, x.shape[2])
                correlations = np.corrcoef(errors.T) - np.eye(x.shape[2])
                assert np.abs(correlations).max() < 4.5 / np.sqrt(len(errors))
    world, data = curved
    expected = expect_curved(world, data.shared, data.private[0])
    np.testing.assert_allclose(synthetic.oracle(world, data), expected, rtol=0, atol=1e-13)


def test_latents_are_standard_normal_around_the_shift_of_their_client(curved, shifts):
    _, data = curved
    for client in range(2):
        latents = [data.shared[client] - shifts[client], *(v[client] for v in data.private)]
        latents = np.concatenate(latents, axis=1)
        count, width = latents.shape
        assert width == sum(LATENTS)
        # Of 6 means and 21 second moments, the largest of the standard errors.
        assert np.abs(latents.mean(axis=0)).max() < 4 / np.sqrt(count)
        moments = latents.T @ latents / count - np.eye(width)
        assert np.abs(moments).max() < 4 * np.sqrt(2 / count)


def test_the_oracle_attains_the_floor(curved, linear):
    for world, data in (curved, linear):
        errors = data.targets - synthetic.oracle(world, data)
        assert_mean_square(errors, world.noise[0] ** 2)


def test_the_floor_is_attained_from_inputs_without_noise(curved):
    """Behind the link, the pseudoinverse of W_m gives u and v_m; without x_1 that is u alone."""
    world, data = curved
    latents = [
        np.arctanh(x) @ np.linalg.pinv(np.asarray(weight))
        for x, weight in zip(data.inputs, world.weights, strict=True)
    ]
    for m, found in enumerate(latents):
        expected = np.concatenate([data.shared, data.private[m]], axis=2)
        # Rounding of tanh near 1 and its inverse; measured 1e-10.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    best = expect_curved(world, latents[0][..., :3], latents[0][..., 3:])
    without = expect_curved(world, latents[1][..., :3], None)
    for observed, predicted in ((None, best), ((0,), best), ((1,), without)):
        assert_mean_square(data.targets - predicted, synthetic.bayes_error(world, observed))
    found = [synthetic.bayes_error(world, observed) for observed in (None, (1,))]
    expected = 0.2**2 + np.array([0, np.sum(np.asarray(world.private) ** 2)])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("observed", [(0, 1), (1,), (1, 0), (0,)])
def test_the_floor_of_noisy_inputs_is_that_of_the_regression(observed):
    for seed in range(3):
        world = make_linear(seed)
        joint = joint_covariance(world, observed)
        _, expected = regression(world, observed)
        np.testing.assert_allclose(synthetic.bayes_error(world, observed), expected, rtol=1e-10)
        # The mutual information of Gaussians by determinants.
        logs = [np.linalg.slogdet(part)[1] for part in (joint[:-1, :-1], joint[-1:, -1:], joint)]
        np.testing.assert_allclose(
            synthetic.mutual_information(world, observed),
            (logs[0] + logs[1] - logs[2]) / 2,
            rtol=1e-10,
        )


@pytest.mark.parametrize("observed", [(0, 1), (0,), (1,)])
def test_the_floor_of_noisy_inputs_is_attained_where_the_shift_is_known(linear, shifts, observed):
    world, data = linear
    slope, _ = regression(world, observed)
    x = np.concatenate([data.inputs[m] for m in observed], axis=2)
    weights = [np.asarray(world.weights[m])[:3] for m in observed]
    center = shifts @ np.concatenate(weights, axis=1)
    prior = shifts @ np.asarray(world.directions)[0]
    predicted = prior[:, None] + (x - center[:, None]) @ slope
    assert_mean_square(data.targets - predicted, synthetic.bayes_error(world, observed))


def test_noise_of_the_inputs_costs_and_vanishes_in_the_limit():
    """From sigma^2 up to the variance of the target, always more, and less from more inputs."""
    spread = 1 + 0.5**2 + 0.2**2
    previous = 0.2**2
    for level in (1e-4, 0.1, 1.0, 10.0, 1e4):
        world = make_linear(noise=(0.2, level))
        errors = [float(synthetic.bayes_error(world, observed)) for observed in (None, (0,), (1,))]
        assert previous < errors[0] < min(errors[1:])
        assert max(errors) < spread
        previous = errors[0]
        if level == 1e-4:
            np.testing.assert_allclose(errors, [0.04, 0.04, 0.29], rtol=1e-5)
    np.testing.assert_allclose(errors, spread, rtol=1e-5)
    assert abs(float(synthetic.mutual_information(world))) < 1e-5


def test_the_mutual_information_is_the_same_behind_any_link():
    expected = np.log((1 + 0.25 + 0.04) / np.array([0.04, 0.29])) / 2
    for link in (jnp.tanh, jax.nn.identity):
        world = make_linear(noise=(0.2, 0.0), link=link)
        found = [synthetic.mutual_information(world, observed) for observed in (None, (1,))]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_world_has_the_scales_that_it_states():
    keys = jax.random.split(jax.random.key(3), 2000)
    worlds = jax.vmap(
        lambda key: synthetic.multimodal_world(CHANNELS, LATENTS, key=key, dtype=jnp.float64)
    )(keys)
    np.testing.assert_allclose(jnp.linalg.norm(worlds.directions, axis=2), 1, rtol=1e-12)
    np.testing.assert_allclose(jnp.linalg.norm(worlds.private, axis=1), 0.5, rtol=1e-12)
    for weight, own in zip(worlds.weights, LATENTS[1:], strict=True):
        entries = np.asarray(weight).ravel() * np.sqrt(LATENTS[0] + own)
        assert abs(entries.mean()) < 4 / np.sqrt(entries.size)
        assert abs(entries.var() - 1) < 4 * np.sqrt(2 / entries.size)
    # No direction is preferred: the mean of 2000 unit vectors of R^3.
    assert np.abs(worlds.directions.mean(axis=0)).max() < 4 / np.sqrt(3 * 2000)


def test_shifts_have_their_length_in_all_directions():
    world = make_world()
    for length in (0.0, 0.5, 1.0):
        found = synthetic.client_shifts(world, 400, length, key=jax.random.key(0))
        np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), length, rtol=1e-12)
        assert np.abs(found.mean(axis=0)).max() <= 4 * length / np.sqrt(3 * 400)


def test_a_world_may_be_given_other_coefficients():
    world = make_world()
    longer = eqx.tree_at(lambda tree: tree.private, world, 3 * world.private)
    np.testing.assert_allclose(synthetic.bayes_error(longer, (1,)), 0.04 + 1.5**2, rtol=1e-12)


def test_the_key_decides_worlds_and_samples(shifts):
    world, again, other = make_world(), make_world(), make_world(1)
    jax.tree.map(np.testing.assert_array_equal, world, again)
    for ours, theirs in zip(jax.tree.leaves(world), jax.tree.leaves(other), strict=True):
        assert (ours != theirs).all()
    data, again, other = (sample(world, shifts, 5, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, data, again)
    for ours, theirs in zip(jax.tree.leaves(data), jax.tree.leaves(other), strict=True):
        assert (ours != theirs).all()
    # Clients draw their own numbers.
    assert (data.private[0][0] != data.private[0][1]).all()


def test_link_noise_and_response_move_no_other_number(curved, linear):
    (_, data), (_, other) = curved, linear
    jax.tree.map(np.testing.assert_array_equal, data[2:], other[2:])
    errors = [d.targets - synthetic.oracle(world, d) for world, d in (curved, linear)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=0, atol=1e-13)


def test_bayes_errors_of_many_worlds_are_those_of_each():
    keys = jax.random.split(jax.random.key(0), 3)

    def error(key):
        return synthetic.bayes_error(
            synthetic.multimodal_world(
                CHANNELS,
                LATENTS,
                noise=(0.2, 0.3),
                link=jax.nn.identity,
                response=synthetic.linear_response,
                key=key,
                dtype=jnp.float64,
            )
        )

    together = jax.vmap(error)(keys)
    np.testing.assert_allclose(together, [error(key) for key in keys], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_everything_has_the_dtype_of_the_world(dtype):
    def everything(key):
        world = synthetic.multimodal_world(
            noise=(0.2, 0.3),
            link=jax.nn.identity,
            response=synthetic.linear_response,
            key=key,
            dtype=dtype,
        )
        shifts = synthetic.client_shifts(world, 2, 1.0, key=key)
        data = synthetic.multimodal_clients(world, shifts, 4, key=key)
        numbers = synthetic.bayes_error(world), synthetic.mutual_information(world)
        sums = [synthetic.fused_sums(3, response, key=key, dtype=dtype) for response in RESPONSES]
        return world, shifts, data, synthetic.oracle(world, data), numbers, sums

    found = jax.eval_shape(everything, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert [x.shape for x in found[2].inputs] == [(2, 4, 40), (2, 4, 30)]


def test_float32_is_float64_up_to_rounding():
    world = make_linear(dtype=jnp.float32)
    double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), world)
    # The condition number of I + W W^T / s^2 is 16; measured 1.2e-7.
    found, expected = synthetic.bayes_error(world), synthetic.bayes_error(double)
    np.testing.assert_allclose(found, expected, rtol=16 * np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def sums():
    draw = jax.jit(lambda key: synthetic.fused_sums(2000, key=key, dtype=jnp.float64))
    return jax.tree.map(np.asarray, draw(jax.random.key(0)))


def test_sums_are_those_of_every_tenth_entry(sums):
    assert [x.shape[1:] for x in sums.inputs] == [(3, 32, 32), (10, 50), (32,)]
    counts = []
    for x, found in zip(sums.inputs, sums.sums.T, strict=True):
        flat = x.reshape(len(x), -1)
        chosen = [k for k in range(flat.shape[1]) if k % 10 == 0]
        counts.append(len(chosen))
        np.testing.assert_allclose(found, sum(flat[:, k] for k in chosen), rtol=0, atol=1e-12)
        assert abs(flat.mean()) < 4 / np.sqrt(flat.size)
        assert abs(flat.var() - 1) < 4 * np.sqrt(2 / flat.size)
    assert (counts, sum(counts)) == ([308, 50, 4], 362)
    total = sums.sums.sum(axis=1)
    assert abs(total.var() - 362) < 3 * 362 * np.sqrt(2 / len(total))


def test_responses_are_the_formulas(sums):
    a, b, c = sums.sums.T
    s = a + b + c
    formulas = np.tanh(0.05 * s), np.log1p(np.exp(0.1 * s + 1e-4 * a * b)), 8 / np.cosh(0.02 * s)
    np.testing.assert_allclose(sums.targets, formulas[0], rtol=1e-12)
    for response, expected in zip(RESPONSES, formulas, strict=True):
        np.testing.assert_allclose(response(jnp.asarray(sums.sums)), expected, rtol=1e-12)


def test_variances_of_the_responses_are_those_of_their_integrals(sums):
    """Gauss-Hermite quadrature over (A, B, C), to which the sample has to fit."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(50)
    weights = weights / weights.sum()
    grid = np.stack(np.meshgrid(*(np.sqrt(v) * nodes for v in (308, 50, 4)), indexing="ij"), -1)
    weights = np.einsum("i,j,k->ijk", weights, weights, weights)
    total = grid.sum(axis=-1)
    # Of 4e6 draws of the source, whose standard errors are below 2e-3 of a variance.
    published = (0.3761, 1.0744, 0.3791), (0.936, 0.845, 0.0)
    for response, variance, share in zip(RESPONSES, *published, strict=True):
        values = np.asarray(response(jnp.asarray(grid)))
        centred = values - (weights * values).sum()
        expected = (weights * centred**2).sum()
        np.testing.assert_allclose(expected, variance, rtol=2e-3)
        explained = (weights * centred * total).sum() ** 2 / (362 * expected)
        np.testing.assert_allclose(explained, share, atol=1e-3)
        drawn = np.asarray(response(jnp.asarray(sums.sums)))
        squares = (drawn - drawn.mean()) ** 2
        assert abs(squares.mean() - expected) < 3 * squares.std() / np.sqrt(len(squares))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels": ()}, "got num_channels (), expected a tuple of ints"),
        ({"num_channels": 7}, "got num_channels 7, expected a tuple of ints"),
        ({"num_channels": (7, 0)}, "got num_channels 0, expected an integer from 1"),
        ({"num_latents": (3, 2)}, "got num_latents (3, 2) for 2 modalities, expected 3: "),
        ({"num_latents": (3, 2, 1.5)}, "got num_latents 1.5, expected an integer from 1"),
        ({"noise": 0.2}, "got noise 0.2, expected a pair of numbers"),
        ({"noise": (0.2,)}, "got noise (0.2,), expected a pair of numbers"),
        ({"noise": (0.2, -1.0)}, "got noise -1.0, expected a non-negative number"),
        ({"dtype": int}, "got dtype int64, expected float32 or float64"),
    ],
)
def test_bad_worlds_are_refused(changes, message):
    options = {"num_channels": CHANNELS, "num_latents": LATENTS} | changes
    with pytest.raises(ValueError, match=f"^{re.escape(f'multimodal_world: {message}')}"):
        synthetic.multimodal_world(key=jax.random.key(0), **options)


def test_bad_samples_are_refused():
    world, key = make_world(), jax.random.key(0)
    for shifts, count, message in (
        (jnp.zeros((2, 3)), 0, "got num_samples 0, expected an integer from 1"),
        (jnp.zeros(3), 4, "got shifts of shape (3,), expected 2 axes"),
        (jnp.zeros((2, 4)), 4, "got shifts of shape (2, 4), expected shape (2, 3)"),
        (
            jnp.zeros((2, 3), jnp.float32),
            4,
            "got shifts of dtype float32, expected the world's dtype float64",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'multimodal_clients: {message}')}"):
            synthetic.multimodal_clients(world, shifts, count, key=key)
    with pytest.raises(ValueError, match=r"^client_shifts: got num_clients 0, expected an integer"):
        synthetic.client_shifts(world, 0, 0.5, key=key)
    with pytest.raises(ValueError, match=r"^client_shifts: got length -0.5, expected a non-neg"):
        synthetic.client_shifts(world, 2, -0.5, key=key)
    with pytest.raises(ValueError, match=r"^fused_sums: got num_samples 0, expected an integer"):
        synthetic.fused_sums(0, key=key)
    with pytest.raises(ValueError, match=r"^fused_sums: got dtype float16, expected float32 or"):
        synthetic.fused_sums(2, key=key, dtype=jnp.float16)


@pytest.mark.parametrize(
    "options",
    [
        {"noise": (0.2, 0.3)},
        {"noise": (0.2, 0.3), "link": jax.nn.identity},
        {"noise": (0.2, 0.3), "response": synthetic.linear_response},
        {"num_channels": (4, 6), "link": jax.nn.identity},
        {"num_channels": (4, 4)},
    ],
)
def test_where_only_a_bound_is_known_no_error_is_given(options):
    options = {"num_channels": CHANNELS, "num_latents": LATENTS} | options
    world = jax.eval_shape(
        lambda: synthetic.multimodal_world(key=jax.random.key(0), **options),
    )
    message = r"^bayes_error: got noise \(0.2, .*\) with modalities .*, expected inputs without"
    with pytest.raises(ValueError, match=message):
        synthetic.bayes_error(world)


def test_bad_modalities_and_responses_are_refused():
    world = make_linear()
    for observed in ((), (0, 0), (2,), (-1,)):
        message = f"got observed {observed}, expected different indices from 0 to 1"
        with pytest.raises(ValueError, match=f"^{re.escape(f'bayes_error: {message}')}$"):
            synthetic.bayes_error(world, observed)
    message = "^mutual_information: got a world with curved_response, expected linear_response$"
    with pytest.raises(ValueError, match=message):
        synthetic.mutual_information(make_world())
