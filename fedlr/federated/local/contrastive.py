"""Local training against anchors: what other models made of a client's own examples.

A contrastive term draws the representation of an example to what one model makes of the same
example (the positive) and away from what others do, or from other examples (the negatives). These
other models are those that the client once received or trained. Since a client's examples stay the
same, it remembers the representations and not the models: each model is applied once, in the round
in which the client has it, and nothing but the model itself is ever sent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedlr import _checks
from fedlr.federated import protocol
from fedlr.federated.local import training as training_

__all__ = [
    "Anchors",
    "Contrast",
    "Memory",
    "empty_memory",
    "history",
    "history_and_batch",
    "in_batch",
    "local_contrastive",
    "previous_local",
]


class Anchors(NamedTuple):
    """What the representations of the N examples of a batch are compared with.

    Attributes:
        positives: Representations to be near to, one for each example, shape (N, d).
        negatives: Representations to be far from, shape (N, M, d).
        mask: Which of the negatives count, bool, shape (N, M). None of them in the first rounds.
    """

    positives: Float[Array, "examples features"]
    negatives: Float[Array, "examples negatives features"]
    mask: Bool[Array, "examples negatives"]


class Memory(NamedTuple):
    """What a client remembers: a ring of the representations of its examples.

    Attributes:
        embeddings: Representations under the last S remembered models, shape (S, samples, d).
        rounds: Round in which each was written, -1 for never, int32, shape (S,).
    """

    embeddings: Float[Array, "slots samples features"]
    rounds: Int[Array, " slots"]


class Contrast(NamedTuple):
    """What a representation is contrasted with.

    The positive is always what the model just received makes of the same example.

    Attributes:
        slots: Number S of remembered models whose representations are negatives, *static*.
        remembers_trained: Whether a client remembers the models that it trained itself; else those
            that it received, from the second round of the run on. *Static.*
        across_batch: Whether what the received model makes of the other examples of the batch are
            negatives too. *Static.*
        max_age: Rounds after which a remembered model no longer counts; None for never.
        temperature: Temperature of the softmax, above 0; for the loss to read.
    """

    slots: int
    remembers_trained: bool
    across_batch: bool
    max_age: int | None
    temperature: float | Float[Array, ""]


def history(count: int = 3, *, max_age: int | None = 8, temperature: float = 0.5) -> Contrast:
    """Contrast with the same example under earlier global models.

    Near convergence old and new global models agree, so that the loss tends to log(1 + count) and
    its gradient to zero.

    Args:
        count: Number of earlier models, *static*.
        max_age: Rounds after which a model no longer counts, for clients that were away; None for
            never.
        temperature: Temperature of the softmax.

    Returns:
        The contrast.

    Raises:
        ValueError: If `count` is not a positive integer or the temperature not above 0.

    Example:
        >>> from fedlr.federated import local
        >>> local.history(2).slots
        2

    Reference:
        FDRMFL, arXiv 2512.02076, the term R_fcl. `max_age` is an addition.
    """
    _checks.check_count("history", "count", count)
    return _contrast("history", count, max_age=max_age, temperature=temperature)


def in_batch(*, temperature: float = 0.5) -> Contrast:
    """Contrast with the other examples of the batch under the received model.

    This is instance discrimination. It needs no memory.

    Args:
        temperature: Temperature of the softmax.

    Returns:
        The contrast.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> from fedlr.federated import local
        >>> local.in_batch().across_batch
        True
    """
    return _contrast("in_batch", 0, across_batch=True, temperature=temperature)


def history_and_batch(
    count: int = 3, *, max_age: int | None = 8, temperature: float = 0.5
) -> Contrast:
    """Contrast with both earlier global models and the other examples of the batch.

    Args:
        count: Number of earlier models, *static*.
        max_age: Rounds after which a model no longer counts; None for never.
        temperature: Temperature of the softmax.

    Returns:
        The contrast.

    Raises:
        ValueError: As `history`.

    Example:
        >>> from fedlr.federated import local
        >>> local.history_and_batch(2).slots
        2
    """
    _checks.check_count("history_and_batch", "count", count)
    return _contrast(
        "history_and_batch", count, across_batch=True, max_age=max_age, temperature=temperature
    )


def previous_local(*, temperature: float = 0.5) -> Contrast:
    """Contrast with the same example under the model that the client itself trained last.

    Args:
        temperature: Temperature of the softmax.

    Returns:
        The contrast.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> from fedlr.federated import local
        >>> local.previous_local().remembers_trained
        True

    Reference:
        MOON, Li et al. 2021, arXiv 2103.16257, equation 3.
    """
    return _contrast("previous_local", 1, remembers_trained=True, temperature=temperature)


def empty_memory(
    embed: Callable[[PyTree, PyTree], Float[Array, "samples features"]],
    contrast: Contrast,
    params: PyTree,
    clients: protocol.ClientData,
) -> Memory:
    """Return the memory that every client starts with, before it has received anything.

    Args:
        embed: Representations of a batch ``(params, inputs) -> (samples, d)``.
        contrast: What is remembered.
        params: Params of the model.
        clients: Data of all clients; only shapes are read.

    Returns:
        The memory of one client.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import local, protocol
        >>> data = protocol.ClientData(
        ...     jnp.ones((3, 5, 2)), jnp.ones((3, 5)), jnp.ones((3, 5), bool)
        ... )
        >>> memory = local.empty_memory(lambda w, x: x * w, local.history(2), jnp.ones(2), data)
        >>> memory.embeddings.shape, memory.rounds
        ((2, 5, 2), Array([-1, -1], dtype=int32))
    """
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], clients.inputs)
    shape = jax.eval_shape(embed, params, one)
    return Memory(
        jnp.zeros((contrast.slots, *shape.shape), shape.dtype),
        jnp.full(contrast.slots, -1, jnp.int32),
    )


def local_contrastive(
    loss: Callable[[PyTree, PyTree, Array, Array, Anchors], tuple[Float[Array, ""], Any]],
    embed: Callable[[PyTree, PyTree], Float[Array, "samples features"]],
    contrast: Contrast,
    training: training_.Training,
    *,
    round: Int[Array, ""] | int,
) -> protocol.LocalUpdate:
    """Build local training with anchors.

    The anchors are computed once, before the local steps, which read their rows. No gradient flows
    into them.

    Args:
        loss: Loss of a batch ``(params, inputs, targets, valid, anchors) -> (value, aux)``, see
            `training.train`.
        embed: Representations of a batch ``(params, inputs) -> (samples, d)``, that of an example
            depending on no other.
        contrast: What the representations are contrasted with.
        training: The optimizer, steps and batches.
        round: Number of the round, from 0; traced. See `rounds.scheduled`.

    Returns:
        A local update for `protocol.ClientData` with the client state `Memory`, see `empty_memory`.
        Its metrics are `training.LocalMetrics`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import information
        >>> from fedlr.federated import local, protocol
        >>> def embed(w, x):
        ...     return x * w
        >>> def loss(w, x, y, valid, anchors):
        ...     positives, negatives, mask = anchors
        ...     value = information.model_contrastive(embed(w, x), positives, negatives, mask=mask)
        ...     return value, ()
        >>> data = protocol.ClientData(jnp.ones((4, 2)), jnp.ones(4), jnp.ones(4, bool))
        >>> plan = local.Training(optax.sgd(0.1), num_steps=1)
        >>> update = local.local_contrastive(loss, embed, local.in_batch(), plan, round=1)
        >>> stacked = jax.tree.map(lambda leaf: leaf[None], data)
        >>> memory = local.empty_memory(embed, local.in_batch(), jnp.ones(2), stacked)
        >>> _, _, metrics = update(jnp.ones(2), memory, data, key=jax.random.key(0))
        >>> metrics.loss.round(4)  # log 4: the four examples look the same
        Array(1.3863, dtype=float32)
    """

    def update(params, client_state, data, *, key):
        def embed_present(model):
            # Rows that are no examples may hold anything, and are kept as zeros.
            return jnp.where(data.mask[:, None], embed(model, data.inputs), 0.0)

        received = embed_present(params)
        fresh = _usable(client_state.rounds, contrast.max_age, round)
        # Axis of examples first, so that steps read rows.
        anchors = (received, jnp.moveaxis(client_state.embeddings, 0, 1))

        def of_batch(current, inputs, targets, valid):
            own, (positives, negatives) = inputs
            usable = jnp.broadcast_to(fresh, negatives.shape[:2])
            if contrast.across_batch:
                others, counts = _across(positives, valid, round)
                negatives = jnp.concatenate([negatives, others], axis=1)
                usable = jnp.concatenate([usable, counts], axis=1)
            return loss(current, own, targets, valid, Anchors(positives, negatives, usable))

        trained, metrics = training_.train(
            of_batch,
            params,
            data._replace(inputs=(data.inputs, anchors)),
            training,
            key=key,
            has_aux=True,
            function="local_contrastive",
        )
        memory = client_state
        if contrast.slots:
            kept = embed_present(trained) if contrast.remembers_trained else received
            # What the run starts from is no model that anybody trained.
            worth = True if contrast.remembers_trained else jnp.asarray(round) > 0
            memory = _remember(client_state, kept, jnp.asarray(round, jnp.int32), worth)
        difference = jax.tree.map(jnp.subtract, trained, params)
        return difference, memory, metrics

    return update


def _contrast(
    function,
    slots,
    *,
    remembers_trained=False,
    across_batch=False,
    max_age=None,
    temperature,
):
    if max_age is not None:
        _checks.check_count(function, "max_age", max_age)
    _checks.check_positive(function, "temperature", temperature)
    return Contrast(slots, remembers_trained, across_batch, max_age, temperature)


def _usable(rounds, max_age, round):
    """Tell which of the remembered models are there and young enough."""
    written = rounds >= 0
    if max_age is None:
        return written
    return written & (jnp.asarray(round, jnp.int32) - rounds <= max_age)


def _across(positives, valid, round):
    """Return the anchors of the whole batch as negatives of each example, but for its own."""
    size = positives.shape[0]
    others = jnp.broadcast_to(positives, (size, *positives.shape))
    counts = valid[None] & ~jnp.eye(size, dtype=bool) & (jnp.asarray(round) > 0)
    return others, counts


def _remember(memory, embeddings, round, worth):
    """Write over the oldest entry of the ring."""
    oldest = jnp.argmin(memory.rounds)
    written = Memory(
        memory.embeddings.at[oldest].set(embeddings), memory.rounds.at[oldest].set(round)
    )
    return jax.tree.map(lambda new, old: jnp.where(worth, new, old), written, memory)
