"""SCAFFOLD: control variates take the drift of the clients out of their gradients.

    client:  y <- y - eta (g(y) - c_k + c),   T steps;   c_k+ = c_k - c + (x - y) / (T eta)
    server:  x <- x + eta_g mean_k (y_k - x),   c <- c + M / K mean_k (c_k+ - c_k)

with M of K clients in the cohort. Clients count equally. Both x and c travel in both directions.

Reference: Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1 with option II for c_k+. The
formula of c_k+ holds for plain SGD, so a learning rate takes the place of an optimizer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import aggregators, compressors, local, protocol, rounds
from fedlr.federated import clients as clients_

__all__ = ["Controlled", "build"]


class Controlled(NamedTuple):
    """A model and the control variate of the server: the params of the state, and of an update.

    Attributes:
        model: Params x of the model.
        control: Control variate c, a pytree like the model.
    """

    model: PyTree
    control: PyTree


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    learning_rate: float,
    *,
    num_steps: int,
    batch_size: int | None = None,
    server_rate: float = 1.0,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build SCAFFOLD.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar``.
        learning_rate: eta of the local steps, above 0.
        num_steps: Local steps T, *static*.
        batch_size: Examples per step, *static*; None takes all.
        server_rate: eta_g.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model; the params of its state are
        a `Controlled`, the clients' states their control variates.

    Raises:
        ValueError: If a number is not positive; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import scaffold
        >>> from fedlr.federated import protocol
        >>> targets = jnp.array([[1.0], [3.0]])
        >>> data = protocol.ClientData(jnp.ones((2, 1)), targets, jnp.ones((2, 1), bool))
        >>> algorithm = scaffold.build(lambda w, x, y: (w - y) ** 2 / 2, 0.5, num_steps=3)
        >>> state = algorithm.init(jnp.float32(0.0), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=9, key=jax.random.key(1)
        ... )
        >>> state.params.model.round(3), infos.uplink_bytes[0]
        (Array(2., dtype=float32), Array([8, 8], dtype=int32))
    """
    _checks.check_count("build", "num_steps", num_steps)
    _checks.check_positive("build", "learning_rate", learning_rate)
    training = local.Training(optax.sgd(learning_rate), num_steps, batch_size)
    of_batch = local.mean_loss(loss)

    def local_update(params, client_state, data, *, key):
        model, control = params
        correction = jax.tree.map(jnp.subtract, control, client_state)

        def drift(current):
            terms = jax.tree.map(lambda c, y, x: jnp.sum(c * (y - x)), correction, current, model)
            return functools.reduce(jnp.add, jax.tree.leaves(terms))

        trained, metrics = local.train(of_batch, model, data, training, key=key, extra=drift)
        moved = jax.tree.map(jnp.subtract, trained, model)
        change = jax.tree.map(
            # An idle client has learned nothing of its gradient.
            lambda c, move: jnp.where(
                metrics.num_examples > 0, -c - move / (num_steps * learning_rate), 0.0
            ),
            control,
            moved,
        )
        new_control = jax.tree.map(jnp.add, client_state, change)
        return Controlled(moved, change), new_control, metrics

    def for_cohort(clients, cohort):
        share = jnp.shape(cohort)[0] / clients_.num_clients(clients)

        def apply(params, update, server_state, *, key):
            del key
            model = jax.tree.map(lambda x, d: x + server_rate * d, params.model, update.model)
            control = jax.tree.map(lambda c, d: c + share * d, params.control, update.control)
            return Controlled(model, control), server_state

        return rounds.compose(
            local_update,
            compressor=compressors.identity(),
            aggregator=aggregators.weighted_mean(),
            server=protocol.ServerUpdate(lambda _: (), apply),
            client_state=lambda params: jax.tree.map(jnp.zeros_like, params.model),
            client_weights=_equal_weights,
            chunk_size=chunk_size,
        )

    def uncontrolled(model, *, key):
        del key
        return Controlled(model, jax.tree.map(jnp.zeros_like, model))

    return rounds.prepared(rounds.for_cohorts(for_cohort), uncontrolled)


def _equal_weights(clients: PyTree) -> Float[Array, " clients"]:
    """Count every client that has an example once."""
    counts = clients_.num_examples(clients)
    return (counts > 0).astype(counts.dtype)
