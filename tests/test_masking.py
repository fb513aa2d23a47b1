import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import masking

SUMS = [masking.masked_sum, masking.masked_mean, masking.masked_norm]


def observed(x, mask, axis):
    """Reference: the observed entries of every slice over `axis`, one list per slice."""
    moved, moved_mask = np.moveaxis(x, axis, -1), np.moveaxis(mask, axis, -1)
    rows, row_masks = moved.reshape(-1, x.shape[axis]), moved_mask.reshape(-1, x.shape[axis])
    return [row[keep] for row, keep in zip(rows, row_masks, strict=True)]


@pytest.fixture
def data(rng):
    x = rng.normal(size=(3, 4, 5))
    mask = rng.random(x.shape) < 0.6
    mask[1, 2] = False
    return np.where(mask, x, np.nan), mask


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_from_nan_moves_nan_into_the_mask_and_nothing_else(dtype):
    x = jnp.asarray(np.array([[1, np.nan, np.inf], [np.nan, 0, -2]], dtype))
    filled, mask = jax.jit(masking.from_nan)(x)
    np.testing.assert_array_equal(mask, [[True, False, True], [False, True, True]])
    np.testing.assert_array_equal(filled, np.array([[1, 0, np.inf], [0, 0, -2]]))
    assert filled.dtype == dtype


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_those_of_the_observed_entries(data, axis, dtype):
    x, mask = data[0].astype(dtype), data[1]
    slices = observed(x, mask, axis)
    expected = [
        [np.sum(part) for part in slices],
        [np.mean(part) if len(part) else 0 for part in slices],
        [np.linalg.norm(part) for part in slices],
    ]
    for function, values in zip(SUMS, expected, strict=True):
        result = function(jnp.asarray(x), mask, axis)
        assert result.dtype == dtype
        bound = 10 * x.shape[axis] * np.finfo(dtype).eps
        np.testing.assert_allclose(result.ravel(), values, rtol=bound, atol=bound)


@pytest.mark.parametrize("function", SUMS)
def test_a_full_mask_changes_nothing(rng, function):
    x = jnp.asarray(rng.normal(size=(3, 4)))
    plain = {
        masking.masked_sum: jnp.sum(x),
        masking.masked_mean: jnp.mean(x),
        masking.masked_norm: jnp.linalg.norm(x),
    }[function]
    np.testing.assert_allclose(function(x, jnp.ones_like(x, bool)), plain, rtol=1e-14)


@pytest.mark.parametrize("function", SUMS)
def test_hidden_entries_reach_neither_value_nor_gradient(data, function):
    x, mask = data
    total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(function(x, mask, 2))))
    value, gradient = total(x)
    other_value, other_gradient = total(np.where(mask, x, np.inf))
    assert np.isfinite(value)
    assert value == other_value
    np.testing.assert_array_equal(gradient, other_gradient)
    np.testing.assert_array_equal(gradient[~mask], 0)
    assert np.any(gradient[mask] != 0)


@pytest.mark.parametrize("function", SUMS)
def test_nothing_observed_gives_zero_and_a_zero_gradient(function):
    x = jnp.array([jnp.nan, jnp.inf, 0.0])
    value, gradient = jax.value_and_grad(function)(x, jnp.zeros(3, bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_norm_of_observed_zeros_has_a_zero_gradient():
    gradient = jax.grad(masking.masked_norm)(jnp.zeros(3), jnp.array([True, True, False]))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("function", SUMS)
def test_a_mask_of_leading_axes_holds_for_all_that_follow(data, function):
    x, mask = data[0], data[1][:, :, 0]
    full = jnp.broadcast_to(mask[:, :, None], x.shape)
    filled = np.nan_to_num(x)
    np.testing.assert_array_equal(function(filled, mask, 1), function(filled, full, 1))


@pytest.mark.parametrize("num_axes", range(4))
def test_spreading_repeats_a_mask_along_the_axes_that_follow(rng, num_axes):
    shape = (3, 4, 5)
    mask = rng.random(shape[:num_axes]) < 0.6
    found = jax.jit(masking.spread, static_argnums=1)(mask, shape)
    assert found.dtype == bool
    assert found.shape == shape
    for index in np.ndindex(shape):
        assert found[index] == mask[index[:num_axes]]


@pytest.mark.parametrize("function", SUMS)
def test_batch_is_the_loop(data, function):
    x, mask = data
    batch = jax.vmap(function)(x, mask)
    loop = [function(*pair) for pair in zip(x, mask, strict=True)]
    np.testing.assert_allclose(batch, loop, rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_stack_ragged_returns_every_array_through_its_mask(rng, dtype):
    arrays = [rng.normal(size=(length, 2)).astype(dtype) for length in (3, 0, 4)]
    stacked, mask = masking.stack_ragged(arrays)
    assert stacked.shape == (3, 4, 2)
    assert stacked.dtype == dtype
    for row, keep, array in zip(stacked, mask, arrays, strict=True):
        np.testing.assert_array_equal(row[keep], array)
        np.testing.assert_array_equal(row[~keep], 0)


X = jnp.zeros((3, 4))
BAD_CALLS = [
    (lambda: masking.from_nan(X.astype(int)), "from_nan: got x of dtype int64, expected float32"),
    (
        lambda: masking.masked_sum(X, jnp.ones((3, 4))),
        r"masked_sum: got mask of dtype float64, expected bool \(True = observed\)",
    ),
    (
        lambda: masking.masked_mean(X, jnp.ones(4, bool)),
        r"masked_mean: got mask of shape \(4,\), expected shape \(3,\)",
    ),
    (
        lambda: masking.masked_norm(X, jnp.ones((3, 4, 1), bool)),
        r"masked_norm: got mask of shape \(3, 4, 1\), expected shape \(3, 4\)",
    ),
    (
        lambda: masking.masked_norm(X.astype(jnp.float16), jnp.ones((3, 4), bool)),
        "masked_norm: got x of dtype float16, expected float32 or float64",
    ),
    (
        lambda: masking.spread(jnp.ones((3, 5), bool), (3, 4)),
        r"^spread: got mask of shape \(3, 5\), expected shape \(3, 4\)",
    ),
    (
        lambda: masking.spread(jnp.ones(3), (3, 4), function="caller"),
        r"^caller: got mask of dtype float64, expected bool \(True = observed\)",
    ),
    (lambda: masking.stack_ragged([]), "stack_ragged: got no arrays, expected one for every"),
    (
        lambda: masking.stack_ragged([np.float64(1)]),
        r"stack_ragged: got array 0 of shape \(\), expected one axis or more",
    ),
    (
        lambda: masking.stack_ragged([np.ones((3, 4)), np.ones((3, 5))]),
        r"stack_ragged: got array 1 of shape \(3, 5\), expected \(length, 4\) as array 0",
    ),
    (
        lambda: masking.stack_ragged([np.ones(3), np.ones(3, int)]),
        "stack_ragged: got array 1 of dtype int64, expected float64 as array 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
