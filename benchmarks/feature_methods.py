"""Features of several modalities: networks trained by federated methods, and classical baselines.

All federated methods train the same network from the same start with the same rounds, steps and
keys. Splits, seeds and weights of a loss are lanes of one compiled function.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from benchmarks import feature_data
from fedlr import federated, multimodal
from fedlr.algorithms import fdrmfl, fedavg, local_only, moon
from fedlr.federated import local, protocol, rounds

__all__ = [
    "METHODS",
    "Features",
    "Method",
    "Plan",
    "Trained",
    "apply",
    "choose",
    "learn",
    "pooled",
    "run_lane",
    "sizes_of",
    "starts",
    "structure",
    "train",
    "validate",
    "without_critic",
]

NO_TERMS = fdrmfl.Weights(None, None, None)


class Plan(NamedTuple):
    """How networks are trained, the same for all methods.

    The defaults are the best of the benchmark table `training`.

    Attributes:
        num_features: d.
        num_rounds: Rounds.
        num_steps: Steps of a client in a round; a pooled one does those of all.
        batch_size: Samples a step.
        rate: Learning rate of the first round, from where it falls to 0 as a cosine.
        lanes: Lanes worked on at once.
    """

    num_features: int = 8
    num_rounds: int = 80
    num_steps: int = 50
    batch_size: int = 16
    rate: float = 3e-4
    lanes: int = 10


Build = Callable[[multimodal.Network, local.Training, Any], protocol.FederatedAlgorithm]


class Method(NamedTuple):
    """A way to train the network.

    Attributes:
        build: ``(network, training, numbers) -> algorithm``, the numbers traced.
        has_critic: Whether the network has its critic.
        is_pooled: Whether one client holds all the data.
        is_alone: Whether every client has a network of its own.
    """

    build: Build
    has_critic: bool = False
    is_pooled: bool = False
    is_alone: bool = False


def squared_error(network: multimodal.Network) -> Callable[[PyTree, PyTree, Array], Array]:
    """Build the loss of one sample."""

    def loss(params, sample, target):
        model = eqx.combine(params, network)
        return (model.predict(model.encode(sample).fused) - target) ** 2

    return loss


def average(network, training, numbers):
    del numbers
    return fdrmfl.build(network, training, weights=NO_TERMS)


def three_terms(network, training, weights):
    return fdrmfl.build(network, training, weights=weights)


def proximal(network, training, strength):
    update = local.local_proximal(
        squared_error(network),
        training.optimizer,
        strength=strength,
        num_steps=training.num_steps,
        batch_size=training.batch_size,
    )
    return fedavg.build(update)


def model_contrast(network, training, strength):
    def embed(params, samples):
        return multimodal.features(eqx.combine(params, network), samples)

    return moon.build(squared_error(network), embed, training, strength=strength)


def alone(network, training, numbers):
    del numbers
    update = local.local_sgd(
        squared_error(network),
        training.optimizer,
        num_steps=training.num_steps,
        batch_size=training.batch_size,
    )
    return local_only.build(update)


METHODS = {
    "central": Method(average, is_pooled=True),
    "local only": Method(alone, is_alone=True),
    "FedAvg": Method(average),
    "FedProx": Method(proximal),
    "MOON": Method(model_contrast),
    "FDRMFL": Method(three_terms, has_critic=True),
    "FDRMFL without information": Method(three_terms),
}


class Trained(NamedTuple):
    """Networks of all lanes.

    Attributes:
        params: Arrays of the network, leading axis (lanes,), or (lanes, clients) of lone clients.
        num_rounds: Rounds done.
        up_bytes: Bytes that all clients sent in all rounds, shape (lanes,). A pooled one has the
            data, and sends nothing.
        down_bytes: Bytes that they received, shape (lanes,).
        metrics: Record of the last round, leading axes (lanes, clients).
    """

    params: PyTree
    num_rounds: int
    up_bytes: Float[np.ndarray, " lanes"]
    down_bytes: Float[np.ndarray, " lanes"]
    metrics: Any


class Features(NamedTuple):
    """What a method makes of the samples of a problem.

    Attributes:
        method: Its name.
        train: Features of the training samples, shape (splits, clients, samples, d).
        test: Features of the test samples.
        predictions: Of the test samples by the method's own head, standardized, shape (splits,
            clients, samples); None without an own head.
        trained: How the network was trained, None for others.
        is_alone: Whether every client has features of its own, which only a head of its own reads.
        has_own_size: Whether the number of features is the method's own and not that of the table.
    """

    method: str
    train: Float[np.ndarray, "splits clients samples d"]
    test: Float[np.ndarray, "splits clients samples d"]
    predictions: Float[np.ndarray, "splits clients samples"] | None
    trained: Trained | None = None
    is_alone: bool = False
    has_own_size: bool = False


def starts(problem: feature_data.Problem, plan: Plan) -> PyTree:
    """Draw the network that all methods start from, for every split.

    Args:
        problem: The problem; only shapes are read.
        plan: How networks are trained.

    Returns:
        Arrays of the networks, leading axis (splits,).
    """
    # With the keys of the default kind this took five times as long to compile.
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(problem.scales))
    return _draw(sizes_of(problem), plan.num_features)(keys)


def pooled(data: protocol.ClientData) -> protocol.ClientData:
    """Give the samples of all clients to one, along the axes (splits, clients, samples)."""
    return jax.tree.map(lambda x: x.reshape(len(x), 1, -1, *x.shape[3:]), data)


def run_lane(
    method: Method,
    network: multimodal.Network,
    plan: Plan,
    lane: tuple[PyTree, protocol.ClientData, Any, Key[Array, ""]],
) -> tuple[protocol.FederatedState, protocol.RoundInfo]:
    """Train one network: params to start from, clients, numbers of the method, key.

    Args:
        method: The method.
        network: Structure of the network.
        plan: How it is trained.
        lane: All that is traced.

    Returns:
        The last state, and the records of the rounds.
    """
    params, clients, numbers, key = lane

    def build(rate):
        training = local.Training(fdrmfl.optimizer(rate), plan.num_steps, plan.batch_size)
        return method.build(network, training, numbers)

    schedule = optax.cosine_decay_schedule(plan.rate, plan.num_rounds)
    algorithm = rounds.scheduled(build, schedule)
    state = algorithm.init(params, clients, key=key)
    return federated.run(algorithm, state, clients, num_rounds=plan.num_rounds, key=key)


def train(
    name: str,
    problem: feature_data.Problem,
    plan: Plan,
    *,
    numbers: PyTree = None,
    repeats: int = 1,
) -> Trained:
    """Train a method on all splits.

    Args:
        name: One of `METHODS`.
        problem: The problem.
        plan: How networks are trained.
        numbers: Weights of the terms or strength, leaves of shape (splits * repeats,).
        repeats: How often the splits are repeated, one time after the other, with other numbers.

    Returns:
        The networks, leading axis (splits * repeats,).
    """
    method, data = METHODS[name], problem.train
    params = starts(problem, plan)
    keys = jax.random.split(jax.random.key(1), len(problem.scales))
    clients = pooled(data) if method.is_pooled else data
    if method.is_pooled:
        plan = plan._replace(num_steps=plan.num_steps * data.mask.shape[1])
    function = _lanes(name, sizes_of(problem), plan)
    if not method.has_critic:
        params = without_critic(params)
    count = len(keys) * repeats
    pieces = []
    for start in range(0, count, min(plan.lanes, count)):
        # The last piece is filled up with lanes of the first.
        lanes = np.arange(start, start + min(plan.lanes, count)) % count
        splits = lanes % len(keys)
        own = jax.tree.map(lambda x, i=lanes: jnp.asarray(x, jnp.float32)[i], numbers)
        start_, data_, keys_ = jax.tree.map(lambda x, i=splits: x[i], (params, clients, keys))
        pieces.append(function(start_, data_, own, keys_))
    params, up, down, metrics = jax.tree.map(
        lambda *leaves: np.concatenate(leaves)[:count], *jax.device_get(pieces)
    )
    # Bytes of a round fit int32, those of all rounds may not.
    up, down = (np.asarray(x, float).sum(axis=(1, 2)) for x in (up, down))
    if method.is_pooled:
        up, down = np.zeros_like(up), np.zeros_like(down)
    return Trained(params, plan.num_rounds, up, down, metrics)


def apply(
    label: str,
    problem: feature_data.Problem,
    plan: Plan,
    params: PyTree,
    *,
    trained: Trained | None = None,
    is_alone: bool = False,
) -> Features:
    """Apply networks to all samples.

    Args:
        label: What the table calls the method.
        problem: The problem.
        plan: How the networks were trained.
        params: Arrays of the networks, one for each split.
        trained: What the table tells of the training, None for nothing.
        is_alone: Whether there is one for each client.

    Returns:
        The features.
    """
    params = without_critic(params)
    encode = _encoder(sizes_of(problem), plan.num_features, is_alone)
    found, _ = encode(params, problem.train.inputs)
    tested, predictions = encode(params, problem.test.inputs)
    found, tested, predictions = jax.device_get((found, tested, predictions))
    return Features(label, found, tested, predictions, trained, is_alone=is_alone)


def learn(
    name: str,
    problem: feature_data.Problem,
    plan: Plan,
    *,
    numbers: PyTree = None,
    label: str | None = None,
) -> Features:
    """Train a method and apply it.

    Args:
        name: One of `METHODS`.
        problem: The problem.
        plan: How networks are trained.
        numbers: As in `train`.
        label: What the table calls it; None for its name.

    Returns:
        The features.
    """
    trained = train(name, problem, plan, numbers=numbers)
    is_alone = METHODS[name].is_alone
    label = name if label is None else label
    return apply(label, problem, plan, trained.params, trained=trained, is_alone=is_alone)


def choose(name: str, problem: feature_data.Problem, plan: Plan, grid: PyTree) -> PyTree:
    """Choose numbers of a method by the validation error.

    Args:
        name: One of `METHODS`.
        problem: The problem; its test samples are not read.
        plan: How networks are trained.
        grid: Candidates, leaves of shape (candidates,).

    Returns:
        The best candidate of each split, leaves of shape (splits,).
    """
    splits = len(problem.scales)
    (count,) = {len(leaf) for leaf in jax.tree.leaves(grid)}
    numbers = jax.tree.map(lambda leaf: np.repeat(leaf, splits), grid)
    errors = validate(name, problem, plan, numbers=numbers, repeats=count)
    best = np.argmin(errors, axis=0)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[best], grid)


def validate(
    name: str,
    problem: feature_data.Problem,
    plan: Plan,
    *,
    numbers: PyTree = None,
    repeats: int = 1,
) -> Float[np.ndarray, "repeats splits"]:
    """Train on four fifths of the training samples, and test the own head on the others.

    Args:
        name: One of `METHODS`, but for that of lone clients.
        problem: The problem; its test samples are not read. Scales stay those of all training
            samples.
        plan: How networks are trained.
        numbers: As in `train`.
        repeats: As in `train`.

    Returns:
        Mean squared errors of standardized targets.
    """
    mask, splits = np.asarray(problem.train.mask), len(problem.scales)
    rng = np.random.default_rng(2)
    validation = mask & (rng.random(mask.shape) < 0.2)
    inner = problem._replace(train=problem.train._replace(mask=mask & ~validation))
    trained = train(name, inner, plan, numbers=numbers, repeats=repeats)
    encode = _encoder(sizes_of(problem), plan.num_features, False)
    errors = []
    for repeat in range(repeats):
        own = slice(repeat * splits, (repeat + 1) * splits)
        params = jax.tree.map(lambda leaf, i=own: leaf[i], without_critic(trained.params))
        residuals = np.asarray(encode(params, problem.train.inputs)[1]) - problem.train.targets
        errors.append(np.mean(residuals**2, axis=(1, 2), where=validation))
    return np.stack(errors)


def without_critic(params: PyTree) -> PyTree:
    """Leave out the critic, which no features need."""
    return eqx.tree_at(lambda network: network.critic, params, None, is_leaf=lambda x: x is None)


def sizes_of(problem: feature_data.Problem) -> tuple[int, ...]:
    """Return the number of channels of every modality."""
    return tuple(value.shape[-1] for value in problem.train.inputs.values)


@functools.cache
def structure(sizes: tuple[int, ...], num_features: int) -> multimodal.Network:
    """Return the network without any arrays, which come as params."""
    network = eqx.filter_eval_shape(
        functools.partial(multimodal.dense_network, sizes, num_features=num_features),
        key=jax.random.key(0),
    )
    return eqx.filter(network, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))


@functools.cache
def _draw(sizes: tuple[int, ...], num_features: int) -> Callable[[Array], PyTree]:
    def draw(key):
        network = multimodal.dense_network(sizes, num_features=num_features, key=key)
        return eqx.filter(network, eqx.is_inexact_array)

    return jax.jit(jax.vmap(draw))


@functools.cache
def _lanes(name: str, sizes: tuple[int, ...], plan: Plan) -> Callable:
    """Compile the training of so many lanes at once."""
    method, network = METHODS[name], structure(sizes, plan.num_features)
    network = network if method.has_critic else without_critic(network)

    def one(*lane):
        state, infos = run_lane(method, network, plan, lane)
        last = jax.tree.map(lambda leaf: leaf[-1], infos.metrics)
        return state.params, infos.uplink_bytes, infos.downlink_bytes, last

    return jax.jit(jax.vmap(one))


@functools.cache
def _encoder(sizes: tuple[int, ...], num_features: int, is_alone: bool) -> Callable:
    """Compile features and predictions of samples with leading axes (splits, clients, samples)."""
    network = without_critic(structure(sizes, num_features))

    def one(params, sample):
        model = eqx.combine(params, network)
        fused = model.encode(sample).fused
        return fused, model.predict(fused)

    of_client = jax.vmap(one, in_axes=(None, 0))
    of_split = jax.vmap(of_client, in_axes=(0 if is_alone else None, 0))
    return jax.jit(jax.vmap(of_split))
