"""MOON: model-contrastive federated learning.

    client k:  min_y mean loss(y, b) + mu R(y)   from the received model x
    R = mean -log(e^(z.z_x / t) / (e^(z.z_x / t) + e^(z.z_k / t)))

with the representations z of an example under y, z_x under the received model x, and z_k under the
model that the client trained last, all scaled to length one. The server averages.

Reference: Li et al. 2021, arXiv 2103.16257, equations 3 and 4, Algorithm 1. A client that has not
trained before has no negative, and its contrast is 0.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import _checks, information
from fedlr.federated import aggregators, compressors, local, protocol, rounds, servers

__all__ = ["build"]


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    embed: Callable[[PyTree, PyTree], Float[Array, "samples features"]],
    training: local.Training,
    *,
    strength: float | Float[Array, ""] = 1.0,
    temperature: float = 0.5,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build MOON.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar``.
        embed: Representations of a batch ``(params, inputs) -> (samples, d)``, that of an example
            depending on no other.
        training: The optimizer, steps and batches of a client.
        strength: mu, from 0, traced; the paper tries 0.1, 1, 5 and 10.
        temperature: t, above 0.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Metrics are `local.LocalMetrics`, whose losses are with the contrast;
        clients keep a `local.Memory`.

    Raises:
        ValueError: If the temperature or strength is out of its range; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import moon
        >>> from fedlr.federated import local, protocol
        >>> x = jax.random.normal(jax.random.key(0), (3, 20, 4))
        >>> data = protocol.ClientData(x, x.sum(2), jnp.ones((3, 20), bool))
        >>> algorithm = moon.build(
        ...     lambda w, x, y: (x @ w - y) ** 2,
        ...     lambda w, x: x * w,
        ...     local.Training(optax.sgd(0.1), num_steps=3),
        ...     strength=0.1,
        ... )
        >>> state = algorithm.init(jnp.zeros(4), data, key=jax.random.key(1))
        >>> state, _ = federated.run(algorithm, state, data, num_rounds=9, key=jax.random.key(2))
        >>> state.params.round(1)
        Array([1., 1., 1., 1.], dtype=float32)

    Reference:
        Li et al. 2021, arXiv 2103.16257, Algorithm 1.
    """
    _checks.check_non_negative("build", "strength", strength)
    contrast = local.previous_local(temperature=temperature)
    mean = local.mean_loss(loss)

    def of_batch(params, inputs, targets, valid, anchors):
        apart = information.model_contrastive(
            embed(params, inputs),
            anchors.positives,
            anchors.negatives,
            temperature=temperature,
            mask=anchors.mask,
            rows=valid,
        )
        weighted = jnp.asarray(strength, apart.dtype) * apart
        return mean(params, inputs, targets, valid) + weighted, ()

    def in_round(number):
        update = local.local_contrastive(of_batch, embed, contrast, training, round=number)

        def for_clients(clients, cohort):
            del cohort
            return rounds.compose(
                update,
                compressor=compressors.identity(),
                aggregator=aggregators.weighted_mean(),
                server=servers.from_optax(optax.sgd(1.0)),
                client_state=functools.partial(
                    local.empty_memory, embed, contrast, clients=clients
                ),
                chunk_size=chunk_size,
            )

        return rounds.for_cohorts(for_clients)

    return rounds.scheduled(in_round, lambda number: number)
