"""How the server moves its params once an update is there."""

import jax
import jax.numpy as jnp
import optax

from fedlr.federated import protocol

__all__ = ["from_optax"]


def from_optax(optimizer: optax.GradientTransformation) -> protocol.ServerUpdate:
    """Build a server that gives the negative update to an optax optimizer as a gradient.

        x+ = x + optimizer(-update),   sgd(1.0): x+ = x + update

    ``optax.sgd(1.0)`` is FedAvg and ``optax.sgd(lr, momentum=b)`` is FedAvgM. optax's adam and yogi
    correct the bias of their moments and its adagrad has a start value of its own, so they are
    variants of FedAdam, FedYogi and FedAdagrad.

    Args:
        optimizer: Any optax optimizer.

    Returns:
        A server update whose state is the state of the optimizer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.federated import servers
        >>> server = servers.from_optax(optax.sgd(1.0))
        >>> params = jnp.array([1.0, 2.0])
        >>> server.apply(params, jnp.ones(2), server.init(params), key=jax.random.key(0))[0]
        Array([2., 3.], dtype=float32)

    Reference:
        Reddi et al. 2021, arXiv 2003.00295, Algorithm 1.
    """

    def apply(params, update, state, *, key):
        del key
        pseudo_gradient = jax.tree.map(jnp.negative, update)
        # optax mixes its int32 step count with floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            step, state = optimizer.update(pseudo_gradient, state, params)
        return optax.apply_updates(params, step), state

    return protocol.ServerUpdate(optimizer.init, apply)
