import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedlr import curvature

DTYPES = [np.float32, np.float64]
NUM_PROBES = 64
CLIENTS, EXAMPLES, SIZES = 3, 6, (4, 5, 3)
NUM_PARAMS = 4 * 5 + 5 + 5 * 3 + 3
DEVIATIONS = 4  # allowed standard deviations of a Monte-Carlo estimate


# A small network: three clients of six examples.


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["out"]["w"] + params["out"]["b"][None]


def cross_entropy(logits, labels):
    shares = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(shares, labels[:, None], axis=1))


def loss(params, inputs, labels):
    return cross_entropy(network(params, inputs), labels)


@functools.cache
def problem(dtype=np.float64):
    rng = np.random.default_rng(1)
    inputs, hidden, classes = SIZES
    params = {
        "hidden": {"w": rng.standard_normal((inputs, hidden)), "b": rng.standard_normal(hidden)},
        "out": {"w": rng.standard_normal((hidden, classes)), "b": rng.standard_normal(classes)},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    data = jnp.asarray(rng.standard_normal((CLIENTS, EXAMPLES, inputs)), dtype)
    return params, data, jnp.asarray(rng.integers(0, classes, (CLIENTS, EXAMPLES)), jnp.int32)


@functools.cache
def dense_matrices():
    """Hessian and Gauss-Newton matrix of every client, float64."""
    params, inputs, labels = problem()
    flat, unravel = ravel_pytree(params)

    def matrices(x, y):
        hessian = jax.hessian(lambda p: loss(unravel(p), x, y))(flat)
        jacobian = jax.jacobian(lambda p: network(unravel(p), x).ravel())(flat)
        outputs = network(params, x)
        inner = jax.hessian(lambda z: cross_entropy(z.reshape(outputs.shape), y))(outputs.ravel())
        return hessian, jacobian.T @ inner @ jacobian

    hessians, gauss_newton = jax.jit(jax.vmap(matrices))(inputs, labels)
    return {"hessian": np.asarray(hessians), "gauss_newton": np.asarray(gauss_newton)}


def estimate(kind, params, x, y, key):
    options = {"num_probes": NUM_PROBES, "num_lanczos": NUM_PARAMS, "key": key}
    if kind == "hessian":
        return curvature.stable_rank(lambda p: loss(p, x, y), params, **options)
    return curvature.gauss_newton_rank(
        lambda p: network(p, x), lambda z: cross_entropy(z, y), params, **options
    )


@functools.cache
def compiled(kind):
    return jax.jit(functools.partial(estimate, kind))


def multiply(kind, params, x, y, vector):
    if kind == "hessian":
        return curvature.hvp(lambda p: loss(p, x, y), params, vector)
    return curvature.gauss_newton_product(
        lambda p: network(p, x), lambda z: cross_entropy(z, y), params, vector
    )


def probe_deviations(matrix, num_probes):
    """Exact standard deviations of the estimates of trace and squared norm with random signs."""

    def deviation(m):
        return np.sqrt(2 * (np.sum(m**2) - np.sum(np.diag(m) ** 2)) / num_probes)

    return deviation(matrix), deviation(matrix @ matrix)


def check_spectrum(found, matrix, num_probes, rtol):
    """Compare with dense eigenvalues: the ends to rounding, the estimates to their deviation."""
    values = np.linalg.eigvalsh(matrix)
    extreme = np.abs(values).max()
    trace_deviation, norm_deviation = probe_deviations(matrix, num_probes)
    rounding = rtol * np.sum(values**2)
    np.testing.assert_allclose(found.largest, values[-1], atol=rtol * extreme)
    np.testing.assert_allclose(found.smallest, values[0], atol=rtol * extreme)
    trace_error = DEVIATIONS * trace_deviation + rtol * np.abs(values).sum()
    np.testing.assert_allclose(found.trace, values.sum(), atol=trace_error)
    norm_error = DEVIATIONS * norm_deviation + rounding
    np.testing.assert_allclose(found.squared_norm, np.sum(values**2), atol=norm_error)
    stable = np.asarray(found.squared_norm) / extreme**2
    np.testing.assert_allclose(found.stable_rank, stable, rtol=10 * rtol)
    effective = np.asarray(found.trace) ** 2 / np.asarray(found.squared_norm)
    np.testing.assert_allclose(found.effective_rank, effective, rtol=10 * rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_product_is_that_of_the_dense_matrix(kind, dtype, rng):
    params, inputs, labels = problem(dtype)
    flat, unravel = ravel_pytree(params)
    vector = rng.standard_normal(flat.size)
    vector_tree = unravel(jnp.asarray(vector, flat.dtype))
    product = jax.jit(functools.partial(multiply, kind))(params, inputs[0], labels[0], vector_tree)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    found = ravel_pytree(product)[0]
    assert found.dtype == dtype
    expected = dense_matrices()[kind][0] @ vector
    atol = 50 * np.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("hessian", np.float32), ("hessian", np.float64), ("gauss_newton", np.float64)],
)
def test_spectrum_of_a_network_is_that_of_the_dense_matrix(kind, dtype):
    params, inputs, labels = problem(dtype)
    for client, matrix in enumerate(dense_matrices()[kind]):
        key = jax.random.key(client)
        found = compiled(kind)(params, inputs[client], labels[client], key)
        assert {leaf.dtype for leaf in found} == {np.dtype(dtype)}
        check_spectrum(found, matrix, NUM_PROBES, rtol=200 * np.finfo(dtype).eps)


def test_gauss_newton_matrix_is_positive_and_of_rank_at_most_the_number_of_outputs():
    params, inputs, labels = problem()
    found = compiled("gauss_newton")(params, inputs[0], labels[0], jax.random.key(0))
    assert found.smallest >= -1e-14 * found.largest
    # log_softmax is flat along the all-ones direction: one output of each example is lost.
    bound = EXAMPLES * (SIZES[-1] - 1)
    assert np.linalg.matrix_rank(dense_matrices()["gauss_newton"][0]) == bound
    norm_deviation = probe_deviations(dense_matrices()["gauss_newton"][0], NUM_PROBES)[1]
    assert found.stable_rank <= bound + DEVIATIONS * norm_deviation / found.largest**2


def test_vmap_over_clients_is_a_loop_over_clients():
    params, inputs, labels = problem()
    key = jax.random.key(3)
    over_clients = jax.jit(
        jax.vmap(lambda x, y: estimate("hessian", params, x, y, key))  # params stay unbatched
    )(inputs, labels)
    for client in range(CLIENTS):
        alone = compiled("hessian")(params, inputs[client], labels[client], key)
        for found, expected in zip(over_clients, alone, strict=True):
            np.testing.assert_allclose(found[client], expected, rtol=1e-10)


def test_keys_alone_make_the_estimates_random():
    params, inputs, labels = problem()
    runs = [compiled("hessian")(params, inputs[0], labels[0], jax.random.key(s)) for s in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].squared_norm != runs[2].squared_norm


# Quadratic losses with a prescribed Hessian.


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_eigenvalues(rng, values):
    vectors = orthonormal(rng, len(values), len(values))
    return (vectors * values) @ vectors.T


@functools.cache
def compiled_quadratic(num_probes, num_lanczos):
    def of_matrix(matrix, key):
        start = jnp.zeros(matrix.shape[0], matrix.dtype)
        return curvature.stable_rank(
            lambda x: x @ matrix @ x / 2,
            start,
            num_probes=num_probes,
            num_lanczos=num_lanczos,
            key=key,
        )

    return jax.jit(jax.vmap(of_matrix))


SHARES = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 5]) / 5
HARD = {
    "zero": np.zeros(12),
    "identity": np.full(12, 3.0),
    "negative": np.full(12, -3.0),
    "two values": np.repeat([-2.0, 1.0], 6),
    "rank one": np.repeat([0.0, 4.0], [11, 1]),
    "rank one, negative": np.repeat([-4.0, 0.0], [1, 11]),
    "low rank": SHARES,
    "more negative than positive": np.linspace(-5, 2, 12),
    "tiny": 1e-12 * SHARES,
    "large": 1e12 * SHARES,
}


def hard_matrices(dtype, rotated):
    rng = np.random.default_rng(2)
    matrices = [with_eigenvalues(rng, v) if rotated else np.diag(v) for v in HARD.values()]
    return jnp.asarray(np.stack(matrices), dtype)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_spectrum_survive_the_end_of_the_krylov_space(dtype, rotated):
    # As many steps as parameters: every one of these but "more negative" runs out of directions.
    matrices = hard_matrices(dtype, rotated)
    keys = jax.random.split(jax.random.key(0), len(HARD))
    found = compiled_quadratic(NUM_PROBES, 12)(matrices, keys)
    for index, (name, values) in enumerate(HARD.items()):
        atol = 50 * np.finfo(dtype).eps * np.abs(values).max()
        np.testing.assert_allclose(found.largest[index], values.max(), atol=atol, err_msg=name)
        np.testing.assert_allclose(found.smallest[index], values.min(), atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_of_signs_are_exact_on_diagonal_hessians(dtype):
    keys = jax.random.split(jax.random.key(0), len(HARD))
    found = compiled_quadratic(NUM_PROBES, 12)(hard_matrices(dtype, rotated=False), keys)
    rtol = 50 * np.finfo(dtype).eps
    for index, values in enumerate(HARD.values()):
        np.testing.assert_allclose(found.squared_norm[index], np.sum(values**2), rtol=rtol)
        atol = rtol * np.abs(values).sum()
        np.testing.assert_allclose(found.trace[index], values.sum(), atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_takes_the_end_of_larger_modulus_and_zero_has_rank_zero(dtype):
    keys = jax.random.split(jax.random.key(0), len(HARD))
    found = compiled_quadratic(NUM_PROBES, 12)(hard_matrices(dtype, rotated=False), keys)
    ranks = dict(zip(HARD, zip(found.stable_rank, found.effective_rank, strict=True), strict=True))
    assert ranks["zero"] == (0, 0)
    for name, values in HARD.items():
        if name != "zero":
            total = np.sum(values**2)
            expected = total / np.abs(values).max() ** 2, values.sum() ** 2 / total
            np.testing.assert_allclose(ranks[name], expected, rtol=100 * np.finfo(dtype).eps)


def test_nan_in_a_hessian_is_not_hidden():
    matrices = hard_matrices(np.float64, rotated=True).at[6, 2, 3].set(jnp.nan)
    keys = jax.random.split(jax.random.key(0), len(HARD))
    found = compiled_quadratic(NUM_PROBES, 12)(matrices, keys)
    for values in found:
        assert np.isnan(values[6])
        assert np.isfinite(np.delete(values, 6)).all()


SPIKES = np.arange(10.0, 2.0, -1.0)


def spiked_wigner(rng, size, noise):
    """Rotated spikes and symmetric noise, off-diagonal variance 1 / size, diagonal 2 / size."""
    spikes = orthonormal(rng, size, len(SPIKES))
    gaussian = rng.standard_normal((size, size)) / np.sqrt(2 * size)
    return (spikes * SPIKES) @ spikes.T + noise * (gaussian + gaussian.T)


def test_spiked_wigner_has_the_stable_rank_of_theory():
    size, draws, num_probes = 200, 3, 200
    noises = np.array([min(1.0, 3 / np.sqrt(samples)) for samples in (14, 72, np.inf)])
    rng = np.random.default_rng(0)
    matrices = np.stack([spiked_wigner(rng, size, s) for s in noises for _ in range(draws)])
    keys = jax.random.split(jax.random.key(0), len(matrices))
    found = compiled_quadratic(num_probes, 20)(jnp.asarray(matrices), keys)
    # Twenty steps find the ends of a spectrum with a gap, whatever its dimension.
    values = np.linalg.eigvalsh(matrices)
    np.testing.assert_allclose(found.largest, values[:, -1], rtol=1e-6)
    dense = np.sum(values**2, axis=1) / values[:, -1] ** 2
    deviations = [probe_deviations(m, num_probes)[1] for m in matrices] / values[:, -1] ** 2
    assert np.all(np.abs(found.stable_rank - dense) <= DEVIATIONS * deviations + 1e-5)

    top = SPIKES[0]
    largest = top + noises**2 / top
    total = np.sum(SPIKES**2) + noises**2 * (size + 1)
    # What varies between draws, to first order: the noise seen by every spike, of variance
    # 2 / size, in the norm and (the first) in the largest eigenvalue; and the norm of the noise.
    seen = 2 * noises[:, None] * np.sqrt(2 / size) * SPIKES / total[:, None]
    seen[:, 0] -= 2 * noises * np.sqrt(2 / size) / largest
    of_draws = np.sqrt(np.sum(seen**2, axis=1) + (2 * noises**2 / total) ** 2)
    of_probes = np.mean(deviations.reshape(-1, draws), axis=1) / (total / largest**2)
    means = np.mean(np.asarray(found.stable_rank).reshape(-1, draws), axis=1)
    rtol = DEVIATIONS * np.hypot(of_draws, of_probes) / np.sqrt(draws)
    assert rtol.max() < 0.1
    np.testing.assert_array_less(np.abs(means / (total / largest**2) - 1), rtol)
    # More samples, less noise, a lower rank: a theorem of this model, not of losses.
    assert np.all((size + 1) * (top**2 - noises**2) > 2 * np.sum(SPIKES**2))
    assert np.all(np.diff(means) < 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_works_under_strict_promotion_without_x64(dtype):
    with jax.enable_x64(dtype == np.float64):
        params = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}

        def quartic(p):
            return jnp.sum(p["a"] ** 4) + jnp.sum(p["b"]) ** 2

        options = {"num_lanczos": 4, "key": jax.random.key(0)}
        spectrum = jax.eval_shape(lambda p: curvature.stable_rank(quartic, p, **options), params)
        space = jax.eval_shape(
            lambda p: curvature.leading_eigenspace(quartic, p, 2, **options), params
        )
        assert {leaf.dtype for leaf in jax.tree.leaves((spectrum, space))} == {np.dtype(dtype)}


# Eigenspaces.


@functools.cache
def compiled_eigenspace():
    def of_matrix(matrix, key):
        start = {"a": jnp.zeros((2, 3), matrix.dtype), "b": jnp.zeros(6, matrix.dtype)}

        def quadratic(params):
            x = jnp.concatenate([params["a"].ravel(), params["b"]])
            return x @ matrix @ x / 2

        return curvature.leading_eigenspace(quadratic, start, 5, num_lanczos=12, key=key)

    return jax.jit(of_matrix)


def as_rows(vectors):
    return np.concatenate([np.asarray(v).reshape(len(v), -1) for v in vectors.values()], axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_eigenspace_has_the_eigenvectors_of_largest_modulus(dtype, rng):
    values = np.array([-7, 5, 4, -2, 1.5, 1.2, 1.0, 0.7, -0.6, 0.4, -0.3, 0.1])
    vectors = orthonormal(rng, 12, 12)
    matrix = jnp.asarray((vectors * values) @ vectors.T, dtype)
    found = compiled_eigenspace()(matrix, jax.random.key(0))
    atol = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(found.values, values[:5], rtol=atol)
    shapes = {name: leaf.shape for name, leaf in found.vectors.items()}
    assert shapes == {"a": (5, 2, 3), "b": (5, 6)}
    rows = as_rows(found.vectors)
    assert rows.dtype == dtype
    np.testing.assert_allclose(np.abs(rows @ vectors[:, :5]), np.eye(5), atol=10 * atol)


def test_eigenvectors_beyond_the_krylov_space_are_zero(rng):
    vectors = orthonormal(rng, 12, 2)
    matrix = jnp.asarray((vectors * np.array([2.0, -3.0])) @ vectors.T)
    found = compiled_eigenspace()(matrix, jax.random.key(0))
    np.testing.assert_allclose(found.values, [-3, 2, 0, 0, 0], atol=1e-14)
    rows = as_rows(found.vectors)
    np.testing.assert_allclose(np.abs(rows[:2] @ vectors), [[0, 1], [1, 0]], atol=1e-13)
    gram = rows @ rows.T
    reached = np.round(np.diag(gram))
    assert reached.sum() < 5
    np.testing.assert_allclose(gram, np.diag(reached), atol=1e-13)


# Gradients of clients.

similarity = jax.jit(curvature.gradient_similarity)
truncate = jax.jit(curvature.truncate_gradients, static_argnums=1)
project = jax.jit(curvature.project_gradients)


def gradients(rng, count, dtype=np.float64, scale=1.0):
    shapes = {"kernel": (4, 3, 2, 2), "tall": (7, 3), "bias": (5,), "scalar": ()}
    return {
        name: jnp.asarray(scale * (rng.standard_normal((count, *shape)) + 0.3), dtype)
        for name, shape in shapes.items()
    }


def naive_similarity(tree, weights):
    rows = np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in tree], 1)
    total = norm = 0.0
    for k, one in enumerate(rows):
        for m, other in enumerate(rows):
            if k != m and weights[k] * weights[m] > 0:
                cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                total += weights[k] * weights[m] * cosine
                norm += weights[k] * weights[m]
    return total / norm


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_similarity_is_the_mean_cosine_of_pairs(dtype, scale, rng):
    tree = gradients(rng, 5, dtype, scale)
    weights = jnp.array([3.0, 1.0, 0.0, 2.0, 5.0], dtype)
    for given, numbers in ((None, np.ones(5)), (weights, weights)):
        found = similarity(tree, given)
        assert found.dtype == dtype
        expected = naive_similarity(tree.values(), np.asarray(numbers, np.float64))
        np.testing.assert_allclose(found, expected, atol=20 * np.finfo(dtype).eps)


def test_similarity_of_equal_opposite_and_vanishing_gradients(rng):
    one = rng.standard_normal((1, 3, 4))

    def of_multiples(*factors):
        return similarity({"w": np.concatenate([factor * one for factor in factors])})

    np.testing.assert_allclose(of_multiples(1, 2, 3), 1, rtol=1e-14)
    np.testing.assert_allclose(of_multiples(1, -2), -1, rtol=1e-14)
    np.testing.assert_allclose(of_multiples(1, 1, 0), 1 / 3, rtol=1e-14)
    assert of_multiples(0, 0) == 0


def test_clients_without_weight_are_ignored_and_one_client_has_no_similarity(rng):
    tree = gradients(rng, 5)
    poisoned = {name: leaf.at[3:].set(jnp.nan) for name, leaf in tree.items()}
    first = {name: leaf[:3] for name, leaf in tree.items()}
    expected = naive_similarity(first.values(), np.ones(3))
    found = similarity(poisoned, jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert jnp.isnan(similarity(poisoned, None))
    for lonely in ([0.3, 0.0, 0.0, 0.0, 0.0], [0.0] * 5):
        assert jnp.isnan(similarity(tree, jnp.array(lonely)))


def best_approximation(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2])
def test_truncation_is_the_best_approximation_of_every_leaf(rank, dtype, scale, rng):
    tree = gradients(rng, 3, dtype, scale)
    found = truncate(tree, rank)
    for name, leaf in tree.items():
        assert found[name].dtype == dtype
        if leaf.ndim < 3:
            np.testing.assert_array_equal(found[name], leaf)
            continue
        for truncated, whole in zip(found[name], leaf, strict=True):
            matrix = np.asarray(whole, np.float64).reshape(whole.shape[0], -1)
            expected = best_approximation(matrix, rank)
            # The Gram matrix squares the condition of the subspace.
            atol = 500 * np.finfo(dtype).eps * np.abs(matrix).max()
            np.testing.assert_allclose(truncated.reshape(expected.shape), expected, atol=atol)


def test_truncation_at_the_small_side_or_of_low_rank_changes_nothing(rng):
    tree = gradients(rng, 3)
    for name, leaf in truncate(tree, 4).items():
        np.testing.assert_array_equal(leaf, tree[name])
    once = truncate(tree, 2)
    twice = truncate(once, 2)
    for name, leaf in once.items():
        np.testing.assert_allclose(twice[name], leaf, atol=1e-13)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    assert all(np.all(leaf == 0) for leaf in truncate(zeros, 2).values())


@pytest.mark.parametrize("rank", [3, 75])
def test_coordinates_have_the_similarity_of_projections(rank, rng):
    tree = gradients(rng, 5)
    first, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], tree))
    assert first.size == 75
    vectors = orthonormal(rng, 75, rank).T
    found = project(tree, jax.vmap(unravel)(jnp.asarray(vectors)))
    flat = jax.vmap(lambda one: ravel_pytree(one)[0])(tree)
    np.testing.assert_allclose(found, flat @ vectors.T, atol=1e-13)
    projected = naive_similarity([flat @ vectors.T @ vectors], np.ones(5))
    np.testing.assert_allclose(similarity(found), projected, rtol=1e-12)
    if rank == 75:
        np.testing.assert_allclose(similarity(tree, None), projected, rtol=1e-12)


# Factors.

SHAPES = {"small factors": (3, 2, 31, 40), "large factors": (4, 3, 7, 5)}


def factors(rng, shape, drift=1.0, dtype=np.float64):
    clients, rank, rows, columns = shape
    up = rng.standard_normal((rows, rank)) + drift * rng.standard_normal((clients, rows, rank))
    down = rng.standard_normal((rank, columns))
    down = down + drift * rng.standard_normal((clients, rank, columns))
    weights = jnp.asarray(1 + np.arange(clients), dtype)
    return jnp.asarray(up, dtype), jnp.asarray(down, dtype), weights


def naive_error(ups, downs, weights):
    """Dense and not centred, in the dtype of the factors."""
    ups, downs, weights = (np.asarray(array) for array in (ups, downs, weights))
    shares = weights / weights.sum()
    products = np.einsum("k,kmr,krn->mn", shares, ups, downs)
    averages = np.einsum("k,kmr->mr", shares, ups) @ np.einsum("k,krn->rn", shares, downs)
    return np.linalg.norm(products - averages) / np.linalg.norm(products)


compiled_error = jax.jit(curvature.aggregation_error)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_aggregation_error_is_the_dense_one(dtype, shape, rng):
    ups, downs, weights = factors(rng, shape, dtype=dtype)
    found = compiled_error(ups, downs, weights)
    assert found.dtype == dtype
    exact = naive_error(*(np.asarray(array, np.float64) for array in (ups, downs, weights)))
    np.testing.assert_allclose(found, exact, rtol=50 * np.finfo(dtype).eps)
    np.testing.assert_allclose(compiled_error(ups, downs, 7 * weights), found, rtol=1e-5)


def sizes_of_matrices(jaxpr):
    """Collect the sizes of everything that a traced function computes."""
    found = {np.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars}
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= sizes_of_matrices(inner)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_larger_than_the_factors_is_formed_and_no_dense_weight_of_small_ones(name, rng):
    clients, rank, rows, columns = SHAPES[name]
    jaxpr = jax.make_jaxpr(curvature.aggregation_error)(*factors(rng, SHAPES[name])).jaxpr
    biggest = max(sizes_of_matrices(jaxpr))
    assert biggest <= (clients + 1) * rank * max(rows, columns)  # factors and their mean
    assert biggest < rows * columns or name == "large factors"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_clients_and_a_frozen_factor_make_no_error_at_all(dtype, shape, rng):
    ups, downs, weights = factors(rng, shape, dtype=dtype)
    same_ups, same_downs = (jnp.broadcast_to(a[1], a.shape) for a in (ups, downs))
    assert compiled_error(same_ups, same_downs, weights) == 0
    assert compiled_error(same_ups, downs, weights) == 0
    assert compiled_error(ups, same_downs, weights) == 0
    assert compiled_error(ups, downs, weights) > 0
    assert compiled_error(jnp.zeros_like(ups), downs, weights) == 0
    first_absent = weights.at[0].set(0)
    assert compiled_error(same_ups.at[0].set(7), downs, first_absent) == 0
    alone = jnp.zeros_like(weights).at[2].set(1)
    assert compiled_error(ups, downs, alone) == 0
    assert compiled_error(ups, downs, 0 * weights) == 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_small_drift_is_resolved_in_float32_where_the_plain_difference_is_noise(shape, rng):
    ups, downs, weights = factors(rng, shape, drift=1e-4, dtype=np.float32)
    arguments = [np.asarray(array, np.float64) for array in (ups, downs, weights)]
    exact = naive_error(*arguments)
    assert exact < np.finfo(np.float32).eps  # second order in the drift
    np.testing.assert_allclose(compiled_error(ups, downs, weights), exact, rtol=1e-3)
    assert abs(naive_error(ups, downs, weights) / exact - 1) > 0.1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_aggregation_error_ignores_order_padding_and_the_common_gauge(shape, rng):
    ups, downs, weights = factors(rng, shape)
    found = compiled_error(ups, downs, weights)
    order = jnp.asarray(rng.permutation(shape[0]))
    permuted = compiled_error(ups[order], downs[order], weights[order])
    np.testing.assert_allclose(permuted, found, rtol=1e-12)
    gauge = jnp.asarray(rng.standard_normal((shape[1], shape[1])) + 3 * np.eye(shape[1]))
    changed = compiled_error(ups @ gauge, jnp.linalg.inv(gauge) @ downs, weights)
    np.testing.assert_allclose(changed, found, rtol=1e-10)
    absent = weights.at[0].set(0)
    padded = compiled_error(ups.at[0].set(jnp.nan), downs.at[0].set(jnp.nan), absent)
    exact = naive_error(ups[1:], downs[1:], weights[1:])
    np.testing.assert_allclose(padded, exact, rtol=1e-12)


# Ranks of matrices.

stable_rank_of_matrix = jax.jit(curvature.stable_rank_of_matrix)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_rank_of_a_matrix_is_that_of_its_singular_values(dtype, shape, rng):
    for scale in (1.0, 1e-30):
        matrix = jnp.asarray(scale * rng.standard_normal(shape), dtype)
        values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        found = stable_rank_of_matrix(matrix)
        assert found.dtype == dtype
        expected = np.sum(values**2) / values[0] ** 2
        np.testing.assert_allclose(found, expected, rtol=20 * np.finfo(dtype).eps)
    assert stable_rank_of_matrix(jnp.zeros(shape, dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_of_a_batch_are_those_of_its_matrices(dtype, rng):
    left, right = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 2, 4))
    matrices = np.concatenate([left @ right, np.zeros((1, 5, 4)), rng.standard_normal((1, 5, 4))])
    matrices = jnp.asarray(matrices, dtype)
    ranks = jax.vmap(curvature.numerical_rank)(matrices)
    assert ranks.dtype == np.int32
    assert ranks.tolist() == [2, 2, 2, 0, 4]
    stable = jax.vmap(curvature.stable_rank_of_matrix)(matrices)
    alone = [stable_rank_of_matrix(matrix) for matrix in matrices]
    np.testing.assert_allclose(stable, alone, rtol=10 * np.finfo(dtype).eps)
    assert np.all(np.asarray(stable) <= np.asarray(ranks) * (1 + 10 * np.finfo(dtype).eps))


def test_rank_of_a_float32_update_needs_the_tolerance_of_the_weight(rng):
    rows, columns, rank = 30, 20, 3
    start = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
    up, down = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    change = (start + jnp.asarray(1e-4 * up @ down, jnp.float32)) - start
    assert curvature.numerical_rank(change) > rank
    eps = np.finfo(np.float32).eps
    noise = eps * np.abs(start).max() * (np.sqrt(rows) + np.sqrt(columns))
    tolerance = noise / np.linalg.norm(change, 2)
    assert curvature.numerical_rank(change, tolerance) == rank


# Errors.

X = jnp.ones(4)
KEY = jax.random.key(0)


def square(x):
    return jnp.sum(x**2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: curvature.hvp(square, {}, {}), "hvp: got params without leaves"),
        (
            lambda: curvature.hvp(square, {"w": jnp.ones(2, jnp.int32)}, X),
            r"hvp: got params\['w'\] of dtype int32",
        ),
        (
            lambda: curvature.hvp(square, [X, jnp.ones(4, jnp.float32)], X),
            "hvp: got params of dtypes float32 and float64, expected one dtype",
        ),
        (
            lambda: curvature.hvp(square, X, [X]),
            r"hvp: got vector of structure PyTreeDef\(\[\*\]\)",
        ),
        (lambda: curvature.hvp(square, X, jnp.ones(3)), r"hvp: got vector of shapes .*\(3,\)"),
        (
            lambda: curvature.hvp(square, X, jnp.ones(4, jnp.float32)),
            "hvp: got vector of shapes and dtypes .*float32.*, expected .*float64",
        ),
        (
            lambda: curvature.hvp(jnp.sin, X, X),
            r"hvp: got a loss of shapes \[\(4,\)\], expected one",
        ),
        (
            lambda: curvature.hvp(lambda _: jnp.int32(1), X, X),
            "hvp: got a loss of dtype int32",
        ),
        (
            lambda: curvature.gauss_newton_product(lambda x: x, jnp.sin, X, X),
            "gauss_newton_product: got a loss of shapes",
        ),
        (
            lambda: curvature.gauss_newton_rank(lambda _: {}, square, X, num_lanczos=2, key=KEY),
            "gauss_newton_rank: got outputs of the model without leaves",
        ),
        (
            lambda: curvature.stable_rank(square, X, key=KEY),
            "stable_rank: got num_lanczos 20, expected an integer from 1 to 4",
        ),
        (
            lambda: curvature.stable_rank(square, jnp.ones(0), num_lanczos=1, key=KEY),
            "stable_rank: got num_lanczos 1, expected an integer from 1 to 0",
        ),
        (
            lambda: curvature.stable_rank(square, X, num_lanczos=0, key=KEY),
            "stable_rank: got num_lanczos 0",
        ),
        (
            lambda: curvature.stable_rank(square, X, num_probes=0, num_lanczos=2, key=KEY),
            "stable_rank: got num_probes 0, expected an integer from 1",
        ),
        (
            lambda: curvature.leading_eigenspace(square, X, 0, num_lanczos=3, key=KEY),
            "leading_eigenspace: got rank 0, expected an integer from 1 to 3",
        ),
        (
            lambda: curvature.leading_eigenspace(square, X, 4, num_lanczos=3, key=KEY),
            "leading_eigenspace: got rank 4, expected an integer from 1 to 3",
        ),
        (
            lambda: curvature.leading_eigenspace(square, X, 2, num_lanczos=5, key=KEY),
            "leading_eigenspace: got num_lanczos 5",
        ),
        (
            lambda: curvature.gradient_similarity(jnp.ones((1, 3))),
            "gradient_similarity: got 1 clients, expected at least 2",
        ),
        (
            lambda: curvature.gradient_similarity([jnp.ones((2, 3)), jnp.ones(3)]),
            "gradient_similarity: got gradients of shapes .*, expected one leading axis",
        ),
        (
            lambda: curvature.gradient_similarity(jnp.ones(())),
            "gradient_similarity: got gradients of shapes",
        ),
        (
            lambda: curvature.gradient_similarity(jnp.ones((2, 3)), jnp.ones(3)),
            r"gradient_similarity: got weights of shape \(3,\)",
        ),
        (
            lambda: curvature.gradient_similarity(jnp.ones((2, 3)), jnp.array([1.0, -1.0])),
            "gradient_similarity: got weights .*, expected a non-negative",
        ),
        (lambda: curvature.truncate_gradients([X], 0), "truncate_gradients: got rank 0"),
        (lambda: curvature.truncate_gradients({}, 1), "truncate_gradients: got gradients without"),
        (
            lambda: curvature.project_gradients(jnp.ones((2, 3)), jnp.ones((2, 4))),
            "project_gradients: got basis of shapes and dtypes",
        ),
        (
            lambda: curvature.aggregation_error(jnp.ones((2, 3)), X, X),
            r"aggregation_error: got ups of shape \(2, 3\), expected 3 axes",
        ),
        (
            lambda: curvature.aggregation_error(jnp.ones((2, 3, 1)), jnp.ones((2, 2, 4)), X),
            r"aggregation_error: got downs of shape \(2, 2, 4\), expected shape \(2, 1, 4\)",
        ),
        (
            lambda: curvature.aggregation_error(
                jnp.ones((2, 3, 1)), jnp.ones((2, 1, 4), jnp.float32), jnp.ones(2)
            ),
            "aggregation_error: got ups of dtype float64 and downs of dtype float32",
        ),
        (
            lambda: curvature.aggregation_error(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 4)), X),
            r"aggregation_error: got weights of shape \(4,\), expected shape \(2,\)",
        ),
        (lambda: curvature.stable_rank_of_matrix(X), "stable_rank_of_matrix: got matrix of shape"),
        (
            lambda: curvature.numerical_rank(jnp.ones((2, 2), jnp.int32)),
            "numerical_rank: got matrix of dtype int32",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
