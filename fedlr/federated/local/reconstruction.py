"""The local updates of reconstruction: gradient steps on a data misfit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from fedlr import _checks, _precision, masking, operators
from fedlr.federated import protocol

__all__ = [
    "ReconstructionMetrics",
    "gradient_step",
    "initial_step_size",
    "operator_norm",
    "projected_gradient",
]


class ReconstructionMetrics(NamedTuple):
    """Record of a gradient step on a data misfit.

    Attributes:
        loss: ``1/2 ||A w - b||^2`` at the received image w, over the present entries, shape ().
        residual_norm: ``||A w - b||``, shape ().
    """

    loss: Float[Array, ""]
    residual_norm: Float[Array, ""]


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
