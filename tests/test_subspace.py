import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedlr import sketching, subspace

EXACT = {
    "svd": subspace.svd(),
    "gram": subspace.gram(),
    "gram64": subspace.gram64(),
    "lq": subspace.lq(),
}
BUILDERS = {
    **{name: lambda find=find: find for name, find in EXACT.items()},
    "randomized": lambda: subspace.randomized(key=jax.random.key(1), oversampling=2),
    "sketch": lambda: subspace.randomized(key=jax.random.key(1), oversampling=0, power_iters=0),
}
TOLERANCE = {"eps": 1e-6, "rtol": 1e-5, "atol": 1e-6}  # of central differences in float64
SHAPES = {"wide": (4, 9), "tall": (9, 4), "thin": (6, 2)}


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_singular_values(rng, values, columns):
    """Matrix with prescribed singular values, and its left singular vectors."""
    left = orthonormal(rng, len(values), len(values))
    return left * values @ orthonormal(rng, columns, len(values)).T, left


def projector(basis):
    return basis @ basis.T


def matrices(rng, shape):
    low = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
    kinds = {"full": rng.standard_normal(shape), "low": low, "zero": np.zeros(shape)}
    return kinds | {"tied": np.eye(*shape), "large": 1e15 * low, "small": 1e-15 * low}


@functools.cache
def compiled(name, rank):
    return jax.jit(lambda matrix: BUILDERS[name]()(matrix, rank, mode=0))


@functools.cache
def compiled_warm(rank):
    return jax.jit(lambda matrix, s: subspace.warm_started((s,))(matrix, rank, mode=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [*BUILDERS, "warm_started"])
def test_basis_is_orthonormal_for_every_matrix(name, shape, dtype, rng):
    rank = 3
    start = orthonormal(rng, shape[0], rank).astype(dtype)
    for kind, matrix in matrices(rng, shape).items():
        matrix = matrix.astype(dtype)
        if name == "warm_started":
            basis = compiled_warm(rank)(matrix, start)
        else:
            basis = compiled(name, rank)(matrix)
        assert basis.shape == (shape[0], rank)
        assert basis.dtype == dtype
        deviation = np.abs(np.asarray(basis.T @ basis) - np.eye(rank)).max()
        assert deviation <= 10 * shape[0] * np.finfo(dtype).eps, kind


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_exact_finders_span_the_leading_left_singular_vectors(name, shape, rng):
    matrix = rng.standard_normal(shape)
    rank = 2
    left = np.linalg.svd(matrix)[0][:, :rank]
    np.testing.assert_allclose(projector(compiled(name, rank)(matrix)), left @ left.T, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_basis_is_completed_beyond_the_number_of_columns(name, rng):
    matrix = rng.standard_normal((6, 2))
    basis = compiled(name, 4)(matrix)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-13)
    np.testing.assert_allclose(basis @ (basis.T @ matrix), matrix, atol=1e-13)


def found_share(name, ratio, seed):
    """How much of a direction at `ratio` of the largest singular value is in the float32 basis."""
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, ratio])
    rng = np.random.default_rng(seed)
    left = orthonormal(rng, 36, 7)
    matrix = (left * values @ orthonormal(rng, 400, 7).T).astype(np.float32)
    return np.linalg.norm(np.asarray(compiled(name, 7)(matrix)).T @ left[:, 6])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "ratio"), [("gram", 6e-4), ("gram64", 1e-7), ("lq", 1e-6), ("svd", 1e-6)]
)
def test_smallest_reliable_singular_value_in_float32(name, ratio, seed):
    assert found_share(name, ratio, seed) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_gram_loses_in_float32_what_it_says_it_loses(seed):
    assert found_share("gram", 1e-4, seed) < 0.9


@pytest.mark.parametrize("name", ["lq", "gram64"])
def test_singular_values_agree_to_a_tenth_down_to_1e_6_in_float32(name, rng):
    values = np.logspace(0, -6, 13)
    matrix = np.asarray(with_singular_values(rng, values, 60)[0], np.float32)
    basis = np.asarray(EXACT[name](jnp.asarray(matrix), len(values), mode=0), np.float64)
    found = np.linalg.norm(basis.T @ matrix, axis=1)
    np.testing.assert_allclose(found, values, rtol=0.1)


def test_gram64_leaves_the_x64_switch_alone_and_works_without_it(rng):
    matrix = rng.standard_normal((4, 9)).astype(np.float32)
    with jax.enable_x64(False):
        find = functools.partial(subspace.gram64(), rank=2, mode=0)
        stacked = jnp.stack([jnp.asarray(matrix), 2 * jnp.asarray(matrix)])
        bases = [find(stacked[0]), jax.jit(find)(stacked[0]), jax.vmap(find)(stacked)[1]]
        energy = jax.grad(lambda x: jnp.sum((find(x).T @ x) ** 2))(stacked[0])
        assert not jax.config.jax_enable_x64
        assert jnp.asarray(1.0).dtype == jnp.float32
    left = np.linalg.svd(matrix)[0][:, :2]
    for basis in bases:
        assert basis.dtype == np.float32
        np.testing.assert_allclose(projector(basis), left @ left.T, atol=1e-5)
    np.testing.assert_allclose(energy, 2 * left @ (left.T @ matrix), atol=1e-4)


@pytest.mark.parametrize("rows", [150, 201])
def test_blocked_gram_matrix_is_the_plain_product(rows, rng):
    matrix = rng.standard_normal((rows, 2 * subspace._BLOCK_COLUMNS + 37))
    expected = matrix @ matrix.T
    found = subspace._blocked_gram(jnp.asarray(matrix), jnp.float64)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-13 * largest)
    # The blocks on the diagonal are symmetric only up to rounding, from jaxlib 0.12 on.
    np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-15 * largest)
    left = np.linalg.svd(matrix, full_matrices=False)[0][:, :3]
    basis = subspace.gram()(jnp.asarray(matrix), 3, mode=0)
    np.testing.assert_allclose(projector(basis), projector(left), atol=1e-10)


def span_loss(target):
    return lambda basis: jnp.sum((basis @ (basis.T @ target)) ** 2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [*EXACT, "sketch", "warm_started"])
def test_gradient_of_a_function_of_the_span(name, shape, rng):
    rank = 2
    loss = span_loss(rng.standard_normal(shape))
    start = jnp.asarray(orthonormal(rng, shape[0], rank))
    low = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    find = compiled(name, rank) if name != "warm_started" else None
    function = jax.jit(lambda x: loss(find(x) if find else compiled_warm(rank)(x, start)))
    for matrix in (rng.standard_normal(shape), low):
        check_grads(
            function, (matrix,), order=1, modes=["fwd", "rev"], eps=1e-6, rtol=1e-5, atol=1e-6
        )


def test_gradient_of_the_randomized_finder(rng):
    target = rng.standard_normal((4, 9))
    function = jax.jit(lambda x: span_loss(target)(compiled("randomized", 2)(x)))
    check_grads(function, (target,), order=1, modes=["fwd", "rev"], **TOLERANCE)


@pytest.mark.parametrize("name", EXACT)
def test_gradient_of_the_energy_is_right_below_the_rank(name, rng):
    # |U^T X|^2 has the gradient 2 U U^T X = 2 X for every matrix of rank at most the kept one.
    matrix = np.outer(rng.standard_normal(4), rng.standard_normal(9))
    find = compiled(name, 3)
    function = jax.jit(lambda x: jnp.sum((find(x).T @ x) ** 2))
    np.testing.assert_allclose(jax.grad(function)(matrix), 2 * matrix, atol=1e-12)


@pytest.mark.parametrize("name", [*EXACT, "warm_started"])
def test_gradient_is_finite_for_zero_and_tied_matrices(name, rng):
    loss = span_loss(rng.standard_normal((4, 9)))
    start = jnp.asarray(orthonormal(rng, 4, 3))
    find = compiled(name, 3) if name in BUILDERS else lambda x: compiled_warm(3)(x, start)
    gradient = jax.jit(jax.grad(lambda x: loss(find(x))))
    for matrix in (np.zeros((4, 9)), np.eye(4, 9), np.ones((4, 9))):
        assert np.all(np.isfinite(gradient(matrix)))


@pytest.mark.parametrize("name", ["gram", "lq"])
def test_gradient_of_a_batch_is_the_batch_of_gradients(name, rng):
    batch = jnp.asarray(rng.standard_normal((3, 4, 9)))
    gradient = jax.grad(lambda x: span_loss(jnp.ones((4, 9)))(EXACT[name](x, 2, mode=0)))
    together = jax.jit(jax.vmap(gradient))(batch)
    apart = jnp.stack([jax.jit(gradient)(matrix) for matrix in batch])
    np.testing.assert_allclose(together, apart, atol=1e-11)


def test_plain_sketch_is_the_orthonormalized_product_with_the_test_matrix(rng):
    matrix, key = jnp.asarray(rng.standard_normal((5, 8))), jax.random.key(3)
    omega = sketching.sign(8, 2, key=jax.random.fold_in(key, 1), dtype=matrix.dtype)
    find = subspace.randomized(key=key, oversampling=0, power_iters=0, test_matrix=sketching.sign)
    expected = np.linalg.qr(matrix @ omega)[0]
    np.testing.assert_allclose(projector(find(matrix, 2, mode=1)), projector(expected), atol=1e-13)


def test_modes_have_their_own_test_matrices(rng):
    matrix = jnp.asarray(rng.standard_normal((5, 8)))
    find = BUILDERS["sketch"]()
    first, again, other = (find(matrix, 2, mode=mode) for mode in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(projector(first) - projector(other)).max() > 1e-3


def test_power_iterations_and_oversampling_capture_more():
    values = 0.8 ** np.arange(20)
    captured = {}
    for name, options in {
        "plain": {"oversampling": 0, "power_iters": 0},
        "oversampled": {"oversampling": 8, "power_iters": 0},
        "both": {"oversampling": 8, "power_iters": 1},
    }.items():

        @jax.jit
        def energy(matrix, key, options=options):
            basis = subspace.randomized(key=key, **options)(matrix, 4, mode=0)
            return jnp.sum((basis.T @ matrix) ** 2)

        captured[name] = sum(
            energy(
                with_singular_values(np.random.default_rng(seed), values, 30)[0],
                jax.random.key(seed),
            )
            for seed in range(3)
        )
    assert captured["plain"] < captured["oversampled"] < captured["both"]
    assert captured["both"] > (1 - 1e-2) * 3 * np.sum(values[:4] ** 2)


def test_warm_start_is_one_subspace_iteration_and_captures_more(rng):
    matrix, start = rng.standard_normal((5, 8)), orthonormal(rng, 5, 2)
    basis = compiled_warm(2)(matrix, start)
    expected = np.linalg.qr(matrix @ (matrix.T @ start))[0]
    np.testing.assert_allclose(projector(basis), projector(expected), atol=1e-13)
    assert np.linalg.norm(basis.T @ matrix) >= np.linalg.norm(start.T @ matrix)


def test_warm_start_uses_the_leading_columns_of_the_factor_of_its_mode(rng):
    matrix = jnp.asarray(rng.standard_normal((5, 8)))
    previous = (jnp.zeros((3, 1)), jnp.asarray(orthonormal(rng, 5, 4)))
    found = subspace.warm_started(previous)(matrix, 2, mode=1)
    np.testing.assert_allclose(found, compiled_warm(2)(matrix, previous[1][:, :2]), atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_warm_start_leaves_a_start_that_the_matrix_maps_to_zero(dtype, rng):
    # The first rows are background, so the first columns of the identity see nothing.
    matrix = np.zeros((9, 12), dtype)
    matrix[4:] = rng.standard_normal((5, 12))
    for border in (0, np.finfo(dtype).tiny, np.finfo(dtype).eps / 100):
        matrix[:4] = border
        basis = np.eye(9, 3, dtype=dtype)
        for _ in range(60):
            basis = compiled_warm(3)(matrix, basis)
        best = np.linalg.norm(np.linalg.svd(matrix)[1][:3])
        assert np.linalg.norm(basis.T @ matrix) >= 0.999 * best


@pytest.mark.parametrize("name", ["svd", "gram", "gram64", "lq", "randomized"])
@pytest.mark.parametrize(
    ("matrix", "rank", "message"),
    [
        (np.ones((3, 4)), 4, r": got rank 4, expected an integer from 1 to 3"),
        (np.ones((3, 4)), 0, r": got rank 0, expected an integer from 1 to 3"),
        (np.ones((3, 4)), 1.5, r": got rank 1.5, expected an integer"),
        (np.ones((3, 4, 5)), 1, r": got matrix of shape \(3, 4, 5\), expected 2 axes"),
        (np.ones((3, 4), int), 1, r": got matrix of dtype int64, expected float32 or float64"),
        (np.ones((3, 4), np.float16), 1, r": got matrix of dtype float16, expected float32"),
    ],
)
def test_bad_input_is_refused(name, matrix, rank, message):
    with pytest.raises(ValueError, match=f"^{name}{message}"):
        BUILDERS[name]()(jnp.asarray(matrix), rank, mode=0)


@pytest.mark.parametrize(
    ("previous", "mode", "message"),
    [
        ((np.ones((3, 1)),), 0, r"shape \(3, 1\) for mode 0, expected 3 rows and at least 2"),
        ((np.ones((4, 2)),), 0, r"shape \(4, 2\) for mode 0, expected 3 rows and at least 2"),
        ((np.ones((3, 2)),), 1, r"mode 1, expected an integer from 0 to 0"),
        ((np.ones((3, 2), np.float32),), 0, r"dtype float32 for mode 0, expected float64"),
    ],
)
def test_bad_previous_factors_are_refused(previous, mode, message):
    find = subspace.warm_started(tuple(jnp.asarray(factor) for factor in previous))
    with pytest.raises(ValueError, match=f"^warm_started: got .*{message}"):
        find(jnp.ones((3, 4)), 2, mode=mode)


@pytest.mark.parametrize("name", ["oversampling", "power_iters"])
@pytest.mark.parametrize("count", [-1, 0.5, True])
def test_bad_counts_are_refused(name, count):
    with pytest.raises(ValueError, match=f"^randomized: got {name} {count}, expected an integer"):
        subspace.randomized(key=jax.random.key(0), **{name: count})
