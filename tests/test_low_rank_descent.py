import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import federated, operators, tucker
from fedlr.algorithms import low_rank_descent
from fedlr.federated import protocol
from tests.reference import reconstruction as reference

COEFFICIENTS = np.array([0.5, 0.3])
SHAPES = {2: (4, 5), 3: (3, 4, 2)}
RANKS = {2: (2, 2), 3: (2, 2, 2)}
ROUNDS = 300


def forward(tensor, matrix):
    """A dense operator per client: the data's inputs are its matrix."""
    return matrix @ tensor.ravel()


def make_clients(seed, num_modes=2, dtype=jnp.float64, rows=60):
    rng = np.random.default_rng(seed)
    matrices = rng.normal(size=(3, rows, int(np.prod(SHAPES[num_modes]))))
    data = 3.0 * rng.normal(size=(3, rows))
    return protocol.ClientData(
        jnp.asarray(matrices, dtype), jnp.asarray(data, dtype), jnp.ones((3, rows), bool)
    )


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnames=("num_rounds", "num_modes"))
def run(clients, client_ranks, penalty, step_size, start=None, *, num_modes=2, num_rounds=ROUNDS):
    """All problems of a stack at once; a step size of zero stands for the default."""
    shape = SHAPES[num_modes]

    def one(clients, client_ranks, penalty, step_size, start):
        algorithm = low_rank_descent.build(
            forward,
            jnp.asarray(COEFFICIENTS, clients.targets.dtype),
            ranks=RANKS[num_modes],
            client_ranks=client_ranks,
            penalty=penalty,
        )
        begin = jnp.zeros((3, *shape), clients.targets.dtype) if start is None else start
        state = algorithm.init(begin, clients, key=jax.random.key(0))
        step = jnp.where(step_size > 0, step_size, state.server.step_size)
        state = state._replace(server=state.server._replace(step_size=step))
        return federated.run(
            algorithm, state, clients, num_rounds=num_rounds, key=jax.random.key(1)
        )

    return jax.vmap(one)(clients, client_ranks, penalty, step_size, start)


UNIFORM, MIXED = np.full((3, 3), 2, np.int32), np.array([(2, 1, 2), (1, 2, 1), (2, 2, 1)], np.int32)
# Seed, ranks, penalty.
PROBLEMS = [
    (0, UNIFORM, 1.0),
    (1, UNIFORM, 0.0),
    (2, UNIFORM, 30.0),
    (0, MIXED, 30.0),
    (1, MIXED, 1.0),
    (2, MIXED, 0.1),
]


def largest_norm(clients):
    return max(np.linalg.norm(matrix, 2) ** 2 for matrix in np.asarray(clients.inputs))


class Runs:
    """Runs of every problem, by the factor of the step over 1 / L_F; None is the default step."""

    def __init__(self, num_modes):
        self.data = [make_clients(seed, num_modes) for seed, _, _ in PROBLEMS]
        ranks = jnp.asarray(np.stack([ranks[:, :num_modes] for _, ranks, _ in PROBLEMS]))
        penalties = jnp.array([penalty for _, _, penalty in PROBLEMS])
        # The weight is known from the default run, L_F then from the dense matrices.
        self.follow = functools.partial(
            run, stack(self.data), ranks, penalties, num_modes=num_modes
        )
        self.runs = {None: self.follow(jnp.zeros(len(PROBLEMS)))}
        self.weights = np.asarray(self.runs[None][0].server.weight)
        signed = reference.signed_coefficients(COEFFICIENTS)
        self.bounds = np.array(
            [
                largest_norm(data) + weight * np.sum(signed**2)
                for data, weight in zip(self.data, self.weights, strict=True)
            ]
        )

    def __getitem__(self, factor):
        if factor not in self.runs:
            self.runs[factor] = self.follow(jnp.asarray(factor / self.bounds))
        return self.runs[factor]


@pytest.fixture(scope="module", params=[2, 3])
def runs(request):
    return Runs(request.param)


@pytest.fixture(scope="module")
def matrix_runs():
    return Runs(2)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_objective_never_rises_up_to_the_bound(runs, factor):
    _, infos = runs[factor]
    objective = np.asarray(infos.metrics.objective[:, :, 0])
    assert (np.diff(objective, axis=1).max(axis=1) <= 1e-13 * objective[:, 0]).all()
    assert (objective[:, -1] < 0.95 * objective[:, 0]).all()


def test_objective_rises_well_above_the_bound(runs):
    objective = np.asarray(runs[4.0][1].metrics.objective[:, :, 0])
    assert (np.diff(objective, axis=1).max(axis=1) > 1e-6 * objective[:, 0]).any()


def test_default_step_is_just_below_the_bound(runs):
    steps = np.asarray(runs[None][0].server.step_size) * runs.bounds
    assert (steps <= 1.0).all()
    assert (steps >= 0.95).all()
    penalties = [penalty for _, _, penalty in PROBLEMS]
    exact = [p * largest_norm(data) for p, data in zip(penalties, runs.data, strict=True)]
    np.testing.assert_allclose(runs.weights, exact, rtol=0.05)


def test_rounds_equal_naive_rounds_with_singular_value_decompositions(matrix_runs):
    """Equal ranks of both modes, where ST-HOSVD is the best approximation, and one gradient."""
    state, infos = matrix_runs[None]
    for i, (_, ranks, _) in enumerate(PROBLEMS):
        if (ranks[:, 0] != ranks[:, 1]).any():
            continue
        matrices, data = (np.asarray(x) for x in matrix_runs.data[i][:2])
        weight, step = matrix_runs.weights[i], float(state.server.step_size[i])
        images = np.zeros((3, *SHAPES[2]))
        for t in range(20):
            objective = reference.penalized_objective(matrices, images, data, COEFFICIENTS, weight)
            np.testing.assert_allclose(infos.metrics.objective[i, t], objective, rtol=1e-9)
            gap = np.tensordot(reference.signed_coefficients(COEFFICIENTS), images, axes=1)
            size = np.linalg.norm(images[-1])
            expected = np.linalg.norm(gap) / size if size else 0.0
            np.testing.assert_allclose(infos.metrics.violation[i, t], expected, rtol=1e-6)
            before = images
            images = reference.low_rank_descent_round(
                matrices, images, data, COEFFICIENTS, step, weight, ranks[:, 0]
            )
            moved = np.linalg.norm(images - before, axis=(1, 2))
            np.testing.assert_allclose(
                infos.metrics.change[i, t], moved / np.linalg.norm(images, axis=(1, 2)), rtol=1e-5
            )


def test_run_ends_at_a_critical_point(matrix_runs):
    """The gradient's part in the tangent space of the ranks is the last change over the step.

    To first order, a step of -eta G is projected onto the tangent space.
    """
    state, infos = matrix_runs[None]
    assert infos.metrics.change[:, -1].max() < 1e-2
    images = np.asarray(jax.vmap(low_rank_descent.images)(state))
    for i, (_, ranks, _) in enumerate(PROBLEMS):
        if (ranks[:, 0] != ranks[:, 1]).any():
            continue
        matrices, data = (np.asarray(x) for x in matrix_runs.data[i][:2])
        gradient = reference.penalized_gradient(
            matrices, images[i], data, COEFFICIENTS, matrix_runs.weights[i]
        )
        for client, (g, image) in enumerate(zip(gradient, images[i], strict=True)):
            u, _, vt = np.linalg.svd(image)
            rank = ranks[client, 0]
            normal = u[:, rank:] @ u[:, rank:].T @ g @ vt[rank:].T @ vt[rank:]
            step = float(infos.metrics.change[i, -1, client]) * np.linalg.norm(image)
            limit = 1.1 * step / float(state.server.step_size[i])
            assert np.linalg.norm(g - normal) <= limit + 1e-9 * np.linalg.norm(g)


@pytest.mark.parametrize("seed", range(3))
def test_exact_low_rank_data_of_coupled_images_are_recovered(seed):
    rng = np.random.default_rng(seed)
    pairs = [(rng.normal(size=4), rng.normal(size=5)) for _ in range(2)]
    truth = np.stack([np.outer(*pairs[0]), np.outer(*pairs[1]), np.zeros((4, 5))])
    truth[2] = np.tensordot(COEFFICIENTS, truth[:2], axes=1)
    clients = make_clients(seed)
    data = np.einsum("cmn,cn->cm", np.asarray(clients.inputs), truth.reshape(3, -1))
    clients = clients._replace(targets=jnp.asarray(data))
    ranks = np.array([(1, 1), (1, 1), (2, 2)], np.int32)
    # As many copies as there are problems, so that no program is compiled anew.
    many = len(PROBLEMS)
    state, infos = run(
        stack([clients] * many),
        jnp.asarray(np.stack([ranks] * many)),
        jnp.ones(many),
        jnp.zeros(many),
        num_modes=2,
    )
    np.testing.assert_allclose(low_rank_descent.images(first(state)), truth, atol=1e-6)
    assert infos.metrics.change[0, -1].max() < 1e-7
    assert infos.metrics.objective[0, -1].max() < 1e-12
    sent = [8 * (r * r + 9 * r) for r in (1, 1, 2)]
    np.testing.assert_array_equal(infos.uplink_bytes[0, 0], sent)
    # Three clients of rank two span all of 4 x 5 pixels.
    np.testing.assert_array_equal(infos.downlink_bytes[0, 0], [8 * 20] * 3)


def test_records_of_a_run_that_diverges_say_so():
    many = len(PROBLEMS)
    clients = make_clients(0)
    clients = clients._replace(targets=clients.targets.at[-1, 0].set(jnp.nan))
    _, infos = run(
        stack([clients] * many),
        jnp.asarray(np.stack([UNIFORM[:, :2]] * many)),
        jnp.ones(many),
        jnp.zeros(many),
        num_modes=2,
    )
    assert jnp.isnan(infos.metrics.change[0, 1:]).all()
    assert jnp.isnan(infos.metrics.violation[0, 1:]).all()


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def identical(ranks, shape, dtype):
    """Two clients that observe their tensors as they are, and random tensors of full rank."""
    start = np.random.default_rng(0).normal(size=(2, *shape))
    clients = protocol.ClientData((), jnp.asarray(start, dtype), jnp.ones(start.shape, bool))
    algorithm = low_rank_descent.build(lambda x, _: x, jnp.ones(1, dtype), ranks=ranks)
    init = functools.partial(algorithm.init, clients=clients, key=jax.random.key(0))
    return init, jnp.asarray(start, dtype)


@pytest.mark.parametrize(
    ("shape", "ranks", "factored"),
    [
        # Two clients of rank one: 4 + 2 (n + m) numbers against n m.
        ((4, 6), (1, 1), False),  # 24 and 24
        ((3, 11), (1, 1), True),  # 32 and 33
        ((3, 10), (1, 1), False),  # 30 and 30
        ((7, 9), (4, 4), False),
        ((4, 5, 6), (1, 1, 1), True),
        ((2, 3, 4), (1, 1, 1), False),
    ],
)
def test_residual_travels_factored_where_that_is_smaller(shape, ranks, factored):
    init, start = identical(ranks, shape, jnp.float64)
    residual = jax.eval_shape(init, start).server.residual
    spans = [min(n, 2 * r) for n, r in zip(shape, ranks, strict=True)]
    small = np.prod(spans) + np.dot(shape, spans)
    assert isinstance(residual, tucker.TuckerTensor) == factored == (small < np.prod(shape))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(residual))
    assert numbers == min(small, np.prod(shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_residual_is_exact_up_to_rounding_when_factored(dtype):
    """Where the factors of the clients are dependent too."""
    init, start = identical((2, 1), (7, 9), dtype)

    @jax.jit
    def both(start):
        state = init(start)
        images = low_rank_descent.images(state)
        return images, tucker.to_dense(state.server.residual)

    eps = float(jnp.finfo(dtype).eps)
    for tensors in (start, jnp.stack([start[0], -start[0]]), jnp.stack([start[0], start[0]])):
        images, residual = both(tensors)
        scale = float(jnp.abs(images).max())
        np.testing.assert_allclose(residual, images[0] - images[1], atol=50 * eps * scale)


def test_bytes_of_a_factored_residual(key):
    shape, ranks = (7, 9), jnp.array([(1, 1), (2, 1)], jnp.int32)
    clients = protocol.ClientData((), jnp.ones((2, *shape)), jnp.ones((2, *shape), bool))
    algorithm = low_rank_descent.build(
        lambda x, _: x, jnp.ones(1), ranks=(2, 1), client_ranks=ranks, step_size=0.1
    )
    start = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)))

    @jax.jit
    def advance(start):
        state = algorithm.init(start, clients, key=key)
        return algorithm.round(state, clients, np.arange(2), key=key)[1]

    info = advance(start)
    np.testing.assert_array_equal(info.uplink_bytes, [8 * (1 + 7 + 9), 8 * (2 + 14 + 9)])
    # Counted at the largest rank of every client: 4 x 2.
    np.testing.assert_array_equal(info.downlink_bytes, [8 * (8 + 4 * 7 + 2 * 9)] * 2)


def test_float32_runs_descend_up_to_rounding():
    clients = make_clients(0, dtype=jnp.float32)
    state, infos = run(
        stack([clients]),
        jnp.full((1, 3, 2), 2, jnp.int32),
        jnp.ones(1, jnp.float32),
        jnp.zeros(1, jnp.float32),
        num_rounds=60,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.server))} == {
        jnp.dtype("float32")
    }
    objective = np.asarray(infos.metrics.objective[0, :, 0], np.float64)
    eps = np.finfo(np.float32).eps
    assert np.diff(objective).max() <= 20 * eps * objective[0]
    images = np.asarray(low_rank_descent.images(first(state)), np.float64)
    data = make_clients(0)
    exact = reference.penalized_objective(
        np.asarray(data.inputs),
        images,
        np.asarray(data.targets),
        COEFFICIENTS,
        float(state.server.weight[0]),
    )
    assert exact <= objective[-1] * (1 + 100 * eps)


def test_bad_input_is_refused(key):
    clients = make_clients(0)
    start = jnp.zeros((3, *SHAPES[2]))

    def init(start=start, model=forward, **options):
        coefficients = options.pop("coefficients", COEFFICIENTS)
        options = {"ranks": (2, 2)} | options
        algorithm = low_rank_descent.build(model, jnp.asarray(coefficients), **options)
        begin = functools.partial(algorithm.init, key=key)
        return algorithm, jax.eval_shape(begin, start, clients)

    for options, message in (
        ({"ranks": (2, 6)}, r"got ranks \(2, 6\)"),
        ({"ranks": [2, 2]}, r"got ranks \[2, 2\] of type list"),
        ({"client_ranks": jnp.full((3, 2), 3)}, r"got client_ranks .*, expected 1 to \(2, 2\)"),
        ({"client_ranks": jnp.ones((2, 2), int)}, r"got client_ranks of shape \(2, 2\)"),
        ({"penalty": -1.0}, "got penalty -1.0, expected a non-negative number"),
        ({"penalty": np.nan}, "got penalty nan"),
        ({"penalty": np.inf}, "got penalty inf, expected a finite number"),
        ({"penalty": jnp.ones(2)}, r"got penalty of shape \(2,\), expected 0 axes"),
        ({"coefficients": [0.5, np.nan]}, "got coefficients .*, expected finite numbers"),
        ({"coefficients": np.ones(3)}, "got coefficients .*, expected 2 coefficients for 3 cli"),
        ({"start": start[:2]}, r"got params of shape \(2, 4, 5\)"),
        ({"start": jnp.zeros((3, 4, 5), int)}, "got params of dtype int"),
    ):
        with pytest.raises(ValueError, match=f"low_rank_descent: {message}"):
            init(**options)
    # Without a bound on the entries any sign will do.
    algorithm, state = init(coefficients=[-0.5, -0.3])
    with pytest.raises(ValueError, match="low_rank_descent: got cohort of 2 clients, expected all"):
        algorithm.round(state, clients, jnp.arange(2), key=key)
    wrong = operators.from_pair(forward, lambda y, a: 1.01 * (a.T @ y).reshape(SHAPES[2]))
    bad = low_rank_descent.build(wrong, jnp.asarray(COEFFICIENTS), ranks=(2, 2))
    with pytest.raises(ValueError, match="low_rank_descent: got a forward model whose adjoint"):
        bad.init(start, clients, key=key)
