"""FDRMFL: federated features of several modalities by information maximization and contrast.

    L = mean (f(Z) - y)^2 + l_mi R_mi + l_kl R_kl + l_fcl R_fcl      for every client,
    w+ = sum_k n_k w_k / sum_k n_k

    R_mi:  -JSD estimate of the mutual information of features Z and target y, with a critic
    R_kl:  symmetric divergence of the modalities' codes, per pair and dimension
    R_fcl: contrast of Z with what the received (positive) and earlier global models (negatives)
           make of the same sample

The smallest R_kl is at codes of zero, so only the prediction and R_mi hold the scale; and a large
weight erases what only one modality knows.

Reference: arXiv 2512.02076. The published code differs from it in nearly every term (its R_mi is
``-log |corr(u(Z), y)|``, its R_fcl compares unrelated samples); this follows the paper. Deviations:
each round of a client computes the representations under the received model only and remembers
them, which for a client that is always there is the same as keeping the models; the term of history
is off unless asked for, since near convergence its gradient vanishes and before it pushes away from
a useful model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from fedlr import _checks, information, masking, multimodal
from fedlr.federated import (
    aggregators,
    availability,
    compressors,
    local,
    privacy,
    protocol,
    rounds,
    servers,
)

__all__ = ["Metrics", "Terms", "Weights", "build", "multimodal_loss", "optimizer"]

Weight = float | Float[Array, ""] | None


class Weights(NamedTuple):
    """Weights of the terms.

    None takes a term out of the program; a traced 0 keeps it, so that one program serves a whole
    grid of weights, by `jax.vmap`.

    Attributes:
        information: l_mi.
        alignment: l_kl.
        contrast: l_fcl.
        prior: Weight of the divergence of Gaussian codes from N(0, I), without which a large
            variance makes every gap of the means free. For encoders that return Gaussians.
    """

    information: Weight = 0.1
    alignment: Weight = 0.01
    contrast: Weight = None
    prior: Weight = None


DEFAULTS = Weights()


class Terms(NamedTuple):
    """Values of the terms without their weights, shape (); None for those that are left out.

    Attributes:
        prediction: Mean squared error.
        information: R_mi.
        alignment: R_kl.
        contrast: R_fcl.
        prior: Mean divergence from N(0, I) per dimension.
    """

    prediction: Float[Array, ""]
    information: Float[Array, ""] | None
    alignment: Float[Array, ""] | None
    contrast: Float[Array, ""] | None
    prior: Float[Array, ""] | None


class Metrics(NamedTuple):
    """Record of a round, one entry a member: `RoundInfo.metrics`.

    Attributes:
        loss: Loss at the received params, on the first batch, shape (cohort,).
        terms: The `Terms` of that loss.
        num_examples: Number of samples with a modality, int32.
        num_steps: Number of steps done, int32.
        squared_move: Squared distance from the received to the trained model.
    """

    loss: Float[Array, ""]
    terms: Terms
    num_examples: Int[Array, ""]
    num_steps: Int[Array, ""]
    squared_move: Float[Array, ""]


def optimizer(learning_rate: float | Float[Array, ""]) -> optax.GradientTransformation:
    """Return the optimizer of the defaults: AdamW, weight decay 1e-4, gradients clipped to norm 5.

    Args:
        learning_rate: Learning rate, 3e-3 for up to about 50 inputs and 1e-3 for wide ones. Traced.

    Returns:
        The optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fdrmfl
        >>> chain = fdrmfl.optimizer(0.1)
        >>> chain.update(jnp.ones(1), chain.init(jnp.zeros(1)), jnp.zeros(1))[0].round(3)
        Array([-0.1], dtype=float32)
    """
    return optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(learning_rate, weight_decay=1e-4)
    )


def multimodal_loss(
    network: multimodal.Network,
    *,
    weights: Weights = DEFAULTS,
    temperature: float | Float[Array, ""] = 0.5,
) -> Callable:
    """Build the loss of a batch.

    Args:
        network: The network; only its structure is used, its arrays come as params.
        weights: Weights of the terms; traced, or None.
        temperature: Temperature of the contrast.

    Returns:
        ``(params, samples, targets, valid, anchors) -> (loss, Terms)``: params the arrays of the
        network; samples `multimodal.Modalities` with leading axis (N,); targets (N,); valid bool
        (N,), which rows count; anchors a `local.Anchors`, or None for no contrast. A sample without
        any modality counts in no term. What does not count may be NaN. Without any sample all is 0.

    Raises:
        ValueError: If the information has a weight and the network no critic. While tracing the
            loss, if a prior or contrast is wanted without Gaussians or anchors, or the samples do
            not fit the network or the targets.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import multimodal
        >>> from fedlr.algorithms import fdrmfl
        >>> network = multimodal.dense_network((3, 2), key=jax.random.key(0))
        >>> params = eqx.filter(network, eqx.is_inexact_array)
        >>> loss = fdrmfl.multimodal_loss(network)
        >>> samples = multimodal.all_present([jnp.ones((5, 3)), jnp.ones((5, 2))])
        >>> value, terms = loss(params, samples, jnp.zeros(5), jnp.ones(5, bool), None)
        >>> terms.information.round(1), terms.contrast
        (Array(1.4, dtype=float32), None)

    Reference:
        arXiv 2512.02076, the local objective. R_kl is averaged over the pairs that are there and
        divided by the number of dimensions, which the paper leaves to the weight.
    """
    if weights.information is not None and network.critic is None:
        expected = "one with a critic, or None for the weight of the information"
        raise _checks.fail("multimodal_loss", "a network without critic", expected)
    _, static = eqx.partition(network, eqx.is_inexact_array)

    def loss(params, samples, targets, valid, anchors):
        _check_samples("multimodal_loss", samples, targets)
        model = eqx.combine(params, static)
        usable = valid & jnp.any(samples.present, axis=1)
        there = samples.present & usable[:, None]
        # Zeros for what does not count: a NaN would come back through the derivatives.
        targets = jnp.where(usable, targets, 0.0)
        encoded = jax.vmap(model.encode)(samples._replace(present=there))
        residuals = jax.vmap(model.predict)(encoded.fused) - targets
        terms = Terms(
            prediction=masking.masked_mean(residuals**2, usable),
            information=None
            if weights.information is None
            else -information.jensen_shannon(model.scores(encoded.fused, targets), mask=usable),
            alignment=None if weights.alignment is None else _alignment(encoded, there),
            contrast=None
            if weights.contrast is None
            else _contrast(encoded, anchors, temperature, usable),
            prior=None if weights.prior is None else _prior(encoded, there),
        )
        value = terms.prediction
        for weight, term in zip(weights, terms[1:], strict=True):
            if term is not None:
                value = value + jnp.asarray(weight, value.dtype) * term
        return value, terms

    return loss


def build(
    network: multimodal.Network,
    training: local.Training,
    *,
    weights: Weights = DEFAULTS,
    contrast: local.Contrast | None = None,
    mechanism: privacy.Mechanism | None = None,
    arrivals: availability.Arrivals | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FDRMFL.

    Clients are `protocol.ClientData` with `multimodal.Modalities` (clients, samples, ...) as inputs
    and targets (clients, samples). With all weights None it is `fedavg`. Clients that come and go
    are `arrivals`, or cohorts: whoever is away keeps what it remembers, of which what is too old
    does not count, and whoever joins remembers nothing, so that a contrast with history is 0.

    Args:
        network: The network; only its structure is used.
        training: The optimizer, steps and batches of a client.
        weights: Weights of the terms; traced, or None.
        contrast: What R_fcl contrasts with, where it has a weight; None for `local.history`.
        mechanism: Client-level differential privacy, see `privacy.gaussian_mechanism`; None for
            none. Clients then count equally.
        arrivals: Whose messages arrive, see `availability`; None for all.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the arrays of the network, as
        ``equinox.filter(network, equinox.is_inexact_array)``. Metrics are `Metrics`.

    Raises:
        ValueError: As `multimodal_loss` and `rounds.compose`.

    Example:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import federated, multimodal
        >>> from fedlr.algorithms import fdrmfl
        >>> from fedlr.federated import local, protocol
        >>> x = jax.random.normal(jax.random.key(0), (2, 3, 40, 4))
        >>> samples = multimodal.all_present(tuple(x), batch_ndim=2)
        >>> data = protocol.ClientData(samples, x.sum((0, 3)), jnp.ones((3, 40), bool))
        >>> network = multimodal.dense_network((4, 4), key=jax.random.key(1))
        >>> training = local.Training(fdrmfl.optimizer(1e-2), num_steps=10, batch_size=16)
        >>> algorithm = fdrmfl.build(network, training)
        >>> params = eqx.filter(network, eqx.is_inexact_array)
        >>> state = algorithm.init(params, data, key=jax.random.key(2))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=8, key=jax.random.key(3)
        ... )
        >>> errors = infos.metrics.terms.prediction.mean(1)
        >>> bool(errors[-1] < 0.2 * errors[0])
        True

    Reference:
        arXiv 2512.02076, Algorithm 1.
    """
    contrast = local.history() if contrast is None else contrast
    of_batch = multimodal_loss(network, weights=weights, temperature=contrast.temperature)
    _, static = eqx.partition(network, eqx.is_inexact_array)

    def embed(params, samples):
        return multimodal.features(eqx.combine(params, static), samples)

    def without_anchors(params, client_state, data, *, key):
        trained, metrics = local.train(
            lambda *batch: of_batch(*batch, None), params, data, training, key=key, has_aux=True
        )
        return jax.tree.map(jnp.subtract, trained, params), client_state, metrics

    parts = (
        privacy.Mechanism(aggregators.weighted_mean(), servers.from_optax(optax.sgd(1.0)), _counts)
        if mechanism is None
        else mechanism
    )

    def for_clients(number, clients, cohort):
        del cohort
        if weights.contrast is None:
            update, memory = without_anchors, None
        else:
            update = local.local_contrastive(of_batch, embed, contrast, training, round=number)
            memory = functools.partial(local.empty_memory, embed, contrast, clients=clients)
        return rounds.compose(
            _recorded(update),
            compressor=compressors.identity(),
            client_state=memory,
            arrivals=arrivals,
            chunk_size=chunk_size,
            **parts._asdict(),
        )

    def in_round(number):
        return rounds.for_cohorts(functools.partial(for_clients, number))

    return rounds.scheduled(in_round, lambda number: number)


def _recorded(update: protocol.LocalUpdate) -> protocol.LocalUpdate:
    """Leave out samples without any modality, and add to the record."""

    def recorded(params, client_state, data, *, key):
        _check_samples("build", data.inputs, data.targets)
        usable = data._replace(mask=_usable(data))
        difference, client_state, metrics = update(params, client_state, usable, key=key)
        squares = jax.tree.map(lambda leaf: jnp.sum(leaf**2), difference)
        moved = functools.reduce(jnp.add, jax.tree.leaves(squares))
        record = Metrics(metrics.loss, metrics.aux, metrics.num_examples, metrics.num_steps, moved)
        return difference, client_state, record

    return recorded


def _usable(data: protocol.ClientData) -> Bool[Array, "... samples"]:
    """Tell which samples are there with at least one modality."""
    return data.mask & jnp.any(data.inputs.present, axis=-1)


def _counts(clients: protocol.ClientData) -> Float[Array, " clients"]:
    """Count the usable samples of every client, in the dtype of the targets."""
    return jnp.sum(_usable(clients), axis=-1, dtype=clients.targets.dtype)


def _check_samples(
    function: str, samples: multimodal.Modalities, targets: Float[Array, " samples"]
) -> None:
    """Refuse samples and targets that do not belong together: rows are taken without a check."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(samples)]
    if any(shape[:1] != jnp.shape(targets) for shape in shapes):
        got = f"samples of shapes {shapes} for targets of shape {jnp.shape(targets)}"
        raise _checks.fail(function, got, "targets (samples,) and as many of every modality")


def _alignment(
    encoded: multimodal.Encoded, there: Bool[Array, "samples modalities"]
) -> Float[Array, ""]:
    """Average the divergence over all samples and pairs of modalities that are there."""
    means, log_vars = encoded.means, encoded.log_vars
    if log_vars is None:
        log_vars = jnp.zeros_like(means)
    num_modalities, width = means.shape[1:]
    firsts, seconds = np.triu_indices(num_modalities, 1)
    divergences = information.symmetric_kl(
        means[:, firsts], log_vars[:, firsts], means[:, seconds], log_vars[:, seconds]
    )
    return masking.masked_mean(divergences / width, there[:, firsts] & there[:, seconds])


def _contrast(
    encoded: multimodal.Encoded,
    anchors: local.Anchors | None,
    temperature: float | Float[Array, ""],
    usable: Bool[Array, " samples"],
) -> Float[Array, ""]:
    """Contrast the features with the anchors."""
    if anchors is None:
        raise _checks.fail("multimodal_loss", "a weight of the contrast, no anchors", "anchors")
    positives, negatives, mask = anchors
    return information.model_contrastive(
        encoded.fused, positives, negatives, temperature=temperature, mask=mask, rows=usable
    )


def _prior(
    encoded: multimodal.Encoded, there: Bool[Array, "samples modalities"]
) -> Float[Array, ""]:
    """Average the divergence of the codes from N(0, I), per dimension."""
    if encoded.log_vars is None:
        raise _checks.fail("multimodal_loss", "a prior for points", "encoders of Gaussians")
    means, log_vars = encoded.means, encoded.log_vars
    zeros = jnp.zeros_like(means)
    divergences = information.gaussian_kl(means, log_vars, zeros, zeros)
    return masking.masked_mean(divergences / means.shape[-1], there)
