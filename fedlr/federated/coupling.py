"""Servers for one image per client under a known linear coupling.

The images ``w_1, ..., w_N`` are stacked along a leading axis and have to satisfy

    r(w) = sum_{j<N} c_j w_j - w_N = 0,        c~ = (c_1, ..., c_{N-1}, -1)

Every operation here acts on each entry alone. Without a bound on the entries it is linear in the
images, so it can be applied to the cores of a joint orthonormal basis as well.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jaxtyping import Array, Float, Int, PyTree

from fedlr import _checks, masking
from fedlr.federated import protocol

__all__ = [
    "Builder",
    "CoupledMetrics",
    "augmented_lagrangian",
    "check_satisfiable",
    "constraint_residual",
    "couple",
    "couple_with_multiplier",
    "exact_projection",
    "project_coupled",
    "proximal_coupling",
    "relative_norm",
    "relative_violation",
    "round_info",
    "signed_coefficients",
]


class Builder(Protocol):
    """Build the server of a coupling, as every builder below does, or a partial of one."""

    def __call__(
        self, coefficients: Float[Array, " others"], *, lower: float | None
    ) -> protocol.ServerUpdate:
        """Return the server of these coefficients, which clips at `lower`."""
        ...


class CoupledMetrics(NamedTuple):
    """Record of a round of coupled reconstruction, `RoundInfo.metrics`.

    Attributes:
        residual_norm: ``||A_i w_i - b_i||`` of the images that entered, shape (clients,).
        violation: ``||r(w)|| / ||w_N||`` of these images as by `relative_norm`, the same number for
            every client, shape (clients,): 0 for zero images.
        change: ``||w_i+ - w_i|| / ||w_i+||`` as by `relative_norm`, how far the round moved the
            images, shape (clients,). It goes to zero where the run settles; it is infinite where
            the round brought an image to zero, and 1 where it started from zero.
    """

    residual_norm: Float[Array, " clients"]
    violation: Float[Array, " clients"]
    change: Float[Array, " clients"]


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
    signed = signed_coefficients("constraint_residual", coefficients, stacked)
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
    signed = signed_coefficients("couple", coefficients, stacked)
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
    signed = signed_coefficients("couple_with_multiplier", coefficients, stacked)
    _checks.check_shape("couple_with_multiplier", "multiplier", multiplier, stacked.shape[1:])
    penalty = jnp.asarray(penalty, stacked.dtype)
    pull = multiplier + penalty * constraint_residual(coefficients, stacked)
    pull = pull / (1.0 + penalty * jnp.sum(signed**2))
    coupled = _clip(stacked - _column(signed, stacked) * pull[None], lower)
    return coupled, multiplier + penalty * constraint_residual(coefficients, coupled)


def project_coupled(
    coefficients: Float[Array, " others"], stacked: Array, *, lower: float | None = 0.0
) -> Array:
    """Project a stack of images onto those that satisfy the coupling and a lower bound.

        argmin_w sum_i ||w_i - z_i||^2   subject to   r(w) = 0,   w_i >= lower

    Entry by entry ``w_i = max(z_i - t c~_i, lower)`` with t the root of ``sum_i c~_i w_i``, which
    falls with t and is linear between the points ``(z_i - lower) / c~_i`` where a w_i meets the
    bound. The two of these points that enclose the root are found by trying all of them.

    Args:
        coefficients: c, shape (N - 1,).
        stacked: Images z, shape (N, ...).
        lower: Lower bound of every entry; None for none, the projection of `couple` with an
            infinite penalty.

    Returns:
        The projection, shape (N, ...).

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, `stacked` is not float32 or float64, or
            no non-zero w_N satisfies the coupling (`check_satisfiable`).

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> coupling.project_coupled(jnp.array([1.0]), jnp.array([[3.0, -3.0], [1.0, 1.0]]))
        Array([[2., 0.],
               [2., 0.]], dtype=float32)
    """
    if lower is None:
        return couple(coefficients, stacked, penalty=jnp.inf)
    check_satisfiable("project_coupled", coefficients, lower)
    signed = _column(signed_coefficients("project_coupled", coefficients, stacked), stacked)
    bound = jnp.asarray(lower, stacked.dtype)
    above, offset = stacked - bound, bound * jnp.sum(signed)
    acts = signed != 0
    points = jnp.where(acts, above / jnp.where(acts, signed, 1), 0)

    def enclose(interval, point):
        low, high = interval
        value = jnp.sum(signed * jnp.maximum(above - point[None] * signed, 0), axis=0) + offset
        low = jnp.where(value >= 0, jnp.maximum(low, point), low)
        return (low, jnp.where(value <= 0, jnp.minimum(high, point), high)), None

    everywhere = jnp.full_like(points[0], jnp.inf)
    (low, high), _ = lax.scan(enclose, (-everywhere, everywhere), lax.stop_gradient(points))
    # Between the two points the same entries are free, so the root is that of one linear function.
    free = acts & jnp.where(signed > 0, points >= high[None], points <= low[None])
    slope = jnp.sum(jnp.where(free, signed**2, 0), axis=0)
    value = jnp.sum(jnp.where(free, signed * above, 0), axis=0) + offset
    root = jnp.where(slope > 0, value / jnp.where(slope > 0, slope, 1), jnp.clip(0, low, high))
    return bound + jnp.maximum(above - root[None] * signed, 0)


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
        signed_coefficients("proximal_coupling", coefficients, params)
        return ()

    def apply(params, update, state, *, key):
        del key
        return _clip(couple(coefficients, params + update, penalty=penalty), lower), state

    return protocol.ServerUpdate(init, apply)


def exact_projection(
    coefficients: Float[Array, " others"], *, lower: float | None = 0.0
) -> protocol.ServerUpdate:
    """Build the server of FedPGD: move every image, then `project_coupled`.

    With the projected gradient step of the clients but without their clip this is projected
    gradient descent on the sum of the misfits over all images that satisfy the coupling.

    Args:
        coefficients: c, shape (N - 1,).
        lower: Lower bound of every entry; None for none.

    Returns:
        A server update without state. Its params and update are stacked over the clients, shape
        (N, ...).

    Raises:
        ValueError: While tracing, as `project_coupled` does.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> server = coupling.exact_projection(jnp.array([1.0]))
        >>> images = jnp.zeros((2, 1))
        >>> update = jnp.array([[3.0], [1.0]])
        >>> server.apply(images, update, server.init(images), key=jax.random.key(0))[0]
        Array([[2.],
               [2.]], dtype=float32)

    Reference:
        arXiv 2501.05642 names FedPGD as a rival that solves a quadratic program on the server;
        the closed form here is derived.
    """

    def init(params):
        signed_coefficients("exact_projection", coefficients, params)
        return ()

    def apply(params, update, state, *, key):
        del key
        return project_coupled(coefficients, params + update, lower=lower), state

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
        signed_coefficients("augmented_lagrangian", coefficients, params)
        return jnp.zeros_like(params[0])

    def apply(params, update, state, *, key):
        del key
        return couple_with_multiplier(
            coefficients, params + update, state, penalty=penalty, lower=lower
        )

    return protocol.ServerUpdate(init, apply)


def check_satisfiable(
    function: str, coefficients: Float[Array, " others"], lower: float | None
) -> None:
    """Refuse a coupling that only a zero w_N can satisfy, or nothing at all.

    Where no coefficient is positive, ``w_N = sum_j c_j w_j`` is at most 0 for images of at least 0.
    Traced coefficients are not checked.

    Args:
        function: Name of the caller, for the message.
        coefficients: c, shape (N - 1,).
        lower: Lower bound of the images; None for none.

    Raises:
        ValueError: If a coefficient is NaN or infinite, or none is positive and `lower` is not
            negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> coupling.check_satisfiable("example", jnp.array([0.5, -0.2]), 0.0)
    """
    if isinstance(coefficients, core.Tracer):
        return
    values = np.asarray(coefficients)
    if not np.isfinite(values).all():
        raise _checks.fail(function, f"coefficients {values.tolist()}", "finite numbers")
    if values.size and lower is not None and lower >= 0 and not (values > 0).any():
        got = f"coefficients {values.tolist()} for images of at least {lower}"
        raise _checks.fail(function, got, "a positive one: no non-zero w_N satisfies this coupling")


def signed_coefficients(
    function: str, coefficients: Float[Array, " others"], stacked: Array
) -> Float[Array, " clients"]:
    """Return c~ = (c_1, ..., c_{N-1}, -1) in the dtype of the images.

    Args:
        function: Name of the caller, for the message.
        coefficients: c, shape (N - 1,).
        stacked: Images or cores, shape (N, ...).

    Returns:
        c~, shape (N,).

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, or `stacked` is not float32 or float64.
    """
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


def relative_norm(part: Array, whole: Array) -> Float[Array, ""]:
    """Compute ``||part|| / ||whole||`` with a finite gradient everywhere.

    Args:
        part: Array of any shape.
        whole: Array of any shape.

    Returns:
        The ratio, shape (). Where `whole` is zero it is 0 if `part` is zero too, else infinite,
        with a zero gradient. It is NaN if either array holds NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> one, zero = jnp.ones(4), jnp.zeros(4)
        >>> [float(coupling.relative_norm(one, whole)) for whole in (2 * one, zero)]
        [0.5, inf]
        >>> float(coupling.relative_norm(zero, zero))
        0.0
    """
    # Not jnp.linalg.norm, whose gradient at zero is NaN and would reach all that a run records.
    everything = jnp.array(True)
    scale = masking.masked_norm(whole, everything)
    norm = masking.masked_norm(part, everything)
    is_zero = scale == 0
    return jnp.where(
        is_zero, jnp.where(norm > 0, jnp.inf, norm), norm / jnp.where(is_zero, 1, scale)
    )


def relative_violation(coefficients: Float[Array, " others"], stacked: Array) -> Float[Array, ""]:
    """Compute ``||r(w)|| / ||w_N||`` as by `relative_norm`: 0 for zero images.

    Args:
        coefficients: c, shape (N - 1,).
        stacked: Images, or their cores in one orthonormal basis, shape (N, ...).

    Returns:
        The relative violation, shape (). Its gradient is finite, at zero images too.

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, or `stacked` is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling
        >>> coupling.relative_violation(jnp.ones(1), jnp.array([[3.0], [1.0]]))
        Array(2., dtype=float32)
    """
    return relative_norm(constraint_residual(coefficients, stacked), stacked[-1])


def round_info(
    coefficients: Float[Array, " others"],
    before: Array,
    after: Array,
    metrics: PyTree,
    sent: Int[Array, " clients"],
    received: Int[Array, " clients"],
) -> protocol.RoundInfo:
    """Make the record of a round of coupled reconstruction.

    Args:
        coefficients: c, shape (N - 1,).
        before: The images that entered the round, shape (N, ...).
        after: The images that left it, shape (N, ...).
        metrics: Stacked metrics of the clients with fields `loss` and `residual_norm`, shape (N,)
            (`local.ReconstructionMetrics`).
        sent: Bytes every client sent, int32, shape (N,).
        received: Bytes every client received, int32, shape (N,).

    Returns:
        A RoundInfo with weights 1 and `CoupledMetrics`.

    Raises:
        ValueError: If there are not N - 1 > 0 coefficients, or `before` is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling, local
        >>> images, two = jnp.array([[3.0], [1.0]]), jnp.full(2, 4, jnp.int32)
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.zeros(2))
        >>> info = coupling.round_info(jnp.ones(1), images, 2 * images, metrics, two, two)
        >>> info.metrics.violation, info.metrics.change
        (Array([2., 2.], dtype=float32), Array([0.5, 0.5], dtype=float32))
    """
    violation = relative_violation(coefficients, before)
    change = jax.vmap(relative_norm)(after - before, after)
    return protocol.RoundInfo(
        losses=metrics.loss,
        weights=jnp.ones_like(metrics.loss),
        uplink_bytes=sent,
        downlink_bytes=received,
        metrics=CoupledMetrics(
            metrics.residual_norm, jnp.broadcast_to(violation, metrics.loss.shape), change
        ),
    )


def _column(signed, stacked):
    """Reshape c~ so that it broadcasts along the client axis."""
    return signed.reshape(-1, *[1] * (stacked.ndim - 1))


def _clip(stacked, lower):
    return stacked if lower is None else jnp.maximum(stacked, jnp.asarray(lower, stacked.dtype))
