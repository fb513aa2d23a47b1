"""What one client does between receiving and sending: the local updates.

A local update is `(params, client_state, data, *, key) -> (update, client_state, metrics)`, written
for ONE client: no leaf of `data` has a client axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from fedlr import _checks, _precision, masking, operators
from fedlr.federated import protocol

__all__ = [
    "LocalMetrics",
    "ReconstructionMetrics",
    "gradient_step",
    "initial_step_size",
    "local_sgd",
    "operator_norm",
    "projected_gradient",
]


class LocalMetrics(NamedTuple):
    """Record of a local training.

    Attributes:
        loss: Loss at the received params, on the first batch, shape ().
        num_examples: Number of present examples, int32, shape ().
    """

    loss: Float[Array, ""]
    num_examples: Int[Array, ""]


class ReconstructionMetrics(NamedTuple):
    """Record of a gradient step on a data misfit.

    Attributes:
        loss: ``1/2 ||A w - b||^2`` at the received image w, over the present entries, shape ().
        residual_norm: ``||A w - b||``, shape ().
    """

    loss: Float[Array, ""]
    residual_norm: Float[Array, ""]


def local_sgd(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int | None = None,
) -> protocol.LocalUpdate:
    """Build local training: `num_steps` of any optax optimizer on the client's own data.

        y_0 = x,   y_{t+1} = y_t - optimizer(grad mean_{b in B_t} loss(y_t, b)),   update = y_T - x

    Batches read one random order of the client's present examples, over and over, so that every
    client does the same number of steps without wasting work on padding; a client with fewer
    examples than `batch_size` uses all of them in every step. The optimizer starts afresh in every
    round. A client without any example sends zeros. Masked examples may hold anything.

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
    _checks.check_count("local_sgd", "num_steps", num_steps)
    if batch_size is not None:
        _checks.check_count("local_sgd", "batch_size", batch_size)

    def update(params, client_state, data, *, key):
        (num_samples,) = data.targets.shape[:1]
        _checks.check_mask("local_sgd", data.mask, (num_samples,))
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

        def rows(t):
            # Slots beyond the client's examples repeat a present one: no masked value is read.
            chosen = order[(t * slots.size + slots) % jnp.maximum(count, 1)]
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], (data.inputs, data.targets))

        def mean_loss(params, batch):
            losses = jax.vmap(loss, in_axes=(None, 0, 0))(params, *batch)
            total = jnp.sum(jnp.where(valid, losses, 0.0))
            return total / jnp.maximum(jnp.sum(valid, dtype=losses.dtype), 1.0)

        everything = rows(jnp.int32(0)) if batch_size is None else None

        def step(carry, t):
            current, optimizer_state = carry
            batch = rows(t) if everything is None else everything
            value, gradient = jax.value_and_grad(mean_loss)(current, batch)
            # optax mixes its int32 step count with floats, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                step_update, optimizer_state = optimizer.update(gradient, optimizer_state, current)
            return (optax.apply_updates(current, step_update), optimizer_state), value

        carry = (params, optimizer.init(params))
        (trained, _), values = lax.scan(step, carry, jnp.arange(num_steps, dtype=jnp.int32))
        present = count > 0
        difference = jax.tree.map(
            lambda new, old: jnp.where(present, new - old, jnp.zeros_like(old)), trained, params
        )
        metrics = LocalMetrics(jnp.where(present, values[0], jnp.zeros_like(values[0])), count)
        return difference, client_state, metrics

    return update


@_precision.highest
def gradient_step(
    forward: Callable[[Array, PyTree], Array],
    image: Array,
    data: protocol.ClientData,
    step_size: Float[Array, ""] | float,
) -> tuple[Array, Float[Array, ""]]:
    """Do one gradient step on the data misfit of one client.

        w+ = w - step_size A^T (A w - b),   f(w) = 1/2 ||A w - b||^2 over the present entries

    The adjoint A^T is the vjp of `forward`.

    Args:
        forward: ``(image, inputs) -> prediction``, linear in the image.
        image: The image w, any shape.
        data: Data of one client. The shape of its mask is a leading part of the shape of
            `targets`; masked targets may hold anything, masked inputs any finite numbers.
        step_size: Step size; ``1 / ||A||_2^2`` is always stable.

    Returns:
        The new image, and ``||A w - b||`` at the image received, shape ().

    Raises:
        ValueError: If the image is not float32 or float64, the prediction does not have the shape
            and dtype of the targets, or the mask does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData((), jnp.array([3.0, 4.0]), jnp.array([True, True]))
        >>> image, residual_norm = local.gradient_step(lambda w, _: w, jnp.zeros(2), data, 0.5)
        >>> image, residual_norm
        (Array([1.5, 2. ], dtype=float32), Array(5., dtype=float32))
    """
    _checks.check_floating("gradient_step", image=image)
    prediction, adjoint = jax.vjp(lambda w: forward(w, data.inputs), image)
    residual = _residual("gradient_step", prediction, data)
    (gradient,) = adjoint(residual)
    step_size = jnp.asarray(step_size, image.dtype)
    return image - step_size * gradient, masking.masked_norm(residual, data.mask)


def projected_gradient(
    forward: Callable[[Array, PyTree], Array],
    *,
    step_size: Float[Array, ""] | float,
    lower: float | None = 0.0,
    proximal: Callable[[Array], Array] | None = None,
) -> protocol.LocalUpdate:
    """Build one projected gradient step on the data misfit, the local update of reconstruction.

        z = prox(P(w - step_size A^T (A w - b))),   P(w) = max(w, lower),   update = z - w

    Args:
        forward: ``(image, inputs) -> prediction``, linear in the image.
        step_size: Step size; `operator_norm` gives the largest ``||A_i||^2``, whose inverse is
            stable for every client.
        lower: Lower bound of every pixel; None does not clip.
        proximal: Function of an image applied after the clip, e.g. the prox of a regularizer.

    Returns:
        A local update for `protocol.ClientData`, masked as in `gradient_step`. Its metrics are
        `ReconstructionMetrics`; the client state is passed through.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData((), jnp.array([3.0, -4.0]), jnp.array([True, True]))
        >>> update = local.projected_gradient(lambda w, _: w, step_size=1.0)
        >>> update(jnp.zeros(2), (), data, key=jax.random.key(0))[0]
        Array([3., 0.], dtype=float32)

    Reference:
        arXiv 2501.05642 and arXiv 2502.02761: the client step of FIRM and of CompJF.
    """

    def update(params, client_state, data, *, key):
        del key
        moved, residual_norm = gradient_step(forward, params, data, step_size)
        if lower is not None:
            moved = jnp.maximum(moved, jnp.asarray(lower, moved.dtype))
        if proximal is not None:
            moved = proximal(moved)
        metrics = ReconstructionMetrics(residual_norm**2 / 2.0, residual_norm)
        return moved - params, client_state, metrics

    return update


@_precision.highest
def operator_norm(
    forward: Callable[[Array, PyTree], Array],
    clients: protocol.ClientData,
    image: Array,
    *,
    key: Key[Array, ""],
    num_iters: int = 40,
) -> Float[Array, ""]:
    """Estimate the largest squared operator norm of all clients by power iterations.

        L = max_i ||A_i||_2^2,   v <- A_i^T A_i v / ||A_i^T A_i v||

    Masked entries count as removed rows. The start is a random positive image. The estimate
    approaches L from below.

    Args:
        forward: ``(image, inputs) -> prediction``, linear in the image.
        clients: Data of all clients, with a leading client axis.
        image: An image of one client; only its shape and dtype are used.
        key: Random key.
        num_iters: Number of power iterations, *static*.

    Returns:
        The estimate of L, shape (). A gradient step of size 1 / L is stable for every client.

    Raises:
        ValueError: If `num_iters` is not a positive integer, or data and image do not fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(
        ...     jnp.array([2.0, 3.0]), jnp.zeros((2, 4)), jnp.ones((2, 4), bool)
        ... )
        >>> local.operator_norm(lambda w, s: s * w, data, jnp.zeros(4), key=jax.random.key(0))
        Array(9., dtype=float32)
    """
    _checks.check_count("operator_norm", "num_iters", num_iters)
    _checks.check_floating("operator_norm", image=image)
    start = jnp.abs(jax.random.normal(key, jnp.shape(image), jnp.result_type(image)))
    tiny = jnp.finfo(start.dtype).tiny

    def squared_norm(data):
        data = data._replace(targets=jnp.zeros_like(data.targets))

        def iterate(carry, _):
            vector, _ = carry
            prediction, adjoint = jax.vjp(lambda w: forward(w, data.inputs), vector)
            (image,) = adjoint(_residual("operator_norm", prediction, data))
            norm = jnp.sqrt(jnp.sum(image**2))
            return (image / jnp.maximum(norm, tiny), norm), None

        carry = (start / jnp.sqrt(jnp.sum(start**2)), jnp.zeros((), start.dtype))
        return lax.scan(iterate, carry, None, length=num_iters)[0][1]

    return jnp.max(lax.map(squared_norm, clients))


def initial_step_size(
    step_size: Float[Array, ""] | float | None,
    forward: Callable[[Array, PyTree], Array],
    clients: protocol.ClientData,
    image: Array,
    *,
    key: Key[Array, ""],
    function: str = "initial_step_size",
) -> Float[Array, ""]:
    """Check the forward model and return a given step size, or the largest that is stable for all.

        eta = 1 / max_i ||A_i||_2^2

    The model is checked by `operators.check_adjoint` with the inputs of the first client, unless
    something is traced.

    Args:
        step_size: Step size; None takes the formula, with `operator_norm`.
        forward: ``(image, inputs) -> prediction``, linear in the image.
        clients: Data of all clients, with a leading client axis.
        image: An image of one client; only its shape and dtype are used.
        key: Random key.
        function: Name that the message of the check begins with.

    Returns:
        The step size in the dtype of the image, shape (); 1 where no client has any data.

    Raises:
        ValueError: If the forward model is not linear or its adjoint does not match, and as
            `operator_norm`, if that is needed.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData((), jnp.zeros((2, 4)), jnp.ones((2, 4), bool))
        >>> key = jax.random.key(0)
        >>> local.initial_step_size(None, lambda w, _: 2 * w, data, jnp.zeros(4), key=key)
        Array(0.25, dtype=float32)
    """
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], clients.inputs)
    operators.check_adjoint(forward, image, first, key=key, function=function)
    if step_size is not None:
        return jnp.asarray(step_size, jnp.result_type(image))
    norm = operator_norm(forward, clients, image, key=key)
    is_zero = norm == 0
    return jnp.where(is_zero, 1.0, 1.0 / jnp.where(is_zero, 1.0, norm))


def _residual(function, prediction, data):
    """Return A w - b on the present entries and zero elsewhere."""
    targets = data.targets
    _checks.check_shape(function, "prediction", prediction, targets.shape)
    if prediction.dtype != targets.dtype:
        raise _checks.fail(function, f"prediction of dtype {prediction.dtype}", f"{targets.dtype}")
    present = masking.spread(data.mask, targets.shape, function=function)
    return jnp.where(present, prediction - targets, 0.0)
