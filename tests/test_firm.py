import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import federated, operators
from fedlr.algorithms import firm
from fedlr.federated import channels, compressors, coupling, protocol
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


def test_fed_pgd_rounds_equal_naive_projected_gradient(problem):
    matrices, data, images = problem
    state, infos = run(problem, server=coupling.exact_projection, clip_clients=False)
    for t in range(4):
        before = images
        images = reference.fed_pgd_round(matrices, images, data, COEFFICIENTS, STEP)
        moved = np.linalg.norm(images - before, axis=(1, 2)) / np.linalg.norm(images, axis=(1, 2))
        np.testing.assert_allclose(infos.metrics.change[t], moved, rtol=1e-10)
    np.testing.assert_allclose(state.params, images, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_fed_pgd_never_raises_the_objective_and_stays_feasible(seed):
    """For a step of 1 / L exactly, from the dense matrices."""
    rng = np.random.default_rng(seed)
    matrices, data = rng.normal(size=(3, 12, 20)), rng.normal(size=(3, 12)) + 1.0
    step = 1.0 / max(np.linalg.norm(matrix, 2) ** 2 for matrix in matrices)
    state, infos = long_fed_pgd(jnp.asarray(matrices), jnp.asarray(data), step)
    objective = np.asarray(infos.losses.sum(axis=1))
    assert np.diff(objective).max() <= 1e-13 * objective[0]
    assert objective[-1] < 0.8 * objective[0]
    assert infos.metrics.violation.max() < 1e-14
    assert state.params.min() == 0
    _, infos = long_fed_pgd(jnp.asarray(matrices), jnp.asarray(data), 8 * step)
    assert np.diff(infos.losses.sum(axis=1)).max() > 0


@functools.partial(jax.jit, static_argnames="num_rounds")
def long_fed_pgd(matrices, data, step, num_rounds=100):
    clients = clients_of(matrices, data)
    algorithm = firm.build(
        forward,
        jnp.asarray(COEFFICIENTS),
        server=coupling.exact_projection,
        clip_clients=False,
        step_size=step,
    )
    state = algorithm.init(jnp.zeros((3, *SHAPE)), clients, key=jax.random.key(0))
    return federated.run(algorithm, state, clients, num_rounds=num_rounds, key=jax.random.key(1))


def test_limits_agree_where_the_data_are_those_of_coupled_images():
    """Then the truth is a fixed point of every server, and with full column rank the only one."""
    rng = np.random.default_rng(0)
    truth = np.abs(rng.normal(size=(3, *SHAPE)))
    truth[-1] = np.tensordot(COEFFICIENTS, truth[:-1], axes=1)
    matrices = rng.normal(size=(3, 60, 20))
    data = np.einsum("cmn,cn->cm", matrices, truth.reshape(3, -1))
    problem = matrices, data, np.zeros_like(truth)
    for options in (
        {},
        {"server": coupling.augmented_lagrangian},
        {"server": coupling.exact_projection, "clip_clients": False},
    ):
        state, infos = run(problem, num_rounds=400, step_size=0.006, **options)
        np.testing.assert_allclose(state.params, truth, atol=1e-7)
        assert infos.metrics.change[-1].max() < 1e-8


def test_firm_plus_without_the_clip_of_the_clients_has_the_limit_of_fed_pgd():
    """Noisy data: both satisfy the optimality conditions of the constrained problem, FIRM not."""
    rng = np.random.default_rng(1)
    problem = rng.normal(size=(3, 60, 20)), rng.normal(size=(3, 60)) + 0.5, np.zeros((3, *SHAPE))
    follow = functools.partial(run, problem, num_rounds=1500, step_size=0.005, clip_clients=False)
    exact, _ = follow(server=coupling.exact_projection)
    plus, _ = follow(server=coupling.augmented_lagrangian)
    plain, _ = follow()
    assert (exact.params == 0).any()
    np.testing.assert_allclose(plus.params, exact.params, atol=1e-8)
    assert jnp.abs(plain.params - exact.params).max() > 1e-3


def test_full_decomp_equals_naive_rounds_with_truncation_before_and_after_the_coupling(problem):
    matrices, data, images = problem
    channel = channels.states(compressors.truncated_tucker((2, 2)))
    state, infos = run(problem, num_rounds=3, uplink=channel, downlink=channel)
    for _ in range(3):
        images = reference.encoded_firm_round(
            matrices, images, data, COEFFICIENTS, STEP, lambda x: reference.truncate(x, 2)
        )
    np.testing.assert_allclose(state.params, images, rtol=1e-8, atol=1e-9)
    sent = 8 * (2 * 2 + 4 * 2 + 5 * 2)
    np.testing.assert_array_equal(infos.uplink_bytes, np.full((3, 3), sent))
    np.testing.assert_array_equal(infos.downlink_bytes, np.full((3, 3), sent))


def test_top_k_of_states_equals_naive_rounds_with_the_largest_pixels(problem):
    matrices, data, images = problem
    channel = channels.states(compressors.top_k(7))
    state, infos = run(problem, num_rounds=3, uplink=channel, downlink=channel)
    for _ in range(3):
        images = reference.encoded_firm_round(
            matrices, images, data, COEFFICIENTS, STEP, lambda x: reference.keep_largest(x, 7)
        )
    np.testing.assert_allclose(state.params, images, rtol=1e-12, atol=1e-13)
    assert ((np.asarray(state.params) != 0).sum(axis=(1, 2)) <= 7).all()
    np.testing.assert_array_equal(infos.uplink_bytes[0], [7 * (8 + 4)] * 3)


@pytest.mark.parametrize("sparse", [compressors.top_k, compressors.csr])
def test_increments_with_a_budget_of_all_pixels_are_firm(problem, sparse):
    channel = channels.increments(compressors.error_feedback(sparse(20)))
    found, _ = run(problem, uplink=channel, downlink=channel)
    expected, _ = run(problem)
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-12, atol=1e-13)
    for end in found.clients:
        np.testing.assert_allclose(end.residual, 0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_increments_with_error_feedback_reach_the_images_of_firm(seed):
    """A fifth of the pixels a message, and the limit is the same; as states they never get there.

    The truth satisfies the coupling, so that all messages go to zero.
    """
    rng = np.random.default_rng(seed)
    truth = np.abs(rng.normal(size=(3, *SHAPE)))
    truth[-1] = np.tensordot(COEFFICIENTS, truth[:-1], axes=1)
    matrices = rng.normal(size=(3, 60, 20))
    data = np.einsum("cmn,cn->cm", matrices, truth.reshape(3, -1))
    for build, limit in ((channels.increments, 1e-6), (channels.states, None)):
        state = sparse_limit(jnp.asarray(matrices), jnp.asarray(data), build)
        error = np.abs(state.params - truth).max()
        assert error < limit if limit else error > 0.1


@functools.partial(jax.jit, static_argnames="build")
def sparse_limit(matrices, data, build):
    clients = clients_of(matrices, data)
    sparse = compressors.top_k(4)
    feedback = compressors.error_feedback(sparse) if build is channels.increments else sparse
    algorithm = firm.build(
        forward,
        jnp.asarray(COEFFICIENTS),
        uplink=build(feedback),
        downlink=build(feedback),
        step_size=0.001,
    )
    state = algorithm.init(jnp.zeros((3, *SHAPE)), clients, key=jax.random.key(0))
    return federated.run(algorithm, state, clients, num_rounds=4000, key=jax.random.key(1))[0]


def test_bytes_are_those_of_the_messages_of_each_direction(problem):
    """Every pair of channels in one program; of sparse rows only what is not zero counts."""
    matrices, data, images = problem
    clients = clients_of(matrices, data)
    size, rows, columns = 20, *SHAPE
    encodings = {
        "dense": (channels.states(), 8 * size),
        "full_decomp": (
            channels.states(compressors.truncated_tucker((2, 3))),
            8 * (2 * 3 + 2 * rows + 3 * columns),
        ),
        "svd": (channels.states(compressors.truncated_svd(2)), 8 * 2 * (1 + rows + columns)),
        "top_k": (channels.increments(compressors.top_k(6)), 6 * (8 + 4)),
        "quantized": (channels.increments(compressors.quantize(4)), size // 2 + 2 * 8),
        "csr": (channels.increments(compressors.csr(6)), 6 * (8 + 4) + 4 * (rows + 1)),
    }
    names = list(encodings)

    @jax.jit
    def traffic(images):
        found = []
        for up, down in zip(names, names[::-1], strict=True):
            algorithm = firm.build(
                forward,
                jnp.asarray(COEFFICIENTS),
                uplink=encodings[up][0],
                downlink=encodings[down][0],
                step_size=STEP,
            )
            state = algorithm.init(images, clients, key=jax.random.key(0))
            _, info = algorithm.round(state, clients, np.arange(3), key=jax.random.key(1))
            found.append((info.uplink_bytes, info.downlink_bytes))
        return found

    for (sent, received), up, down in zip(
        traffic(jnp.asarray(images)), names, names[::-1], strict=True
    ):
        np.testing.assert_array_equal(sent, [encodings[up][1]] * 3)
        np.testing.assert_array_equal(received, [encodings[down][1]] * 3)


def test_forward_models_with_a_wrong_adjoint_are_refused_before_any_round(problem):
    matrices, data, images = problem
    clients = clients_of(matrices, data)
    key = jax.random.key(0)

    def transposed(measurements, matrix):
        return (matrix.T @ measurements).reshape(SHAPE)

    def init(model):
        algorithm = firm.build(model, jnp.asarray(COEFFICIENTS), step_size=STEP)
        return algorithm.init(jnp.asarray(images), clients, key=key)

    init(operators.from_pair(forward, transposed))
    longer = operators.from_pair(forward, lambda y, matrix: 1.01 * transposed(y, matrix))
    with pytest.raises(ValueError, match=r"firm: got a forward model whose adjoint does not match"):
        init(longer)
    with pytest.raises(ValueError, match=r"firm: got a forward model that is not linear"):
        init(lambda image, matrix: jnp.abs(forward(image, matrix)))


def test_couplings_that_only_zero_images_satisfy_are_refused_by_build():
    message = r"firm: got coefficients \[-0.5, -0.3\] for images of at least 0.0, expected a pos"
    with pytest.raises(ValueError, match=message):
        firm.build(forward, -jnp.asarray(COEFFICIENTS))
    firm.build(forward, -jnp.asarray(COEFFICIENTS), lower=None)
    firm.build(forward, -jnp.asarray(COEFFICIENTS), lower=-1.0)
    with pytest.raises(ValueError, match=r"firm: got coefficients .*, expected finite numbers"):
        firm.build(forward, jnp.array([0.5, jnp.nan]), lower=None)


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
