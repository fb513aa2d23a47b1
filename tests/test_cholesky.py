import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import _cholesky


def definite(rng, count, size, spread=0.0):
    """Random positive definite matrices (count, size, size), badly scaled by 10^+-spread."""
    roots = rng.normal(size=(count, size, 2 * size))
    roots *= 10.0 ** rng.uniform(-spread, spread, size=(count, size, 1))
    return roots @ np.swapaxes(roots, 1, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("count", "size"), [(1, 7), (5, 1), (40, 7), (200, 20)])
def test_inverse_factors_are_those_of_numpy(rng, count, size, dtype):
    matrices = definite(rng, count, size, spread=2.0).astype(dtype)
    expected = np.linalg.inv(np.linalg.cholesky(matrices.astype(np.float64)))
    found = jax.jit(_cholesky.inverse_factor)(jnp.moveaxis(jnp.asarray(matrices), 0, -1))
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    assert found.dtype == dtype
    error = np.abs(np.moveaxis(np.asarray(found), -1, 0) - expected) / scale
    assert error.max() < 200 * np.finfo(dtype).eps * size


def test_one_matrix_and_nested_batches_give_the_same(rng):
    matrices = jnp.asarray(definite(rng, 6, 4).reshape(2, 3, 4, 4))
    expected = np.linalg.inv(np.linalg.cholesky(matrices))
    alone = np.stack([[_cholesky.inverse_factor(m) for m in row] for row in matrices])
    nested = jax.vmap(jax.vmap(_cholesky.inverse_factor))(matrices)
    trailing = jax.vmap(_cholesky.inverse_factor)(jnp.moveaxis(matrices, 1, -1))
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(nested, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(jnp.moveaxis(trailing, -1, 1), expected, rtol=0, atol=1e-13)


def test_derivatives_are_those_of_finite_differences(rng):
    matrices = jnp.asarray(np.moveaxis(definite(rng, 3, 4), 0, -1))
    slopes = rng.normal(size=matrices.shape)
    slopes = jnp.asarray(slopes + np.swapaxes(slopes, 0, 1))

    def total(step):
        return jnp.sum(jnp.sin(_cholesky.inverse_factor(matrices + step * slopes)))

    expected = (total(1e-6) - total(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(total)(0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(total)(0.0), expected, rtol=1e-6)
    gradient = jax.vmap(jax.grad(lambda m: jnp.sum(_cholesky.inverse_factor(m))), in_axes=2)
    assert gradient(matrices).shape == (3, 4, 4)


def test_rows_are_solved_for(rng):
    matrices, rows = definite(rng, 5, 3), rng.normal(size=(5, 3))
    inverses = _cholesky.inverse_factor(jnp.asarray(np.moveaxis(matrices, 0, -1)))
    expected = np.linalg.solve(matrices, rows[..., None])[..., 0]
    found = _cholesky.solve_each(inverses, jnp.asarray(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    expected = np.linalg.solve(matrices[0], rows.T).T
    found = _cholesky.solve_rows(inverses[..., 0], jnp.asarray(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_matrix_that_is_not_definite_is_not_finite(rng):
    matrices = np.moveaxis(definite(rng, 3, 4), 0, -1)
    matrices[2, 2, 1] = -1.0
    found = np.asarray(_cholesky.inverse_factor(jnp.asarray(matrices)))
    assert np.isfinite(found).all(axis=(0, 1)).tolist() == [True, False, True]


MANY_STARTS = """
import jax, jax.numpy as jnp
from fedlr import linked
with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 130)
    tensors = tuple(jax.random.normal(keys[i], s) for i, s in enumerate(((10, 10, 8), (10, 14, 5))))
    starts = jax.vmap(lambda key: linked.random_init(tensors, 20, key=key))(keys[2:])
    fit = lambda s: linked.multifac(tensors, init=s, penalty=2.0, max_iters=30, tol=0.0)[1]
    assert jnp.all(jnp.isfinite(jax.jit(jax.vmap(fit))(starts).objective))
"""


def test_loops_over_many_systems_end():
    """With batched library routines this never returned; see `_cholesky`."""
    subprocess.run([sys.executable, "-c", MANY_STARTS], check=True, timeout=240)
