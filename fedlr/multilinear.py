"""Kernels of multilinear algebra: unfoldings, mode products, Khatri-Rao products and MTTKRP.

Convention (row-major, used by the whole package): the mode-n unfolding of a tensor with shape
(I_0, ..., I_{N-1}) is ``reshape(moveaxis(x, n, 0), (I_n, -1))``. The other modes keep their order
and the last runs fastest, so that

* CP: ``X_(n) = A_n KR(A_m : m != n, increasing m)^T`` with `khatri_rao`, whose row index has the
  last factor fastest;
* Tucker: ``X_(n) = U_n G_(n) (U_0 kron .. without n .. kron U_{N-1})^T``.

Column-major texts reverse the order of the Khatri-Rao and Kronecker factors.

Only the first and the last mode unfold without a copy. The kernels therefore contract a large
tensor from its ends and touch a middle mode after the tensor has shrunk.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fedlr import _checks, _partials, _precision

__all__ = ["fold", "gram", "khatri_rao", "mode_dot", "mttkrp", "multi_mode_dot", "unfold"]

# A product with a middle mode is a batch of small products, eight times faster on a CPU than a
# permuted copy and one product (2 against 15 ms at 200 x 200 x 200, J = 10, float32), unless their
# inner rows are shorter than this (42 against 19 ms at 10000 x 200 x 4).
_NARROW = 16


def unfold(x: Shaped[Array, "..."], mode: int) -> Shaped[Array, "rows columns"]:
    """Unfold a tensor along one mode.

    ``X_(n) = reshape(moveaxis(x, n, 0), (I_n, -1))``, row-major: the last of the other modes runs
    fastest.

    Args:
        x: Tensor of N >= 1 modes, any dtype.
        mode: The mode that becomes the rows; *static*.

    Returns:
        Matrix (I_mode, product of the other sizes).

    Raises:
        ValueError: If `x` has no axes or `mode` is not an integer in 0 .. N - 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> multilinear.unfold(jnp.arange(24).reshape(2, 3, 4), 1)[1].tolist()
        [4, 5, 6, 7, 16, 17, 18, 19]
    """
    _checks.check_mode("unfold", mode, jnp.ndim(x))
    columns = math.prod(x.shape[:mode] + x.shape[mode + 1 :])
    return jnp.moveaxis(x, mode, 0).reshape(x.shape[mode], columns)


def fold(
    matrix: Shaped[Array, "rows columns"], mode: int, shape: Sequence[int]
) -> Shaped[Array, "..."]:
    """Fold a matrix into a tensor, the inverse of `unfold`: ``fold(unfold(x, n), n, shape) == x``.

    Args:
        matrix: Unfolding (shape[mode], product of the other sizes), any dtype.
        mode: The mode whose index runs over the rows; *static*.
        shape: Shape of the tensor; *static*.

    Returns:
        Tensor of the given shape.

    Raises:
        ValueError: If `mode` is not a mode of `shape`, or the matrix does not fit the shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> x = jnp.arange(24).reshape(2, 3, 4)
        >>> bool(jnp.all(multilinear.fold(multilinear.unfold(x, 1), 1, x.shape) == x))
        True
    """
    shape = tuple(shape)
    _checks.check_mode("fold", mode, len(shape))
    others = shape[:mode] + shape[mode + 1 :]
    _checks.check_shape("fold", "matrix", matrix, (shape[mode], math.prod(others)))
    return jnp.moveaxis(matrix.reshape(shape[mode], *others), 0, mode)


@_precision.highest
def mode_dot(
    x: Float[Array, "..."], matrix: Float[Array, "rows columns"], mode: int
) -> Float[Array, "..."]:
    """Multiply a tensor by a matrix along one mode.

    ``(x x_n M)[.., j, ..] = sum_i M[j, i] x[.., i, ..]``, that is ``Y_(n) = M X_(n)``.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        matrix: Matrix (J, I_mode) of the same dtype.
        mode: The mode to contract; *static*.

    Returns:
        Tensor of the shape of `x` with size J in that mode. No copy of `x` is made for the first
        and the last mode.

    Raises:
        ValueError: If `mode` is not a mode of `x`, `matrix` is not (J, I_mode), or the dtypes are
            not floating or differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> x = jnp.ones((2, 3, 4))
        >>> multilinear.mode_dot(x, jnp.ones((5, 3)), 1).shape
        (2, 5, 4)
    """
    _checks.check_floating("mode_dot", x=x)
    x, matrix = jnp.asarray(x), jnp.asarray(matrix)
    _checks.check_mode("mode_dot", mode, jnp.ndim(x))
    _check_matrix("mode_dot", "matrix", matrix, x, mode, axis=1)
    return _mode_dot(x, matrix, mode)


@_precision.highest
def multi_mode_dot(
    x: Float[Array, "..."],
    matrices: Sequence[Float[Array, "rows columns"]],
    modes: Sequence[int] | None = None,
    *,
    transpose: bool = False,
) -> Float[Array, "..."]:
    """Multiply a tensor by matrices along several modes: ``x x_0 M_0 x_1 M_1 ...``.

    The products over distinct modes commute, so the order is chosen here: reductions before
    expansions; the end modes first while the tensor is large (they need no copy); and among equals
    the order of fewest multiplications, which is that of increasing ``1/I - 1/J``.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        matrices: One matrix (J_m, I_m) per mode to contract, of the same dtype.
        modes: The distinct modes of the matrices; all modes in order if None; *static*.
        transpose: Whether the matrices are given as (I_m, J_m), as the factors of a decomposition
            are when a tensor is projected on them; *static*.

    Returns:
        Tensor with size J_m in the contracted modes and the others unchanged.

    Raises:
        ValueError: If there is not one matrix for every mode, a mode is repeated or absent, or a
            matrix does not fit its mode in shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> x = jnp.ones((3, 4, 5))
        >>> factors = [jnp.ones((3, 1)), jnp.ones((4, 2)), jnp.ones((5, 3))]
        >>> core = multilinear.multi_mode_dot(x, factors, transpose=True)
        >>> core.shape, multilinear.multi_mode_dot(core, factors).shape
        ((1, 2, 3), (3, 4, 5))
        >>> multilinear.multi_mode_dot(x, factors[::2], (0, 2), transpose=True).shape
        (1, 4, 3)
    """
    ndim = jnp.ndim(x)
    _checks.check_floating("multi_mode_dot", x=x)
    x, matrices = jnp.asarray(x), [jnp.asarray(matrix) for matrix in matrices]
    modes = tuple(range(ndim)) if modes is None else tuple(modes)
    if len(matrices) != len(modes) or len(set(modes)) != len(modes):
        expected = "one matrix for each of the distinct modes"
        raise _checks.fail(
            "multi_mode_dot", f"{len(matrices)} matrices for modes {modes}", expected
        )
    by_mode = {}
    for mode, matrix in zip(modes, matrices, strict=True):
        _checks.check_mode("multi_mode_dot", mode, ndim)
        name = f"matrix of mode {mode}"
        _check_matrix("multi_mode_dot", name, matrix, x, mode, axis=0 if transpose else 1)
        by_mode[mode] = matrix.T if transpose else matrix
    sizes = {mode: (x.shape[mode], matrix.shape[0]) for mode, matrix in by_mode.items()}
    for mode in sorted(modes, key=lambda mode: _priority(mode, ndim, *sizes[mode])):
        x = _mode_dot(x, by_mode[mode], mode)
    return x


def khatri_rao(*factors: Float[Array, "rows rank"]) -> Float[Array, "product rank"]:
    """Form the column-wise Kronecker product of matrices, the last row index running fastest.

    ``KR(A, B)[i * J + j, r] = A[i, r] B[j, r]`` for B of J rows, and so on for more factors.

    Args:
        factors: One or more matrices (I_m, R) with equal R and dtype, float32 or float64.

    Returns:
        Matrix (product of the I_m, R).

    Raises:
        ValueError: If there is no factor, or ranks or dtypes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> a, b = jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0], [5.0]])
        >>> multilinear.khatri_rao(a, b)[:, 0].tolist()
        [3.0, 4.0, 5.0, 6.0, 8.0, 10.0]
    """
    if not factors:
        raise _checks.fail("khatri_rao", "no factors", "one or more matrices")
    _check_factors("khatri_rao", dict(enumerate(factors)))
    return _partials.khatri_rao(factors)


@_precision.highest
def mttkrp(
    x: Float[Array, "..."], factors: Sequence[Float[Array, "rows rank"]], mode: int
) -> Float[Array, "rows rank"]:
    """Multiply an unfolding by the Khatri-Rao product of the other factors.

    ``M_n = X_(n) KR(A_m : m != n, increasing m)``, computed without the unfolding: one matrix
    product contracts the first or the last few modes, whichever leaves and needs the least
    memory, and the small rest follows.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        factors: N matrices (I_m, R) of the same dtype; that of `mode` gives no values to the
            result.
        mode: The mode that stays; *static*.

    Returns:
        Matrix (I_mode, R).

    Raises:
        ValueError: If there are not N factors, one does not fit its mode, ranks or dtypes differ,
            or `mode` is not a mode of `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> x = jnp.ones((3, 4, 5))
        >>> factors = [jnp.ones((3, 2)), jnp.ones((4, 2)), jnp.ones((5, 2))]
        >>> multilinear.mttkrp(x, factors, 1)[0].tolist()
        [15.0, 15.0]

    Reference: Kolda and Bader 2009, "Tensor decompositions and applications", section 3.4; there
        the unfolding is column-major and the factors come in decreasing order.
    """
    ndim = jnp.ndim(x)
    _checks.check_floating("mttkrp", x=x)
    _checks.check_mode("mttkrp", mode, ndim)
    if len(factors) != ndim:
        raise _checks.fail("mttkrp", f"{len(factors)} factors", f"{ndim} for shape {x.shape}")
    _check_factors("mttkrp", dict(enumerate(factors)))
    for other, factor in enumerate(factors):
        _check_matrix("mttkrp", f"factor of mode {other}", factor, x, other, axis=0)
    if ndim == 1:
        return jnp.broadcast_to(x[:, None], (x.shape[0], factors[0].shape[1]))

    start, stop = _side(x.shape, mode)
    kept = range(stop, ndim) if start == 0 else range(start)
    return _partials.finish(_partials.contract(x, factors, start, stop), factors, kept, mode)


@_precision.highest
def gram(x: Float[Array, "..."], mode: int) -> Float[Array, "rows rows"]:
    """Form the Gram matrix of an unfolding: ``X_(n) X_(n)^T``.

    Its eigenvalues are the squared singular values of the unfolding. In float32 those below about
    6e-4 of the largest singular value drown in the rounding of the products.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        mode: The mode that stays; *static*. A middle mode costs a permuted copy of `x`, which is
            still cheaper than a sum of many small products (22 against 35 to 70 ms for 200^3).
            Computing one triangle by blocks saves a quarter of the operations but no time on a CPU.

    Returns:
        Symmetric matrix (I_mode, I_mode).

    Raises:
        ValueError: If `mode` is not a mode of `x` or the dtype is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import multilinear
        >>> multilinear.gram(jnp.ones((2, 3, 4)), 1)[0].tolist()
        [8.0, 8.0, 8.0]
    """
    _checks.check_floating("gram", x=x)
    _checks.check_mode("gram", mode, jnp.ndim(x))
    if mode == x.ndim - 1:
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return flat.T @ flat
    flat = unfold(x, mode)
    return flat @ flat.T


def _mode_dot(x: Array, matrix: Array, mode: int) -> Array:
    """Multiply along one mode, arguments checked."""
    before, after = x.shape[:mode], x.shape[mode + 1 :]
    size, new_size = x.shape[mode], matrix.shape[0]
    height, width = math.prod(before), math.prod(after)
    if mode == 0:
        return (matrix @ x.reshape(size, width)).reshape(new_size, *after)
    if mode == x.ndim - 1:
        return (x.reshape(height, size) @ matrix.T).reshape(*before, new_size)
    if width < _NARROW:
        product = matrix @ unfold(x, mode)
        return jnp.moveaxis(product.reshape(new_size, *before, *after), 0, mode)
    blocks = x.reshape(height, size, width)
    stacked = jnp.broadcast_to(matrix, (height, *matrix.shape))
    return jnp.matmul(stacked, blocks).reshape(*before, new_size, *after)


def _priority(mode: int, ndim: int, size: int, new_size: int) -> tuple[int, float]:
    """Rank a mode product: end reductions, middle reductions, middle and end expansions."""
    is_end = mode in (0, ndim - 1)
    group = (0 if is_end else 1) if new_size <= size else (3 if is_end else 2)
    # First a, then b costs J_a + J_b J_a / I_a per entry of x: a goes first if 1/I_a - 1/J_a is
    # the smaller one.
    return group, 1 / max(size, 1) - 1 / max(new_size, 1)


def _side(shape: tuple[int, ...], mode: int) -> tuple[int, int]:
    """Choose the run of end modes that `mttkrp` contracts first, as (start, stop).

    Of all runs of first or last modes without `mode` the one with the least memory, which is that
    of the Khatri-Rao product and of what the contraction leaves. Among equals first modes before
    last ones, few of the first (2.2 against 3.9 ms for 200 x 200 x 200 at rank 10, float32, CPU)
    and many of the last (2.3 against 3.6 ms).
    """
    ndim, total = len(shape), math.prod(shape)
    runs = [(0, stop) for stop in range(1, mode + 1)]
    runs += [(start, ndim) for start in range(mode + 1, ndim)]

    def memory(run: tuple[int, int]) -> int:
        rows = math.prod(shape[run[0] : run[1]])
        return rows + total // max(rows, 1)

    return min(runs, key=memory)


def _check_matrix(function: str, name: str, matrix: Array, x: Array, mode: int, axis: int) -> None:
    """Refuse a matrix whose `axis` does not fit the mode of `x`, or of another dtype."""
    _checks.check_ndim(function, name, matrix, 2)
    _checks.check_floating(function, **{name: matrix})
    if matrix.shape[axis] != x.shape[mode]:
        wanted = f"{x.shape[mode]} {'rows' if axis == 0 else 'columns'} for mode {mode}"
        raise _checks.fail(function, f"{name} of shape {matrix.shape}", wanted)
    if matrix.dtype != x.dtype:
        raise _checks.fail(function, f"{name} of dtype {matrix.dtype}", f"{x.dtype} as x")


def _check_factors(function: str, factors: dict[int, Array]) -> None:
    """Refuse factors that are not matrices with one rank and one dtype."""
    for mode, factor in factors.items():
        name = f"factor {mode}"
        _checks.check_ndim(function, name, factor, 2)
        _checks.check_floating(function, **{name: factor})
        if factor.shape[1] != factors[0].shape[1]:
            got = f"{name} of rank {factor.shape[1]}"
            raise _checks.fail(function, got, f"rank {factors[0].shape[1]} as factor 0")
        if factor.dtype != factors[0].dtype:
            got = f"{name} of dtype {factor.dtype}"
            raise _checks.fail(function, got, f"{factors[0].dtype} as factor 0")
