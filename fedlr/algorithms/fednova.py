"""FedNova: clients that do different numbers of local steps pull equally hard per step.

    x <- x + (sum_k p_k a_k) sum_k p_k d_k / a_k,   a_k the weight of T_k local steps

so that a client with many steps does not drag the fixed point towards its own optimum. For plain
SGD ``a_k = T_k``; for momentum rho ``a_k = (T_k - rho (1 - rho^T_k) / (1 - rho)) / (1 - rho)``.

Reference: Wang et al. 2020, arXiv 2007.07481, equations (7) and (9).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import aggregators, compressors, local, protocol, rounds

__all__ = ["Normalized", "build", "momentum_weight"]


class Normalized(NamedTuple):
    """What a client sends: its update per unit of local work, and the work.

    Attributes:
        direction: ``d_k / a_k``, a pytree like the params.
        work: a_k, shape ().
    """

    direction: PyTree
    work: Float[Array, ""]


def momentum_weight(num_steps: Array, momentum: float = 0.0) -> Float[Array, ""]:
    """Weigh T local steps of SGD with momentum: ``(T - rho (1 - rho^T) / (1 - rho)) / (1 - rho)``.

    Args:
        num_steps: T, floating, shape ().
        momentum: rho in [0, 1); 0 gives T.

    Returns:
        The weight, shape ().

    Raises:
        ValueError: If the momentum is not in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fednova
        >>> float(fednova.momentum_weight(jnp.float32(2.0), 0.5))  # 1 + (1 + 0.5)
        2.5

    Reference:
        Wang et al. 2020, arXiv 2007.07481, section 4.1.
    """
    if not 0 <= momentum < 1:
        raise _checks.fail("momentum_weight", f"momentum {momentum}", "a number in [0, 1)")
    return (num_steps - momentum * (1 - momentum**num_steps) / (1 - momentum)) / (1 - momentum)


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    training: local.Training,
    *,
    momentum: float = 0.0,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FedNova.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar``.
        training: Optimizer, steps and batches; its `active_steps` gives T_k, without it all clients
            do the same work and this is FedAvg.
        momentum: rho of the optimizer, which must be SGD: it is not read off it.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm; `init` takes the params of one model. The work of a client is 4 or 8
        bytes of its message.

    Raises:
        ValueError: If the momentum is not in [0, 1); as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.algorithms import fednova
        >>> from fedlr.federated import local, protocol
        >>> mask = jnp.array([[True, False], [True, True]])
        >>> data = protocol.ClientData(jnp.ones((2, 2)), jnp.ones((2, 2)), mask)
        >>> training = local.Training(optax.sgd(0.1), 2, 1, local.epochs(1, batch_size=1))
        >>> algorithm = fednova.build(lambda w, x, y: (w * x - y) ** 2 / 2, training)
        >>> state = algorithm.init(jnp.float32(0.0), data, key=jax.random.key(0))
        >>> _, info = algorithm.round(state, data, jnp.arange(2), key=jax.random.key(1))
        >>> info.metrics.num_steps
        Array([1, 2], dtype=int32)
    """
    momentum_weight(jnp.ones(()), momentum)
    of_batch = local.mean_loss(loss)

    def local_update(params, client_state, data, *, key):
        trained, metrics = local.train(of_batch, params, data, training, key=key)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        work = momentum_weight(metrics.num_steps.astype(dtype), momentum)
        safe = jnp.where(work > 0, work, 1)
        direction = jax.tree.map(lambda y, x: (y - x) / safe.astype(x.dtype), trained, params)
        return Normalized(direction, work), client_state, metrics

    def apply(params, update, state, *, key):
        del key
        moved = jax.tree.map(
            lambda x, d: x + update.work.astype(x.dtype) * d, params, update.direction
        )
        return moved, state

    def expects(params):
        return Normalized(params, jnp.zeros((), jnp.result_type(*jax.tree.leaves(params))))

    return rounds.compose(
        local_update,
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean(),
        server=protocol.ServerUpdate(lambda _: (), apply, expects),
        chunk_size=chunk_size,
    )
