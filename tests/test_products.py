import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import lowrank
from fedlr.federated import products
from tests.reference import low_rank as reference


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_truncated_factors_are_the_best_of_every_rank(rng, dtype, share):
    matrix = rng.normal(size=(5, 4))
    like = lowrank.LowRank(jnp.zeros((5, 3), dtype), jnp.zeros((3, 4), dtype), 0.25)
    update = products.truncate({"a": jnp.asarray(matrix, dtype)}, {"a": like})["a"]
    # Rounding of a singular value decomposition of numbers of size one.
    tolerance = 50 * np.finfo(dtype).eps
    for rank in (1, 2, 3):
        found = lowrank.dense_delta(lowrank.first_columns(update, rank))
        np.testing.assert_allclose(found, reference.truncate(matrix, rank), atol=tolerance)
    update = products.truncate(jnp.asarray(matrix, dtype), like, share=share)
    values = np.linalg.svd(matrix, compute_uv=False)[:3] / 0.25
    np.testing.assert_allclose(
        update.up.T @ update.up, np.diag(values ** (2 * share)), atol=40 * tolerance
    )
    assert update.up.dtype == update.down.dtype == dtype
    assert update.scale == 0.25


def test_a_matrix_of_zeros_leaves_d_orthonormal_if_u_gets_all():
    like = lowrank.LowRank(jnp.zeros((5, 2)), jnp.zeros((2, 4)))
    update = products.truncate(jnp.zeros((5, 4)), like, share=1.0)
    np.testing.assert_array_equal(update.up, 0)
    np.testing.assert_allclose(update.down @ update.down.T, np.eye(2), atol=1e-14)


def test_matrices_of_kernels_are_added_in_their_shape(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 3, 2, 2))), "bias": jnp.ones(8)}
    factors = lowrank.init(params, 2, key=jax.random.key(0))
    matrices = products.of_leaves(params, factors)
    assert matrices["kernel"].shape == (8, 12)
    doubled = products.add(params, matrices)
    np.testing.assert_array_equal(doubled["kernel"], 2 * params["kernel"])
    np.testing.assert_array_equal(doubled["bias"], params["bias"])
