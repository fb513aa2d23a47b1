import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import federated
from fedlr.algorithms import firm
from fedlr.federated import coupling, protocol
from tests.reference import reconstruction as reference

COEFFICIENTS = np.array([0.5, 0.3])
STEP = 0.02
SHAPE = (4, 5)


def forward(image, matrix):
    """A dense operator per client: the data's inputs are its matrix."""
    return matrix @ image.ravel()


@pytest.fixture(scope="module")
def problem():
    """Matrices, measurements and start images of three clients."""
    rng = np.random.default_rng(3)
    matrices = rng.normal(size=(3, 12, 20))
    data = rng.normal(size=(3, 12)) + 1.0
    images = np.abs(rng.normal(size=(3, *SHAPE)))
    return matrices, data, images


def clients_of(matrices, data, dtype=jnp.float64):
    targets = jnp.asarray(data, dtype)
    return protocol.ClientData(jnp.asarray(matrices, dtype), targets, jnp.ones(data.shape, bool))


def run(problem, num_rounds=4, dtype=jnp.float64, **options):
    matrices, data, images = problem
    clients = clients_of(matrices, data, dtype)
    coefficients = jnp.asarray(COEFFICIENTS, dtype)
    algorithm = firm.build(forward, coefficients, **{"step_size": STEP} | options)

    @jax.jit
    def simulate(images, clients):
        state = algorithm.init(images, clients, key=jax.random.key(0))
        return federated.run(
            algorithm, state, clients, num_rounds=num_rounds, key=jax.random.key(1)
        )

    return simulate(jnp.asarray(images, dtype), clients)


@pytest.mark.parametrize("penalty", [1.0, 7.0])
def test_rounds_equal_the_naive_rounds(problem, penalty):
    matrices, data, images = problem
    server = functools.partial(coupling.proximal_coupling, penalty=penalty)
    state, infos = run(problem, server=server)
    for t in range(4):
        images, norms = reference.firm_round(matrices, images, data, COEFFICIENTS, STEP, penalty)
        np.testing.assert_allclose(infos.metrics.residual_norm[t], norms, rtol=1e-12)
        np.testing.assert_allclose(infos.losses[t], norms**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(state.params, images, rtol=1e-12, atol=1e-13)


def test_firm_plus_rounds_equal_the_naive_rounds(problem):
    matrices, data, images = problem
    state, _ = run(problem, server=coupling.augmented_lagrangian)
    multiplier = np.zeros(SHAPE)
    signed = reference.signed_coefficients(COEFFICIENTS)
    for _ in range(4):
        images, _ = reference.firm_round(
            matrices, images, data, COEFFICIENTS, STEP, 1.0, multiplier
        )
        multiplier = multiplier + np.tensordot(signed, images, axes=1)
    np.testing.assert_allclose(state.params, images, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(state.server.coupling, multiplier, rtol=1e-11, atol=1e-12)


def test_multiplier_satisfies_the_coupling_in_the_limit(problem):
    matrices, data, _ = problem
    start = np.zeros((3, *SHAPE))
    plain = run((matrices, data, start), num_rounds=400)[1].metrics.violation[-1, 0]
    exact = run((matrices, data, start), num_rounds=400, server=coupling.augmented_lagrangian)[
        1
    ].metrics.violation[-1, 0]
    assert exact < 1e-3 * plain


def test_default_step_size_is_one_over_the_largest_squared_norm(problem):
    matrices, _, _ = problem
    state, _ = run(problem, num_rounds=1, step_size=None)
    largest = max(np.linalg.norm(matrix, 2) ** 2 for matrix in matrices)
    assert float(state.server.step_size) == pytest.approx(1.0 / largest, rel=1e-2)
    assert float(state.server.step_size) >= 1.0 / largest


def test_lower_none_leaves_images_free_and_lower_bounds_them(problem):
    free, _ = run(problem, lower=None)
    bounded, _ = run(problem, lower=0.1)
    assert float(free.params.min()) < 0.0
    assert float(bounded.params.min()) >= 0.1


def test_proximal_map_acts_after_the_clip_of_the_client(problem):
    matrices, data, images = problem
    state, _ = run(problem, num_rounds=1, proximal=lambda image: 0.5 * image)
    stepped = [
        0.5 * reference.clipped_step(a, w, b, STEP)[0]
        for a, w, b in zip(matrices, images, data, strict=True)
    ]
    signed = reference.signed_coefficients(COEFFICIENTS)
    residual = sum(c * z for c, z in zip(signed, stepped, strict=True))
    gamma = 1.0 / (1.0 + np.sum(signed**2))
    expected = [
        np.maximum(z - gamma * c * residual, 0) for c, z in zip(signed, stepped, strict=True)
    ]
    np.testing.assert_allclose(state.params, np.stack(expected), rtol=1e-12, atol=1e-13)


def test_bytes_are_those_of_dense_images_in_both_directions(problem):
    for dtype, itemsize in ((jnp.float32, 4), (jnp.float64, 8)):
        _, infos = run(problem, num_rounds=1, dtype=dtype)
        np.testing.assert_array_equal(infos.uplink_bytes[0], [itemsize * 20] * 3)
        np.testing.assert_array_equal(infos.downlink_bytes[0], [itemsize * 20] * 3)


def test_order_of_the_cohort_is_the_order_of_the_record(problem):
    matrices, data, images = problem
    clients = clients_of(matrices, data)
    algorithm = firm.build(forward, jnp.asarray(COEFFICIENTS), step_size=STEP)
    state = algorithm.init(jnp.asarray(images), clients, key=jax.random.key(0))
    turned = jnp.array([2, 0, 1])
    advance = jax.jit(algorithm.round)
    one, info = advance(state, clients, jnp.arange(3), key=jax.random.key(0))
    other, turned_info = advance(state, clients, turned, key=jax.random.key(0))
    np.testing.assert_array_equal(one.params, other.params)
    np.testing.assert_array_equal(info.losses[turned], turned_info.losses)


def test_bad_input_is_refused(problem):
    matrices, data, images = problem
    clients = clients_of(matrices, data)
    algorithm = firm.build(forward, jnp.asarray(COEFFICIENTS), step_size=STEP)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"got coefficients of shape .2,., expected 3 coeff"):
        algorithm.init(jnp.zeros((4, *SHAPE)), jax.tree.map(_repeat_first, clients), key=key)
    with pytest.raises(ValueError, match=r"firm: got params of shape .2, 4, 5."):
        algorithm.init(jnp.zeros((2, *SHAPE)), clients, key=key)
    with pytest.raises(ValueError, match="firm: got params of dtype int"):
        algorithm.init(jnp.zeros((3, *SHAPE), int), clients, key=key)
    one = jax.tree.map(lambda leaf: leaf[:1], clients)
    with pytest.raises(ValueError, match="proximal_coupling: got 1 client, expected at least 2"):
        firm.build(forward, jnp.zeros(0), step_size=STEP).init(images[:1], one, key=key)
    state = algorithm.init(images.tolist(), clients, key=key)
    with pytest.raises(ValueError, match="firm: got cohort of 2 clients, expected all 3"):
        algorithm.round(state, clients, jnp.arange(2), key=key)
    with pytest.raises(ValueError, match="firm: got cohort with index 3"):
        algorithm.round(state, clients, jnp.arange(1, 4), key=key)


def _repeat_first(leaf):
    return jnp.concatenate([leaf, leaf[:1]])
