"""When a run of rounds should stop, decided from the record of a round.

A stopping rule is a pure function `stop(info) -> bool scalar`, or a `Rule` where it needs to
remember earlier rounds. The record measures the state that *entered* the round, so that is the
state to keep when a rule fires. `fedlr.federated.simulate` does so.

The rules for inverse problems read the residual norms ``||A_i w_i - b_i||`` of all clients from
`info.metrics.residual_norm`, which every algorithm of reconstruction records.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedlr import _checks
from fedlr.federated import protocol

__all__ = [
    "Rule",
    "any_of",
    "as_rule",
    "discrepancy",
    "edge_noise_levels",
    "every_client",
    "noise_thresholds",
    "noisy_maximum_thresholds",
    "num_measurements",
    "stagnation",
]

Stop = Callable[[protocol.RoundInfo], Bool[Array, ""]]


class Rule(NamedTuple):
    """A stopping rule with a memory.

    Attributes:
        init: `() -> memory`, a pytree of arrays.
        update: `(info, memory) -> (stop, memory)` with a bool scalar.
    """

    init: Callable[[], Any]
    update: Callable[[protocol.RoundInfo, Any], tuple[Bool[Array, ""], Any]]


def as_rule(stop: Stop | Rule) -> Rule:
    """Give a plain function `stop(info)` the form of a rule with an empty memory.

    Args:
        stop: Function `stop(info)`, or a rule, which is returned as it is.

    Returns:
        A rule.
    """
    if isinstance(stop, Rule):
        return stop
    return Rule(lambda: (), lambda info, memory: (stop(info), memory))


def any_of(*rules: Stop | Rule) -> Rule:
    """Build the rule that stops as soon as one of several does.

    Args:
        *rules: Functions `stop(info)` and rules.

    Returns:
        A rule whose memory is the tuple of theirs.

    Raises:
        ValueError: If there is no rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import stopping
        >>> rule = stopping.any_of(lambda info: info < 1.0, lambda info: info > 5.0)
        >>> bool(rule.update(jnp.float32(9.0), rule.init())[0])
        True
    """
    if not rules:
        raise _checks.fail("any_of", "no rule", "at least one")
    parts = tuple(as_rule(rule) for rule in rules)

    def update(info, memory):
        results = [part.update(info, own) for part, own in zip(parts, memory, strict=True)]
        stops, memories = zip(*results, strict=True)
        return jnp.any(jnp.stack(stops)), memories

    return Rule(lambda: tuple(part.init() for part in parts), update)


def discrepancy(
    noise_levels: Float[Array, " clients"],
    measurements: Float[Array, " clients"],
    *,
    kappa: float = 1.0,
) -> Stop:
    """Build the pooled discrepancy principle, the rule to begin with in reconstruction.

        stop when  sum_i ||A_i w_i - b_i||^2 <= kappa^2 sum_i m_i s_i^2

    One decision for all clients. The paper lets each client compare its residual with a level taken
    from the maximum of the noisy data (`noisy_maximum_thresholds`). That overestimates the noise
    and stops too early, and under truncation single clients may never cross their level at all.

    Args:
        noise_levels: Standard deviation s_i of the noise, shape (clients,).
        measurements: Number m_i of measurements, shape (clients,) (`num_measurements`).
        kappa: Safety factor, from 1 to 1.05.

    Returns:
        A function `stop(info)`.

    Raises:
        ValueError: If the shapes are not equal; while tracing, if the residual norms have another
            shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol, stopping
        >>> stop = stopping.discrepancy(jnp.array([0.1, 0.1]), jnp.array([100.0, 100.0]))
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.array([1.2, 0.5]))
        >>> info = protocol.RoundInfo(jnp.zeros(2), jnp.ones(2), *[jnp.zeros(2, int)] * 2, metrics)
        >>> bool(stop(info))
        True
    """
    noise_levels, measurements = jnp.asarray(noise_levels), jnp.asarray(measurements)
    _checks.check_shape("discrepancy", "measurements", measurements, noise_levels.shape)
    limit = kappa**2 * jnp.sum(measurements.astype(noise_levels.dtype) * noise_levels**2)

    def stop(info):
        residual_norms = _residual_norms("discrepancy", info, noise_levels.shape)
        return jnp.sum(residual_norms**2) <= limit.astype(residual_norms.dtype)

    return stop


def every_client(thresholds: Float[Array, " clients"]) -> Stop:
    """Build the rule that stops once every client is at or below its own level.

        stop when  ||A_i w_i - b_i|| <= threshold_i  for all i

    Args:
        thresholds: One level per client, shape (clients,): `noise_thresholds`, or for the paper's
            rule `noisy_maximum_thresholds`.

    Returns:
        A function `stop(info)`.

    Raises:
        ValueError: While tracing, if the residual norms have another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol, stopping
        >>> stop = stopping.every_client(jnp.array([1.0, 1.0]))
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.array([1.2, 0.5]))
        >>> info = protocol.RoundInfo(jnp.zeros(2), jnp.ones(2), *[jnp.zeros(2, int)] * 2, metrics)
        >>> bool(stop(info))
        False
    """
    thresholds = jnp.asarray(thresholds)

    def stop(info):
        residual_norms = _residual_norms("every_client", info, thresholds.shape)
        return jnp.all(residual_norms <= thresholds.astype(residual_norms.dtype))

    return stop


def stagnation(*, tolerance: float = 1e-3, patience: int = 10) -> Rule:
    """Build the rule that stops when the pooled residual no longer falls.

    A round counts as progress if ``sum_i ||A_i w_i - b_i||^2`` is below ``1 - tolerance`` times the
    value at the last progress. It stops after `patience` rounds without progress. Of use beside a
    discrepancy rule (`any_of`), because a low-rank iterate may never reach the noise level.

    Args:
        tolerance: Relative decrease that counts as progress.
        patience: Number of rounds without progress, *static*.

    Returns:
        A rule whose memory is that value and the number of rounds since.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol, stopping
        >>> rule = stopping.stagnation(patience=1)
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.array([1.2, 0.5]))
        >>> info = protocol.RoundInfo(jnp.zeros(2), jnp.ones(2), *[jnp.zeros(2, int)] * 2, metrics)
        >>> first, memory = rule.update(info, rule.init())
        >>> second, memory = rule.update(info, memory)
        >>> bool(first), bool(second)
        (False, True)
    """

    def init():
        return jnp.array(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)

    def update(info, memory):
        best, waited = memory
        pooled = jnp.sum(_residual_norms("stagnation", info, None) ** 2).astype(jnp.float32)
        progress = pooled < (1.0 - tolerance) * best
        waited = jnp.where(progress, 0, waited + 1)
        return waited >= patience, (jnp.where(progress, pooled, best), waited)

    return Rule(init, update)


def num_measurements(clients: protocol.ClientData) -> Float[Array, " clients"]:
    """Count the scalar measurements present in the targets of every client.

    Args:
        clients: Data of all clients; the shape of the mask is a leading part of that of `targets`.

    Returns:
        The counts, shape (clients,), in the dtype of the targets.

    Raises:
        ValueError: If the mask is not bool or does not fit the targets.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import protocol, stopping
        >>> mask = jnp.array([[True, True, False]])
        >>> stopping.num_measurements(protocol.ClientData((), jnp.zeros((1, 3, 5)), mask))
        Array([10.], dtype=float32)
    """
    present = _present("num_measurements", clients)
    return jnp.sum(present, axis=tuple(range(1, present.ndim)), dtype=clients.targets.dtype)


def noise_thresholds(
    noise_levels: Float[Array, " clients"],
    measurements: Float[Array, " clients"],
    *,
    factor: float = 1.05,
) -> Float[Array, " clients"]:
    """Compute levels for `every_client` from the true standard deviation of the noise.

        threshold_i = factor sqrt(m_i) s_i

    Args:
        noise_levels: Standard deviation s_i of the noise, shape (clients,).
        measurements: Number m_i of measurements, shape (clients,) (`num_measurements`).
        factor: Safety factor. With 1 the rule may never fire under truncation.

    Returns:
        The levels, shape (clients,).

    Raises:
        ValueError: If the shapes are not equal.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import stopping
        >>> stopping.noise_thresholds(jnp.array([0.5]), jnp.array([16.0]), factor=1.0)
        Array([2.], dtype=float32)
    """
    noise_levels, measurements = jnp.asarray(noise_levels), jnp.asarray(measurements)
    _checks.check_shape("noise_thresholds", "measurements", measurements, noise_levels.shape)
    return factor * jnp.sqrt(measurements.astype(noise_levels.dtype)) * noise_levels


def noisy_maximum_thresholds(
    clients: protocol.ClientData, relative_noise: Float[Array, ""] | float
) -> Float[Array, " clients"]:
    """Compute the paper's levels for `every_client`.

        threshold_i = max(B_i) sqrt(m_i) sigma,   m_i = number of angles times number of bins

    The maximum is taken from the *noisy* data and overestimates the noise: by 5 to 10 % at sigma
    0.05, where it does no harm, and by 12 to 19 % at 0.1, which stops after half the rounds and
    costs more than 1 dB. Here for fidelity.

    Args:
        clients: Data of all clients; targets are the noisy measurements B_i.
        relative_noise: Noise level sigma relative to the maximum of the clean data.

    Returns:
        The levels, shape (clients,).

    Raises:
        ValueError: If the mask is not bool or does not fit the targets.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import protocol, stopping
        >>> targets = jnp.array([[1.0, 4.0, 9.0, 9.0]])
        >>> data = protocol.ClientData((), targets, jnp.ones((1, 4), bool))
        >>> stopping.noisy_maximum_thresholds(data, 0.5)
        Array([9.], dtype=float32)

    Reference:
        arXiv 2502.02761. Whether one client or all have to cross is not readable there.
    """
    present = _present("noisy_maximum_thresholds", clients)
    axes = tuple(range(1, present.ndim))
    maxima = jnp.max(jnp.where(present, clients.targets, -jnp.inf), axis=axes)
    maxima = jnp.where(jnp.any(present, axis=axes), maxima, 0.0)
    return maxima * jnp.sqrt(num_measurements(clients)) * jnp.asarray(relative_noise, maxima.dtype)


def edge_noise_levels(
    clients: protocol.ClientData, *, num_bins: int = 12
) -> Float[Array, " clients"]:
    """Estimate the noise of sinograms from detector bins that see only background.

        s_i = 1.4826 median |b - median b|   over the outermost bins on both sides

    Args:
        clients: Data of all clients; the last axis of the targets is the detector.
        num_bins: Bins on each side, *static*. The object must not reach into them.

    Returns:
        The standard deviations s_i, shape (clients,); 0 for a client without any data there.

    Raises:
        ValueError: If the mask does not fit the targets, or `num_bins` is not an integer from 1 to
            half the number of bins.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import protocol, stopping
        >>> noise = 0.1 * jax.random.normal(jax.random.key(0), (1, 200, 64))
        >>> data = protocol.ClientData((), noise, jnp.ones((1, 200), bool))
        >>> bool(abs(stopping.edge_noise_levels(data)[0] - 0.1) < 0.01)
        True
    """
    present = _present("edge_noise_levels", clients)
    _checks.check_rank("edge_noise_levels", num_bins, present.shape[-1] // 2, name="num_bins")

    def edges_of(x):
        edges = jnp.concatenate([x[..., :num_bins], x[..., -num_bins:]], axis=-1)
        return edges.reshape(edges.shape[0], -1)

    seen = edges_of(present)
    edges = jnp.where(seen, edges_of(clients.targets), jnp.nan)
    centre = jnp.nanmedian(edges, axis=1, keepdims=True)
    levels = 1.4826 * jnp.nanmedian(jnp.abs(edges - centre), axis=1)
    return jnp.where(jnp.any(seen, axis=1), levels, 0.0)


def _present(function, clients):
    """Expand the mask to the shape of the targets."""
    mask, shape = clients.mask, clients.targets.shape
    _checks.check_mask(function, mask, shape[: mask.ndim])
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def _residual_norms(function, info, shape):
    residual_norms = getattr(info.metrics, "residual_norm", None)
    if residual_norms is None:
        got = f"metrics of type {type(info.metrics).__name__}"
        raise _checks.fail(function, got, "a field residual_norm")
    if shape is not None:
        _checks.check_shape(function, "residual_norm", residual_norms, shape)
    return residual_norms
