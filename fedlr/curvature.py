"""Curvature of losses and agreement of clients, measured without forming a Hessian.

* Hessian: `hvp`, its spectrum in numbers by `stable_rank`, its `leading_eigenspace`; the same
  numbers of the positive semidefinite Gauss-Newton matrix by `gauss_newton_rank`.
* Gradients of clients: `gradient_similarity`, of the gradients themselves, of their
  `truncate_gradients`, or of their coordinates from `project_gradients`.
* Factors and updates: `aggregation_error` of averaging factors instead of products,
  `stable_rank_of_matrix` and `numerical_rank` of a weight's change.

Everything works under jit and under vmap over clients and seeds: data of a client are closed over,
``vmap(lambda data: stable_rank(lambda p: loss(p, data), params, key=key))(clients)``. These are
measurements. Whether the Hessians of clients have a higher stable rank than the server's depends on
the data and on how far training is.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree
from matfree import decomp, eig, stochtrace

from fedlr import _checks, _precision

__all__ = [
    "Eigenspace",
    "Spectrum",
    "aggregation_error",
    "gauss_newton_product",
    "gauss_newton_rank",
    "gradient_similarity",
    "hvp",
    "leading_eigenspace",
    "numerical_rank",
    "project_gradients",
    "stable_rank",
    "stable_rank_of_matrix",
    "truncate_gradients",
]

Loss = Callable[[Any], Float[Array, ""]]


class Spectrum(NamedTuple):
    """Numbers about the spectrum of a symmetric matrix H with eigenvalues l_i.

    Attributes:
        trace: ``tr H``, estimated, shape ().
        squared_norm: ``|H|_F^2 = sum l_i^2``, estimated, shape ().
        largest: Largest eigenvalue, shape ().
        smallest: Smallest eigenvalue, shape ().
        stable_rank: ``|H|_F^2 / max |l_i|^2``, shape (); zero for H = 0. The noise of the estimate
            can bring it below 1.
        effective_rank: ``tr(H)^2 / |H|_F^2``, shape (); zero for H = 0.
    """

    trace: Float[Array, ""]
    squared_norm: Float[Array, ""]
    largest: Float[Array, ""]
    smallest: Float[Array, ""]
    stable_rank: Float[Array, ""]
    effective_rank: Float[Array, ""]


class Eigenspace(NamedTuple):
    """Leading eigenvalues of a symmetric matrix and their eigenvectors.

    Attributes:
        values: Eigenvalues, the largest in absolute value first, shape (rank,).
        vectors: Orthonormal eigenvectors, a pytree like the parameters with a leading axis (rank,)
            on every leaf. A vector that could not be found is zero, and so is its eigenvalue.
    """

    values: Float[Array, " rank"]
    vectors: PyTree


@_precision.highest
def hvp(loss: Loss, params: PyTree, vector: PyTree) -> PyTree:
    """Multiply the Hessian of a loss with a vector, forward over reverse.

        H v = d/dt grad loss(params + t v) at t = 0

    Args:
        loss: Function ``params -> scalar``.
        params: Where the Hessian is taken, a pytree of float32 or of float64 arrays.
        vector: The vector v, a pytree like `params`.

    Returns:
        The product, a pytree like `params`.

    Raises:
        ValueError: If a dtype is not floating or two dtypes meet, the vector is not like the
            parameters, or the loss is no scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> curvature.hvp(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0]))
        Array([6., 2.], dtype=float32)
    """
    params = _check_params("hvp", params)
    vector = _check_like("hvp", "vector", vector, params)
    return _hessian("hvp", loss, params)(vector)


@_precision.highest
def gauss_newton_product(
    model: Callable[[Any], Any], loss: Loss, params: PyTree, vector: PyTree
) -> PyTree:
    """Multiply the Gauss-Newton matrix of ``loss(model(params))`` with a vector.

        G v = J^T (H_loss (J v)),   J the Jacobian of the model, H_loss the loss's own Hessian

    G is the Hessian without the curvature of the model. It is positive semidefinite for a loss that
    is convex in the outputs, and of rank at most the number of outputs.

    Args:
        model: Function ``params -> outputs``, outputs of all examples, any pytree.
        loss: Function ``outputs -> scalar``.
        params: Where the matrix is taken, a pytree of float32 or of float64 arrays.
        vector: The vector v, a pytree like `params`.

    Returns:
        The product, a pytree like `params`.

    Raises:
        ValueError: If a dtype is not floating or two dtypes meet, the vector is not like the
            parameters, or the loss is no scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> x, v = jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])
        >>> curvature.gauss_newton_product(jnp.prod, lambda y: y**2 / 2, x, v)
        Array([9., 3.], dtype=float32)
    """
    params = _check_params("gauss_newton_product", params)
    vector = _check_like("gauss_newton_product", "vector", vector, params)
    return _gauss_newton("gauss_newton_product", model, loss, params)(vector)


@_precision.highest
def stable_rank(
    loss: Loss,
    params: PyTree,
    *,
    num_probes: int = 100,
    num_lanczos: int = 20,
    key: Key[Array, ""],
) -> Spectrum:
    """Estimate the stable rank of a loss's Hessian, ``srank H = |H|_F^2 / |H|_2^2``.

        tr H ~ mean_i v_i^T H v_i,   |H|_F^2 ~ mean_i |H v_i|^2,   v_i of random signs

    Both are unbiased; the relative standard deviation of the second is at most
    ``sqrt(2 / num_probes) |H^2|_F / tr(H^2)``. The eigenvalues are Ritz values from `num_lanczos`
    Lanczos steps with full re-orthogonalization: a Hessian is indefinite, so both ends are looked
    at. Ritz values lie inside the spectrum, so few steps make the rank too large, never too small.
    Every probe is one product with H; all of them are made at once, so for a large model the mean
    over a scan with few probes and several keys needs less memory. Ritz values in float32 on a CPU
    are 0.3 % off at four million parameters, where its long dot products lose digits.

    Args:
        loss: Function ``params -> scalar``.
        params: Where the Hessian is taken, a pytree of float32 or of float64 arrays.
        num_probes: Number of random vectors v_i, *static*.
        num_lanczos: Number of Lanczos steps, at most the number of parameters; *static*.
        key: Random key.

    Returns:
        The estimates, scalars of the dtype of the parameters.

    Raises:
        ValueError: If a dtype is not floating or two dtypes meet, there are no parameters, the loss
            is no scalar, or a number is out of its range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> def loss(x):
        ...     return (x[0] ** 2 - 3 * x[1] ** 2) / 2
        >>> key = jax.random.key(0)
        >>> spectrum = curvature.stable_rank(loss, jnp.ones(2), num_lanczos=2, key=key)
        >>> [round(float(value), 3) for value in spectrum]
        [-2.0, 10.0, 1.0, -3.0, 1.111, 0.4]

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, for the stable rank of client and server Hessians.
    """
    params = _check_params("stable_rank", params)
    product = _hessian("stable_rank", loss, params)
    return _spectrum("stable_rank", product, params, num_probes, num_lanczos, key)


@_precision.highest
def gauss_newton_rank(
    model: Callable[[Any], Any],
    loss: Loss,
    params: PyTree,
    *,
    num_probes: int = 100,
    num_lanczos: int = 20,
    key: Key[Array, ""],
) -> Spectrum:
    """Estimate the stable rank of the Gauss-Newton matrix of ``loss(model(params))``.

    As `stable_rank`, with `gauss_newton_product` for the products.

    Args:
        model: Function ``params -> outputs``, outputs of all examples, any pytree.
        loss: Function ``outputs -> scalar``.
        params: Where the matrix is taken, a pytree of float32 or of float64 arrays.
        num_probes: Number of random vectors, *static*.
        num_lanczos: Number of Lanczos steps, at most the number of parameters; *static*.
        key: Random key.

    Returns:
        The estimates, scalars of the dtype of the parameters.

    Raises:
        ValueError: If a dtype is not floating or two dtypes meet, there are no parameters, the loss
            is no scalar, or a number is out of its range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> def loss(outputs):
        ...     return jnp.sum(outputs**2) / 2
        >>> key = jax.random.key(0)
        >>> spectrum = curvature.gauss_newton_rank(
        ...     jnp.sin, loss, jnp.zeros(3), num_lanczos=3, key=key
        ... )
        >>> [round(float(value), 3) for value in spectrum]
        [3.0, 3.0, 1.0, 1.0, 3.0, 3.0]

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, use the Hessian; the Gauss-Newton matrix is the
        part of it that a convex loss leaves positive semidefinite.
    """
    params = _check_params("gauss_newton_rank", params)
    product = _gauss_newton("gauss_newton_rank", model, loss, params)
    return _spectrum("gauss_newton_rank", product, params, num_probes, num_lanczos, key)


@_precision.highest
def leading_eigenspace(
    loss: Loss, params: PyTree, rank: int, *, num_lanczos: int = 20, key: Key[Array, ""]
) -> Eigenspace:
    """Find the eigenvectors of a Hessian that belong to the eigenvalues of largest absolute value.

    They are Ritz vectors from `num_lanczos` Lanczos steps; of a multiple eigenvalue one vector is
    found. More steps than about twice the rank are wanted.

    Args:
        loss: Function ``params -> scalar``.
        params: Where the Hessian is taken, a pytree of float32 or of float64 arrays.
        rank: Number of eigenvectors, at most `num_lanczos`; *static*.
        num_lanczos: Number of Lanczos steps, at most the number of parameters; *static*.
        key: Random key.

    Returns:
        Eigenvalues and eigenvectors, of the dtype of the parameters.

    Raises:
        ValueError: If a dtype is not floating or two dtypes meet, there are no parameters, the loss
            is no scalar, or a number is out of its range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import curvature
        >>> def loss(x):
        ...     return x[0] * x[1] - 2 * x[2] ** 2
        >>> key = jax.random.key(0)
        >>> space = curvature.leading_eigenspace(loss, jnp.ones(3), 1, num_lanczos=3, key=key)
        >>> space.values.round(3), jnp.abs(space.vectors).round(3)
        (Array([-4.], dtype=float32), Array([[0., 0., 1.]], dtype=float32))
    """
    params = _check_params("leading_eigenspace", params)
    product = _hessian("leading_eigenspace", loss, params)
    _check_steps("leading_eigenspace", num_lanczos, params)
    _checks.check_rank("leading_eigenspace", rank, num_lanczos)
    values, vectors, unravel = _ritz_pairs(product, params, num_lanczos, key)
    # A row is a unit vector, or zero where the Krylov space ended.
    values = jnp.where(jnp.sum(vectors**2, axis=1) < 0.5, 0, values)
    order = jnp.argsort(-jnp.abs(values))[:rank]
    return Eigenspace(values[order], jax.vmap(unravel)(vectors[order]))


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
    gradients, count = _check_stacked("gradient_similarity", gradients)
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
    gradients, count = _check_stacked("truncate_gradients", gradients)

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
    gradients, count = _check_stacked("project_gradients", gradients)
    basis, rank = _check_stacked("project_gradients", basis, name="basis")
    first = jax.tree.map(lambda leaf: leaf[0], gradients)
    _check_like("project_gradients", "basis", jax.tree.map(lambda leaf: leaf[0], basis), first)
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
    return jnp.sqrt(_ratio(jnp.maximum(squared_error, 0), jnp.maximum(squared_norm, 0)))


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
    return _ratio(jnp.trace(gram), jnp.linalg.eigvalsh(gram)[-1])


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


def _hessian(function, loss, params):
    """Return the product with the Hessian, forward over reverse."""
    values = jax.tree.leaves(jax.eval_shape(loss, params))
    if [value.shape for value in values] != [()]:
        got = f"a loss of shapes {[value.shape for value in values]}"
        raise _checks.fail(function, got, "one scalar, shape ()")
    _checks.check_floating(function, **{"a loss": values[0]})
    gradient = jax.grad(loss)
    return lambda vector: jax.jvp(gradient, (params,), (vector,))[1]


def _gauss_newton(function, model, loss, params):
    """Return the product with the Gauss-Newton matrix."""
    outputs, forward = jax.linearize(model, params)
    outputs = _check_params(function, outputs, name="outputs of the model")
    backward = jax.linear_transpose(forward, params)
    curve = _hessian(function, loss, outputs)
    return lambda vector: backward(curve(forward(vector)))[0]


def _spectrum(function, product, params, num_probes, num_lanczos, key):
    """Estimate the numbers of a `Spectrum` from products with the matrix."""
    _checks.check_count(function, "num_probes", num_probes)
    _check_steps(function, num_lanczos, params)
    lanczos_key, probe_key = jax.random.split(key)
    values = _ritz_pairs(product, params, num_lanczos, lanczos_key)[0]
    trace, squared_norm = stochtrace.estimator_monte_carlo(
        _trace_and_squared_norm, stochtrace.sampler_signs(params, num=num_probes)
    )(product, probe_key)
    largest, smallest = values[-1], values[0]
    extreme = jnp.maximum(jnp.abs(largest), jnp.abs(smallest))
    return Spectrum(
        trace,
        squared_norm,
        largest,
        smallest,
        stable_rank=_ratio(squared_norm, extreme**2),
        effective_rank=_ratio(trace**2, squared_norm),
    )


def _trace_and_squared_norm(product, vector):
    """Evaluate both integrands with one product.

    They are sums, not dot products as in matfree: on a CPU, XLA adds the terms of a dot product one
    by one, which in float32 loses 1.6 % of a squared norm of ten million entries.
    """
    image = product(vector)
    leaves = list(zip(jax.tree.leaves(vector), jax.tree.leaves(image), strict=True))
    return sum(jnp.sum(v * hv) for v, hv in leaves), sum(jnp.sum(hv * hv) for _, hv in leaves)


def _ritz_pairs(product, params, num_lanczos, key):
    """Return increasing Ritz values, Ritz vectors as rows, and the way back to a pytree."""
    flat, unravel = ravel_pytree(params)
    start = jax.random.normal(key, flat.shape, flat.dtype)
    eigh = eig.eigh_partial(_tridiagonalization(num_lanczos))
    values, vectors = eigh(lambda vector: ravel_pytree(product(unravel(vector)))[0], start)
    return values, vectors, unravel


def _tridiagonalization(num_lanczos):
    """Build matfree's Lanczos decomposition, ended where the Krylov space ends.

    A Hessian with few distinct eigenvalues (of low rank, zero) leaves a residual of rounding errors
    after a few steps. matfree divides by its length, and the further vectors are NaN or not
    orthogonal: 3 times the identity of size 30 gets Ritz values of a thousand. Here the basis is
    zero from there on, and the small matrix has its first Rayleigh quotient on the diagonal and no
    coupling, which moves neither end of the spectrum.

    `decomp.tridiag_sym` is this Hessenberg decomposition and the mean of both off-diagonals. Only
    the lower one, the lengths of the residuals, says where the space ends, so it is taken alone.
    """
    lanczos = decomp.hessenberg(num_lanczos, reortho="full", custom_vjp=False)

    def decompose(product, start):
        basis, small, *_ = lanczos(product, start)  # rows of the basis are the vectors
        basis, small = jnp.asarray(basis), jnp.asarray(small)
        lengths = jnp.diag(small, -1)
        rounding = 10 * jnp.finfo(small.dtype).eps * lax.cummax(jnp.linalg.norm(small, axis=0))
        ended = ~(lengths > rounding[:-1])  # NaN is an end as well
        kept = jnp.pad(jnp.cumsum(ended, dtype=jnp.int32), (1, 0)) == 0
        lengths = jnp.where(kept[1:], lengths, 0)
        small = jnp.diag(jnp.where(kept, jnp.diag(small), small[0, 0]))
        return jnp.where(kept[:, None], basis, 0), small + jnp.diag(lengths, 1) + jnp.diag(
            lengths, -1
        )

    return decompose


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


def _ratio(numerator, denominator):
    """Divide, with zero for a numerator of zero."""
    nothing = numerator == 0
    return jnp.where(nothing, 0, numerator / jnp.where(nothing, 1, denominator))


def _check_params(function, tree, name="params"):
    """Refuse a pytree that has no leaves or not one floating dtype; return it as arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise _checks.fail(function, f"{name} without leaves", "at least one array")
    labelled = {f"{name}{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    _checks.check_floating(function, **labelled)
    dtypes = sorted({str(jnp.result_type(leaf)) for leaf in labelled.values()})
    if len(dtypes) > 1:
        raise _checks.fail(function, f"{name} of dtypes {' and '.join(dtypes)}", "one dtype")
    return jax.tree.map(jnp.asarray, tree)


def _check_like(function, name, tree, like):
    """Refuse a pytree of other structure, shapes or dtype than another; return it as arrays."""
    tree = _check_params(function, tree, name)

    def describe(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves]

    got, expected = describe(tree), describe(like)
    if got[0] != expected[0]:
        raise _checks.fail(function, f"{name} of structure {got[0]}", str(expected[0]))
    if got[1] != expected[1]:
        raise _checks.fail(function, f"{name} of shapes and dtypes {got[1]}", str(expected[1]))
    return tree


def _check_stacked(function, tree, name="gradients"):
    """Refuse leaves without a common leading axis; return the pytree as arrays, and its length."""
    tree = _check_params(function, tree, name)
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree)]
    if len({shape[:1] for shape in shapes}) > 1 or shapes[0] == ():
        raise _checks.fail(function, f"{name} of shapes {shapes}", "one leading axis of all leaves")
    return tree, shapes[0][0]


def _check_steps(function, num_lanczos, params):
    """Refuse more Lanczos steps than parameters."""
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    _checks.check_rank(function, num_lanczos, size, name="num_lanczos")
