"""Tucker decompositions: ``X = G x_0 U_0 x_1 U_1 ...`` with orthonormal factors.

With the singular-value tails ``t_n^2 = sum_{i > r_n} sigma_i(X_(n))^2`` the direct methods satisfy
``|X - Xhat|^2 <= sum_n t_n^2 <= N best^2``; for the sequentially truncated one the error is
exactly the sum of the tails discarded on the way. For orthonormal factors and the optimal core,
``|X - Xhat|^2 = |X|^2 - |G|^2``.

Every function is written for one tensor: batches and clients come from `jax.vmap`.

**Order of the modes.** `sthosvd` and `choose_ranks` visit the modes in the order of `mode_order`:
the smaller end mode first, because only an end mode unfolds without a copy of the large tensor,
then the others by increasing size. The order depends on the shape alone. So ranks that were chosen
for a tolerance meet it, and a tensor that is masked to its effective ranks has the decomposition
it would have by itself.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fedlr import _checks, _precision, iteration, multilinear, subspace

__all__ = [
    "TuckerTensor",
    "average_factors",
    "choose_ranks",
    "hooi",
    "hosvd",
    "joint_factors",
    "mode_order",
    "project_core",
    "projection_error",
    "relative_error",
    "sthosvd",
    "to_dense",
    "truncate",
]

_GRAM = subspace.gram()
_BLOCK_ENTRIES = 2**18


class TuckerTensor(NamedTuple):
    """A tensor in Tucker form, ``G x_0 U_0 x_1 U_1 ...``; all leaves may have leading batch axes.

    Attributes:
        core: G, shape (r_0, ..., r_{N-1}).
        factors: Tuple of the N factors U_n, shape (I_n, r_n), float32 or float64 as the core.
    """

    core: Float[Array, "..."]
    factors: tuple[Float[Array, "size rank"], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (I_0, ..., I_{N-1}) of the dense tensor, without batch axes."""
        return tuple(factor.shape[-2] for factor in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Multilinear ranks (r_0, ..., r_{N-1})."""
        return tuple(factor.shape[-1] for factor in self.factors)


@_precision.highest
def hosvd(
    x: Float[Array, "..."], ranks: tuple[int, ...], *, basis: subspace.BasisFinder = _GRAM
) -> TuckerTensor:
    """Compute the higher-order SVD: the leading subspace of every unfolding, then the core.

    ``U_n = find(X_(n), r_n)``, ``G = X x_0 U_0^T x_1 U_1^T ...``.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        ranks: Ranks (r_0, ..., r_{N-1}), a tuple with 1 <= r_n <= I_n; *static*.
        basis: Basis finder; *static*. The default resolves singular values down to 6e-4 of the
            largest in float32; `subspace.lq` goes further.

    Returns:
        TuckerTensor with orthonormal factors.

    Raises:
        ValueError: If the ranks do not fit the shape, are not a tuple of ints, or `x` is not
            floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> x = jnp.arange(60.0).reshape(3, 4, 5)
        >>> fit = tucker.hosvd(x, (2, 2, 2))
        >>> fit.ranks, fit.shape, bool(tucker.relative_error(x, fit) < 1e-5)
        ((2, 2, 2), (3, 4, 5), True)

    Reference: De Lathauwer, De Moor and Vandewalle 2000, "A multilinear singular value
        decomposition", SIAM J. Matrix Anal. Appl. 21(4).
    """
    x = _check_input("hosvd", x, ranks)
    factors = tuple(
        basis(multilinear.unfold(x, mode), rank, mode=mode) for mode, rank in enumerate(ranks)
    )
    return TuckerTensor(_project(x, factors, tuple(range(x.ndim))), factors)


@_precision.highest
def sthosvd(
    x: Float[Array, "..."],
    ranks: tuple[int, ...],
    *,
    basis: subspace.BasisFinder = _GRAM,
    modes: Sequence[int] | None = None,
    effective_ranks: Int[Array, " ndim"] | None = None,
) -> TuckerTensor:
    """Compute the sequentially truncated HOSVD, which projects the tensor mode by mode.

    For every mode n in the order of `mode_order`: ``U_n = find(Y_(n), r_n)``, ``Y <- Y x_n U_n^T``,
    from ``Y = X``; at last ``G = Y``. For N = 2 this is the truncated SVD with a diagonal core.

    With `effective_ranks` the columns of U_n from the effective rank on are set to zero before the
    next mode is unfolded. The result is the decomposition at the effective ranks, padded with
    zeros to the static `ranks`: exactly so for the finders that depend on ``Y_(n) Y_(n)^T`` alone
    (svd, gram, gram64, lq), in law for `subspace.randomized` with a Gaussian test matrix. A mask
    cuts between columns, which only as a span have a derivative: differentiating through
    `effective_ranks` is refused.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        ranks: Ranks (r_0, ..., r_{N-1}), a tuple with 1 <= r_n <= I_n; *static*.
        basis: Basis finder; *static*.
        modes: Modes to project; all if None; *static*. The others have the identity as factor, and
            their size as rank. A full rank takes a pass over the tensor that makes nothing smaller.
        effective_ranks: Ranks <= `ranks` that really count, int (N,), traced; all if None.

    Returns:
        TuckerTensor with orthonormal factors, but for the masked columns, which are zero.

    Raises:
        ValueError: If the ranks do not fit the shape, are not a tuple of ints, or are not the sizes
            of modes left out, a mode is absent or repeated, `x` is not floating, `effective_ranks`
            is not an integer vector of N entries, or the result with `effective_ranks` is
            differentiated.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> x = jnp.arange(60.0).reshape(3, 4, 5)
        >>> fit = tucker.sthosvd(x, (2, 2, 2))
        >>> bool(tucker.relative_error(x, fit) < 1e-5)
        True
        >>> padded = tucker.sthosvd(x, (2, 2, 2), effective_ranks=jnp.array([1, 1, 1]))
        >>> padded.core.shape, int((padded.core != 0).sum())
        ((2, 2, 2), 1)

    Reference: Vannieuwenhoven, Vandebril and Meerbergen 2012, "A new truncation strategy for the
        higher-order singular value decomposition", SIAM J. Sci. Comput. 34(2), algorithm 1.
    """
    x = _check_input("sthosvd", x, ranks)
    if effective_ranks is not None:
        _check_effective("sthosvd", "effective_ranks", effective_ranks, x.ndim)
    visited = tuple(range(x.ndim)) if modes is None else tuple(modes)
    for mode in visited:
        _checks.check_mode("sthosvd", mode, x.ndim)
    if len(set(visited)) != len(visited):
        raise _checks.fail("sthosvd", f"modes {visited}", "distinct modes")
    core, factors = x, {}
    for mode in mode_order(x.shape):
        if mode not in visited:
            if ranks[mode] != x.shape[mode]:
                got = f"rank {ranks[mode]} of mode {mode}, which is left out"
                raise _checks.fail("sthosvd", got, f"its size {x.shape[mode]}")
            factors[mode] = jnp.eye(x.shape[mode], dtype=x.dtype)
            continue
        factor = basis(multilinear.unfold(core, mode), ranks[mode], mode=mode)
        if effective_ranks is not None:
            kept = _leading(ranks[mode], effective_ranks[mode])
            factor = jnp.where(kept, _without_derivative(factor), 0)
        core = multilinear.mode_dot(core, _transposed(factor), mode)
        factors[mode] = factor
    return TuckerTensor(core, tuple(factors[mode] for mode in range(x.ndim)))


@_precision.highest
def hooi(
    x: Float[Array, "..."],
    ranks: tuple[int, ...],
    *,
    init: TuckerTensor | None = None,
    max_iters: int = 50,
    tol: float = 1e-6,
) -> tuple[TuckerTensor, iteration.IterationInfo]:
    """Improve a Tucker decomposition by higher-order orthogonal iteration.

    A sweep updates the modes in order, ``U_n <- orth(M (M^T U_n))`` with M the unfolding of X
    projected on all other factors: one subspace iteration in place of a singular value
    decomposition, which raises ``|G|`` or leaves it, as the full update does. The tensor is read
    twice per sweep, whatever N: projections are shared along a binary tree of the modes. Entries
    whose squares overflow or vanish in the dtype want scaling before.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        ranks: Ranks (r_0, ..., r_{N-1}), a tuple with 1 <= r_n <= I_n; *static*.
        init: Start, of these ranks and with orthonormal factors; `sthosvd` of `x` if None.
        max_iters: Largest number of sweeps; *static*.
        tol: Sweeps stop when the objective changes by no more than `tol` of itself; *static*.
            With 0 all sweeps are done, by a scan, and reverse mode works.

    Returns:
        TuckerTensor with orthonormal factors and the record of the iteration. Its objective is the
        squared relative error by ``1 - |G|^2 / |X|^2``, which in float32 is exact to about 1e-7
        only; for the error of a very good fit use `relative_error`.

    Raises:
        ValueError: If the ranks do not fit the shape, are not a tuple of ints, `x` is not
            floating, or `init` has another shape, other ranks or another dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> x = jnp.sin(jnp.arange(60.0) ** 2).reshape(3, 4, 5)
        >>> fit, info = tucker.hooi(x, (2, 2, 2), tol=0.0, max_iters=10)
        >>> start = tucker.sthosvd(x, (2, 2, 2))
        >>> bool(tucker.relative_error(x, fit) <= tucker.relative_error(x, start))
        True

    Reference: De Lathauwer, De Moor and Vandewalle 2000, "On the best rank-1 and
        rank-(R1, ..., RN) approximation of higher-order tensors", SIAM J. Matrix Anal. Appl. 21(4),
        algorithm 4.2; the subspace iteration in a sweep is ours.
    """
    x = _check_input("hooi", x, ranks)
    if init is None:
        init = sthosvd(x, ranks)
    else:
        _check_tucker("hooi", init, x.shape, ranks, x.dtype)
    energy = _energy(x)
    safe_energy = jnp.where(energy > 0, energy, 1)
    modes = tuple(range(x.ndim))

    def step(fit: TuckerTensor) -> tuple[TuckerTensor, Array]:
        fit = _sweep(x, fit.factors, modes)
        residual = jnp.maximum(energy - jnp.sum(fit.core * fit.core), 0)
        return fit, residual / safe_energy

    return iteration.iterate(step, init, max_iters=max_iters, tol=tol)


@_precision.highest
def to_dense(t: TuckerTensor) -> Float[Array, "..."]:
    """Form the dense tensor ``G x_0 U_0 x_1 U_1 ...``.

    Args:
        t: TuckerTensor without batch axes.

    Returns:
        Tensor (I_0, ..., I_{N-1}) of the dtype of the core.

    Raises:
        ValueError: If the factors do not fit the core.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> t = tucker.TuckerTensor(jnp.ones((1, 1)), (jnp.ones((2, 1)), jnp.ones((3, 1))))
        >>> tucker.to_dense(t).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    return multilinear.multi_mode_dot(t.core, t.factors)


@_precision.highest
def relative_error(x: Float[Array, "..."], t: TuckerTensor) -> Float[Array, ""]:
    """Compute ``|X - Xhat| / |X|`` from the residual itself.

    The residual is formed in blocks of rows of the first mode, so no dense model is stored. It is
    right to a few eps at any scale of the data: the shortcut ``|X|^2 - |G|^2`` cancels below about
    5e-4 in float32, is of the same cost, and is therefore not used.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64.
        t: TuckerTensor of the same shape, factors not necessarily orthonormal.

    Returns:
        Scalar of the dtype of `x`. For ``X = 0`` it is 0 if the model is zero as well, else inf.

    Raises:
        ValueError: If `t` is not of the shape and dtype of `x`, or `x` is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> x = jnp.eye(2)
        >>> round(float(tucker.relative_error(x, tucker.sthosvd(x, (1, 1)))), 4)
        0.7071
    """
    _checks.check_floating("relative_error", x=x)
    x = jnp.asarray(x)
    _check_tucker("relative_error", t, x.shape, t.ranks, x.dtype)
    residual, energy = _energies(x, t)
    ratio = residual / jnp.where(energy > 0, energy, 1)
    ratio = jnp.where(energy == 0, jnp.where(residual > 0, jnp.inf, residual), ratio)
    # The root of an exact zero has no derivative; zero is taken.
    return jnp.where(ratio == 0, 0, jnp.sqrt(jnp.where(ratio == 0, 1, ratio)))


def choose_ranks(x: Float[Array, "..."], tolerance: float) -> tuple[int, ...]:
    """Choose the smallest ranks with which `sthosvd` meets a relative error. Host-side.

    Every mode may discard ``tolerance^2 |X|^2 / N`` of the energy plus what the modes before it
    left over, in the order of `sthosvd`. The tails come from LQ decompositions, which resolve
    singular values to about eps of the largest. Where a budget is below that, ``10 eps |X|``, the
    tolerance is out of reach and the mode keeps the full rank: a returned rank equal to that of the
    full unfolding is how this is reported.

    `sthosvd` at these ranks has an error of at most `tolerance`. Its default finder, `gram`, loses
    directions below 6e-4 of the largest singular value in float32, so for tolerances below about
    1e-3 give it `subspace.lq()`.

    Args:
        x: Tensor of N >= 1 modes, float32 or float64, concrete (not traced) and finite.
        tolerance: Relative error to meet, >= 0.

    Returns:
        Ranks as a tuple of Python ints, each at least 1.

    Raises:
        ValueError: If `x` has NaN or Inf or is not floating, or `tolerance` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> x = jnp.arange(60.0).reshape(3, 4, 5)
        >>> tucker.choose_ranks(x, 1e-4)
        (2, 2, 2)

    Reference: Vannieuwenhoven, Vandebril and Meerbergen 2012, SIAM J. Sci. Comput. 34(2), section
        6; handing the unused budget on is common practice.
    """
    _checks.check_floating("choose_ranks", x=x)
    if x.ndim < 1:
        raise _checks.fail("choose_ranks", f"x of shape {x.shape}", "at least one axis")
    _checks.check_finite("choose_ranks", "x", x)
    if not tolerance >= 0:
        raise _checks.fail("choose_ranks", f"tolerance {tolerance}", "a number of at least 0")
    eps = float(np.finfo(x.dtype).eps)
    # Scaled by a power of two, which is exact, no square overflows or vanishes.
    data = np.asarray(x)
    data = np.ldexp(data, -np.frexp(np.abs(data).max(initial=0))[1])
    total = float(np.sum(np.square(data, dtype=np.float64)))
    # The allowance for rounding keeps the promise with "at most".
    allowed = (1 - 100 * eps) * tolerance**2 * total / x.ndim
    core, ranks, unused = jnp.asarray(data), {}, 0.0
    for mode in mode_order(x.shape):
        rotated, energies = _rotate(core, mode)
        # tails[r] is what a rank of r discards.
        tails = np.append(np.cumsum(np.asarray(energies, np.float64)[::-1])[::-1], 0.0)
        budget = allowed + unused
        if budget < (10 * eps) ** 2 * total:
            rank = energies.size
        else:
            rank = max(1, int(np.argmax(tails <= budget)))
        unused = max(0.0, budget - float(tails[rank]))
        core = lax.slice_in_dim(rotated, 0, rank, axis=mode)
        ranks[mode] = rank
    return tuple(ranks[mode] for mode in range(x.ndim))


def truncate(t: TuckerTensor, ranks: Int[Array, " ndim"]) -> TuckerTensor:
    """Set everything from the given ranks on to zero, shapes unchanged.

    Slices of the core and columns of the factors whose index is not below the rank become zero.
    The ranks are traced, so clients with different ranks share one program. For a decomposition
    with ordered subspaces (`hosvd`, or N = 2) this is the decomposition at the smaller ranks; for
    `sthosvd` of N >= 3 use its `effective_ranks`, which mask on the way. The derivative with
    respect to the leaves of `t` is that of the masks; it must not be carried on to a tensor that
    was decomposed, because single columns of a basis have no derivative.

    Args:
        t: TuckerTensor without batch axes.
        ranks: Ranks to keep, int (N,), traced; what exceeds the ranks of `t` has no effect.

    Returns:
        TuckerTensor of the same shapes.

    Raises:
        ValueError: If `ranks` is not an integer vector with one entry for every mode.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> t = tucker.sthosvd(jnp.diag(jnp.array([3.0, 2.0, 1.0])), (3, 3))
        >>> best = tucker.to_dense(tucker.truncate(t, jnp.array([1, 1])))
        >>> bool(jnp.allclose(best, jnp.diag(jnp.array([3.0, 0.0, 0.0])), atol=1e-5))
        True
    """
    ranks = jnp.asarray(ranks)
    _check_effective("truncate", "ranks", ranks, len(t.factors))
    core, factors = t.core, []
    for mode, factor in enumerate(t.factors):
        kept = _leading(factor.shape[-1], ranks[mode])[0]
        core = jnp.where(jnp.expand_dims(kept, [m for m in range(core.ndim) if m != mode]), core, 0)
        factors.append(jnp.where(kept[None, :], factor, 0))
    return TuckerTensor(core, tuple(factors))


@_precision.highest
def joint_factors(
    stacked: TuckerTensor, ranks: tuple[int, ...], *, basis: subspace.BasisFinder = _GRAM
) -> tuple[Float[Array, "size rank"], ...]:
    """Find factors that span the tensors of all clients together.

    The leading left singular vectors of the side-by-side unfoldings ``[X_1(k), ..., X_C(k)]`` are
    those of ``Y_k = [S_1k G_1(k), ..., S_Ck G_C(k)]``, because the other factors are orthonormal.
    Where a core has more columns than rows, ``G_i(k)`` is replaced by its triangular factor L,
    ``G_i(k) = L Q^T``, so the finder sees at most ``sum_i r_ik`` columns and the dense tensors and
    the wide Y_k are never formed.

    Clients of smaller ranks are padded with zero columns and zero core slices: the result is
    unchanged by that. With `subspace.randomized` and a Gaussian test matrix this is so in law, as
    is the reduction to L. For N >= 3 the derivative passes through L and exists where the core
    unfoldings have full row rank, so not for padded clients; for N = 2 it is that of the finder.

    Args:
        stacked: TuckerTensor whose leaves have a leading client axis C: core (C, r_0, ...),
            factors (C, I_k, r_k) with orthonormal or zero columns.
        ranks: Ranks of the joint factors, a tuple with 1 <= rank_k <= I_k; *static*.
        basis: Basis finder; *static*. The exact ones give CompJF, `subspace.randomized` with
            ``oversampling=0, power_iters=0`` CompRandJF, `subspace.warm_started` the step from the
            factors of the last round.

    Returns:
        Tuple of N orthonormal factors (I_k, rank_k).

    Raises:
        ValueError: If the leaves have no client axis, do not fit each other, or the ranks do not
            fit the shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import tucker
        >>> images = jnp.stack([jnp.eye(4), jnp.diag(jnp.arange(4.0))])
        >>> stacked = jax.vmap(lambda image: tucker.sthosvd(image, (4, 4)))(images)
        >>> factors = tucker.joint_factors(stacked, (4, 4))
        >>> cores = jax.vmap(lambda t: tucker.project_core(t, factors))(stacked)
        >>> dense = jnp.einsum("ia,cab,jb->cij", factors[0], cores, factors[1])
        >>> bool(jnp.allclose(dense, images, atol=1e-5))
        True

    Reference: arXiv 2502.02761, Lemma II.1. Its statement is inferred there from the abstract; the
        proof is the Gram identity ``Y_k Y_k^T = sum_i X_i(k) X_i(k)^T``.
    """
    _check_stacked("joint_factors", stacked)
    _checks.check_ranks("joint_factors", ranks, stacked.shape)

    def spread(core: Array, factor: Array, mode: int) -> Array:
        unfolding = multilinear.unfold(core, mode)
        if unfolding.shape[1] > unfolding.shape[0]:
            unfolding = jnp.linalg.qr(unfolding.T, mode="r").T
        return factor @ unfolding

    def find(mode: int, rank: int) -> Array:
        blocks = jax.vmap(lambda core, factor: spread(core, factor, mode))(
            stacked.core, stacked.factors[mode]
        )
        side_by_side = jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)
        return basis(side_by_side, rank, mode=mode)

    return tuple(find(mode, rank) for mode, rank in enumerate(ranks))


def average_factors(
    stacked: TuckerTensor, ranks: tuple[int, ...], *, basis: subspace.BasisFinder = _GRAM
) -> tuple[Float[Array, "size rank"], ...]:
    """Average the factors of all clients and orthonormalize: a rival of `joint_factors`.

    ``S_k = find(mean_i S_ik, rank_k)``. Column a of one client has nothing to do with column a of
    another one, whose order and signs are its own, so the mean spans neither's images. This is what
    averaging the parameters of factored models does; it is here to be compared with.

    Args:
        stacked: TuckerTensor whose leaves have a leading client axis C.
        ranks: Ranks of the averaged factors, a tuple with 1 <= rank_k <= I_k; *static*.
        basis: Basis finder; *static*.

    Returns:
        Tuple of N orthonormal factors (I_k, rank_k).

    Raises:
        ValueError: If the leaves have no client axis, do not fit each other, or the ranks do not
            fit the shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import tucker
        >>> images = jnp.stack([jnp.eye(4), 2 * jnp.eye(4)])
        >>> stacked = jax.vmap(lambda image: tucker.sthosvd(image, (2, 2)))(images)
        >>> [factor.shape for factor in tucker.average_factors(stacked, (2, 2))]
        [(4, 2), (4, 2)]
    """
    _check_stacked("average_factors", stacked)
    _checks.check_ranks("average_factors", ranks, stacked.shape)
    means = [jnp.mean(factor, axis=0) for factor in stacked.factors]
    return tuple(
        basis(mean, rank, mode=mode)
        for mode, (mean, rank) in enumerate(zip(means, ranks, strict=True))
    )


@_precision.highest
def project_core(
    t: TuckerTensor, factors: Sequence[Float[Array, "size rank"]]
) -> Float[Array, "..."]:
    """Express a Tucker tensor in other orthonormal factors: ``G x_0 (V_0^T U_0) x_1 ...``.

    This is the core of the orthogonal projection of the tensor on the span of `factors`, without
    the dense tensor. Linear in the core; map over clients with `jax.vmap`.

    Args:
        t: TuckerTensor of N modes without batch axes.
        factors: N matrices V_k (I_k, s_k) with orthonormal columns, of the same dtype.

    Returns:
        Core (s_0, ..., s_{N-1}).

    Raises:
        ValueError: If there are not N factors or one has not I_k rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> t = tucker.sthosvd(jnp.diag(jnp.array([3.0, 2.0])), (1, 1))
        >>> core = tucker.project_core(t, (jnp.eye(2), jnp.eye(2)))
        >>> bool(jnp.allclose(core, jnp.diag(jnp.array([3.0, 0.0])), atol=1e-5))
        True
    """
    _check_change("project_core", t, factors)
    changes = [new.T @ old for new, old in zip(factors, t.factors, strict=True)]
    return multilinear.multi_mode_dot(t.core, changes)


@_precision.highest
def projection_error(
    t: TuckerTensor, factors: Sequence[Float[Array, "size rank"]]
) -> Float[Array, ""]:
    """Compute what a projection on other orthonormal factors loses, relative to the tensor.

        ||X - X x_0 V_0 V_0^T x_1 V_1 V_1^T ...|| / ||X||

    Mode by mode the lost parts ``X x_n (I - V_n V_n^T)`` are orthogonal to each other, so their
    squares add up and no difference of large squares is taken.

    Args:
        t: TuckerTensor of N modes without batch axes, with orthonormal or zero columns.
        factors: N matrices V_k (I_k, s_k) with orthonormal or zero columns, of the same dtype.

    Returns:
        The relative error, shape (); 0 for the zero tensor, NaN if anything holds NaN.

    Raises:
        ValueError: If there are not N factors or one has not I_k rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import tucker
        >>> t = tucker.sthosvd(jnp.diag(jnp.array([3.0, 4.0])), (2, 2))
        >>> round(float(tucker.projection_error(t, (jnp.eye(2)[:, :1], jnp.eye(2)))), 4)
        0.8
    """
    _check_change("projection_error", t, factors)
    core, lost = t.core, jnp.zeros((), t.core.dtype)
    for mode, (new, old) in enumerate(zip(factors, t.factors, strict=True)):
        change = new.T @ old
        outside = old - new @ change
        # Not by Gram matrices: where the core cancels what sticks out they leave sqrt(eps).
        lost += jnp.sum((outside @ multilinear.unfold(core, mode)) ** 2)
        core = multilinear.mode_dot(core, change, mode)
    total = _energy(t.core)
    nothing = lost == 0
    ratio = jnp.where(nothing, 1, lost) / jnp.where(total == 0, 1, total)
    return jnp.where(nothing, 0, jnp.sqrt(ratio))


def mode_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Order the modes of a tensor for sequential truncation.

    First the smaller of the two end modes, which unfold without a copy, then the others by
    increasing size; equal sizes in mode order. Ranks play no part: see the module's docstring.

    Args:
        shape: Shape of the tensor.

    Returns:
        Permutation of ``0 .. N - 1``.

    Example:
        >>> from fedlr import tucker
        >>> tucker.mode_order((40, 20, 30))
        (2, 1, 0)
    """
    last = len(shape) - 1
    first = last if shape[last] < shape[0] else 0
    others = (mode for mode in range(len(shape)) if mode != first)
    return (first, *sorted(others, key=lambda mode: shape[mode]))


def _sweep(partial: Array, factors: tuple[Array, ...], modes: tuple[int, ...]) -> TuckerTensor:
    """Update the factors of `modes` in order; `partial` is X projected on all other factors."""
    if len(modes) == 1:
        (mode,) = modes
        matrix = multilinear.unfold(partial, mode)
        factor = subspace.warm_started(factors)(matrix, factors[mode].shape[1], mode=mode)
        core = multilinear.mode_dot(partial, _transposed(factor), mode)
        return TuckerTensor(core, (*factors[:mode], factor, *factors[mode + 1 :]))
    half = (len(modes) + 1) // 2
    early, late = modes[:half], modes[half:]
    factors = _sweep(_project(partial, factors, late), factors, early).factors
    return _sweep(_project(partial, factors, early), factors, late)


def _project(partial: Array, factors: tuple[Array, ...], modes: tuple[int, ...]) -> Array:
    return multilinear.multi_mode_dot(partial, [_transposed(factors[m]) for m in modes], modes)


def _transposed(factor: Array) -> Array:
    """Transpose in memory: folded into a float64 product with mode 0, it doubles the time."""
    return lax.optimization_barrier(factor.T)


def _energies(x: Array, t: TuckerTensor) -> tuple[Array, Array]:
    """Sum the squares of ``X - Xhat`` and of X over blocks of rows of mode 0.

    Both are in units of the largest square of X, so that they neither overflow nor vanish.
    """
    rows = x.shape[0]
    peak = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    peak = jnp.where(peak == 0, 1, peak)
    others = multilinear.multi_mode_dot(t.core, t.factors[1:], range(1, x.ndim))
    others, flat = others.reshape(others.shape[0], -1), x.reshape(rows, -1)
    height = max(1, min(rows, _BLOCK_ENTRIES // max(1, flat.shape[1])))

    def of_block(start: Array | int, size: int) -> tuple[Array, Array]:
        block = lax.dynamic_slice_in_dim(flat, start, size)
        residual = block - lax.dynamic_slice_in_dim(t.factors[0], start, size) @ others
        residual, block = residual / peak, block / peak
        return jnp.sum(residual * residual), jnp.sum(block * block)

    sums = lax.map(lambda start: of_block(start, height), height * jnp.arange(rows // height))
    rest = of_block(rows - rows % height, rows % height)
    return jnp.sum(sums[0]) + rest[0], jnp.sum(sums[1]) + rest[1]


def _energy(x: Array) -> Array:
    """Sum the squares row by row: one sum over all entries would store the squares on a CPU."""
    return jnp.sum(lax.map(lambda row: jnp.sum(row * row), x))


def _rotate_mode(core: Array, mode: int) -> tuple[Array, Array]:
    """Rotate a mode to its singular directions and return the energies of its slices."""
    matrix = multilinear.unfold(core, mode)
    rotation = subspace.lq()(matrix, min(matrix.shape), mode=mode)
    rotated = multilinear.mode_dot(core, rotation.T, mode)
    return rotated, jnp.sum(multilinear.unfold(rotated, mode) ** 2, axis=1)


_rotate: Callable[..., tuple[Array, Array]] = jax.jit(_rotate_mode, static_argnames="mode")


@jax.custom_jvp
def _without_derivative(factor: Array) -> Array:
    """Pass a factor on, but refuse to differentiate it."""
    return factor


@_without_derivative.defjvp
def _refuse_derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    del primals, tangents
    raise _checks.fail("sthosvd", "a derivative through effective_ranks", "static ranks alone")


def _leading(size: int, count: Array) -> Array:
    """Mark the first `count` of `size` columns, bool (1, size)."""
    return jnp.arange(size, dtype=jnp.result_type(count))[None, :] < count


def _check_input(function: str, x: Array, ranks: tuple[int, ...]) -> Array:
    """Return a checked tensor as a JAX array, which may narrow a NumPy one to float32."""
    _checks.check_floating(function, x=x)
    _checks.check_ndim(function, "x", x, 1, max(jnp.ndim(x), 1))
    x = jnp.asarray(x)
    _checks.check_ranks(function, ranks, x.shape)
    return x


def _check_effective(function: str, name: str, ranks: Array, ndim: int) -> None:
    _checks.check_shape(function, name, ranks, (ndim,))
    if not jnp.issubdtype(jnp.result_type(ranks), jnp.integer):
        raise _checks.fail(function, f"{name} of dtype {jnp.result_type(ranks)}", "integers")


def _check_change(function: str, t: TuckerTensor, factors: Sequence[Array]) -> None:
    if len(factors) != len(t.factors):
        raise _checks.fail(function, f"{len(factors)} factors", f"{len(t.factors)}")
    for mode, (new, old) in enumerate(zip(factors, t.factors, strict=True)):
        _checks.check_ndim(function, f"factor {mode}", new, 2)
        if new.shape[0] != old.shape[-2]:
            got = f"factor {mode} of shape {new.shape}"
            raise _checks.fail(function, got, f"{old.shape[-2]} rows")


def _check_tucker(
    function: str, t: TuckerTensor, shape: tuple[int, ...], ranks: tuple[int, ...], dtype: object
) -> None:
    if t.shape != tuple(shape) or t.ranks != ranks or t.core.shape != ranks:
        got = f"a Tucker tensor of shape {t.shape}, ranks {t.ranks} and core {t.core.shape}"
        raise _checks.fail(function, got, f"shape {tuple(shape)} and ranks {ranks}")
    dtypes = {str(leaf.dtype) for leaf in (t.core, *t.factors)}
    if dtypes != {str(dtype)}:
        raise _checks.fail(function, f"a Tucker tensor of dtype {sorted(dtypes)}", f"{dtype}")


def _check_stacked(function: str, stacked: TuckerTensor) -> None:
    _checks.check_floating(function, core=stacked.core)
    clients = stacked.core.shape[0] if stacked.core.ndim else 0
    _checks.check_shape(function, "core", stacked.core, (clients, *stacked.ranks))
    for mode, (size, rank) in enumerate(zip(stacked.shape, stacked.ranks, strict=True)):
        factor = stacked.factors[mode]
        _checks.check_shape(function, f"factor {mode}", factor, (clients, size, rank))
