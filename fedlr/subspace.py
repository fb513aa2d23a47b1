"""Basis finders: an orthonormal basis of the leading left singular subspace of a matrix.

A basis finder is a function ``find(matrix, rank, *, mode) -> (rows, rank)``. Every decomposition
that needs a leading subspace takes one as its argument `basis`, so that an exact and a sketched
method differ in that argument alone. Build one with

=================  ==================================================  ==========================
builder            computes                                            resolves (of the largest
                                                                       singular value)
=================  ==================================================  ==========================
`svd`              singular value decomposition, slow reference        eps
`gram`             eigenvectors of the Gram matrix of the small side   6e-4 float32, 3e-8 float64
`gram64`           `gram` with float64 products for float32 data       1e-7 float32
`lq`               triangular factor of the transpose, then its SVD    1e-6 float32, eps float64
`randomized`       range of a sketch                                   its spectrum decides
`warm_started`     one subspace iteration from an earlier basis        its start decides
=================  ==================================================  ==========================

A singular direction below the resolution is replaced by an arbitrary direction orthogonal to the
others; the result is orthonormal whatever the matrix, the zero matrix included. If `rank` exceeds
the rank of the matrix, or its number of columns, the basis is completed in the same way.

**Gradients.** A basis is determined up to an orthogonal change of its columns, so only functions
of its span (reconstructions, core energies, projectors) have a derivative. `svd`, `gram`,
`gram64` and `lq` share one rule, in forward and reverse mode: with the kept basis U, the discarded
directions V and ``G = X X^T`` of eigenvalues lambda,

    dU = V Z,    Z_ji = (V^T dG U)_ji / (lambda_i - lambda_j),    U^T dU = 0,

where a quotient whose denominator is not resolved is set to zero. It is right for functions of the
span to first order and finite for exactly low-rank, tied and zero matrices. Where the last kept and
the first discarded singular value are equal the span has no derivative and the rule leaves the pair
out. Second derivatives are not promised.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from fedlr import _checks, _precision, sketching

__all__ = ["BasisFinder", "gram", "gram64", "lq", "randomized", "svd", "warm_started"]

# On a CPU a Gram matrix is summed over column blocks of this width, which stay in the cache, and of
# the products between its two to four parts of rows those below the diagonal are left out
# (measured 1.7 times faster for 200 x 40000). The width is no power of two, which would map the
# rows to few cache sets; the parts start at multiples of eight rows, as the kernels like it.
_BLOCK_COLUMNS = 1008
_MIN_PART_ROWS = 64


class BasisFinder(Protocol):
    """Find an orthonormal basis (rows, rank) of the leading left singular subspace of a matrix.

    `rank` is *static*, from 1 to the number of rows. `mode` is the *static* number of the mode
    whose unfolding the matrix is: it picks the stream of random numbers, or the earlier basis.
    """

    def __call__(
        self, matrix: Float[Array, "rows columns"], rank: int, *, mode: int
    ) -> Float[Array, "rows rank"]: ...


def svd() -> BasisFinder:
    """Build the finder by the singular value decomposition of the matrix itself.

    The reference: exact to eps, about twenty times slower than `gram` on a wide matrix, and slower
    still under vmap.

    Returns:
        Basis finder; it raises ValueError for a matrix that is not two-dimensional or floating and
        for a rank that is not an integer in 1 .. rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import subspace
        >>> matrix = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> jnp.abs(subspace.svd()(matrix, 1, mode=0)).tolist()
        [[1.0], [0.0]]
    """
    return _exact("svd", _by_svd, _of_values)


def gram() -> BasisFinder:
    """Build the finder by the eigenvectors of the Gram matrix: the default, and the fast one.

    ``X X^T`` is formed for a wide matrix, ``X^T X`` for a tall one, so the eigenvalue problem is
    always that of the small side. Squaring costs half the digits: singular values below about
    6e-4 (float32) or 3e-8 (float64) of the largest are noise and so are their directions. That is
    harmless for a truncation, not for a small tolerance. Entries whose squares overflow or vanish
    in the dtype (beyond about 1e18 in float32) want scaling first.

    Returns:
        Basis finder; it raises ValueError for a matrix that is not two-dimensional or floating and
        for a rank that is not an integer in 1 .. rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import subspace
        >>> basis = subspace.gram()(jnp.ones((3, 40)), 2, mode=0)
        >>> bool(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-6))
        True
    """
    return _exact("gram", _by_gram, _of_squares)


def gram64() -> BasisFinder:
    """Build the finder by a Gram matrix that is summed and diagonalized in float64.

    For float32 data this resolves singular values down to about 1e-7 of the largest, for the price
    of float64 products, in column blocks so that no float64 copy of the matrix is made. The float64
    part is a local scope; the global x64 switch is neither read nor written. Derivatives follow
    the rule of the module, which is evaluated in the dtype of the matrix. float64 data are treated
    as by `gram`.

    Returns:
        Basis finder; it raises ValueError for a matrix that is not two-dimensional or floating and
        for a rank that is not an integer in 1 .. rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import subspace
        >>> subspace.gram64()(jnp.ones((3, 40)), 2, mode=0).dtype
        dtype('float32')
    """
    return _exact("gram64", _by_gram64, _of_values)


def lq() -> BasisFinder:
    """Build the finder by an LQ decomposition: ``X = L Q^T``, then the SVD of the small L.

    L is the transposed triangular factor of the Householder QR of ``X^T``; a tall matrix is
    reduced by its own QR. Nothing is squared: singular directions are delivered down to 1e-6 of
    the largest singular value in float32 and about 1e-15 in float64. Two to three times the cost of
    `gram`.

    Returns:
        Basis finder; it raises ValueError for a matrix that is not two-dimensional or floating and
        for a rank that is not an integer in 1 .. rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import subspace
        >>> basis = subspace.lq()(jnp.diag(jnp.array([1.0, 1e-5, 1e-6])), 2, mode=0)
        >>> bool(jnp.allclose(jnp.abs(basis), jnp.eye(3)[:, :2], atol=1e-6))
        True
    """
    return _exact("lq", _by_lq, _of_values)


def randomized(
    *,
    key: Key[Array, ""],
    oversampling: int = 10,
    power_iters: int = 1,
    test_matrix: sketching.TestMatrix = sketching.gaussian,
) -> BasisFinder:
    """Build the finder by a randomized range finder.

    ``Q = orth((X X^T)^q X Omega)`` with ``rank + oversampling`` columns, cut to `rank` columns by
    the leading left singular vectors of the small ``Q^T X``. With ``oversampling=0`` and
    ``power_iters=0`` this is the plain sketch ``orth(X Omega)``. Without a power iteration a flat
    tail of noise costs accuracy: relative error 0.077 to 0.080 where 0.0499 is attainable, in the
    setting of Tucker rank 20 of 200^3 with 5 % noise.

    The derivative is that of this computation at a fixed key, by automatic differentiation of the
    QR decomposition: right for functions of the span where the sketch ``X Omega`` has full column
    rank; not finite where it has not, as on a matrix of rank below ``rank + oversampling``.

    Args:
        key: JAX key. The mode is folded in: every mode has its own test matrix.
        oversampling: Columns beyond the rank, >= 0, as far as the matrix has them; *static*.
        power_iters: Number q of power iterations, >= 0; *static*.
        test_matrix: Kind of the test matrix Omega, from `sketching`; *static*.

    Returns:
        Basis finder; it raises ValueError for a matrix that is not two-dimensional or floating and
        for a rank that is not an integer in 1 .. rows.

    Raises:
        ValueError: If `oversampling` or `power_iters` is negative or not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import subspace
        >>> find = subspace.randomized(key=jax.random.key(0), oversampling=2)
        >>> find(jnp.outer(jnp.arange(5.0), jnp.ones(9)), 1, mode=0).shape
        (5, 1)

    Reference: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.3 and 4.4.
    """
    for name, count in (("oversampling", oversampling), ("power_iters", power_iters)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise _checks.fail("randomized", f"{name} {count!r}", "an integer of at least 0")

    @_precision.highest
    def find(matrix: Array, rank: int, *, mode: int) -> Array:
        matrix = _widen(_check("randomized", matrix, rank), rank)
        size = min(rank + oversampling, *matrix.shape)
        basis = sketching.range_finder(
            matrix,
            size,
            power_iters=power_iters,
            key=jax.random.fold_in(key, mode),
            test_matrix=test_matrix,
        )
        if size == rank:
            return basis
        return basis @ _leading(_by_gram, _of_squares, rank, _image(matrix, basis).T)

    return find


def warm_started(previous: Sequence[Float[Array, "rows columns"]]) -> BasisFinder:
    """Build the finder by one subspace iteration from an earlier basis: ``orth(X (X^T S))``.

    S is the first `rank` columns of ``previous[mode]``. If S is orthonormal the captured energy
    ``|S^T X|^2`` never falls. A column of S that the matrix maps to zero, up to eps, would stay
    where it is for ever: image borders without signal do that to columns of the identity. Such
    columns are replaced by columns of a fixed dense matrix before the iteration. Entries whose
    squares overflow or vanish in the dtype want scaling before.

    The derivative is that of this computation, previous factors included: right for functions of
    the span and finite, with the triangular factor of the QR decomposition inverted on its
    resolved part only. It is exact where ``X (X^T S)`` has full column rank.

    Args:
        previous: One matrix (rows, at least rank) for every mode, indexed by the mode.

    Returns:
        Basis finder; it raises ValueError for a matrix that is not two-dimensional or floating, for
        a rank that is not an integer in 1 .. rows, and where `previous` has no matrix of the same
        rows, dtype and at least `rank` columns for the mode.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import subspace
        >>> matrix = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> find = subspace.warm_started((jnp.ones((3, 1)),))
        >>> basis = find(matrix, 1, mode=0)
        >>> bool(basis[0, 0] / basis[2, 0] > 8.9)
        True
    """
    previous = tuple(previous)

    @_precision.highest
    def find(matrix: Array, rank: int, *, mode: int) -> Array:
        matrix = _check("warm_started", matrix, rank)
        _checks.check_mode("warm_started", mode, len(previous))
        start = jnp.asarray(previous[mode])
        if start.ndim != 2 or start.shape[0] != matrix.shape[0] or start.shape[1] < rank:
            got = f"previous factor of shape {start.shape} for mode {mode}"
            expected = f"{matrix.shape[0]} rows and at least {rank} columns"
            raise _checks.fail("warm_started", got, expected)
        if start.dtype != matrix.dtype:
            got = f"previous factor of dtype {start.dtype} for mode {mode}"
            raise _checks.fail("warm_started", got, f"{matrix.dtype} as the matrix")
        return _subspace_iteration(matrix, start[:, :rank])

    return find


def _exact(function: str, decompose: Callable, blur: Callable) -> BasisFinder:
    """Build a finder that takes the leading columns of a full decomposition."""

    @_precision.highest
    def find(matrix: Array, rank: int, *, mode: int) -> Array:
        del mode
        return _leading(decompose, blur, rank, _check(function, matrix, rank))

    return find


def _check(function: str, matrix: Array, rank: int) -> Array:
    _checks.check_ndim(function, "matrix", matrix, 2)
    _checks.check_floating(function, matrix=matrix)
    _checks.check_rank(function, rank, matrix.shape[0])
    return jnp.asarray(matrix)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _leading(decompose: Callable, blur: Callable, rank: int, matrix: Array) -> Array:
    """Return the leading left singular vectors, differentiable as a span."""
    del blur
    return decompose(matrix, rank)[0][:, :rank]


@_leading.defjvp
@_precision.highest
def _leading_jvp(
    decompose: Callable, blur: Callable, rank: int, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    """Differentiate the span: see the module's docstring."""
    (matrix,), (tangent,) = primals, tangents
    width = max(rank, min(matrix.shape))
    vectors, sigma = decompose(matrix, width)
    kept, others = vectors[:, :rank], vectors[:, rank:]
    changed = tangent @ (matrix.T @ kept) + matrix @ (tangent.T @ kept)
    kept_sigma, other_sigma = sigma[None, :rank], sigma[rank:, None]
    quotients = (others.T @ changed) * _inverse_gap(blur, sigma[0], kept_sigma, other_sigma)
    derivative = others @ quotients
    if width < matrix.shape[0]:
        outside = changed - vectors @ (vectors.T @ changed)
        null = jnp.zeros((1, 1), sigma.dtype)
        derivative += outside * _inverse_gap(blur, sigma[0], kept_sigma, null)
    return kept, derivative


def _inverse_gap(blur: Callable, top: Array, kept: Array, other: Array) -> Array:
    """Invert the differences of eigenvalues, zero where rounding hides the difference."""
    gap = (kept - other) * (kept + other)
    resolved = gap > 4 * jnp.finfo(gap.dtype).eps * blur(top, kept, other)
    return jnp.where(resolved, 1 / jnp.where(resolved, gap, 1), 0)


def _of_squares(top: Array, kept: Array, other: Array) -> Array:
    """Scale of the rounding in eigenvalues that come from a Gram matrix."""
    del kept, other
    return top * top


def _of_values(top: Array, kept: Array, other: Array) -> Array:
    """Scale of the rounding in squares of singular values that are themselves exact to eps."""
    return top * (kept + other)


def _by_svd(matrix: Array, width: int) -> tuple[Array, Array]:
    vectors, sigma, _ = jnp.linalg.svd(_widen(matrix, width), full_matrices=False)
    return vectors, sigma


def _by_lq(matrix: Array, width: int) -> tuple[Array, Array]:
    if matrix.shape[0] <= matrix.shape[1]:
        return _by_svd(jnp.linalg.qr(matrix.T, mode="r").T, width)
    basis, triangle = jnp.linalg.qr(_widen(matrix, width))
    vectors, sigma = _by_svd(triangle, width)
    return basis @ vectors, sigma


def _by_gram(matrix: Array, width: int) -> tuple[Array, Array]:
    """Decompose by the Gram matrix of the small side; `width` columns suffice of a tall one."""
    rows, columns = matrix.shape
    if rows <= columns:
        return _eigenvectors(_gram_matrix(matrix))
    right, sigma = _eigenvectors(matrix.T @ matrix)
    products = _widen(matrix @ right[:, :width], width)
    # Householder reflections leave the independent columns in place and complete the others.
    return jnp.linalg.qr(products)[0], jnp.pad(sigma, (0, max(0, width - columns)))


def _by_gram64(matrix: Array, width: int) -> tuple[Array, Array]:
    """Decompose as `_by_gram` does, in float64 inside a local scope."""
    rows, columns = matrix.shape
    with jax.enable_x64(True):
        small = matrix if rows <= columns else matrix.T
        vectors, sigma = _eigenvectors(_blocked_gram(small, jnp.float64))
        if rows > columns:
            right = vectors[:, :width]
            products = _widen(matrix.astype(jnp.float64) @ right, width)
            vectors = jnp.linalg.qr(products)[0]
            sigma = jnp.pad(sigma, (0, max(0, width - columns)))
        return vectors.astype(matrix.dtype), sigma.astype(matrix.dtype)


def _widen(matrix: Array, width: int) -> Array:
    """Append zero columns up to `width`, which leaves the left singular vectors as they are."""
    return jnp.pad(matrix, ((0, 0), (0, max(0, width - matrix.shape[1]))))


def _eigenvectors(gram_matrix: Array) -> tuple[Array, Array]:
    """Return eigenvectors and square roots of eigenvalues, the largest first."""
    vectors, values = lax.linalg.eigh(gram_matrix, symmetrize_input=False)
    return vectors[:, ::-1], jnp.sqrt(jnp.maximum(values[::-1], 0))


def _gram_matrix(matrix: Array) -> Array:
    """Form ``X X^T``."""
    if matrix.shape[0] < 2 * _MIN_PART_ROWS or matrix.shape[1] < 2 * _BLOCK_COLUMNS:
        return matrix @ matrix.T
    return lax.platform_dependent(
        matrix, cpu=lambda x: _blocked_gram(x, x.dtype), default=lambda x: x @ x.T
    )


def _blocked_gram(matrix: Array, dtype: jnp.dtype) -> Array:
    """Sum ``X X^T`` over blocks of columns in `dtype`, the products below the diagonal left out."""
    rows, columns = matrix.shape
    num_parts = min(4, max(1, rows // _MIN_PART_ROWS))
    edges = [8 * round(rows * part / num_parts / 8) for part in range(num_parts)] + [rows]
    num_blocks = columns // _BLOCK_COLUMNS

    def products(start: Array | int, width: int) -> list[list[Array]]:
        parts = [
            lax.dynamic_slice(matrix, (first, start), (last - first, width)).astype(dtype)
            for first, last in itertools.pairwise(edges)
        ]
        return [[upper @ lower.T for lower in parts[i:]] for i, upper in enumerate(parts)]

    def add(index: Array, totals: list[list[Array]]) -> list[list[Array]]:
        return jax.tree.map(jnp.add, totals, products(index * _BLOCK_COLUMNS, _BLOCK_COLUMNS))

    rest = columns - num_blocks * _BLOCK_COLUMNS
    totals = products(columns - rest, rest)
    if num_blocks:
        totals = lax.fori_loop(0, num_blocks, add, totals)
    return jnp.block(
        [
            [totals[i][j - i] if i <= j else totals[j][i - j].T for j in range(num_parts)]
            for i in range(num_parts)
        ]
    )


def _subspace_iteration(matrix: Array, start: Array) -> Array:
    """Form ``orth(X (X^T S))``, replacing the columns of S that X maps to zero."""
    rows, rank = start.shape
    # Row by row: on a CPU one sum over all entries first stores the squares, ten times the time.
    energies = lax.map(lambda row: jnp.sum(row * row), lax.stop_gradient(matrix))
    scale = jnp.sqrt(jnp.sum(energies))
    image = _image(matrix, start)
    alive = _alive(image, scale)

    def refill() -> Array:
        # Columns of the discrete cosine transform: orthogonal, and no entry is left out.
        frequency = jnp.arange(rank, dtype=matrix.dtype)[None, :]
        position = jnp.arange(rows, dtype=matrix.dtype)[:, None] + 0.5
        dense = jnp.cos(position * frequency * (jnp.pi / rows))
        return _image(matrix, jnp.where(alive, start, dense))

    image = lax.cond(jnp.all(alive), lambda: image, refill)
    # Scaling the columns changes no span; what is still zero, the QR decomposition completes.
    alive = _alive(image, scale)
    lengths = jnp.where(alive, _lengths(image), 1)
    return _orthonormal(matrix @ jnp.where(alive, image / lengths, 0))


def _image(matrix: Array, basis: Array) -> Array:
    """Form ``X^T S`` as ``(S^T X)^T``, with the small matrix transposed in memory.

    A transposition folded into a float64 product with a wide matrix doubles its time on a CPU.
    """
    return (lax.optimization_barrier(basis.T) @ matrix).T


def _alive(image: Array, scale: Array) -> Array:
    """Say which columns are more than the rounding of a product of size `scale`, shape (1, n)."""
    return _lengths(image) > 8 * jnp.finfo(image.dtype).eps * scale


def _lengths(columns: Array) -> Array:
    return jnp.linalg.norm(lax.stop_gradient(columns), axis=0, keepdims=True)


@jax.custom_jvp
def _orthonormal(matrix: Array) -> Array:
    """Orthonormalize the columns; of dependent columns the basis is completed."""
    return jnp.linalg.qr(matrix)[0]


@_orthonormal.defjvp
@_precision.highest
def _orthonormal_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Differentiate the span: ``dQ = (I - Q Q^T) dZ R^+``, R^+ on the resolved part of R."""
    (matrix,), (tangent,) = primals, tangents
    basis = _orthonormal(matrix)
    lengths = _lengths(matrix)
    inverse_lengths = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    left, sigma, right = jnp.linalg.svd(basis.T @ (matrix * inverse_lengths))
    resolved = sigma > 8 * jnp.finfo(sigma.dtype).eps * sigma[0]
    inverse = jnp.where(resolved, 1 / jnp.where(resolved, sigma, 1), 0)
    changed = ((tangent * inverse_lengths) @ right.T * inverse[None, :]) @ left.T
    return basis, changed - basis @ (basis.T @ changed)
