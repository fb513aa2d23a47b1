"""Averaging the products of the clients' factors, which is exact, instead of the factors.

Clients send their trained factors; the server decodes a message as the dense products s U_k D_k, so
that the plain weighted mean of messages is ``sum_k p_k s U_k D_k``, of any ranks. What the server
makes of this mean tells the methods apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedlr import _precision, lowrank
from fedlr.federated import clients as clients_
from fedlr.federated import local, protocol

__all__ = [
    "Products",
    "add",
    "expected",
    "factor_messages",
    "local_factors",
    "of_leaves",
    "server",
    "truncate",
]


class Products(NamedTuple):
    """Products of factors, and the leaves that stay full.

    Attributes:
        matrices: The model's pytree with s U D (m, n) for every factorized leaf, None for others.
        rest: The model's pytree with the full leaves, None for the factorized ones.
    """

    matrices: PyTree
    rest: PyTree


def factor_messages() -> protocol.Compressor:
    """Build the message of trained factors that is decoded as their products.

    Returns:
        A compressor without state: a `lowrank.Trainable` is sent as it is, and decoded as
        `Products`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import products
        >>> update = lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
        >>> products.factor_messages().decompress(lowrank.Trainable(update, None)).matrices
        Array([[0.5, 0.5, 0.5],
               [0.5, 0.5, 0.5]], dtype=float32)
    """

    def compress(update, state, *, key):
        del key
        return update, state

    def decompress(message):
        return Products(lowrank.dense_delta(message.factors), message.rest)

    return protocol.Compressor(lambda _: (), compress, decompress)


def expected(params: lowrank.Adapted) -> Products:
    """Describe the update of a server that takes `Products`, for `protocol.ServerUpdate.expects`.

    Args:
        params: A model with low-rank updates.

    Returns:
        Shapes and dtypes of the products.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import products
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> products.expected(model).matrices.shape
        (8, 6)
    """
    return jax.eval_shape(factor_messages().decompress, lowrank.trainable(params))


def server(
    move: Callable[..., tuple[PyTree, PyTree]],
) -> protocol.ServerUpdate:
    """Build a server from what it makes of the mean of the products.

    Args:
        move: ``(base, factors, matrices, *, key) -> (base, factors)``: the model with its new full
            leaves, the factors that were sent, and ``sum_k p_k s U_k D_k`` as matrices (m, n).

    Returns:
        A server update for `lowrank.Adapted` params that takes `Products`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import products
        >>> merging = products.server(
        ...     lambda base, factors, matrices, *, key: (products.add(base, matrices), factors)
        ... )
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> update = products.Products(jnp.ones((8, 6)), None)
        >>> model, _ = merging.apply(model, update, (), key=jax.random.key(1))
        >>> float(model.base[0, 0]), int(model.round)
        (2.0, 1)
    """

    def apply(params, update, state, *, key):
        base = lowrank.replace_rest(params.base, update.rest)
        base, factors = move(base, params.factors, update.matrices, key=key)
        return lowrank.Adapted(base, factors, params.round + 1), state

    return protocol.ServerUpdate(lambda _: (), apply, expected)


def local_factors(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    training: local.Training,
    *,
    form: Callable[[PyTree, PyTree], PyTree] = lowrank.merge,
) -> protocol.LocalUpdate:
    """Build the local training of as many columns of the factors as a client can take.

    A client of rank r_k receives, trains and sends the first r_k columns of U and rows of D; behind
    them all is zero and stays so. Clients without ranks train everything.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        training: The optimizer, steps and batches.
        form: How the model is made of W and the factors, as in `local.local_low_rank`.

    Returns:
        A local update for `lowrank.Adapted` params and the data of a client, or
        `clients.RankedClients`, that sends trained factors.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import lowrank
        >>> from fedlr.federated import clients, local, products, protocol
        >>> data = protocol.ClientData(jnp.ones((1, 6)), jnp.ones((1, 8)), jnp.ones(1, bool))
        >>> update = products.local_factors(
        ...     lambda w, x, y: jnp.sum((w @ x - y) ** 2),
        ...     local.Training(optax.sgd(0.1), num_steps=2),
        ... )
        >>> model = lowrank.adapt(jnp.zeros((8, 6)), 2, key=jax.random.key(0))
        >>> weak = clients.RankedClients(data, jnp.int32(1))
        >>> values, _, _ = update(model, (), weak, key=jax.random.key(1))
        >>> (values.factors.up != 0).any(0)
        Array([ True, False], dtype=bool)
    """

    def update(params, client_state, data, *, key):
        if not isinstance(data, clients_.RankedClients):
            plain = local.local_low_rank(loss, training, form=form)
            return local.trained_values(plain)(params, client_state, data, key=key)

        def held(factors):
            return lowrank.first_columns(factors, data.ranks)

        def constrain(trained, start, round):
            del start, round
            return trained._replace(factors=held(trained.factors))

        ranked = local.local_low_rank(loss, training, form=form, constrain=constrain)
        start = params._replace(factors=held(params.factors))
        return local.trained_values(ranked)(start, client_state, data.data, key=key)

    return update


def add(base: PyTree, matrices: PyTree) -> PyTree:
    """Add matrices (m, n) to the leaves that they belong to.

    Args:
        base: The model.
        matrices: The pytree of `base` with a matrix for every factorized leaf, None for the others.

    Returns:
        A pytree like `base`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import products
        >>> kernel = jnp.ones((2, 1, 2, 2))
        >>> products.add({"k": kernel, "b": 1.0}, {"k": jnp.ones((2, 4)), "b": None})["k"].shape
        (2, 1, 2, 2)
    """
    return jax.tree.map(
        lambda matrix, leaf: leaf if matrix is None else leaf + matrix.reshape(leaf.shape),
        matrices,
        base,
        is_leaf=lambda node: node is None,
    )


def of_leaves(base: PyTree, factors: PyTree) -> PyTree:
    """Take the factorized leaves of a model as matrices (m, n).

    Args:
        base: The model.
        factors: Its low-rank updates.

    Returns:
        The pytree of `factors` with a matrix for every update.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import products
        >>> model = lowrank.adapt(jnp.ones((8, 2, 3, 3)), 1, key=jax.random.key(0))
        >>> products.of_leaves(model.base, model.factors).shape
        (8, 18)
    """
    # The other leaves are in the places of None, which tree maps refuse.
    leaves, structure = jax.tree.flatten(base)
    updates = structure.flatten_up_to(factors)
    matrices = [
        None if update is None else leaf.reshape(leaf.shape[0], -1)
        for leaf, update in zip(leaves, updates, strict=True)
    ]
    return jax.tree.unflatten(structure, matrices)


@_precision.highest
def truncate(matrices: PyTree, factors: PyTree, *, share: float = 0.5) -> PyTree:
    """Factorize matrices as well as the ranks allow.

        A ~ P S_r Q^T,   U = P T^share,   D = T^(1 - share) Q^T,   T = S_r / s

    The columns of U and the rows of D are ordered: the first r_k are the best factors of rank r_k.

    Args:
        matrices: The pytree of `factors` with a matrix (m, n) for every update.
        factors: Low-rank updates whose ranks and scales are taken.
        share: Part of the singular values that U gets, from 0 to 1, *static*. With 1/2 a factor
            pair of a singular value of zero is zero, so that its gradient is zero too; with 1 the
            rows of D are orthonormal and this does not happen.

    Returns:
        The pytree of `factors` with new ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import products
        >>> like = lowrank.LowRank(jnp.zeros((2, 1)), jnp.zeros((1, 3)), 0.5)
        >>> update = products.truncate(jnp.ones((2, 3)), like)
        >>> lowrank.dense_delta(update).round(3)
        Array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32)
    """

    def of_matrix(update, matrix):
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        values = values[: update.rank] / update.scale
        up = left[:, : update.rank] * (values**share)[None]
        down = (values ** (1 - share))[:, None] * right[: update.rank]
        return lowrank.LowRank(up, down, update.scale)

    return lowrank.map_updates(of_matrix, factors, matrices)
