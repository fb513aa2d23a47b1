"""How alike the gradients of clients are, what averaging factors loses, and ranks of updates."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from fedlr import _checks, _precision
from fedlr.curvature import _trees

__all__ = [
    "aggregation_error",
    "gradient_similarity",
    "numerical_rank",
    "project_gradients",
    "stable_rank_of_matrix",
    "truncate_gradients",
]


@_precision.highest
def gradient_similarity(
    gradients: PyTree, weights: Float[Array, " clients"] | None = None
) -> Float[Array, ""]:
    """Average the cosine between the gradients of two clients over all pairs of clients.

        sum_{k != l} p_k p_l cos(g_k, g_l) / sum_{k != l} p_k p_l

    A gradient is the vector of all its leaves. One that is zero has cosine 0 with every other.

    Args:
        gradients: Pytree whose leaves have a leading client axis, float32 or float64 throughout.
        weights: Weights p_k >= 0, any scale; None weighs clients equally. Clients of weight zero
            are ignored whatever they hold.

    Returns:
        Mean cosine, shape (), of the dtype of the gradients; NaN where fewer than two clients have
        a weight.

    Raises:
        ValueError: If there are fewer than two clients, a shape does not fit, a dtype is not
            floating or two dtypes meet.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> gradients = {"w": jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])}
        >>> round(float(curvature.gradient_similarity(gradients)), 4)
        0.3333

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, compare it between full and low-rank gradients.
    """
    gradients, count = _trees.check_stacked("gradient_similarity", gradients)
    if count < 2:
        raise _checks.fail("gradient_similarity", f"{count} clients", "at least 2")
    rows = _rows(gradients, count)
    shares = _shares("gradient_similarity", weights, count, rows.dtype)
    rows = jnp.where(shares[:, None] == 0, 0, rows)
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows = rows / jnp.where(largest == 0, 1, largest)  # the squares must not underflow
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / jnp.where(norms == 0, 1, norms)
    # The sum over pairs is that over all k, l without k = l, so that no pair is formed.
    mean = shares @ units
    pairs = mean @ mean - jnp.sum(shares**2 * jnp.sum(units**2, axis=1))
    total = jnp.sum(shares * (1 - shares))
    return jnp.where(jnp.sum(shares > 0, dtype=jnp.int32) > 1, pairs / total, jnp.nan)


@_precision.highest
def truncate_gradients(gradients: PyTree, rank: int) -> PyTree:
    """Replace every leaf of every client's gradient by its best approximation of a rank.

    A leaf (o, ...) counts as the matrix (o, product of the others); a leaf with fewer than two axes
    stays as it is. The subspace comes from the eigenvectors of the Gram matrix of the small side.

    Args:
        gradients: Pytree whose leaves have a leading client axis, float32 or float64 throughout.
        rank: The rank, *static*; leaves whose small side is not larger stay as they are.

    Returns:
        Pytree like `gradients`.

    Raises:
        ValueError: If the rank is not a positive integer, a shape does not fit, a dtype is not
            floating or two dtypes meet.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> gradients = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]]]), "b": jnp.ones((1, 2))}
        >>> truncated = curvature.truncate_gradients(gradients, 1)
        >>> truncated["w"].tolist(), truncated["b"].tolist()
        ([[[3.0, 0.0], [0.0, 0.0]]], [[1.0, 1.0]])
    """
    _checks.check_count("truncate_gradients", "rank", rank)
    gradients, count = _trees.check_stacked("truncate_gradients", gradients)

    def truncate(leaf: Array) -> Array:
        if leaf.ndim < 3:
            return leaf
        rows, columns = leaf.shape[1], math.prod(leaf.shape[2:])
        if rank >= min(rows, columns):
            return leaf
        matrices = leaf.reshape(count, rows, columns)
        return jax.vmap(lambda matrix: _truncated(matrix, rank))(matrices).reshape(leaf.shape)

    return jax.tree.map(truncate, gradients)


@_precision.highest
def project_gradients(gradients: PyTree, basis: PyTree) -> Float[Array, "clients rank"]:
    """Compute the coordinates of every client's gradient in an orthonormal basis.

    Cosines and norms of coordinates are those of the orthogonal projections on the span.

    Args:
        gradients: Pytree whose leaves have a leading client axis, float32 or float64 throughout.
        basis: Orthonormal vectors, the same pytree with a leading axis (rank,) in place of the
            client axis, as the vectors of `leading_eigenspace`.

    Returns:
        Inner products of gradients and basis vectors, shape (clients, rank).

    Raises:
        ValueError: If a shape does not fit, a dtype is not floating or two dtypes meet.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> gradients = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> curvature.project_gradients(gradients, {"w": jnp.array([[0.0, 1.0]])}).tolist()
        [[2.0], [4.0]]
    """
    gradients, count = _trees.check_stacked("project_gradients", gradients)
    basis, rank = _trees.check_stacked("project_gradients", basis, name="basis")
    first = jax.tree.map(lambda leaf: leaf[0], gradients)
    _trees.check_like(
        "project_gradients", "basis", jax.tree.map(lambda leaf: leaf[0], basis), first
    )
    return _rows(gradients, count) @ _rows(basis, rank).T


@_precision.highest
def aggregation_error(
    ups: Float[Array, "clients rows rank"],
    downs: Float[Array, "clients rank columns"],
    weights: Float[Array, " clients"],
) -> Float[Array, ""]:
    """Compute how far the product of averaged factors is from the average of the products.

        |sum_k p_k U_k D_k - Ubar Dbar|_F / |sum_k p_k U_k D_k|_F,
        sum_k p_k U_k D_k - Ubar Dbar = sum_k p_k (U_k - Ubar) (D_k - Dbar)

    The second line, free of the cancellation of the first, is what is computed: second order in the
    drift of the clients, and exactly zero if one factor is the same everywhere. The norms are inner
    products of Gram matrices of the stacked factors; a (rows, columns) matrix is formed only where
    it has fewer entries than the stacked factors themselves.

    Args:
        ups: Factors U_k of the clients.
        downs: Factors D_k of the clients.
        weights: Weights p_k >= 0, any scale. Clients of weight zero are ignored whatever they hold.

    Returns:
        Relative error, shape (), of the dtype of the factors; zero for a numerator of zero.

    Raises:
        ValueError: If a shape does not fit, a dtype is not floating or the two differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> ups, downs = jnp.array([[[1.0]], [[2.0]]]), jnp.array([[[1.0]], [[2.0]]])
        >>> round(float(curvature.aggregation_error(ups, downs, jnp.ones(2))), 4)
        0.1

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, average the factors; this is what that leaves out.
    """
    _checks.check_floating("aggregation_error", ups=ups, downs=downs)
    ups, downs = jnp.asarray(ups), jnp.asarray(downs)
    for name, factor in (("ups", ups), ("downs", downs)):
        _checks.check_ndim("aggregation_error", name, factor, 3)
    (clients, rows, rank), columns = ups.shape, downs.shape[2]
    _checks.check_shape("aggregation_error", "downs", downs, (clients, rank, columns))
    if ups.dtype != downs.dtype:
        got = f"ups of dtype {ups.dtype} and downs of dtype {downs.dtype}"
        raise _checks.fail("aggregation_error", got, "one dtype")
    shares = _shares("aggregation_error", weights, clients, ups.dtype)[:, None, None]
    mean_up, drift_up = _centre(ups, shares)
    mean_down, drift_down = _centre(downs, shares)
    # (rows, (1 + clients) rank) times ((1 + clients) rank, columns) is the mean of the products.
    wide = jnp.moveaxis(shares * drift_up, 0, 1).reshape(rows, clients * rank)
    up = jnp.concatenate([mean_up, wide], axis=1)
    down = jnp.concatenate([mean_down, drift_down.reshape(clients * rank, columns)], axis=0)
    if up.size + down.size < rows * columns:
        terms = (up.T @ up) * (down @ down.T)
        squared_error, squared_norm = jnp.sum(terms[rank:, rank:]), jnp.sum(terms)
    else:
        error = up[:, rank:] @ down[rank:]
        squared_error = jnp.sum(error**2)
        squared_norm = jnp.sum((mean_up @ mean_down + error) ** 2)
    return jnp.sqrt(_trees.ratio(jnp.maximum(squared_error, 0), jnp.maximum(squared_norm, 0)))


@_precision.highest
def stable_rank_of_matrix(matrix: Float[Array, "rows columns"]) -> Float[Array, ""]:
    """Compute the stable rank of a matrix, ``|A|_F^2 / |A|_2^2``.

    Args:
        matrix: Matrix, float32 or float64; the change ``W_t - W_0`` of a weight, for one.

    Returns:
        Stable rank, shape (), of the dtype of the matrix; zero for the zero matrix.

    Raises:
        ValueError: If the matrix does not have two axes or is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> curvature.stable_rank_of_matrix(jnp.diag(jnp.array([2.0, 1.0, 1.0])))
        Array(1.5, dtype=float32)
    """
    _checks.check_ndim("stable_rank_of_matrix", "matrix", matrix, 2)
    _checks.check_floating("stable_rank_of_matrix", matrix=matrix)
    gram = _small_gram(jnp.asarray(matrix))
    return _trees.ratio(jnp.trace(gram), jnp.linalg.eigvalsh(gram)[-1])


def numerical_rank(
    matrix: Float[Array, "rows columns"], tolerance: Float[Array, ""] | float | None = None
) -> Int[Array, ""]:
    """Count the singular values of a matrix above a tolerance.

    The default suits a matrix that is exact to its own rounding. A difference ``W_t - W_0`` carries
    the rounding of W_t, with singular values up to about ``eps max |W_t| (sqrt(rows) +
    sqrt(columns))``, and wants a tolerance above that over its own largest singular value.

    Args:
        matrix: Matrix, float32 or float64.
        tolerance: Tolerance relative to the largest singular value, traced; None takes
            ``max(rows, columns) eps`` of the dtype.

    Returns:
        Numerical rank, int32, shape ().

    Raises:
        ValueError: If the matrix does not have two axes or is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> matrix = jnp.diag(jnp.array([2.0, 1.0, 1e-3]))
        >>> int(curvature.numerical_rank(matrix)), int(curvature.numerical_rank(matrix, 0.01))
        (3, 2)
    """
    _checks.check_ndim("numerical_rank", "matrix", matrix, 2)
    _checks.check_floating("numerical_rank", matrix=matrix)
    matrix = jnp.asarray(matrix)
    rtol = None if tolerance is None else jnp.asarray(tolerance, matrix.dtype)
    return jnp.linalg.matrix_rank(matrix, rtol=rtol).astype(jnp.int32)


def _rows(tree, count):
    """Lay out a pytree with a leading axis as one row per entry of that axis."""
    return jnp.concatenate([leaf.reshape(count, -1) for leaf in jax.tree.leaves(tree)], axis=1)


def _small_gram(matrix):
    """Form the Gram matrix of the small side of a matrix that is scaled to largest entry one."""
    largest = jnp.max(jnp.abs(matrix), initial=0)
    matrix = matrix / jnp.where(largest == 0, 1, largest)  # the squares must not underflow
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _truncated(matrix, rank):
    """Project on the leading `rank` singular vectors of the small side."""
    vectors = jnp.linalg.eigh(_small_gram(matrix))[1][:, -rank:]
    if matrix.shape[0] <= matrix.shape[1]:
        return vectors @ (vectors.T @ matrix)
    return (matrix @ vectors) @ vectors.T


def _centre(factors, shares):
    """Return the weighted mean and the deviations from it, which are zero for equal factors."""
    factors = jnp.where(shares == 0, 0, factors)
    # Differences to one of the factors first: a mean of equal numbers may differ by rounding.
    reference = factors[jnp.argmax(shares[:, 0, 0])][None]
    drift = factors - reference
    mean_drift = jnp.sum(shares * drift, axis=0, keepdims=True)
    return (reference + mean_drift)[0], drift - mean_drift


def _shares(function, weights, count, dtype):
    """Check weights and scale them to sum one, or to zeros if all of them are zero."""
    weights = jnp.ones(count, dtype) if weights is None else jnp.asarray(weights)
    _checks.check_floating(function, weights=weights)
    _checks.check_shape(function, "weights", weights, (count,))
    _checks.check_non_negative(function, "weights", weights)
    weights = weights.astype(dtype)
    total = jnp.sum(weights)
    return weights / jnp.where(total == 0, 1, total)
