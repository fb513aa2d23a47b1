"""FedLoRU beside its rivals on handwritten digits: accuracy against bytes, clients, curvature.

Every method trains the same network from the same start with the same local steps; its learning
rate is the best of a grid, by the mean over seeds of the accuracy at the end. The grid and the
seeds are vmapped: one compiled call serves a method and a number of clients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedlr import curvature, datasets, federated, lowrank
from fedlr.algorithms import (
    fedavg,
    fedex_lora,
    fedhm,
    fedlora,
    fedloru,
    fedlrt,
    fedpara,
    ffa_lora,
    flexlora,
    flora,
    rolora,
)
from fedlr.federated import compressors, local, partition, protocol, rounds

__all__ = ["CORES", "TABLES", "run"]

CORES = None
Rows = list[dict[str, Any]]


class Setting(NamedTuple):
    """Sizes of an experiment: the network, the federation, and how it is trained."""

    hidden: int = 128
    rank: int = 4
    num_rounds: int = 50
    passes: int = 5
    batch_size: int = 16
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 0.5
    every: int = 10


FULL = Setting()
SMALL = Setting(hidden=12, rank=1, num_rounds=3, passes=1, rates=(0.1, 0.3), seeds=(0,), every=2)


def predict(params, pixels):
    """Apply a network of two hidden layers to the 64 pixels of an image."""
    for weight, bias in params[:-1]:
        pixels = jax.nn.relu(weight @ pixels + bias)
    weight, bias = params[-1]
    return weight @ pixels + bias


def loss(params, pixels, label):
    """Return the cross entropy of one image."""
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, pixels), label)


def network(key, hidden: int):
    """Draw weights uniform on +-1 / sqrt(inputs), and no biases."""
    sizes = (64, hidden, hidden, 10)
    params = []
    for n, m, own in zip(sizes, sizes[1:], jax.random.split(key, 3), strict=False):
        weight = jax.random.uniform(own, (m, n), jnp.float32, -(n**-0.5), n**-0.5)
        params.append((weight, jnp.zeros(m, jnp.float32)))
    return params


def hidden_matrices(path: tuple, leaf: jax.Array) -> bool:
    """Choose the weights of the hidden layers."""
    return path[0].idx < 2 and leaf.ndim == 2


def optimizer(rate) -> optax.GradientTransformation:
    """Clip, decay, momentum: the published order."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(1e-4),
        optax.sgd(rate, momentum=0.9),
    )


Build = Callable[[Any, int, Setting], protocol.FederatedAlgorithm]
Model = Callable[[protocol.FederatedState], Any]


def of_average(rate, steps: int, setting: Setting, compressor=None):
    update = local.local_sgd(loss, optimizer(rate), num_steps=steps, batch_size=setting.batch_size)
    return fedavg.build(update, compressor=compressor)


def of_low_rank(rate, steps: int, setting: Setting, **options):
    training = local.Training(optimizer(rate), steps, setting.batch_size)
    every = options.pop("every", setting.every)
    settings = fedloru.Settings(setting.rank, every, hidden_matrices, **options)
    return fedloru.assemble(loss, training, settings)


def of_rival(module, rate, steps: int, setting: Setting):
    return module.build(
        loss,
        optimizer(rate),
        rank=setting.rank,
        local_steps=steps,
        batch_size=setting.batch_size,
        where=hidden_matrices,
    )


def upload_svd(rate, steps: int, setting: Setting):
    """FedAvg whose clients upload truncated updates; biases and the last layer go in full."""
    compressor = compressors.power_sgd(setting.rank)
    return of_average(rate, steps, setting, compressors.error_feedback(compressor))


PUBLISHED = {
    "start": lowrank.both_random,
    "restart": federated.servers.keep,
    "alpha": 2.0,
    "zero_base": True,
}
METHODS: dict[str, tuple[Build, Model]] = {
    "FedAvg": (of_average, lambda state: state.params),
    "FedAvg, PowerSGD upload": (upload_svd, lambda state: state.params),
    "FedLoRU": (of_low_rank, fedloru.merged_params),
    "FedLoRU, every round": (functools.partial(of_low_rank, every=1), fedloru.merged_params),
    "FedLoRU, factors kept": (
        functools.partial(of_low_rank, restart=federated.servers.keep),
        fedloru.merged_params,
    ),
    "FedLoRU, published code": (
        functools.partial(of_low_rank, **PUBLISHED),
        fedloru.merged_params,
    ),
    **{
        name: (functools.partial(of_rival, module), merged)
        for name, module, merged in (
            ("FedLoRA", fedlora, fedloru.merged_params),
            ("FFA-LoRA", ffa_lora, fedloru.merged_params),
            ("RoLoRA", rolora, fedloru.merged_params),
            ("FLoRA", flora, fedloru.merged_params),
            ("FedEx-LoRA", fedex_lora, fedloru.merged_params),
            ("FlexLoRA", flexlora, fedloru.merged_params),
            ("FedHM", fedhm, fedloru.merged_params),
            ("FeDLRT", fedlrt, fedlrt.merged_params),
            ("FedPara", fedpara, fedpara.merged_params),
        )
    },
}


@functools.cache
def digits() -> datasets.Images:
    """Read the images as rows of 64 pixels, 1438 to train and 359 to test."""
    data = datasets.digits()
    flat = [images.reshape(len(images), 64) for images in (data.train_images, data.test_images)]
    return data._replace(train_images=flat[0], test_images=flat[1])


def federate(num_clients: int, alpha: float | None, seeds: Sequence[int]) -> protocol.ClientData:
    """Split the training images among clients, for every seed, along a leading axis of seeds."""
    data = digits()
    labels, found = np.asarray(data.train_labels), []
    for seed in seeds:
        if alpha is None:
            split = partition.iid(len(labels), num_clients, seed=seed)
        else:
            split = partition.dirichlet(labels, num_clients, alpha, seed=seed)
        found.append(partition.split(split, data.train_images, data.train_labels))
    width = max(clients.mask.shape[1] for clients in found)

    def pad(leaf):
        return np.pad(leaf, [(0, 0), (0, width - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2))

    return jax.tree.map(lambda *leaves: jnp.stack([pad(leaf) for leaf in leaves]), *found)


class Outcome(NamedTuple):
    """Of every rate and seed: accuracies after every round, bytes of a client, the last state."""

    accuracies: jax.Array
    uplink: jax.Array
    downlink: jax.Array
    model: Any


def train(
    name: str, num_clients: int, alpha: float | None, setting: Setting
) -> tuple[Outcome, int]:
    """Train a method at all rates from all seeds; return the place of the best rate as well."""
    build, model_of = METHODS[name]
    data = federate(num_clients, alpha, setting.seeds)
    images = digits()
    cohort = max(1, round(setting.share * num_clients))
    # The same steps for all: the passes of a client of mean size.
    per_pass = -(-len(images.train_labels) // num_clients // setting.batch_size) or 1
    steps = setting.passes * max(1, per_pass)

    def accuracy(params):
        scores = jax.vmap(predict, in_axes=(None, 0))(params, images.test_images)
        return jnp.mean((jnp.argmax(scores, axis=1) == images.test_labels).astype(jnp.float32))

    def one(rate, clients, seed):
        cosine = optax.cosine_decay_schedule(1.0, setting.num_rounds)

        def schedule(count):
            return 1e-3 + (rate - 1e-3) * cosine(count)

        algorithm = federated.with_evaluation(
            rounds.scheduled(lambda rate: build(rate, steps, setting), schedule),
            lambda state: accuracy(model_of(state)),
        )
        key = jax.random.key(seed)
        params = network(jax.random.fold_in(key, 1), setting.hidden)
        state = algorithm.init(params, clients, key=jax.random.fold_in(key, 2))
        state, infos = federated.run(
            algorithm, state, clients, num_rounds=setting.num_rounds, cohort_size=cohort, key=key
        )
        model = model_of(state)
        accuracies = jnp.append(infos.evaluation[1:], accuracy(model))
        return Outcome(
            accuracies, jnp.mean(infos.uplink_bytes.astype(jnp.float32)),
            jnp.mean(infos.downlink_bytes.astype(jnp.float32)), model,
        )  # fmt: skip

    over_seeds = jax.vmap(one, in_axes=(None, 0, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    found = over_rates(
        jnp.array(setting.rates, jnp.float32), data, jnp.array(setting.seeds, jnp.uint32)
    )
    ends = jnp.mean(found.accuracies[..., -5:], axis=(1, 2))
    return jax.device_get(found), int(jnp.argmax(jnp.nan_to_num(ends)))


def row(table: str, name: str, num_clients: int, alpha: float | None, setting: Setting) -> dict:
    """Tell how a method did at its best rate."""
    found, best = train(name, num_clients, alpha, setting)
    ends = found.accuracies[best, :, -5:].mean(axis=1)
    rate = setting.rates[best]
    return {
        "table": table,
        "method": name,
        "clients": num_clients,
        "dirichlet": alpha,
        "accuracy": float(ends.mean()),
        "spread": float(ends.std(ddof=1)) if len(ends) > 1 else 0.0,
        "rate": rate,
        "at the edge of the grid": rate in (setting.rates[0], setting.rates[-1]),
        "up_bytes": float(found.uplink[best].mean()),
        "down_bytes": float(found.downlink[best].mean()),
        "curve": [round(float(value), 4) for value in found.accuracies[best].mean(axis=0)],
    }


def accuracy(size: str) -> Rows:
    """Compare all methods at 20 and 100 clients."""
    setting, counts = (SMALL, (4,)) if size == "small" else (FULL, (20, 100))
    names = list(METHODS)[:3] if size == "small" else METHODS
    return [row("accuracy", name, count, 0.3, setting) for count in counts for name in names]


COMPARED = ("FedAvg", "FedLoRU", "FedLoRA", "FedEx-LoRA")


def clients(size: str) -> Rows:
    """Let the number of clients grow, and their data shrink."""
    setting, counts = (SMALL, (3,)) if size == "small" else (FULL, (20, 50, 100, 200, 400))
    names = COMPARED[:2] if size == "small" else COMPARED
    return [row("clients", name, count, 0.3, setting) for count in counts for name in names]


def heterogeneity(size: str) -> Rows:
    """Let the labels of the clients differ more and less."""
    setting, alphas = (SMALL, (0.3,)) if size == "small" else (FULL, (0.1, 0.3, 1.0, None))
    count, names = (3, COMPARED[:1]) if size == "small" else (50, COMPARED)
    return [row("heterogeneity", name, count, alpha, setting) for alpha in alphas for name in names]


def hessians(size: str) -> Rows:
    """Measure stable ranks of the Hessians of server and clients, and how alike gradients are."""
    small = size == "small"
    setting = SMALL._replace(hidden=6) if small else FULL._replace(hidden=16)
    counts = (3,) if small else (5, 20, 100)
    stops = (0, 2) if small else (0, 5, 20, 50)
    probes, lanczos = (4, 5) if small else (200, 30)
    images, rows = digits(), []

    def of_data(params, pixels, labels, valid):
        losses = jax.vmap(loss, in_axes=(None, 0, 0))(params, pixels, labels)
        return jnp.sum(jnp.where(valid, losses, 0)) / jnp.sum(valid, dtype=losses.dtype)

    def spectrum(params, pixels, labels, valid, key):
        found = curvature.stable_rank(
            lambda p: of_data(p, pixels, labels, valid),
            params, num_probes=probes, num_lanczos=lanczos, key=key,
        )  # fmt: skip
        return found.stable_rank

    @jax.jit
    def measure(params, data, key):
        everyone = jnp.ones(len(images.train_labels), bool)
        server = spectrum(params, images.train_images, images.train_labels, everyone, key)
        own = jax.lax.map(
            lambda one: spectrum(params, one.inputs, one.targets, one.mask, key), data
        )
        gradients = jax.vmap(jax.grad(of_data), in_axes=(None, 0, 0, 0))(params, *data)
        matrices = [gradient[0] for gradient in gradients[:2]]
        alike = {"full": curvature.gradient_similarity(matrices)}
        for rank in (1, 2, 4):
            truncated = curvature.truncate_gradients(matrices, rank)
            alike[f"rank {rank}"] = curvature.gradient_similarity(truncated)
        return server, own, alike

    for count in counts:
        data = jax.tree.map(lambda leaf: leaf[0], federate(count, None, setting.seeds[:1]))
        update = local.local_sgd(loss, optax.sgd(0.1), num_steps=5, batch_size=setting.batch_size)
        algorithm = fedavg.build(update)
        state = algorithm.init(
            network(jax.random.key(0), setting.hidden), data, key=jax.random.key(1)
        )
        advance = jax.jit(algorithm.round)
        for done in range(stops[-1] + 1):
            if done in stops:
                server, own, alike = jax.device_get(measure(state.params, data, jax.random.key(2)))
                rows.append(
                    {
                        "table": "hessians",
                        "clients": count,
                        "examples of a client": len(images.train_labels) // count,
                        "rounds": done,
                        "server": float(server),
                        "clients, mean": float(own.mean()),
                        "clients, spread": float(own.std(ddof=1)),
                        **{f"cosine, {name}": float(value) for name, value in alike.items()},
                    }
                )
            state, _ = advance(state, data, jnp.arange(count), key=jax.random.key(done))
    return rows


TABLES: dict[str, Callable[[str], Rows]] = {
    "accuracy": accuracy,
    "clients": clients,
    "heterogeneity": heterogeneity,
    "hessians": hessians,
}


def run(size: str, only: Sequence[str] | None = None) -> Rows:
    """Run all tables at "small" or "full" size, or those named, and return their rows."""
    return [line for name in only or TABLES for line in TABLES[name](size)]
