"""Servers for one image per client under a known linear coupling.

The images ``w_1, ..., w_N`` are stacked along a leading axis and have to satisfy

    r(w) = sum_{j<N} c_j w_j - w_N = 0,        c~ = (c_1, ..., c_{N-1}, -1)

Every operation here is linear in the images and acts on each entry alone (without a clip), so it
can be applied to the cores of a joint orthonormal basis as well.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from fedlr import _checks, masking
from fedlr.federated import protocol

__all__ = [
    "Builder",
    "CoupledMetrics",
    "augmented_lagrangian",
    "constraint_residual",
    "couple",
    "couple_with_multiplier",
    "proximal_coupling",
    "round_info",
]


class Builder(Protocol):
    """Build the server of a coupling: `proximal_coupling`, `augmented_lagrangian`, or partials."""

    def __call__(
        self, coefficients: Float[Array, " others"], *, lower: float | None
    ) -> protocol.ServerUpdate:
        """Return the server of these coefficients, which clips at `lower`."""
        ...


class CoupledMetrics(NamedTuple):
    """Record of a round of coupled reconstruction, `RoundInfo.metrics`.

    Attributes:
        residual_norm: ``||A_i w_i - b_i||`` of the images that entered, shape (clients,).
        violation: ``||r(w)|| / ||w_N||`` of these images, the same number for every client (0 for
            zero images), shape (clients,).
    """

    residual_norm: Float[Array, " clients"]
    violation: Float[Array, " clients"]


def constraint_residual(coefficients: Float[Array, " others"], stacked: Array) -> Array:
    """Compute how far a stack of images is from the coupling.

        r(w) = sum_{j<N} c_j w_j - w_N

    Args:
        coefficients: c, shape (N - 1,).
        stacked: Images or cores, shape (N, ...).

    Returns:
        The residual, shape of one image.

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, or `stacked` is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> images = jnp.array([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])
        >>> coupling.constraint_residual(jnp.array([0.5, 0.5]), images)
        Array([0., 1.], dtype=float32)
    """
    signed = _signed("constraint_residual", coefficients, stacked)
    return jnp.sum(_column(signed, stacked) * stacked, axis=0)


def couple(
    coefficients: Float[Array, " others"],
    stacked: Array,
    *,
    penalty: Float[Array, ""] | float = 1.0,
) -> Array:
    """Apply the proximal map of the quadratic penalty on the coupling.

        w_i = z_i - gamma c~_i r(z),   gamma = penalty / (1 + penalty ||c~||^2)

    This minimizes ``1/2 sum_i ||w_i - z_i||^2 + penalty/2 ||r(w)||^2``. With penalty infinity it is
    the orthogonal projection onto ``r(w) = 0``.

    Args:
        coefficients: c, shape (N - 1,).
        stacked: Images or cores z, shape (N, ...).
        penalty: The product eta rho of step size and penalty weight, traced; may be infinite.

    Returns:
        The coupled stack, shape (N, ...).

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, or `stacked` is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> coupling.couple(jnp.array([1.0]), jnp.array([[3.0], [1.0]]), penalty=jnp.inf)
        Array([[2.],
               [2.]], dtype=float32)

    Reference:
        arXiv 2501.05642 couples by a gradient step on the same penalty; the proximal form is
        stable for every penalty.
    """
    signed = _signed("couple", coefficients, stacked)
    gamma = 1.0 / (1.0 / jnp.asarray(penalty, stacked.dtype) + jnp.sum(signed**2))
    residual = constraint_residual(coefficients, stacked)
    return stacked - gamma * _column(signed, stacked) * residual[None]


def couple_with_multiplier(
    coefficients: Float[Array, " others"],
    stacked: Array,
    multiplier: Array,
    *,
    penalty: Float[Array, ""] | float = 1.0,
    lower: float | None = None,
) -> tuple[Array, Array]:
    """Do one step of the augmented Lagrangian of the coupling.

        w_i = P(z_i - c~_i (y + penalty r(z)) / (1 + penalty ||c~||^2)),   y+ = y + penalty r(w)

    Here y is the multiplier times the step size of the clients. It is linear in (z, y) apart from
    the clip P, so on cores it holds for y expressed in the same basis.

    Args:
        coefficients: c, shape (N - 1,).
        stacked: Images or cores z, shape (N, ...).
        multiplier: y, shape of one image.
        penalty: The product eta rho, traced, finite.
        lower: Lower bound of every entry, applied before the multiplier moves; None does not clip.

    Returns:
        The coupled stack, shape (N, ...), and the new multiplier.

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, `stacked` is not float32 or float64, or
            the multiplier does not have the shape of one image.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> images, multiplier = jnp.array([[3.0], [1.0]]), jnp.zeros(1)
        >>> coupling.couple_with_multiplier(jnp.array([1.0]), images, multiplier, penalty=0.5)
        (Array([[2.5],
               [1.5]], dtype=float32), Array([0.5], dtype=float32))

    Reference:
        arXiv 2501.05642, FIRM+; the formulas here are derived from the augmented Lagrangian.
    """
    signed = _signed("couple_with_multiplier", coefficients, stacked)
    _checks.check_shape("couple_with_multiplier", "multiplier", multiplier, stacked.shape[1:])
    penalty = jnp.asarray(penalty, stacked.dtype)
    pull = multiplier + penalty * constraint_residual(coefficients, stacked)
    pull = pull / (1.0 + penalty * jnp.sum(signed**2))
    coupled = _clip(stacked - _column(signed, stacked) * pull[None], lower)
    return coupled, multiplier + penalty * constraint_residual(coefficients, coupled)


def proximal_coupling(
    coefficients: Float[Array, " others"],
    *,
    penalty: Float[Array, ""] | float = 1.0,
    lower: float | None = None,
) -> protocol.ServerUpdate:
    """Build the server of FIRM: move every image, then `couple` them.

        z = params + update,   w = P(couple(z)),   P(w) = max(w, lower)

    Args:
        coefficients: c, shape (N - 1,).
        penalty: The product eta rho, traced; may be infinite.
        lower: Lower bound of every entry, applied last; None does not clip.

    Returns:
        A server update without state. Its params and update are stacked over the clients, shape
        (N, ...).

    Raises:
        ValueError: While tracing, as `couple` does.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> server = coupling.proximal_coupling(jnp.array([1.0]), penalty=jnp.inf)
        >>> images = jnp.zeros((2, 1))
        >>> update = jnp.array([[3.0], [1.0]])
        >>> server.apply(images, update, server.init(images), key=jax.random.key(0))[0]
        Array([[2.],
               [2.]], dtype=float32)
    """

    def init(params):
        _signed("proximal_coupling", coefficients, params)
        return ()

    def apply(params, update, state, *, key):
        del key
        return _clip(couple(coefficients, params + update, penalty=penalty), lower), state

    return protocol.ServerUpdate(init, apply)


def augmented_lagrangian(
    coefficients: Float[Array, " others"],
    *,
    penalty: Float[Array, ""] | float = 1.0,
    lower: float | None = None,
) -> protocol.ServerUpdate:
    """Build the server of FIRM+: `couple_with_multiplier` with the multiplier in the state.

    The multiplier starts at zero, has the shape of one image and is never sent.

    Args:
        coefficients: c, shape (N - 1,).
        penalty: The product eta rho, traced, finite.
        lower: Lower bound of every entry, applied before the multiplier moves; None does not clip.

    Returns:
        A server update whose state is the multiplier y. Its params and update are stacked over the
        clients, shape (N, ...).

    Raises:
        ValueError: While tracing, as `couple_with_multiplier` does.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> server = coupling.augmented_lagrangian(jnp.array([1.0]), penalty=0.5)
        >>> images = jnp.zeros((2, 1))
        >>> update = jnp.array([[3.0], [1.0]])
        >>> server.apply(images, update, server.init(images), key=jax.random.key(0))[1]
        Array([0.5], dtype=float32)
    """

    def init(params):
        _signed("augmented_lagrangian", coefficients, params)
        return jnp.zeros_like(params[0])

    def apply(params, update, state, *, key):
        del key
        return couple_with_multiplier(
            coefficients, params + update, state, penalty=penalty, lower=lower
        )

    return protocol.ServerUpdate(init, apply)


def round_info(
    coefficients: Float[Array, " others"],
    stacked: Array,
    metrics: PyTree,
    sent: Int[Array, " clients"],
    received: Int[Array, " clients"],
) -> protocol.RoundInfo:
    """Make the record of a round of coupled reconstruction.

    Args:
        coefficients: c, shape (N - 1,).
        stacked: The images that entered the round, or their cores in one orthonormal basis, shape
            (N, ...).
        metrics: Stacked metrics of the clients with fields `loss` and `residual_norm`, shape (N,)
            (`local.ReconstructionMetrics`).
        sent: Bytes every client sent, int32, shape (N,).
        received: Bytes every client received, int32, shape (N,).

    Returns:
        A RoundInfo with weights 1 and `CoupledMetrics`.

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, or `stacked` is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling, local
        >>> images, two = jnp.array([[3.0], [1.0]]), jnp.full(2, 4, jnp.int32)
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.zeros(2))
        >>> coupling.round_info(jnp.ones(1), images, metrics, two, two).metrics.violation
        Array([2., 2.], dtype=float32)
    """
    # Not jnp.linalg.norm, whose gradient at zero is NaN and would reach all that a run records.
    everything = jnp.array(True)
    violation = masking.masked_norm(constraint_residual(coefficients, stacked), everything)
    scale = masking.masked_norm(stacked[-1], everything)
    violation = jnp.where(scale > 0, violation / jnp.where(scale > 0, scale, 1.0), 0.0)
    return protocol.RoundInfo(
        losses=metrics.loss,
        weights=jnp.ones_like(metrics.loss),
        uplink_bytes=sent,
        downlink_bytes=received,
        metrics=CoupledMetrics(
            metrics.residual_norm, jnp.broadcast_to(violation, metrics.loss.shape)
        ),
    )


def _signed(function, coefficients, stacked):
    """Return c~ = (c_1, ..., c_{N-1}, -1) in the dtype of the images."""
    _checks.check_floating(function, stacked=stacked)
    num_clients = jnp.shape(stacked)[0]
    if num_clients < 2:
        raise _checks.fail(function, f"{num_clients} client", "at least 2 to couple")
    coefficients = jnp.asarray(coefficients, stacked.dtype)
    shape = coefficients.shape
    if shape != (num_clients - 1,):
        expected = f"{num_clients - 1} coefficients for {num_clients} clients"
        raise _checks.fail(function, f"coefficients of shape {shape}", expected)
    return jnp.append(coefficients, jnp.asarray(-1, stacked.dtype))


def _column(signed, stacked):
    """Reshape c~ so that it broadcasts along the client axis."""
    return signed.reshape(-1, *[1] * (stacked.ndim - 1))


def _clip(stacked, lower):
    return stacked if lower is None else jnp.maximum(stacked, jnp.asarray(lower, stacked.dtype))
