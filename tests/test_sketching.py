import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedlr import sketching

ROWS, COLUMNS = 24, 30
SEEDS = [0, 1, 2]
DRAWS = {
    "gaussian": sketching.gaussian,
    "sign": sketching.sign,
    "sparse_sign": sketching.sparse_sign,
    "khatri_rao": sketching.khatri_rao((5, 6)),
}


def with_spectrum(rng, values, dtype=np.float64):
    """A matrix (ROWS, COLUMNS) with the given singular values."""
    u, _ = np.linalg.qr(rng.normal(size=(ROWS, len(values))))
    v, _ = np.linalg.qr(rng.normal(size=(COLUMNS, len(values))))
    return jnp.asarray(((u * values) @ v.T).astype(dtype))


def residual(matrix, basis):
    matrix, basis = np.asarray(matrix, np.float64), np.asarray(basis, np.float64)
    return np.linalg.norm(matrix - basis @ (basis.T @ matrix))


def assert_orthonormal(columns):
    size, eps = columns.shape[1], np.finfo(columns.dtype).eps
    columns = np.asarray(columns, np.float64)
    np.testing.assert_allclose(columns.T @ columns, np.eye(size), atol=10 * len(columns) * eps)


@functools.cache
def drawn(name, rows, columns, dtype=np.float64):
    """A compiled drawing of a test matrix from a key."""
    return jax.jit(lambda key: DRAWS[name](rows, columns, key=key, dtype=dtype))


@functools.cache
def finder(size, power_iters):
    """A compiled range finder, shared by the tests."""
    return jax.jit(lambda a, key: sketching.range_finder(a, size, power_iters=power_iters, key=key))


@functools.cache
def many(size, power_iters, name="gaussian"):
    """The same for 20 keys at once."""
    options = {"power_iters": power_iters, "test_matrix": DRAWS[name]}

    def find(matrix, key):
        return sketching.range_finder(matrix, size, key=key, **options)

    return jax.jit(jax.vmap(find, in_axes=(None, 0)))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_test_matrices_are_determined_by_the_key_and_keep_the_dtype(name, dtype):
    draw = drawn(name, 30, 9, dtype)
    one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.shape == (30, 9)
    assert one.dtype == dtype
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_test_matrices_are_isotropic(name, seed):
    """The mean of Omega Omega^T / columns is the identity; 6 standard errors are allowed.

    The entries with the heaviest tail, products of two normal ones, have the fourth moment 9, so
    the standard error is at most 3 / sqrt(columns).
    """
    columns = 4000
    omega = np.asarray(drawn(name, 30, columns)(jax.random.key(seed)))
    np.testing.assert_allclose(omega @ omega.T / columns, np.eye(30), atol=6 * 3 / columns**0.5)


def test_signs_are_even_and_neighbours_uncorrelated():
    signs = np.asarray(sketching.sign(64, 65, key=jax.random.key(0), dtype=np.float64))
    assert set(np.unique(signs)) == {-1, 1}
    standard_error = signs.size**-0.5
    flat = signs.ravel()
    for lag in (1, 8, 32, 65):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 5 * standard_error
    assert abs(np.mean(flat)) < 5 * standard_error


@pytest.mark.parametrize("columns", [1, 5, 8, 30])
def test_sparse_sign_has_eight_equal_nonzeros_in_every_row(columns):
    draw = np.asarray(drawn("sparse_sign", 400, columns)(jax.random.key(0)))
    nonzeros = min(columns, 8)
    assert np.all(np.sum(draw != 0, axis=1) == nonzeros)
    np.testing.assert_allclose(np.abs(draw[draw != 0]), math.sqrt(columns / nonzeros), rtol=1e-15)
    assert np.all(np.any(draw != 0, axis=0))


def test_khatri_rao_columns_are_products_over_the_modes():
    draw = sketching.khatri_rao((3, 4, 5))(60, 2, key=jax.random.key(0), dtype=np.float64)
    for column in np.asarray(draw).T:
        for mode in range(3):
            unfolding = np.moveaxis(column.reshape(3, 4, 5), mode, 0).reshape(3 + mode, -1)
            values = np.linalg.svd(unfolding, compute_uv=False)
            assert values[1] < 1e-13 * values[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_residual_is_below_the_expectation_bound(rng, seed, decay):
    """Halko, Martinsson, Tropp 2011, Theorem 10.5, as the mean over 20 draws.

    The theorem bounds the root mean square, so the mean of the squares is compared.
    """
    rank, oversampling = 5, 5
    values = decay ** np.arange(ROWS)
    matrix = with_spectrum(rng, values)
    keys = jax.random.split(jax.random.key(seed), 20)
    bases = many(rank + oversampling, 0)(matrix, keys)
    mean_square = np.mean([residual(matrix, basis) ** 2 for basis in bases])
    assert mean_square <= (1 + rank / (oversampling - 1)) * np.sum(values[rank:] ** 2)
    assert mean_square >= np.sum(values[rank + oversampling :] ** 2)


NOISY = np.r_[2.0 ** -np.arange(4), np.full(ROWS - 4, 0.05)]


def mean_residual(matrix, seed, power_iters, name="gaussian"):
    bases = many(8, power_iters, name)(matrix, jax.random.split(jax.random.key(seed), 20))
    return np.mean([residual(matrix, basis) for basis in bases])


@pytest.mark.parametrize("seed", SEEDS)
def test_more_power_is_never_worse_on_average(rng, seed):
    matrix, best = with_spectrum(rng, NOISY), np.linalg.norm(NOISY[8:])
    means = [mean_residual(matrix, seed, power_iters) for power_iters in (0, 1, 2)]
    assert means[0] > means[1] > means[2] >= best


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", DRAWS)
def test_every_test_matrix_keeps_the_gaussian_bound_after_one_power_step(rng, name, seed):
    """The bound is that of rank 4 and oversampling 4 without a power step."""
    matrix = with_spectrum(rng, NOISY)
    bound = np.sqrt((1 + 4 / (4 - 1)) * np.sum(NOISY[4:] ** 2))
    assert mean_residual(matrix, seed, 1, name) < bound
    assert bound < np.linalg.norm(NOISY[2:])  # one missed direction of the leading two shows


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-25, 1, 1e25])
def test_basis_is_orthonormal_for_every_rank(rng, dtype, scale):
    full = np.geomspace(1, np.finfo(dtype).eps ** 2, ROWS)
    for values in (full, full[:3], np.zeros(1)):
        matrix = with_spectrum(rng, values * scale, dtype)
        for power_iters in (0, 2):
            basis = finder(8, power_iters)(matrix, jax.random.key(0))
            assert basis.shape == (ROWS, 8)
            assert basis.dtype == dtype
            assert_orthonormal(basis)


@pytest.mark.parametrize("name", DRAWS)
def test_a_matrix_of_lower_rank_is_captured(rng, name):
    matrix = with_spectrum(rng, np.array([1.0, 0.5, 1e-3]))
    basis = many(8, 1, name)(matrix, jax.random.split(jax.random.key(0), 20))[0]
    assert residual(matrix, basis) < 10 * ROWS * np.finfo(np.float64).eps


def test_power_steps_do_not_lose_small_singular_values_in_float32(rng):
    values = 10.0 ** (-np.arange(ROWS) / 3)
    matrix = with_spectrum(rng, values, np.float32)
    for power_iters in (1, 3):
        basis = finder(18, power_iters)(matrix, jax.random.key(0))
        assert residual(matrix, basis) < 2 * np.linalg.norm(values[18:])
    assert values[17] < 3e-6


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 3)])
def test_a_full_basis_keeps_everything(rng, shape):
    matrix = jnp.asarray(rng.normal(size=shape))
    basis = sketching.range_finder(matrix, min(shape), key=jax.random.key(0))
    assert_orthonormal(basis)
    assert residual(matrix, basis) < 1e-14 * np.linalg.norm(matrix)


@pytest.mark.parametrize(("dtype", "floor"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_randomized_svd_is_the_truncated_svd(rng, dtype, floor):
    values = np.geomspace(1, floor, 12)
    matrix = with_spectrum(rng, values, dtype)
    svd = jax.jit(lambda a, key: sketching.randomized_svd(a, 12, key=key))(
        matrix, jax.random.key(0)
    )
    assert all(part.dtype == dtype for part in svd)
    assert_orthonormal(svd.u)
    assert_orthonormal(svd.vt.T)
    exact = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:12]
    np.testing.assert_allclose(svd.s, exact, rtol=0.1)
    rebuilt = np.asarray(svd.u * svd.s[None, :] @ svd.vt, np.float64)
    np.testing.assert_allclose(rebuilt, matrix, atol=10 * ROWS * np.finfo(dtype).eps)


def test_randomized_svd_takes_as_much_oversampling_as_the_matrix_allows(rng):
    matrix = jnp.asarray(rng.normal(size=(4, 7)))
    svd = sketching.randomized_svd(matrix, 3, oversampling=99, power_iters=0, key=jax.random.key(0))
    expected = np.linalg.svd(matrix, compute_uv=False)[:3]
    np.testing.assert_allclose(svd.s, expected, rtol=1e-13)


def test_batch_of_matrices_and_keys_is_the_loop_in_one_trace(rng):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(matrices, keys):
        return jax.vmap(lambda a, key: sketching.randomized_svd(a, 3, key=key))(matrices, keys)

    matrices = jnp.asarray(rng.normal(size=(4, 9, 8)))
    keys = jax.random.split(jax.random.key(0), 4)
    solve(matrices + 1, keys)
    batch = solve(matrices, keys)
    for i in range(4):
        single = sketching.randomized_svd(matrices[i], 3, key=keys[i])
        rebuilt = batch.u[i] * batch.s[i][None, :] @ batch.vt[i]
        np.testing.assert_allclose(rebuilt, single.u * single.s[None, :] @ single.vt, atol=1e-13)


def test_gradient_of_the_captured_energy(rng):
    matrix = jnp.asarray(rng.normal(size=(5, 6)))

    def energy(a):
        return jnp.sum((sketching.range_finder(a, 2, key=jax.random.key(0)).T @ a) ** 2)

    check_grads(jax.jit(energy), (matrix,), order=1)


A = jnp.zeros((3, 4))
KEY = jax.random.key(0)
BAD_CALLS = [
    (
        lambda: sketching.range_finder(A, 4, key=KEY),
        "range_finder: got size 4, expected an integer from 1 to 3",
    ),
    (lambda: sketching.range_finder(A, 0, key=KEY), "range_finder: got size 0, expected"),
    (
        lambda: sketching.range_finder(A[0], 1, key=KEY),
        r"range_finder: got matrix of shape \(4,\), expected 2 axes",
    ),
    (
        lambda: sketching.range_finder(A.astype(int), 1, key=KEY),
        "range_finder: got matrix of dtype int64, expected float32 or float64",
    ),
    (
        lambda: sketching.range_finder(A, 1, power_iters=-1, key=KEY),
        "range_finder: got power_iters -1, expected an integer from 0",
    ),
    (
        lambda: sketching.randomized_svd(A, 4, key=KEY),
        "randomized_svd: got rank 4, expected an integer from 1 to 3",
    ),
    (
        lambda: sketching.randomized_svd(A, 2, oversampling=1.5, key=KEY),
        "randomized_svd: got oversampling 1.5, expected an integer from 0",
    ),
    (
        lambda: sketching.range_finder(A, 2, test_matrix=sketching.khatri_rao((3, 2)), key=KEY),
        r"khatri_rao: got 4 rows for shape \(3, 2\), expected 6",
    ),
    (lambda: sketching.khatri_rao(()), r"khatri_rao: got shape \(\), expected one size or more"),
    (
        lambda: sketching.gaussian(3, 4, key=KEY, dtype=jnp.bfloat16),
        "gaussian: got dtype bfloat16, expected float32 or float64",
    ),
    (lambda: sketching.sign(3, 4, key=KEY, dtype=int), "sign: got dtype int64, expected float32"),
    (
        lambda: sketching.sparse_sign(3, 4, key=KEY, dtype=int),
        "sparse_sign: got dtype int64, expected float32",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
