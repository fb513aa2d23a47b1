import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fedlr import _partials, multilinear
from tests.reference import tensors

SHAPES = [(4,), (3, 4), (3, 4, 5), (3, 2, 5, 4)]
CASES = [(shape, mode) for shape in SHAPES for mode in range(len(shape))]
RANK = 2


def tensor(rng, shape, dtype=np.float64):
    return jnp.asarray(rng.normal(size=shape).astype(dtype))


def matrices(rng, shape, rank=RANK, dtype=np.float64):
    return [tensor(rng, (size, rank), dtype) for size in shape]


def close(actual, expected, terms):
    """Equal up to the rounding of sums of `terms` terms of size one."""
    bound = 10 * terms * np.finfo(np.asarray(actual).dtype).eps
    np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_unfold_is_row_major_and_fold_its_inverse(rng, shape, mode):
    x = rng.normal(size=shape)
    matrix = multilinear.unfold(x, mode)
    np.testing.assert_array_equal(matrix, tensors.unfold(x, mode))
    np.testing.assert_array_equal(multilinear.fold(matrix, mode, shape), x)


def test_unfold_and_fold_keep_an_empty_mode():
    x = jnp.zeros((3, 0, 5))
    for mode in range(3):
        matrix = multilinear.unfold(x, mode)
        assert matrix.shape[0] == x.shape[mode]
        assert multilinear.fold(matrix, mode, x.shape).shape == x.shape


@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("shape", [(3, 0, 5), (0, 4, 5), (3, 4, 0)])
def test_products_of_an_empty_tensor_are_zero(shape, mode):
    x, matrix = jnp.zeros(shape), jnp.ones((6, shape[mode]))
    product = multilinear.mode_dot(x, matrix, mode)
    assert product.shape == (*shape[:mode], 6, *shape[mode + 1 :])
    assert not product.any()
    assert not multilinear.gram(x, mode).any()
    factors = [jnp.ones((size, 2)) for size in shape]
    assert not multilinear.mttkrp(x, factors, mode).any()


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_mode_dot_is_its_definition(rng, shape, mode):
    x, matrix = tensor(rng, shape), tensor(rng, (6, shape[mode]))
    expected = tensors.mode_dot(np.asarray(x), np.asarray(matrix), mode)
    close(multilinear.mode_dot(x, matrix, mode), expected, shape[mode])


def test_mode_dot_of_a_middle_mode_is_the_same_for_wide_and_narrow_tensors(rng):
    wide = tensor(rng, (3, 4, multilinear._NARROW + 1))
    matrix = tensor(rng, (2, 4))
    narrow = wide[:, :, : multilinear._NARROW - 1]
    product = multilinear.mode_dot(wide, matrix, 1)
    close(multilinear.mode_dot(narrow, matrix, 1), product[:, :, : narrow.shape[2]], 4)
    close(product, tensors.mode_dot(np.asarray(wide), np.asarray(matrix), 1), 4)


def test_mode_dot_commutes_over_distinct_modes(rng):
    x, a, b = tensor(rng, (3, 4, 5)), tensor(rng, (2, 3)), tensor(rng, (6, 5))
    first = multilinear.mode_dot(multilinear.mode_dot(x, a, 0), b, 2)
    second = multilinear.mode_dot(multilinear.mode_dot(x, b, 2), a, 0)
    close(first, second, 15)


def test_mode_dot_with_the_transpose_is_the_adjoint(rng):
    x, matrix, shape = tensor(rng, (3, 4, 5)), tensor(rng, (6, 4)), (3, 6, 5)
    y = tensor(rng, shape)
    forward = jnp.vdot(multilinear.mode_dot(x, matrix, 1), y)
    backward = jnp.vdot(x, multilinear.mode_dot(y, matrix.T, 1))
    close(forward, backward, math.prod(shape))


@pytest.mark.parametrize("size", [2, 9])
def test_multi_mode_dot_is_one_product_after_the_other(rng, size):
    shape = (3, 4, 5, 6)
    x = tensor(rng, shape)
    for modes in [(0, 1, 2, 3), (2, 0), (1,), ()]:
        factors = [tensor(rng, (size, shape[mode])) for mode in modes]
        expected = np.asarray(x)
        for factor, mode in zip(factors, modes, strict=True):
            expected = tensors.mode_dot(expected, np.asarray(factor), mode)
        close(multilinear.multi_mode_dot(x, factors, modes), expected, math.prod(shape))
        transposed = [factor.T for factor in factors]
        result = multilinear.multi_mode_dot(x, transposed, modes, transpose=True)
        close(result, expected, math.prod(shape))


def test_multi_mode_dot_takes_the_cheapest_order_that_meets_large_tensors_at_their_ends():
    def order(old, new):
        ndim = len(old)
        return sorted(range(ndim), key=lambda m: multilinear._priority(m, ndim, old[m], new[m]))

    def multiplications(old, new, modes):
        shape, count = list(old), 0
        for mode in modes:
            count += math.prod(shape) * new[mode]
            shape[mode] = new[mode]
        return count

    for old, new in [((9, 8), (2, 3)), ((9, 5), (7, 1)), ((20, 6), (4, 3))]:
        best = min(multiplications(old, new, modes) for modes in itertools.permutations(range(2)))
        assert multiplications(old, new, order(old, new)) == best
        best = min(multiplications(new, old, modes) for modes in itertools.permutations(range(2)))
        assert multiplications(new, old, order(new, old)) == best
    reducing = order((9, 9, 9, 9), (3, 1, 2, 4))
    assert reducing == [0, 3, 1, 2]
    assert set(order((3, 1, 2, 4), (9, 9, 9, 9))[2:]) == {0, 3}


def test_khatri_rao_is_its_definition_and_associative(rng):
    a, b, c = matrices(rng, (3, 4, 5))
    np.testing.assert_array_equal(multilinear.khatri_rao(a, b), tensors.khatri_rao(a, b))
    product = multilinear.khatri_rao(a, b, c)
    close(product, multilinear.khatri_rao(a, multilinear.khatri_rao(b, c)), 1)
    np.testing.assert_array_equal(multilinear.khatri_rao(a), a)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_khatri_rao_unfolds_a_cp_tensor(rng, shape):
    factors = matrices(rng, shape)
    dense = tensors.cp_to_dense([np.asarray(f) for f in factors])
    for mode in range(len(shape)):
        others = [f for m, f in enumerate(factors) if m != mode]
        close(factors[mode] @ multilinear.khatri_rao(*others).T, tensors.unfold(dense, mode), RANK)


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_mttkrp_is_its_definition(rng, shape, mode):
    x, factors = tensor(rng, shape), matrices(rng, shape)
    expected = tensors.mttkrp(np.asarray(x), [np.asarray(f) for f in factors], mode)
    close(multilinear.mttkrp(x, factors, mode), expected, math.prod(shape))


def test_mttkrp_is_the_unfolding_times_khatri_rao_for_every_run_of_end_modes(rng):
    for shape in [(2, 3, 4, 5), (5, 4, 3, 2), (7, 2, 2, 2), (2, 2, 2, 7)]:
        x, factors = tensor(rng, shape), matrices(rng, shape)
        for mode in range(4):
            others = [f for m, f in enumerate(factors) if m != mode]
            expected = multilinear.unfold(x, mode) @ multilinear.khatri_rao(*others)
            close(multilinear.mttkrp(x, factors, mode), expected, math.prod(shape))


@pytest.mark.parametrize("shape", [(64, 64, 2), (70, 60, 3)])  # eight pieces, and a rest
def test_mttkrp_over_many_rows_is_its_definition_under_all_transforms(rng, shape):
    assert math.prod(shape[:2]) >= _partials._MANY_ROWS
    x, factors = tensor(rng, (2, *shape)), matrices(rng, shape)

    def of_last(x, *factors):
        return multilinear.mttkrp(x, factors, 2)

    expected = [tensors.mttkrp(np.asarray(one), list(map(np.asarray, factors)), 2) for one in x]
    size = math.prod(shape)
    close(of_last(x[0], *factors), expected[0], size)
    mapped = jax.jit(jax.vmap(of_last, in_axes=(0, None, None, None)))
    close(mapped(x, *factors), np.stack(expected), size)
    # <Y, M(X)> is linear in X, so that its gradient is the model of Y.
    y = matrices(rng, shape)[2]
    gradient = jax.grad(lambda x: jnp.sum(y * of_last(x, *factors)))(x[0])
    close(gradient, jnp.einsum("ir,jr,kr->ijk", factors[0], factors[1], y), 3)


def test_mttkrp_is_the_gradient_of_the_squared_residual(rng):
    x, factors = tensor(rng, (3, 4, 5)), matrices(rng, (3, 4, 5))

    def loss(factor):
        rebuilt = multilinear.fold(
            factor @ multilinear.khatri_rao(factors[0], factors[2]).T, 1, x.shape
        )
        return 0.5 * jnp.sum((x - rebuilt) ** 2)

    grams = (factors[0].T @ factors[0]) * (factors[2].T @ factors[2])
    expected = factors[1] @ grams - multilinear.mttkrp(x, factors, 1)
    close(jax.grad(loss)(factors[1]), expected, x.size * 20)


@pytest.mark.parametrize(("shape", "mode"), CASES)
def test_gram_is_the_unfolding_times_its_transpose(rng, shape, mode):
    x = tensor(rng, shape)
    matrix = tensors.unfold(np.asarray(x), mode)
    close(multilinear.gram(x, mode), matrix @ matrix.T, x.size)


def test_end_modes_need_no_copy_of_the_tensor(rng):
    shape = (24, 20, 28)
    x, factors = tensor(rng, shape, np.float32), matrices(rng, shape, 3, np.float32)

    def temporary_bytes(function):
        compiled = jax.jit(function).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for mode in (0, 2):
        assert temporary_bytes(lambda x, mode=mode: multilinear.gram(x, mode)) < x.nbytes / 2
    for mode in range(3):
        product = temporary_bytes(lambda x, mode=mode: multilinear.mttkrp(x, factors, mode))
        assert product < x.nbytes / 2
    project = temporary_bytes(lambda x: multilinear.multi_mode_dot(x, factors, transpose=True))
    assert project < x.nbytes / 2


@pytest.fixture(scope="module")
def everything():
    """All kernels in one compiled program, with the number of its traces bounded by one."""

    @chex.assert_max_traces(n=1)
    def kernels(x, factors):
        core = multilinear.multi_mode_dot(x, factors, transpose=True)
        return (
            core,
            multilinear.mode_dot(core, factors[1], 1),
            multilinear.mttkrp(x, factors, 1),
            multilinear.gram(x, 1),
            multilinear.fold(multilinear.unfold(x, 1), 1, x.shape),
        )

    return kernels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_is_the_loop_in_one_trace_and_keeps_the_dtype(rng, everything, dtype):
    chex.clear_trace_counter()
    xs = tensor(rng, (3, 2, 4, 5), dtype)
    factors = matrices(rng, xs.shape[1:], dtype=dtype)
    compiled = jax.jit(jax.vmap(everything, in_axes=(0, None)))
    compiled(-xs, factors)
    batch = compiled(xs, factors)
    for i, x in enumerate(xs):
        single = everything.__wrapped__(x, factors)
        assert all(part.dtype == dtype for part in single)
        jax.tree.map(lambda a, b, i=i: close(a[i], b, xs.size), batch, single)


def test_gradients_of_the_kernels(rng):
    x, factors = tensor(rng, (2, 3, 4)), matrices(rng, (2, 3, 4))

    def kernels(x, factors):
        core = multilinear.multi_mode_dot(x, factors, transpose=True)
        return core, multilinear.mttkrp(x, factors, 1), multilinear.gram(x, 1)

    check_grads(kernels, (x, factors), order=1)


X = jnp.zeros((3, 4, 5))
FACTORS = [jnp.zeros((size, RANK)) for size in X.shape]
BAD_CALLS = [
    (lambda: multilinear.unfold(X, 3), r"unfold: got mode 3, expected an integer from 0 to 2"),
    (lambda: multilinear.unfold(X, -1), r"unfold: got mode -1, expected"),
    (lambda: multilinear.fold(FACTORS[0], 0, (3, 4)), r"fold: got matrix of shape \(3, 2\), expec"),
    (lambda: multilinear.fold(FACTORS[0], 2, (3, 2)), r"fold: got mode 2, expected"),
    (
        lambda: multilinear.mode_dot(X, FACTORS[1], 1),
        r"mode_dot: got matrix of shape \(4, 2\), expected 4 columns for mode 1",
    ),
    (lambda: multilinear.mode_dot(X, FACTORS[1].T, True), r"mode_dot: got mode True, expected"),
    (
        lambda: multilinear.mode_dot(X, FACTORS[1].T.astype(jnp.float32), 1),
        r"mode_dot: got matrix of dtype float32, expected float64 as x",
    ),
    (
        lambda: multilinear.mode_dot(X.astype(jnp.int32), FACTORS[1].T, 1),
        r"mode_dot: got x of dtype int32, expected float32 or float64",
    ),
    (
        lambda: multilinear.multi_mode_dot(X, FACTORS[:2], transpose=True),
        r"multi_mode_dot: got 2 matrices for modes \(0, 1, 2\), expected one matrix for each",
    ),
    (
        lambda: multilinear.multi_mode_dot(X, FACTORS[:2], (1, 1), transpose=True),
        r"multi_mode_dot: got 2 matrices for modes \(1, 1\), expected",
    ),
    (
        lambda: multilinear.multi_mode_dot(X, FACTORS),
        r"multi_mode_dot: got matrix of mode 0 of shape \(3, 2\), expected 3 columns for mode 0",
    ),
    (lambda: multilinear.khatri_rao(), r"khatri_rao: got no factors, expected one or more"),
    (
        lambda: multilinear.khatri_rao(FACTORS[0], FACTORS[1][:, :1]),
        r"khatri_rao: got factor 1 of rank 1, expected rank 2 as factor 0",
    ),
    (lambda: multilinear.mttkrp(X, FACTORS[:2], 0), r"mttkrp: got 2 factors, expected 3 for shape"),
    (
        lambda: multilinear.mttkrp(X, FACTORS[::-1], 0),
        r"mttkrp: got factor of mode 0 of shape \(5, 2\), expected 3 rows for mode 0",
    ),
    (
        lambda: multilinear.gram(X.astype(jnp.bfloat16), 0),
        r"gram: got x of dtype bfloat16, expected float32 or float64",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
