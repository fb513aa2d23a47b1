"""Low-rank updates for the matrices of any model: W + s U D, with W frozen.

A leaf W of two axes or more is matricised as (m, n) with m its first axis; a kernel (out, in, h, w)
so becomes (out, in h w), and U D is the composition of a convolution to r channels and a 1 x 1 one.
The update of a leaf is a `LowRank` with ``up`` U (m x r) and ``down`` D (r x n); papers on LoRA
call them B and A. Leaves without an update, biases for instance, are the *rest*: they stay full.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from fedlr import _checks, _precision

__all__ = [
    "Adapted",
    "FactoredMatrix",
    "LowRank",
    "Trainable",
    "adapt",
    "apply",
    "both_random",
    "dense_delta",
    "detach",
    "first_columns",
    "init",
    "is_matrix",
    "map_updates",
    "merge",
    "num_bytes",
    "redraw",
    "replace_rest",
    "rest",
    "trainable",
    "zero_up",
]

Start = Callable[..., tuple[Array, Array]]


class LowRank(eqx.Module):
    """The update ``s U D`` of one leaf.

    Attributes:
        up: U, shape (m, r).
        down: D, shape (r, n).
        scale: s, a Python float, *static*.
    """

    up: Float[Array, "m r"]
    down: Float[Array, "r n"]
    scale: float = eqx.field(static=True, default=1.0)

    @property
    def rank(self) -> int:
        """The number of columns of U."""
        return self.up.shape[-1]


class Trainable(NamedTuple):
    """What clients train and send of a model with low-rank updates.

    Attributes:
        factors: The model's pytree with a `LowRank` for every factorized leaf, None for the others.
        rest: The model's pytree with the leaves that stay full, None for the factorized ones.
    """

    factors: PyTree
    rest: PyTree


class Adapted(NamedTuple):
    """A model and its low-rank update: the params of the algorithms that train factors.

    Attributes:
        base: The model. Its factorized leaves W are frozen, the others are trained.
        factors: The model's pytree with a `LowRank` for every factorized leaf, None for the others.
        round: Number of rounds done, int32 scalar: methods that take turns read it.
    """

    base: PyTree
    factors: PyTree
    round: Int[Array, ""]


class FactoredMatrix(eqx.Module):
    """A matrix ``W + s U D`` that is applied without being formed.

    It knows ``matrix @ x`` and ``x @ matrix``, which is what layers such as `equinox.nn.Linear` and
    hand-written ones do with their weights. Under `jax.vmap` over U and D alone, W stays one.

    Attributes:
        matrix: W, shape (m, n).
        update: The `LowRank` of W.
    """

    matrix: Float[Array, "m n"]
    update: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        return self.matrix.shape

    @property
    def ndim(self) -> int:
        """Number of axes, 2."""
        return self.matrix.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of W."""
        return self.matrix.dtype

    def __matmul__(self, x: Array) -> Array:
        """Return ``W x + s U (D x)``."""
        update = self.update
        return self.matrix @ x + update.scale * (update.up @ (update.down @ x))

    def __rmatmul__(self, x: Array) -> Array:
        """Return ``x W + s (x U) D``."""
        update = self.update
        return x @ self.matrix + update.scale * ((x @ update.up) @ update.down)


def is_matrix(path: tuple, leaf: Array) -> bool:
    """Tell whether a leaf has two axes or more and floating entries; the default choice of leaves.

    Args:
        path: Key path of the leaf in its pytree; not looked at.
        leaf: The leaf.

    Returns:
        True if so.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> lowrank.is_matrix((), jnp.ones((2, 3))), lowrank.is_matrix((), jnp.ones(3))
        (True, False)
    """
    del path
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def zero_up(
    shape: tuple[int, int], rank: int, *, key: Key[Array, ""], dtype: Any
) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """Draw factors of the zero matrix: U is 0, D uniform on ``+-1 / sqrt(n)``.

    Args:
        shape: (m, n), *static*.
        rank: r, *static*.
        key: Random key.
        dtype: float32 or float64.

    Returns:
        U (m, r) and D (r, n).

    Example:
        >>> import jax
        >>> from fedlr import lowrank
        >>> up, down = lowrank.zero_up((3, 4), 2, key=jax.random.key(0), dtype="float32")
        >>> float(up.max()), down.shape
        (0.0, (2, 4))

    Reference:
        Hu et al. 2022, arXiv 2106.09685, section 4.1 for U = 0; the law of D as in the published
        code of FedLoRU, arXiv 2409.12371.
    """
    rows, columns = shape
    bound = columns**-0.5
    down = jax.random.uniform(key, (rank, columns), dtype, -bound, bound)
    return jnp.zeros((rows, rank), dtype), down


def both_random(
    shape: tuple[int, int], rank: int, *, key: Key[Array, ""], dtype: Any
) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """Draw both factors: U uniform on ``+-1 / sqrt(r)``, D on ``+-1 / sqrt(n)``.

    An entry of U D has standard deviation ``1 / (3 sqrt(n))``.

    Args:
        shape: (m, n), *static*.
        rank: r, *static*.
        key: Random key.
        dtype: float32 or float64.

    Returns:
        U (m, r) and D (r, n).

    Example:
        >>> import jax
        >>> from fedlr import lowrank
        >>> up, down = lowrank.both_random((3, 4), 2, key=jax.random.key(0), dtype="float32")
        >>> up.shape, down.shape
        ((3, 2), (2, 4))

    Reference:
        The published code of FedLoRU, arXiv 2409.12371.
    """
    up_key, down_key = jax.random.split(key)
    rows, columns = shape
    up = jax.random.uniform(up_key, (rows, rank), dtype, -(rank**-0.5), rank**-0.5)
    down = jax.random.uniform(down_key, (rank, columns), dtype, -(columns**-0.5), columns**-0.5)
    return up, down


def init(
    params: PyTree,
    rank: int,
    *,
    key: Key[Array, ""],
    where: Callable[[tuple, Array], bool] = is_matrix,
    start: Start = zero_up,
    alpha: float | None = None,
) -> PyTree:
    """Make the low-rank updates of a model.

    A chosen leaf is left full where factors would not be smaller, ``r (m + n) >= m n``.

    Args:
        params: Any pytree of arrays.
        rank: r, *static*.
        key: Random key; that of a leaf is folded in from its place among all leaves.
        where: ``(path, leaf) -> bool``, which leaves to factorize; the published choice of a paper
            is a `where`.
        start: ``(shape, rank, *, key, dtype) -> (up, down)``, e.g. `zero_up` or `both_random`.
        alpha: The scale is ``s = alpha / r``; None for r, so s = 1.

    Returns:
        The pytree of `params` with a `LowRank` for every factorized leaf and None for the others.

    Raises:
        ValueError: If the rank is not a positive integer, or no leaf is left to factorize.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> params = {"weight": jnp.ones((8, 6)), "bias": jnp.ones(8)}
        >>> factors = lowrank.init(params, 2, key=jax.random.key(0))
        >>> factors["weight"].up.shape, factors["weight"].down.shape, factors["bias"]
        ((8, 2), (2, 6), None)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371; Hu et al. 2022, arXiv 2106.09685.
    """
    _checks.check_count("init", "rank", rank)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    scale = 1.0 if alpha is None else alpha / rank
    found = []
    for place, (path, leaf) in enumerate(leaves):
        rows, columns = _matrix_shape(leaf) if jnp.ndim(leaf) >= 2 else (0, 0)
        if not where(path, leaf) or rank * (rows + columns) >= rows * columns:
            found.append(None)
            continue
        _checks.check_floating("init", params=leaf)
        own_key = jax.random.fold_in(key, place)
        up, down = start((rows, columns), rank, key=own_key, dtype=jnp.result_type(leaf))
        found.append(LowRank(up, down, scale))
    if all(update is None for update in found):
        shapes = [jnp.shape(leaf) for _, leaf in leaves]
        expected = f"a leaf (m, n, ..) with {rank} (m + n) < m n to factorize"
        raise _checks.fail("init", f"rank {rank} and leaves of shapes {shapes}", expected)
    return jax.tree.unflatten(structure, found)


def adapt(
    params: PyTree,
    rank: int,
    *,
    key: Key[Array, ""],
    where: Callable[[tuple, Array], bool] = is_matrix,
    start: Start = zero_up,
    alpha: float | None = None,
) -> Adapted:
    """Give a model low-rank updates: the params of a federated algorithm that trains factors.

    Args:
        params: Any pytree of arrays.
        rank: r, *static*.
        key: Random key.
        where: Which leaves to factorize, as in `init`.
        start: How factors are drawn, as in `init`.
        alpha: The scale is ``alpha / r``; None for s = 1.

    Returns:
        The model with its updates, after no round.

    Raises:
        ValueError: As `init`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 2, key=jax.random.key(0))
        >>> model.factors.rank, int(model.round)
        (2, 0)
    """
    factors = init(params, rank, key=key, where=where, start=start, alpha=alpha)
    return Adapted(params, factors, jnp.zeros((), jnp.int32))


def trainable(model: Adapted) -> Trainable:
    """Take what clients train: the factors, and the leaves that stay full.

    Args:
        model: A model with low-rank updates.

    Returns:
        Its trainable part.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> params = {"weight": jnp.ones((8, 6)), "bias": jnp.ones(2)}
        >>> part = lowrank.trainable(lowrank.adapt(params, 2, key=jax.random.key(0)))
        >>> part.rest, part.factors["weight"].rank
        ({'bias': Array([1., 1.], dtype=float32), 'weight': None}, 2)
    """
    return Trainable(model.factors, rest(model.base, model.factors))


def replace_rest(base: PyTree, new_rest: PyTree) -> PyTree:
    """Put new leaves in the places that stay full.

    Args:
        base: The model.
        new_rest: The pytree of `base` with None for every factorized leaf.

    Returns:
        The model with these leaves, its factorized ones unchanged.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> lowrank.replace_rest({"w": jnp.ones(1), "b": jnp.ones(1)}, {"w": None, "b": 2.0})
        {'b': 2.0, 'w': Array([1.], dtype=float32)}
    """
    return _map(lambda leaf, new: leaf if new is None else new, base, new_rest)


def redraw(factors: PyTree, *, key: Key[Array, ""], start: Start = zero_up) -> PyTree:
    """Draw new factors in the shapes of given ones.

    Args:
        factors: Low-rank updates.
        key: Random key; that of an update is folded in from its place.
        start: How factors are drawn, as in `init`.

    Returns:
        The same pytree with new factors and the same scales.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> update = lowrank.LowRank(jnp.ones((8, 2)), jnp.ones((2, 6)))
        >>> float(lowrank.redraw(update, key=jax.random.key(0)).up.max())
        0.0
    """
    updates, structure = jax.tree.flatten(factors, is_leaf=_is_update)
    drawn = []
    for place, update in enumerate(updates):
        shape = (update.up.shape[0], update.down.shape[1])
        own_key = jax.random.fold_in(key, place)
        up, down = start(shape, update.rank, key=own_key, dtype=update.up.dtype)
        drawn.append(LowRank(up, down, update.scale))
    return jax.tree.unflatten(structure, drawn)


def rest(params: PyTree, factors: PyTree) -> PyTree:
    """Take the leaves that stay full.

    Args:
        params: The model.
        factors: Its low-rank updates.

    Returns:
        The pytree of `params` with None for every factorized leaf.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> params = {"weight": jnp.ones((8, 6)), "bias": jnp.ones(2)}
        >>> lowrank.rest(params, lowrank.init(params, 2, key=jax.random.key(0)))
        {'bias': Array([1., 1.], dtype=float32), 'weight': None}
    """
    return _map(lambda leaf, update: leaf if update is None else None, params, factors)


@_precision.highest
def merge(params: PyTree, factors: PyTree) -> PyTree:
    """Add the low-rank updates to the leaves: ``W + s U D``, in the shape of W.

    Args:
        params: The model.
        factors: Its low-rank updates.

    Returns:
        A pytree like `params`.

    Raises:
        ValueError: If an update does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> update = lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
        >>> lowrank.merge(jnp.zeros((2, 3)), update)
        Array([[0.5, 0.5, 0.5],
               [0.5, 0.5, 0.5]], dtype=float32)
    """

    def of_leaf(leaf, update):
        if update is None:
            return leaf
        _check_fits("merge", leaf, update)
        return leaf + _dense(update).reshape(leaf.shape)

    return _map(of_leaf, params, factors)


def apply(params: PyTree, factors: PyTree) -> PyTree:
    """Put a `FactoredMatrix` in the place of every factorized matrix; kernels are merged.

    The model computes the same as with `merge`, up to rounding, but W stays unbatched when many
    clients are vmapped: a layer of 512 x 512 and rank 8 takes a 26th of the time for 50 clients.
    Its layers must use their weights by ``@``. Where params meet the static part of an Equinox
    model, `equinox.combine` must be told that a `FactoredMatrix` is a leaf.

    Args:
        params: The model.
        factors: Its low-rank updates.

    Returns:
        A pytree like `params`, with a `FactoredMatrix` for a factorized leaf of two axes.

    Raises:
        ValueError: If an update does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> update = lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
        >>> lowrank.apply(jnp.zeros((2, 3)), update) @ jnp.ones(3)
        Array([1.5, 1.5], dtype=float32)
    """

    def of_leaf(leaf, update):
        if update is None:
            return leaf
        _check_fits("apply", leaf, update)
        return FactoredMatrix(leaf, update) if leaf.ndim == 2 else merge(leaf, update)

    return _map(of_leaf, params, factors)


@_precision.highest
def dense_delta(factors: PyTree) -> PyTree:
    """Form ``s U D`` of every update, as matrices (m, n).

    Args:
        factors: Low-rank updates.

    Returns:
        The same pytree with a matrix for every `LowRank`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> lowrank.dense_delta(lowrank.LowRank(jnp.ones((1, 2)), jnp.ones((2, 2)), 0.5))
        Array([[1., 1.]], dtype=float32)
    """
    return jax.tree.map(_dense, factors, is_leaf=_is_update)


@_precision.highest
def detach(params: PyTree, base: PyTree, factors: PyTree, *, rank: int) -> Trainable:
    """Take off what training has added to a model, as low-rank updates of it.

    This is the detachable adapter of a fine-tuned model. k rounds of merging updates of rank r
    change a matrix by one of rank k r at most, so that with ``rank`` k r or more the adapter is the
    list of the merged pairs up to rounding; with less it is the best one of that rank.
    ``merge(replace_rest(base, adapter.rest), adapter.factors)`` puts it on again.

    Args:
        params: The trained model, as from `merge`.
        base: The model that training started from.
        factors: Low-rank updates that tell which leaves are factorized; their values are not read.
        rank: Rank of the adapter, *static*; cut to the size of a smaller leaf.

    Returns:
        The factors of the changes, and the other leaves of the trained model.

    Raises:
        ValueError: If the rank is not a positive integer, or an update does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> base = jnp.ones((4, 3))
        >>> update = lowrank.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)))
        >>> adapter = lowrank.detach(lowrank.merge(base, update), base, update, rank=1)
        >>> lowrank.merge(base, adapter.factors)[0].round(4)
        Array([2., 2., 2.], dtype=float32)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, on fine-tuning, where the pairs are kept apart.
    """
    _checks.check_count("detach", "rank", rank)

    def of_leaf(change, update):
        if update is None:
            return None
        _check_fits("detach", change, update)
        left, values, right = jnp.linalg.svd(
            change.reshape(_matrix_shape(change)), full_matrices=False
        )
        roots = jnp.sqrt(values[:rank])
        return LowRank(left[:, :rank] * roots[None], roots[:, None] * right[:rank])

    changes = jax.tree.map(jnp.subtract, params, base)
    return Trainable(_map(of_leaf, changes, factors), rest(params, factors))


def map_updates(function: Callable[..., Any], factors: PyTree, *others: PyTree) -> PyTree:
    """Apply a function to every low-rank update, with whatever other pytrees hold in its place.

    Args:
        function: ``(update, *others) -> anything``.
        factors: Low-rank updates.
        *others: Pytrees of the same structure that may hold anything in the place of an update.

    Returns:
        The pytree of `factors` with the results in the places of the updates.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> factors = {"weight": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3))), "bias": None}
        >>> lowrank.map_updates(lambda update: update.rank, factors)
        {'bias': None, 'weight': 2}
    """
    return jax.tree.map(function, factors, *others, is_leaf=_is_update)


def first_columns(factors: PyTree, rank: Int[Array, ""] | int) -> PyTree:
    """Set the columns of U and the rows of D behind the first ones to zero.

    Args:
        factors: Low-rank updates.
        rank: How many are kept; all if it is the rank of an update or more. Traced.

    Returns:
        The same pytree. What is zero has a zero gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> update = lowrank.LowRank(jnp.ones((1, 2)), jnp.ones((2, 1)))
        >>> lowrank.first_columns(update, 1).up
        Array([[1., 0.]], dtype=float32)
    """

    def of_update(update):
        kept = jnp.arange(update.rank, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)
        up = jnp.where(kept[None], update.up, 0)
        return LowRank(up, jnp.where(kept[:, None], update.down, 0), update.scale)

    return map_updates(of_update, factors)


def num_bytes(factors: PyTree) -> int:
    """Count the bytes of the factors, ``r (m + n)`` numbers for every leaf.

    Args:
        factors: Low-rank updates.

    Returns:
        The bytes, a Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> lowrank.num_bytes(lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3))))
        56
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(factors))


def _dense(update: LowRank) -> Array:
    return update.scale * (update.up @ update.down)


def _is_update(node: Any) -> bool:
    return isinstance(node, LowRank)


def _map(function, params, factors):
    """Map over the leaves of a model and the updates or None in their places."""
    leaves, structure = jax.tree.flatten(params)
    updates = structure.flatten_up_to(factors)
    mapped = [function(leaf, update) for leaf, update in zip(leaves, updates, strict=True)]
    return jax.tree.unflatten(structure, mapped)


def _matrix_shape(leaf: Array) -> tuple[int, int]:
    rows = jnp.shape(leaf)[0]
    return rows, jnp.size(leaf) // max(rows, 1)


def _check_fits(function: str, leaf: Array, update: LowRank) -> None:
    rows, columns = _matrix_shape(leaf)
    if update.up.shape[:1] + update.down.shape[1:] != (rows, columns):
        got = f"factors of shapes {update.up.shape} and {update.down.shape}"
        raise _checks.fail(function, got, f"({rows}, r) and (r, {columns}) for {leaf.shape}")
