"""Rounds in FedJAX: its federated averaging, which compiles the step of one client."""

import sys

import fedjax  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
import optax
from fedjax.algorithms import fed_avg  # pyright: ignore[reportMissingImports]
from jax import lax

from benchmarks.peers import common


def logits(params, images, is_smooth):
    """Apply the model that the shapes describe, see `common.torch_model`."""
    activation = jnp.tanh if is_smooth else jax.nn.relu
    pool = jnp.mean if is_smooth else jnp.max
    hidden, flat = images, False
    for weight, bias in zip(params[::2], params[1::2], strict=True):
        if weight.ndim == 4:
            hidden = lax.conv_general_dilated(hidden, weight, (1, 1), "SAME")
            count, channels, height, width = hidden.shape
            shape = (count, channels, height // 2, 2, width // 2, 2)
            hidden = activation(pool(hidden.reshape(shape), (3, 5)) + bias[:, None, None])
        else:
            hidden = activation(hidden) if flat else hidden.reshape(len(hidden), -1)
            hidden, flat = hidden @ weight.T + bias, True
    return hidden


def main(path: str) -> None:
    task = common.load(path)

    @jax.grad
    def gradient(params, batch, rng):
        del rng
        entropies = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(entropies(logits(params, batch["x"], task.is_smooth), batch["y"]))

    algorithm = fed_avg.federated_averaging(
        gradient,
        fedjax.optimizers.sgd(task.rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=task.batch_size, skip_shuffle=True),
    )
    state = algorithm.init([jnp.asarray(value) for value in task.params])
    turns = common.Turns(lambda: [np.asarray(value) for value in state.params])
    labels = task._replace(labels=task.labels.astype(np.int32))
    while turns.next():
        clients = []
        for place, client in enumerate(task.cohorts[turns.index]):
            images, targets = common.rows(labels, turns.index, place)
            data = fedjax.ClientDataset({"x": images, "y": targets})
            clients.append((str(client), data, jax.random.PRNGKey(0)))
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)


if __name__ == "__main__":
    main(sys.argv[1])
