"""Local training: steps of any optax optimizer on the batches of one client.

Every method trains by the same loop, `train`. What a method adds to the loss of the data (a
proximal term, control variates) is a function of the parameters, `extra`, whose gradient joins that
of the loss before the optimizer sees it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from fedlr import _checks, convolution
from fedlr.federated import protocol

__all__ = [
    "LocalMetrics",
    "Training",
    "epochs",
    "local_proximal",
    "local_sgd",
    "mean_loss",
    "train",
]


class Training(NamedTuple):
    """How a client trains.

    Attributes:
        optimizer: Any optax optimizer; it starts afresh in every round.
        num_steps: Number of steps, *static*.
        batch_size: Examples per step, *static*; None takes all examples in every step.
        active_steps: Function of the number of present examples, ``(count) -> int32 scalar``, that
            says how many of the steps a client does, e.g. `epochs`; None for all of them.
    """

    optimizer: optax.GradientTransformation
    num_steps: int
    batch_size: int | None = None
    active_steps: Callable[[Int[Array, ""]], Int[Array, ""]] | None = None


class LocalMetrics(NamedTuple):
    """Record of a local training.

    Attributes:
        loss: Loss at the received params, on the first batch, shape ().
        num_examples: Number of present examples, int32, shape ().
        num_steps: Number of steps done, int32, shape ().
        aux: What else the loss returned with that value; () where it returns nothing else.
    """

    loss: Float[Array, ""]
    num_examples: Int[Array, ""]
    num_steps: Int[Array, ""]
    aux: PyTree = ()


def epochs(count: int, batch_size: int) -> Callable[[Int[Array, ""]], Int[Array, ""]]:
    """Build the number of steps that `count` passes over a client's own examples take.

    The steps beyond them are computed and thrown away, since all clients share one program: give
    `Training.num_steps` that of the largest client, and know that the work is that of the largest.

    Args:
        count: Passes over the data, *static*.
        batch_size: Examples per step, *static*.

    Returns:
        A function for `Training.active_steps`.

    Raises:
        ValueError: If a number is not a positive integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local
        >>> int(local.epochs(5, batch_size=16)(jnp.int32(33)))
        15
    """
    _checks.check_count("epochs", "count", count)
    _checks.check_count("epochs", "batch_size", batch_size)

    def active_steps(num_examples):
        return count * ((num_examples + batch_size - 1) // batch_size)

    return active_steps


def mean_loss(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
) -> Callable[[PyTree, PyTree, Array, Array], Float[Array, ""]]:
    """Make the loss of a batch, its mean over the present examples, from that of one example.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar``.

    Returns:
        ``(params, inputs, targets, valid) -> scalar`` for `train`; 0 if no example is present.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local
        >>> batch = local.mean_loss(lambda w, x, y: (w * x - y) ** 2)
        >>> valid = jnp.array([True, False])
        >>> batch(jnp.float32(1.0), jnp.array([1.0, 2.0]), jnp.array([3.0, 9.0]), valid)
        Array(4., dtype=float32)
    """

    def of_batch(params, inputs, targets, valid):
        losses = jax.vmap(loss, in_axes=(None, 0, 0))(params, inputs, targets)
        total = jnp.sum(jnp.where(valid, losses, 0.0))
        return total / jnp.maximum(jnp.sum(valid, dtype=losses.dtype), 1.0)

    return of_batch


def train(
    loss: Callable[[PyTree, PyTree, Array, Array], Any],
    start: PyTree,
    data: protocol.ClientData,
    training: Training,
    *,
    key: Key[Array, ""],
    extra: Callable[[PyTree], Float[Array, ""]] | None = None,
    has_aux: bool = False,
    function: str = "train",
) -> tuple[PyTree, LocalMetrics]:
    """Train on the data of ONE client; the loop of all local updates.

        y_0 = start,   y_{t+1} = y_t - optimizer(grad [loss(y_t, B_t) + extra(y_t)])

    Batches read one random order of the client's present examples, over and over, so that every
    client does the same number of steps without wasting work on padding; a client with fewer
    examples than the batch size uses all of them in every step. Masked examples may hold anything.
    Without any example nothing moves. On a CPU convolutions of the loss go by patches, see
    `convolution.for_loops`.

    Args:
        loss: Loss of a batch ``(params, inputs, targets, valid) -> scalar``, see `mean_loss`. Rows
            that are not `valid` repeat present examples and must not count.
        start: Parameters to start from; all that the gradient is taken of. What is frozen is held
            by `loss`.
        data: Data of one client: inputs and targets with a leading axis of examples, a mask of
            shape (samples,).
        training: The optimizer, steps and batches.
        key: Random key; only the order of the batches depends on it.
        extra: Term added to the loss, ``(params) -> scalar``; it is not part of the recorded loss.
        has_aux: Whether the loss returns ``(value, aux)`` with a pytree `aux` of arrays to record.
            *Static.*
        function: Name that the messages of errors begin with.

    Returns:
        The trained parameters, and the record.

    Raises:
        ValueError: If a number of steps or the batch size is not a positive integer, the mask is
            not bool of shape (samples,), or inputs and targets differ in their leading axes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(jnp.ones(2), jnp.array([1.0, 9.0]), jnp.array([True, False]))
        >>> loss = local.mean_loss(lambda w, x, y: (w * x - y) ** 2 / 2)
        >>> plan = local.Training(optax.sgd(0.5), num_steps=2)
        >>> local.train(loss, jnp.float32(0.0), data, plan, key=jax.random.key(0))[0]
        Array(0.75, dtype=float32)
    """
    optimizer, num_steps, batch_size, active_steps = training
    _checks.check_count(function, "num_steps", num_steps)
    if batch_size is not None:
        _checks.check_count(function, "batch_size", batch_size)
    (num_samples,) = data.targets.shape[:1]
    _checks.check_mask(function, data.mask, (num_samples,))
    for leaf in jax.tree.leaves(data.inputs):
        if jnp.shape(leaf)[:1] != (num_samples,):
            got = f"inputs of shape {jnp.shape(leaf)} for {num_samples} targets"
            raise _checks.fail(function, got, f"a leading axis of {num_samples}")
    count = jnp.sum(data.mask, dtype=jnp.int32)
    if batch_size is None:
        rank = jnp.zeros(num_samples, jnp.float32)
    else:
        rank = jax.random.uniform(key, (num_samples,), jnp.float32)
    # Present examples first (the sort is stable, so a full batch keeps its order).
    order = jnp.argsort(jnp.where(data.mask, rank, jnp.inf)).astype(jnp.int32)
    slots = jnp.arange(num_samples if batch_size is None else min(batch_size, num_samples))
    slots = slots.astype(jnp.int32)
    valid = slots < count
    limit = num_steps if active_steps is None else jnp.minimum(active_steps(count), num_steps)
    limit = jnp.where(count > 0, jnp.asarray(limit, jnp.int32), 0)

    def rows(t):
        # Slots beyond the client's examples repeat a present one: no masked value is read.
        chosen = order[(t * slots.size + slots) % jnp.maximum(count, 1)]
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], (data.inputs, data.targets))

    # The steps are a loop, in which XLA's own convolutions are slow on a CPU.
    of_batch = convolution.for_loops(loss if has_aux else _without_aux(loss))

    def objective(params, batch):
        inputs, targets = batch
        value, aux = of_batch(params, inputs, targets, valid)
        return value if extra is None else value + extra(params), (value, aux)

    everything = rows(jnp.int32(0)) if batch_size is None else None

    def step(carry, t):
        current, optimizer_state = carry
        batch = rows(t) if everything is None else everything
        (_, record), gradient = jax.value_and_grad(objective, has_aux=True)(current, batch)
        # optax mixes its int32 step count with floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            update, new_state = optimizer.update(gradient, optimizer_state, current)
        moved = (optax.apply_updates(current, update), new_state)
        if active_steps is not None:
            moved = jax.tree.map(lambda new, old: jnp.where(t < limit, new, old), moved, carry)
        return moved, record

    carry = (start, optimizer.init(start))
    (trained, _), records = lax.scan(step, carry, jnp.arange(num_steps, dtype=jnp.int32))
    present = count > 0
    trained = jax.tree.map(lambda new, old: jnp.where(present, new, old), trained, start)
    value, aux = jax.tree.map(lambda x: jnp.where(present, x[0], jnp.zeros_like(x[0])), records)
    return trained, LocalMetrics(value, count, limit, aux)


def _without_aux(loss):
    def with_nothing(*args):
        return loss(*args), ()

    return with_nothing


def local_sgd(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int | None = None,
) -> protocol.LocalUpdate:
    """Build local training: `num_steps` of any optax optimizer on the client's own data.

        y_0 = x,   y_{t+1} = y_t - optimizer(grad mean_{b in B_t} loss(y_t, b)),   update = y_T - x

    `train` tells how batches are drawn. A client without any example sends zeros.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar``.
        optimizer: Any optax optimizer.
        num_steps: Number of local steps, *static*.
        batch_size: Examples per step, *static*; None takes all examples in every step.

    Returns:
        A local update for `protocol.ClientData` whose inputs and targets have a leading axis of
        examples and whose mask has shape (samples,). Its metrics are `LocalMetrics`; the client
        state is passed through.

    Raises:
        ValueError: If `num_steps` or `batch_size` is not a positive integer; while tracing, if the
            mask is not bool of shape (samples,).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.federated import local, protocol
        >>> mask = jnp.array([True, False])
        >>> data = protocol.ClientData(jnp.ones((2, 1)), jnp.array([1.0, 9.0]), mask)
        >>> update = local.local_sgd(
        ...     lambda w, x, y: jnp.sum(w * x - y) ** 2 / 2, optax.sgd(0.5), num_steps=1
        ... )
        >>> update(jnp.zeros(1), (), data, key=jax.random.key(0))[0]
        Array([0.5], dtype=float32)

    Reference:
        McMahan et al. 2017, arXiv 1602.05629, Algorithm 1, ClientUpdate. There a client runs whole
        epochs; here all clients run the same number of steps and the weights stay n_k.
    """
    return _training("local_sgd", loss, Training(optimizer, num_steps, batch_size), 0.0)


def local_proximal(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    strength: Float[Array, ""] | float,
    num_steps: int,
    batch_size: int | None = None,
) -> protocol.LocalUpdate:
    """Build local training that is held near the received params (FedProx).

        gradient of the loss + mu (y - x), before the momentum of the optimizer

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar``.
        optimizer: Any optax optimizer.
        strength: mu, from 0; 0 is `local_sgd`. Traced.
        num_steps: Number of local steps, *static*.
        batch_size: Examples per step, *static*; None takes all examples in every step.

    Returns:
        A local update as that of `local_sgd`. The proximal term is no part of the recorded loss.

    Raises:
        ValueError: As `local_sgd`, or if a concrete strength is negative.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(jnp.ones(1), jnp.ones(1), jnp.ones(1, bool))
        >>> update = local.local_proximal(
        ...     lambda w, x, y: (w * x - y) ** 2 / 2, optax.sgd(0.5), strength=1.0, num_steps=30
        ... )
        >>> round(float(update(jnp.float32(0.0), (), data, key=jax.random.key(0))[0]), 4)
        0.5

    Reference:
        Li et al. 2020, arXiv 1812.06127, Algorithm 2, with inexact minimization by the optimizer.
    """
    _checks.check_non_negative("local_proximal", "strength", strength)
    return _training("local_proximal", loss, Training(optimizer, num_steps, batch_size), strength)


def _training(function, loss, training, strength):
    """Train the received params, held near them where the strength is not 0."""
    _checks.check_count(function, "num_steps", training.num_steps)
    if training.batch_size is not None:
        _checks.check_count(function, "batch_size", training.batch_size)
    of_batch = mean_loss(loss)

    def update(params, client_state, data, *, key):
        def proximal(current):
            moves = jax.tree.map(lambda y, x: jnp.sum((y - x) ** 2), current, params)
            total = functools.reduce(jnp.add, jax.tree.leaves(moves))
            return jnp.asarray(strength, total.dtype) * total / 2

        is_plain = isinstance(strength, float) and strength == 0
        extra = None if is_plain else proximal
        trained, metrics = train(
            of_batch, params, data, training, key=key, extra=extra, function=function
        )
        difference = jax.tree.map(jnp.subtract, trained, params)
        return difference, client_state, metrics

    return update
