"""FeDLRT: federated dynamical low-rank training on common orthonormal bases, W = U S V^T.

One round has two exchanges:

    1. clients send the gradients of U and V; the server extends the bases by the directions of the
       averages that they lack, [U, U'] and [V, V'], so r <= 2 r
    2. clients train S, (2 r, 2 r), and the full leaves, with the bases frozen; the server averages,
       S <- sum_k p_k S_k, which is exact, and truncates by a singular value decomposition of S

W stays of low rank from the start, and the rank follows the loss: singular values are dropped while
the norm of the dropped ones is below ``threshold |S|``, or beyond the largest rank. Shapes are
static, bases have columns of zeros behind the effective rank, and these count no bytes.

Reference: Schotthoefer and Laiu 2024, arXiv 2406.17887, Algorithm 1 without variance correction.
Recalled, not checked against the text: that gradients are taken with respect to U and V rather than
to U S and V S^T, and the form of the threshold. There QR extends the bases; here it is a singular
value decomposition, which spans the same where the gradient has full rank and tells its rank where
it has not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from fedlr import _checks, _precision, lowrank
from fedlr.federated import aggregators, compressors, local, protocol, rounds

__all__ = ["Bases", "build", "effective_rank", "factorize", "merged_params"]


class Bases(eqx.Module):
    """The leaf ``U S V^T``; columns of U and V are orthonormal or zero.

    Attributes:
        left: U, shape (m, 2 r).
        core: S, shape (2 r, 2 r); between rounds it is diagonal.
        right: V, shape (n, 2 r).
        shape: Shape of the leaf, *static*.
    """

    left: Float[Array, "m 2r"]
    core: Float[Array, "2r 2r"]
    right: Float[Array, "n 2r"]
    shape: tuple[int, ...] = eqx.field(static=True)

    @_precision.highest
    def dense(self) -> Array:
        """Form the leaf, in its shape."""
        return (self.left @ self.core @ self.right.T).reshape(self.shape)


class Trained(NamedTuple):
    """What clients train in the second exchange.

    Attributes:
        cores: The model's pytree with S for every factorized leaf, None for the others.
        rest: The model's pytree with the full leaves, None for the factorized ones.
    """

    cores: PyTree
    rest: PyTree


@_precision.highest
def factorize(
    params: PyTree,
    rank: int,
    *,
    key: Key[Array, ""],
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
) -> PyTree:
    """Put truncated singular value decompositions in the places of the chosen leaves.

    A leaf is left as it is where ``r (m + n) >= m n``.

    Args:
        params: Params of the model.
        rank: r, *static*.
        key: Random key; not used, since nothing is drawn.
        where: ``(path, leaf) -> bool``, which leaves.

    Returns:
        The pytree of `params` with `Bases` for every chosen leaf.

    Raises:
        ValueError: If the rank is not a positive integer, or no leaf is left to factorize.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fedlrt
        >>> bases = fedlrt.factorize(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> bases.core.shape, round(float(bases.dense()[0, 0]), 3)
        ((2, 2), 1.0)
    """
    # For the choice of leaves.
    updates = lowrank.init(params, rank, key=key, where=where)

    def of_leaf(update, leaf):
        if update is None:
            return leaf
        left, values, right = jnp.linalg.svd(leaf.reshape(leaf.shape[0], -1), full_matrices=False)
        return Bases(
            _pad(left[:, :rank]),
            _pad_core(jnp.diag(values[:rank])),
            _pad(right[:rank].T),
            leaf.shape,
        )

    return jax.tree.map(
        of_leaf,
        updates,
        params,
        is_leaf=lambda node: node is None or isinstance(node, lowrank.LowRank),
    )


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    rank: int,
    local_steps: int,
    threshold: float = 0.01,
    batch_size: int | None = None,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FeDLRT.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r, the largest rank between rounds, *static*.
        local_steps: Local steps per round, *static*.
        threshold: Part of the norm of S that a truncation may drop, from 0 to 1.
        batch_size: Examples per step, *static*; None takes all.
        where: ``(path, leaf) -> bool``, which leaves to factorize, see `factorize`.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model, see `factorize`; those of
        its state hold `Bases` for every factorized leaf, and `merged_params` gives back a model.
        Bytes are those of both exchanges at the effective ranks. Metrics are a pair of
        `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer, or the threshold not from 0 to 1; from
            `init`, if no leaf is left to factorize; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedlrt
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = fedlrt.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> fedlrt.merged_params(state).shape, fedlrt.effective_rank(state)
        ((8, 6), Array(1, dtype=int32))

    Reference:
        Schotthoefer and Laiu 2024, arXiv 2406.17887.
    """
    _checks.check_count("build", "rank", rank)
    _checks.check_fraction("build", "threshold", threshold)
    extension = rounds.compose(
        _basis_gradients(loss, rank, batch_size),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=protocol.ServerUpdate(
            lambda _: (), _extend, lambda params: _blank_gradients(params, rank)
        ),
        traffic=protocol.Traffic(_first_up, _first_down),
        chunk_size=chunk_size,
    )
    coefficients = rounds.compose(
        _train_cores(loss, local.Training(optimizer, local_steps, batch_size)),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=protocol.ServerUpdate(
            lambda _: (), functools.partial(_truncate, rank=rank, threshold=threshold), _trained
        ),
        traffic=protocol.Traffic(_second_up, functools.partial(_second_down, rank=rank)),
        chunk_size=chunk_size,
    )
    return rounds.prepared(
        rounds.in_turn(extension, coefficients),
        functools.partial(factorize, rank=rank, where=where),
    )


def merged_params(state: protocol.FederatedState) -> PyTree:
    """Return the model of a state, with every ``U S V^T`` formed.

    Args:
        state: State of the algorithm.

    Returns:
        The params of the model.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fedlrt
        >>> from fedlr.federated import protocol
        >>> params = fedlrt.factorize(jnp.zeros((8, 6)), 1, key=jax.random.key(0))
        >>> fedlrt.merged_params(protocol.FederatedState(params, (), (), 0)).shape
        (8, 6)
    """
    return _map_bases(Bases.dense, state.params)


def effective_rank(state: protocol.FederatedState) -> PyTree:
    """Count the columns of the bases that are in use.

    Args:
        state: State of the algorithm.

    Returns:
        The pytree of the params with an int32 scalar for every factorized leaf, None for others.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fedlrt
        >>> from fedlr.federated import protocol
        >>> params = fedlrt.factorize(jnp.ones((8, 6)), 2, key=jax.random.key(0))
        >>> int(fedlrt.effective_rank(protocol.FederatedState(params, (), (), 0)))
        2
    """
    return _only_bases(lambda bases: _width(bases.left), state.params)


def _is_bases(node):
    return isinstance(node, Bases)


def _map_bases(function, params):
    """Map over the bases; the other leaves stay."""
    return jax.tree.map(
        lambda node: function(node) if _is_bases(node) else node, params, is_leaf=_is_bases
    )


def _only_bases(function, params):
    return jax.tree.map(
        lambda node: function(node) if _is_bases(node) else None, params, is_leaf=_is_bases
    )


def _rest(params):
    return jax.tree.map(lambda node: None if _is_bases(node) else node, params, is_leaf=_is_bases)


def _pad(basis):
    """Add as many columns of zeros."""
    return jnp.concatenate([basis, jnp.zeros_like(basis)], axis=1)


def _pad_core(core):
    return jnp.pad(core, (0, core.shape[0]))


def _width(basis):
    return jnp.sum(jnp.any(basis != 0, axis=0), dtype=jnp.int32)


def _blank_gradients(params, rank):
    """Make zeros like the gradients of the bases, without the columns that are to be found."""
    return _only_bases(
        lambda bases: (
            jnp.zeros_like(bases.left[:, :rank]),
            jnp.zeros_like(bases.right[:, :rank]),
        ),
        params,
    )


def _basis_gradients(loss, rank, batch_size):
    """Build the first exchange: one step of unit length from 0 is the negative gradient."""
    of_batch = local.mean_loss(loss)
    step = local.Training(optax.sgd(1.0), 1, batch_size)

    def update(params, client_state, data, *, key):
        def shifted_loss(shifts, inputs, targets, valid):
            def of_bases(bases, shift):
                left = bases.left.at[:, :rank].add(shift[0])
                right = bases.right.at[:, :rank].add(shift[1])
                return Bases(left, bases.core, right, bases.shape).dense()

            return of_batch(_join(of_bases, params, shifts), inputs, targets, valid)

        start = _blank_gradients(params, rank)
        gradients, metrics = local.train(shifted_loss, start, data, step, key=key)
        return gradients, client_state, metrics

    return update


def _join(function, params, values):
    """Map over the bases and what belongs to them; the other leaves, None there, stay."""
    nodes, structure = jax.tree.flatten(params, is_leaf=_is_bases)
    paired = zip(nodes, structure.flatten_up_to(values), strict=True)
    return jax.tree.unflatten(
        structure, [function(node, value) if _is_bases(node) else node for node, value in paired]
    )


@_precision.highest
def _extended(basis, gradient):
    """Add an orthonormal basis of what the gradient has outside the span of the basis."""
    rank = gradient.shape[1]
    kept, residual = basis[:, :rank], gradient
    for _ in range(2):  # once is not orthogonal to working precision
        residual = residual - kept @ (kept.T @ residual)
    new, values, _ = jnp.linalg.svd(residual, full_matrices=False)
    # What rounding leaves of a gradient inside the span is no direction.
    noise = 10 * max(gradient.shape) * jnp.finfo(gradient.dtype).eps * jnp.linalg.norm(gradient)
    return jnp.concatenate([kept, jnp.where((values > noise)[None], new, 0)], axis=1)


def _extend(params, update, state, *, key):
    del key

    def of_bases(bases, gradients):
        left, right = _extended(bases.left, gradients[0]), _extended(bases.right, gradients[1])
        return Bases(left, bases.core, right, bases.shape)

    return _join(of_bases, params, update), state


def _trained(params):
    return Trained(_only_bases(lambda bases: bases.core, params), _rest(params))


def _with_cores(params, trained):
    full = jax.tree.map(
        lambda new, old: old if new is None else new,
        trained.rest,
        params,
        is_leaf=lambda node: node is None,
    )
    return _join(
        lambda bases, core: Bases(bases.left, core, bases.right, bases.shape), full, trained.cores
    )


def _train_cores(loss, training):
    """Build the second exchange."""
    of_batch = local.mean_loss(loss)

    def update(params, client_state, data, *, key):
        start = _trained(params)

        def core_loss(trained, inputs, targets, valid):
            model = _map_bases(Bases.dense, _with_cores(params, trained))
            return of_batch(model, inputs, targets, valid)

        trained, metrics = local.train(core_loss, start, data, training, key=key)
        return jax.tree.map(jnp.subtract, trained, start), client_state, metrics

    return update


def _truncate(params, update, state, *, rank, threshold, key):
    del key
    trained = jax.tree.map(jnp.add, _trained(params), update)
    params = _with_cores(params, trained)
    return _map_bases(lambda bases: _truncated(bases, rank, threshold), params), state


@_precision.highest
def _truncated(bases, rank, threshold):
    rotation, values, rotation_right = jnp.linalg.svd(bases.core)
    # tails[j] is the norm of the values from j on.
    tails = jnp.sqrt(jnp.cumsum(values[::-1] ** 2)[::-1])
    eps = jnp.finfo(values.dtype).eps
    kept = (tails >= threshold * tails[0]) & (values > values.size * eps * values[0])
    kept = kept & (jnp.arange(values.size) < rank)
    left = jnp.where(kept[None], bases.left @ rotation, 0)
    right = jnp.where(kept[None], bases.right @ rotation_right.T, 0)
    found = Bases(left, jnp.diag(jnp.where(kept, values, 0)), right, bases.shape)
    # S = 0 has no directions; those of before stay, so that S can be trained.
    before = Bases(_pad(bases.left[:, :rank]), bases.core, _pad(bases.right[:, :rank]), bases.shape)
    return jax.tree.map(lambda a, b: jnp.where(values[0] > 0, a, b), found, before)


def _entries(params, count):
    """Sum the bytes of `count` numbers for every factorized leaf."""
    sizes = _only_bases(lambda bases: bases.core.dtype.itemsize * count(bases), params)
    return sum(jax.tree.leaves(sizes), jnp.zeros((), jnp.int32))


def _rows(bases):
    return bases.left.shape[0], bases.right.shape[0]


def _first_up(message, params, client_state, data):
    del message, client_state, data
    return _entries(params, lambda bases: sum(_rows(bases)) * _width(bases.left))


def _first_down(params, client_state, data):
    """Count U, the diagonal of S, and V, and the full leaves."""
    del client_state, data
    pairs = _entries(params, lambda bases: (sum(_rows(bases)) + 1) * _width(bases.left))
    return pairs + compressors.message_bytes(_rest(params))


def _second_up(message, params, client_state, data):
    del client_state, data
    cores = _entries(params, lambda bases: _width(bases.left) * _width(bases.right))
    return cores + compressors.message_bytes(message.rest)


def _second_down(params, client_state, data, *, rank):
    """Count the columns that were added."""
    del client_state, data

    def count(bases):
        rows, columns = _rows(bases)
        return rows * _width(bases.left[:, rank:]) + columns * _width(bases.right[:, rank:])

    return _entries(params, count)
