"""Local training of low-rank updates: W is frozen, clients train factors and the full leaves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from fedlr import lowrank
from fedlr.federated import protocol
from fedlr.federated.local import training as training_

__all__ = ["local_low_rank", "trained_values"]

Constraint = Callable[[lowrank.Trainable, lowrank.Trainable, Int[Array, ""]], lowrank.Trainable]


def local_low_rank(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    training: training_.Training,
    *,
    form: Callable[[PyTree, PyTree], PyTree] = lowrank.merge,
    constrain: Constraint | None = None,
) -> protocol.LocalUpdate:
    """Build the training of factors and full leaves, ``f(W + s U D, rest)`` with W constant.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        training: The optimizer, steps and batches.
        form: `lowrank.merge` forms ``W + s U D`` and serves every model; `lowrank.apply` never
            does, for models that use their matrices by ``@``.
        constrain: ``(trained, start, round) -> trained``, applied inside the loss and to the
            result, so that what it holds at the start neither moves nor has a gradient; None
            trains everything.

    Returns:
        A local update for `lowrank.Adapted` params. The update is a `lowrank.Trainable` difference;
        metrics are `training.LocalMetrics`; the client state is passed through.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import lowrank
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(jnp.ones((1, 6)), jnp.ones((1, 8)), jnp.ones(1, bool))
        >>> update = local.local_low_rank(
        ...     lambda w, x, y: jnp.sum((w @ x - y) ** 2),
        ...     local.Training(optax.sgd(0.1), num_steps=2),
        ... )
        >>> model = lowrank.adapt(jnp.zeros((8, 6)), 1, key=jax.random.key(0))
        >>> difference, _, metrics = update(model, (), data, key=jax.random.key(1))
        >>> difference.factors.up.shape, float(metrics.loss)
        ((8, 1), 8.0)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371, the client step; Hu et al. 2022, arXiv 2106.09685.
    """
    of_batch = training_.mean_loss(loss)

    def update(params, client_state, data, *, key):
        start = lowrank.trainable(params)

        def held(trained):
            return trained if constrain is None else constrain(trained, start, params.round)

        def batch_loss(trained, inputs, targets, valid):
            factors, rest = held(trained)
            model = form(lowrank.replace_rest(params.base, rest), factors)
            return of_batch(model, inputs, targets, valid)

        trained, metrics = training_.train(batch_loss, start, data, training, key=key)
        difference = jax.tree.map(jnp.subtract, held(trained), start)
        return difference, client_state, metrics

    return update


def trained_values(local_update: protocol.LocalUpdate) -> protocol.LocalUpdate:
    """Let clients send what they trained instead of its difference to what they received.

    Aggregators of products need the factors themselves: the difference of two products is not the
    product of differences.

    Args:
        local_update: A local update for `lowrank.Adapted` params, e.g. `local_low_rank`.

    Returns:
        The same whose update is the trained `lowrank.Trainable`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import local
        >>> def nothing(params, client_state, data, *, key):
        ...     zeros = jax.tree.map(jnp.zeros_like, lowrank.trainable(params))
        ...     return zeros, client_state, {"loss": jnp.zeros(())}
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> sent = local.trained_values(nothing)(model, (), (), key=jax.random.key(1))[0]
        >>> bool((sent.factors.down == model.factors.down).all())
        True
    """

    def update(params, client_state, data, *, key):
        difference, client_state, metrics = local_update(params, client_state, data, key=key)
        values = jax.tree.map(jnp.add, lowrank.trainable(params), difference)
        return values, client_state, metrics

    return update
