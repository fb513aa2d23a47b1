"""How the server moves its params once an update is there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import PyTree

from fedlr import _checks, lowrank
from fedlr.federated import protocol

__all__ = ["accumulate_low_rank", "from_optax", "keep", "of_values", "reinit", "reinit_subtract"]

Restart = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


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


def reinit(base: PyTree, factors: PyTree, fresh: PyTree) -> tuple[PyTree, PyTree]:
    """Merge the factors and go on with fresh ones: ``W + s U D`` and (U', D').

    The model stays the same if the product of the fresh factors is zero.

    Args:
        base: The model W.
        factors: Its low-rank updates (U, D).
        fresh: Newly drawn ones (U', D').

    Returns:
        The new model and its updates.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import servers
        >>> old = lowrank.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> new = lowrank.LowRank(jnp.zeros((1, 1)), jnp.ones((1, 1)))
        >>> servers.reinit(jnp.ones((1, 1)), old, new)[0]
        Array([[2.]], dtype=float32)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371.
    """
    return lowrank.merge(base, factors), fresh


def keep(base: PyTree, factors: PyTree, fresh: PyTree) -> tuple[PyTree, PyTree]:
    """Merge the factors and go on with them: the model moves by ``s U D`` at once.

    Args:
        base: The model W.
        factors: Its low-rank updates (U, D).
        fresh: Newly drawn ones, not used.

    Returns:
        The new model ``W + s U D``, and (U, D).

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import servers
        >>> old = lowrank.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> base, factors = servers.keep(jnp.ones((1, 1)), old, old)
        >>> lowrank.merge(base, factors)
        Array([[3.]], dtype=float32)

    Reference:
        The published code of FedLoRU, arXiv 2409.12371.
    """
    del fresh
    return lowrank.merge(base, factors), factors


def reinit_subtract(base: PyTree, factors: PyTree, fresh: PyTree) -> tuple[PyTree, PyTree]:
    """Merge, go on with fresh factors, and take their product off: ``W + s U D - s U' D'``.

    The model stays the same whatever the fresh factors are.

    Args:
        base: The model W.
        factors: Its low-rank updates (U, D).
        fresh: Newly drawn ones (U', D').

    Returns:
        The new model and its updates.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import servers
        >>> old = lowrank.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> new = lowrank.LowRank(2 * jnp.ones((1, 1)), jnp.ones((1, 1)))
        >>> lowrank.merge(*servers.reinit_subtract(jnp.ones((1, 1)), old, new))
        Array([[2.]], dtype=float32)
    """
    taken = jax.tree.map(
        lambda update: lowrank.LowRank(-update.up, update.down, update.scale),
        fresh,
        is_leaf=lambda node: isinstance(node, lowrank.LowRank),
    )
    return lowrank.merge(lowrank.merge(base, factors), taken), fresh


def accumulate_low_rank(
    every: int | None,
    *,
    restart: Restart = reinit,
    start: lowrank.Start = lowrank.zero_up,
) -> protocol.ServerUpdate:
    """Build the server of FedLoRU: average the factors, and merge them every so many rounds.

        U <- U + dU,   D <- D + dD,   rest <- rest + d rest,   and if t % every == 0: restart

    Args:
        every: Rounds between two accumulations, *static*; None never accumulates (FedLoRA).
        restart: ``(base, factors, fresh) -> (base, factors)``: `reinit`, `keep` or
            `reinit_subtract`.
        start: How fresh factors are drawn, as in `lowrank.init`: one draw, which all clients get.

    Returns:
        A server update for `lowrank.Adapted` params that takes `lowrank.Trainable` differences.

    Raises:
        ValueError: If `every` is not None or a positive integer.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import servers
        >>> server = servers.accumulate_low_rank(1)
        >>> model = lowrank.adapt(jnp.zeros((8, 6)), 1, key=jax.random.key(0))
        >>> ones = jax.tree.map(jnp.ones_like, lowrank.trainable(model))
        >>> model, _ = server.apply(model, ones, (), key=jax.random.key(1))
        >>> float(model.factors.up.max()), bool((model.base != 0).all())
        (0.0, True)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371; `keep` and the draws as in its published code.
    """
    if every is not None:
        _checks.check_count("accumulate_low_rank", "every", every)

    def init(params):
        del params
        return ()

    def apply(params, update, state, *, key):
        factors, rest = jax.tree.map(jnp.add, lowrank.trainable(params), update)
        base = lowrank.replace_rest(params.base, rest)
        done = params.round + 1
        if every is not None:
            base, factors = lax.cond(
                done % every == 0,
                lambda base, factors: restart(
                    base, factors, lowrank.redraw(factors, key=key, start=start)
                ),
                lambda base, factors: (base, factors),
                base,
                factors,
            )
        return lowrank.Adapted(base, factors, done), state

    return protocol.ServerUpdate(init, apply, lowrank.trainable)


def of_values(server: protocol.ServerUpdate) -> protocol.ServerUpdate:
    """Let a server of differences take trained values, see `local.trained_values`.

    Args:
        server: A server update for `lowrank.Adapted` params that takes `lowrank.Trainable`
            differences, e.g. `accumulate_low_rank`.

    Returns:
        The same for the values that the differences lead to.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.federated import servers
        >>> server = servers.of_values(servers.accumulate_low_rank(None))
        >>> model = lowrank.adapt(jnp.zeros((8, 6)), 1, key=jax.random.key(0))
        >>> ones = jax.tree.map(jnp.ones_like, lowrank.trainable(model))
        >>> model, _ = server.apply(model, ones, (), key=jax.random.key(1))
        >>> bool(jnp.allclose(model.factors.down, 1))
        True
    """

    def apply(params, update, state, *, key):
        difference = jax.tree.map(jnp.subtract, update, lowrank.trainable(params))
        return server.apply(params, difference, state, key=key)

    return server._replace(apply=apply)
