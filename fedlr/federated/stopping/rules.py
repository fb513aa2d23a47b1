"""When a run of rounds should stop, decided from the record of a round.

A stopping rule is a pure function `stop(info) -> bool scalar`, or a `Rule` where it needs to
remember earlier rounds. The record measures the state that *entered* the round, so that is the
state to keep when a rule fires, or an earlier one if the rule saw a better one before.
`fedlr.federated.simulate` does so. `corrected` is the rule to begin with in reconstruction.

The rules for inverse problems read the residual norms ``||A_i w_i - b_i||`` of all clients from
`info.metrics.residual_norm`, which every algorithm of reconstruction records.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedlr import _checks
from fedlr.federated import protocol
from fedlr.federated.stopping import levels

__all__ = [
    "Outcome",
    "Rule",
    "Verdict",
    "any_of",
    "as_rule",
    "corrected",
    "discrepancy",
    "every_client",
    "replay",
    "settled",
    "stagnation",
]

Stop = Callable[[protocol.RoundInfo], Bool[Array, ""]]


class Verdict(NamedTuple):
    """What a rule says of a round.

    Attributes:
        stop: Whether to stop, bool scalar.
        best: Whether the state that entered the round is the one to return if the rule fires, now
            or before it says so again, bool scalar.
    """

    stop: Bool[Array, ""]
    best: Bool[Array, ""]


class Rule(NamedTuple):
    """A stopping rule with a memory.

    Attributes:
        init: `() -> memory`, a pytree of arrays.
        update: `(info, memory) -> (verdict, memory)` with a `Verdict`.
    """

    init: Callable[[], Any]
    update: Callable[[protocol.RoundInfo, Any], tuple[Verdict, Any]]


class Outcome(NamedTuple):
    """What a rule makes of a whole run.

    Attributes:
        fired: Whether the rule fired, bool scalar.
        stop: Round in whose record it fired, else the last one, int32 scalar.
        best: Round whose entering state it returns, else the last one, int32 scalar.
    """

    fired: Bool[Array, ""]
    stop: Int[Array, ""]
    best: Int[Array, ""]


def as_rule(stop: Stop | Rule) -> Rule:
    """Give a plain function `stop(info)` the form of a rule with an empty memory.

    Args:
        stop: Function `stop(info)`, or a rule, which is returned as it is.

    Returns:
        A rule; that of a function returns the state that entered the round in which it fires.
    """
    if isinstance(stop, Rule):
        return stop

    def update(info, memory):
        fired = stop(info)
        return Verdict(fired, fired), memory

    return Rule(lambda: (), update)


def any_of(*rules: Stop | Rule) -> Rule:
    """Build the rule that stops as soon as one of several does.

    Args:
        *rules: Functions `stop(info)` and rules.

    Returns:
        A rule whose memory is the tuple of theirs. The state to return is that of the last round
        which any of them called its best.

    Raises:
        ValueError: If there is no rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import stopping
        >>> rule = stopping.any_of(lambda info: info < 1.0, lambda info: info > 5.0)
        >>> bool(rule.update(jnp.float32(9.0), rule.init())[0].stop)
        True
    """
    if not rules:
        raise _checks.fail("any_of", "no rule", "at least one")
    parts = tuple(as_rule(rule) for rule in rules)

    def update(info, memory):
        results = [part.update(info, own) for part, own in zip(parts, memory, strict=True)]
        verdicts, memories = zip(*results, strict=True)
        stops, bests = zip(*verdicts, strict=True)
        return Verdict(jnp.any(jnp.stack(stops)), jnp.any(jnp.stack(bests))), memories

    return Rule(lambda: tuple(part.init() for part in parts), update)


def corrected(
    noise_levels: Float[Array, " clients"],
    measurements: Float[Array, " clients"],
    *,
    factor: float = 1.05,
    kappa: float = 0.96,
    tolerance: float = 1e-2,
    patience: int = 10,
) -> Rule:
    """Build the rule to begin with in reconstruction: noise level reached, or progress at an end.

        stop when  ||A_i w_i - b_i|| <= factor sqrt(m_i) s_i  for all i,
        or when  sum_i ||A_i w_i - b_i||^2 <= kappa^2 sum_i m_i s_i^2,  or at stagnation

    The true deviation s_i of the noise takes the place of the paper's maximum of the noisy data,
    which stops too early. The first condition stops nearest to the best image; the second one is
    for methods that leave one client behind while the others already fit their noise (sparse
    messages). Methods whose images cannot fit the data (low ranks, averages) never reach the noise;
    for them `stagnation` returns the state of the smallest residual before.

    In the reference setting (benchmark table `quality`, 100 x 100, sigma .05 and .1) the state
    returned is within 0.3 dB of the best one for every method but averaged factors, whose PSNR
    jumps from round to round (1.2 dB), and Top-k of states below the size of the support, whose
    images get worse while their residual falls, as does even the error of projections without
    noise, so that residuals cannot tell (6 dB). With total variation images go on getting
    better at the noise level, and much better where entries are missing (17 dB): leave this rule
    out. Elsewhere it is often too early: by up to .3 dB at 250 x 250, 1.4 at sigma .2 (`sweep`),
    1.7 for volumes, 2.1 for the random phantoms of `clients`; in `operators` by .9 for CompJF in
    tomography of a photograph, 1.1 for FIRM under blur, 3.3 for FullDecomp with missing pixels.

    Args:
        noise_levels: Standard deviation s_i of the noise, shape (clients,), or an estimate.
        measurements: Number m_i of measurements, shape (clients,) (`num_measurements`).
        factor: Safety factor of a single client.
        kappa: Factor of the pooled residual.
        tolerance: Relative decrease of the pooled squared residual that counts as progress.
        patience: Number of rounds without progress, *static*.

    Returns:
        A rule.

    Raises:
        ValueError: If the shapes are not equal, a noise level is negative or NaN, or `patience` is
            not a positive integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol, stopping
        >>> rule = stopping.corrected(jnp.array([0.1]), jnp.array([100.0]))
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(1), jnp.array([1.04]))
        >>> info = protocol.RoundInfo(jnp.zeros(1), jnp.ones(1), *[jnp.zeros(1, int)] * 2, metrics)
        >>> bool(rule.update(info, rule.init())[0].stop)
        True
    """
    noise_levels, measurements = levels.check_levels("corrected", noise_levels, measurements)
    _checks.check_count("corrected", "patience", patience)
    return any_of(
        every_client(levels.noise_thresholds(noise_levels, measurements, factor=factor)),
        discrepancy(noise_levels, measurements, kappa=kappa),
        stagnation(tolerance=tolerance, patience=patience),
    )


def replay(stop: Stop | Rule, infos: protocol.RoundInfo) -> Outcome:
    """Find out where a rule would have stopped a run that is over, to compare rules.

    Args:
        stop: Function `stop(info)`, or a rule.
        infos: Records of all rounds, leaves (rounds, ...), as `federated.run` returns them.

    Returns:
        The outcome, as `federated.simulate` with this rule has it.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import stopping
        >>> outcome = stopping.replay(lambda info: info < 3.0, jnp.array([5.0, 4.0, 2.0, 1.0]))
        >>> bool(outcome.fired), int(outcome.stop), int(outcome.best)
        (True, 2, 2)
    """
    rule = as_rule(stop)
    rounds = jnp.arange(len(jax.tree.leaves(infos)[0]), dtype=jnp.int32)

    def step(carry, record):
        memory, outcome = carry
        index, info = record
        (fired, best), memory = rule.update(info, memory)
        best = jnp.where(best, index, outcome.best)
        going = ~outcome.fired
        new = Outcome(going & fired | outcome.fired, index, best)
        return (memory, jax.tree.map(lambda a, b: jnp.where(going, a, b), new, outcome)), None

    start = Outcome(jnp.array(False), jnp.int32(0), jnp.int32(0))
    (_, found), _ = lax.scan(step, (rule.init(), start), (rounds, infos))
    return found._replace(best=jnp.where(found.fired, found.best, found.stop))


def discrepancy(
    noise_levels: Float[Array, " clients"],
    measurements: Float[Array, " clients"],
    *,
    kappa: float = 1.0,
) -> Stop:
    """Build the pooled discrepancy principle.

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
        ValueError: If the shapes are not equal or a noise level is negative or NaN; while tracing,
            if the residual norms have another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol, stopping
        >>> stop = stopping.discrepancy(jnp.array([0.1, 0.1]), jnp.array([100.0, 100.0]))
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.array([1.2, 0.5]))
        >>> info = protocol.RoundInfo(jnp.zeros(2), jnp.ones(2), *[jnp.zeros(2, int)] * 2, metrics)
        >>> bool(stop(info))
        True
    """
    noise_levels, measurements = levels.check_levels("discrepancy", noise_levels, measurements)
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


def stagnation(*, tolerance: float = 1e-2, patience: int = 10) -> Rule:
    """Build the rule that stops when the pooled residual no longer falls.

    A round counts as progress if ``sum_i ||A_i w_i - b_i||^2`` is below ``1 - tolerance`` times the
    value at the last progress. It stops after `patience` rounds without progress and returns the
    state of the smallest residual so far, so that a run that diverges is undone. Of use beside a
    discrepancy rule (`corrected`), because a low-rank iterate may never reach the noise level.

    Args:
        tolerance: Relative decrease that counts as progress.
        patience: Number of rounds without progress, *static*.

    Returns:
        A rule whose memory is that value, the smallest one so far and the number of rounds since.

    Raises:
        ValueError: If `patience` is not a positive integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol, stopping
        >>> rule = stopping.stagnation(patience=1)
        >>> metrics = local.ReconstructionMetrics(jnp.zeros(2), jnp.array([1.2, 0.5]))
        >>> info = protocol.RoundInfo(jnp.zeros(2), jnp.ones(2), *[jnp.zeros(2, int)] * 2, metrics)
        >>> first, memory = rule.update(info, rule.init())
        >>> second, memory = rule.update(info, memory)
        >>> [bool(verdict) for verdict in (*first, *second)]
        [False, True, True, False]
    """
    _checks.check_count("stagnation", "patience", patience)

    def init():
        start = jnp.array(jnp.inf, jnp.float32)
        return start, start, jnp.zeros((), jnp.int32)

    def update(info, memory):
        reference, smallest, waited = memory
        pooled = jnp.sum(_residual_norms("stagnation", info, None) ** 2).astype(jnp.float32)
        progress = pooled < (1.0 - tolerance) * reference
        waited = jnp.where(progress, 0, waited + 1)
        memory = jnp.where(progress, pooled, reference), jnp.minimum(pooled, smallest), waited
        return Verdict(waited >= patience, pooled < smallest), memory

    return Rule(init, update)


def settled(*, tolerance: float = 1e-4) -> Stop:
    """Build the rule that stops once a round hardly moves any image.

        stop when  ||w_i+ - w_i|| <= tolerance ||w_i+||  for all i

    It looks for a fixed point of the round, not for a good image: with noisy data the fixed point
    fits the noise. A fresh sketch in every round (CompRandJF) keeps the images moving.

    Args:
        tolerance: Relative change, from `info.metrics.change`.

    Returns:
        A function `stop(info)`.

    Raises:
        ValueError: While tracing, if the record has no changes.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import coupling, protocol, stopping
        >>> metrics = coupling.CoupledMetrics(jnp.ones(2), jnp.ones(2), jnp.array([1e-5, 2e-5]))
        >>> info = protocol.RoundInfo(jnp.zeros(2), jnp.ones(2), *[jnp.zeros(2, int)] * 2, metrics)
        >>> bool(stopping.settled()(info))
        True
    """

    def stop(info):
        return jnp.all(_field("settled", info, "change") <= tolerance)

    return stop


def _field(function, info, name):
    values = getattr(info.metrics, name, None)
    if values is None:
        got = f"metrics of type {type(info.metrics).__name__}"
        raise _checks.fail(function, got, f"a field {name}")
    return values


def _residual_norms(function, info, shape):
    residual_norms = _field(function, info, "residual_norm")
    if shape is not None:
        _checks.check_shape(function, "residual_norm", residual_norms, shape)
    return residual_norms
