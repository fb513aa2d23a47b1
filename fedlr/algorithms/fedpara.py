"""FedPara: every matrix is a Hadamard product of two low-rank ones, and clients average factors.

    W = (X1 Y1) o (X2 Y2),   X1, X2 (m, r),   Y1, Y2 (r, n),   rank W <= r^2

with ``2 r (m + n)`` numbers. It is FedAvg for a model that is made so; there is no frozen W.

Reference: Hyeon-Woo et al. 2022, arXiv 2108.06098, Proposition 1. Kernels (o, i, h, w) are
matricized as (o, i h w); the tensor form of the paper (Proposition 3), which saves more for
kernels, is not used.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Float, Key, PyTree

from fedlr import _checks, _precision, lowrank
from fedlr.federated import aggregators, compressors, local, protocol, rounds, servers

__all__ = ["Hadamard", "build", "factorize", "merged_params"]


class Hadamard(eqx.Module):
    """The leaf ``(X1 Y1) o (X2 Y2)``.

    Attributes:
        up: X1 and X2 side by side, shape (m, 2 r).
        down: Y1 on top of Y2, shape (2 r, n).
        shape: Shape of the leaf, *static*.
    """

    up: Float[Array, "m 2r"]
    down: Float[Array, "2r n"]
    shape: tuple[int, ...] = eqx.field(static=True)

    @_precision.highest
    def dense(self) -> Array:
        """Form the leaf, in its shape."""
        rank = self.up.shape[1] // 2
        first = self.up[:, :rank] @ self.down[:rank]
        return (first * (self.up[:, rank:] @ self.down[rank:])).reshape(self.shape)


def factorize(
    params: PyTree,
    rank: int,
    *,
    key: Key[Array, ""],
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
) -> PyTree:
    """Put Hadamard products in the places of the chosen leaves.

    Of these only the shapes are used: factors are Gaussian such that an entry of a leaf (m, n) has
    the variance 2 / n of the initialization of He et al. A leaf is left as it is where
    ``2 r (m + n) >= m n``.

    Args:
        params: Params of the model.
        rank: r, *static*.
        key: Random key.
        where: ``(path, leaf) -> bool``, which leaves.

    Returns:
        The pytree of `params` with a `Hadamard` for every chosen leaf.

    Raises:
        ValueError: If the rank is not a positive integer, or no leaf is left to factorize.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fedpara
        >>> params = fedpara.factorize(jnp.zeros((90, 80)), 3, key=jax.random.key(0))
        >>> weights = params.dense()
        >>> int(jnp.linalg.matrix_rank(weights)), bool(jnp.abs(jnp.var(weights) * 80 - 2) < 0.2)
        (9, True)

    Reference:
        Hyeon-Woo et al. 2022, arXiv 2108.06098, section 2.
    """
    _checks.check_count("factorize", "rank", rank)
    factors = lowrank.init(params, 2 * rank, key=key, where=where, start=_start)

    def of_leaf(update, leaf):
        if update is None:
            return leaf
        return Hadamard(update.up, update.down, leaf.shape)

    return jax.tree.map(
        of_leaf, factors, params, is_leaf=lambda node: node is None or _is_update(node)
    )


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    rank: int,
    local_steps: int,
    batch_size: int | None = None,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FedPara.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r, *static*.
        local_steps: Local steps per round, *static*.
        batch_size: Examples per step, *static*; None takes all.
        where: ``(path, leaf) -> bool``, which leaves to factorize, see `factorize`.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model, see `factorize`; those of
        its state hold a `Hadamard` for every factorized leaf, and `merged_params` gives back a
        model. Metrics are `local.LocalMetrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedpara
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = fedpara.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), optax.sgd(0.1), rank=1, local_steps=5
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> fedpara.merged_params(state).shape, infos.uplink_bytes[0], 4 * 2 * (8 + 6)
        ((8, 6), Array([112, 112, 112], dtype=int32), 112)

    Reference:
        Hyeon-Woo et al. 2022, arXiv 2108.06098.
    """

    def of_factors(params, inputs, target):
        return loss(_merged(params), inputs, target)

    composed = rounds.compose(
        local.local_sgd(of_factors, optimizer, num_steps=local_steps, batch_size=batch_size),
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=servers.from_optax(optax.sgd(1.0)),
        chunk_size=chunk_size,
    )
    return rounds.prepared(composed, functools.partial(factorize, rank=rank, where=where))


def merged_params(state: protocol.FederatedState) -> PyTree:
    """Return the model of a state, with every Hadamard product formed.

    Args:
        state: State of the algorithm.

    Returns:
        The params of the model.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fedpara
        >>> from fedlr.federated import protocol
        >>> params = fedpara.factorize(jnp.zeros((8, 6)), 1, key=jax.random.key(0))
        >>> fedpara.merged_params(protocol.FederatedState(params, (), (), 0)).shape
        (8, 6)
    """
    return _merged(state.params)


def _merged(params):
    return jax.tree.map(
        lambda node: node.dense() if _is_hadamard(node) else node, params, is_leaf=_is_hadamard
    )


def _is_hadamard(node):
    return isinstance(node, Hadamard)


def _is_update(node):
    return isinstance(node, lowrank.LowRank)


def _start(shape, rank, *, key, dtype):
    """Draw factors of deviation d: both sums have variance r d^4, their product r^2 d^8."""
    rows, columns = shape
    deviation = (2 / (columns * (rank // 2) ** 2)) ** (1 / 8)
    up_key, down_key = jax.random.split(key)
    up = deviation * jax.random.normal(up_key, (rows, rank), dtype)
    return up, deviation * jax.random.normal(down_key, (rank, columns), dtype)
