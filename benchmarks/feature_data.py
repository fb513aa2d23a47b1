"""Regressions from several modalities, dealt to clients, with held-out samples at each of them.

A problem has several splits along the leading axis of all its arrays: draws of the training and
test samples, and of who holds them. What is standardized is so by the pooled training samples of
its split, and no test sample has a copy among them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from fedlr import datasets, multimodal, synthetic
from fedlr.federated import partition, protocol

__all__ = [
    "Draw",
    "Problem",
    "Samples",
    "Worlds",
    "by_target",
    "check_no_copies",
    "dirichlet",
    "hold_out",
    "iid",
    "make_problem",
    "meat",
    "rows",
    "split_of",
    "with_gaps",
    "without_modality",
    "worlds",
]


class Samples(NamedTuple):
    """Samples in one place: inputs of shape (samples, p_m) for each modality, targets."""

    inputs: tuple[np.ndarray, ...]
    targets: Float[np.ndarray, " samples"]


class Draw(NamedTuple):
    """One split: the samples, the client of each, and which are held out for the test."""

    samples: Samples
    owners: Int[np.ndarray, " samples"]
    held_out: Bool[np.ndarray, " samples"]


class Problem(NamedTuple):
    """Standardized samples of all clients, leading axes (splits, clients, samples).

    Attributes:
        train: Training samples.
        test: Test samples.
        scales: Standard deviations of the training targets, shape (splits,): squared errors times
            their squares are in the squared unit of the target.
    """

    train: protocol.ClientData
    test: protocol.ClientData
    scales: Float[np.ndarray, " splits"]


class Worlds(NamedTuple):
    """A problem of samples whose Bayes error is known.

    Attributes:
        problem: The problem; every split is a world of its own.
        bayes: Bayes error, that without the second modality too.
        bayes_without_first: Bayes error without the first modality.
        oracle: Mean squared error on the test samples of who sees the latents.
    """

    problem: Problem
    bayes: float
    bayes_without_first: float
    oracle: float


def check_no_copies(samples: Samples, held_out: Bool[np.ndarray, " samples"]) -> None:
    """Refuse a split with equal inputs on both sides.

    Args:
        samples: The samples.
        held_out: Which of them are for the test.

    Raises:
        ValueError: If a test sample equals a training sample in all its inputs.
    """
    inputs = np.concatenate(samples.inputs, axis=1)
    known = {row.tobytes() for row in inputs[~held_out]}
    copies = sum(row.tobytes() in known for row in inputs[held_out])
    if copies:
        message = f"check_no_copies: got {copies} test samples that are training samples too"
        raise ValueError(f"{message}, expected none")


def make_problem(draws: Iterable[Draw]) -> Problem:
    """Standardize the samples of every split and deal them to the clients.

    Args:
        draws: The splits, with equal numbers of samples and of clients.

    Returns:
        The problem. Clients are padded to the largest of any split.

    Raises:
        ValueError: As `check_no_copies`.
    """
    trains, tests, scales = [], [], []
    for samples, owners, held_out in draws:
        check_no_copies(samples, held_out)
        standard, scale = _standardize(samples, ~held_out)
        trains.append(_deal(standard, owners, ~held_out))
        tests.append(_deal(standard, owners, held_out))
        scales.append(scale)
    return Problem(_stack(trains), _stack(tests), np.array(scales))


def rows(data: protocol.ClientData) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs side by side and the targets of all present samples of a split.

    Args:
        data: Samples of the clients, leading axes (clients, samples).

    Returns:
        Inputs, shape (present samples, p_1 + .. + p_M), zeros for missing modalities, and targets.
    """
    mask = np.asarray(data.mask)
    there = np.asarray(data.inputs.present)[mask]
    parts = [np.asarray(value)[mask] for value in data.inputs.values]
    parts = [np.where(own[:, None], part, 0) for part, own in zip(parts, there.T, strict=True)]
    return np.concatenate(parts, axis=1), np.asarray(data.targets)[mask]


def without_modality(data: protocol.ClientData, index: int) -> protocol.ClientData:
    """Let all samples miss a modality.

    Args:
        data: Samples.
        index: Index of the modality.

    Returns:
        The same samples without it.
    """
    present = np.array(data.inputs.present)
    present[..., index] = False
    return data._replace(inputs=data.inputs._replace(present=present))


def split_of(data: protocol.ClientData, index: int) -> protocol.ClientData:
    """Return the samples of one split.

    Args:
        data: Samples, leading axes (splits, clients, samples).
        index: Index of the split.

    Returns:
        Samples of its clients, as NumPy arrays.
    """
    return jax.tree.map(lambda leaf: np.asarray(leaf[index]), data)


def with_gaps(
    data: protocol.ClientData, chance: float, rng: np.random.Generator
) -> protocol.ClientData:
    """Let samples miss one of two modalities at random, each with a chance of at most a half.

    Args:
        data: Samples of two modalities.
        chance: Chance to miss the first, and to miss the second.
        rng: Generator.

    Returns:
        The samples, none without any modality.
    """
    present = np.array(data.inputs.present)
    draws = rng.random(present.shape[:-1])
    present[..., 0] &= draws >= chance
    present[..., 1] &= draws < 1 - chance
    return data._replace(inputs=data.inputs._replace(present=present))


def hold_out(
    owners: Int[np.ndarray, " samples"], share: float, rng: np.random.Generator
) -> Bool[np.ndarray, " samples"]:
    """Choose a share of the samples of every client for the test, at least one.

    Args:
        owners: Client of every sample.
        share: Share of the samples.
        rng: Generator.

    Returns:
        Which samples are chosen.
    """
    chosen = np.zeros(len(owners), bool)
    for client in np.unique(owners):
        own = rng.permutation(np.flatnonzero(owners == client))
        chosen[own[: max(1, round(share * len(own)))]] = True
    return chosen


def by_target(
    targets: Float[np.ndarray, " samples"],
    rng: np.random.Generator,
    shares: tuple[float, ...] = (0.45, 0.3, 0.25),
    noise: float = 0.5,
) -> Int[np.ndarray, " samples"]:
    """Sort the samples by target plus noise and cut them into clients.

    Args:
        targets: Targets.
        rng: Generator.
        shares: Shares of the clients, from the one of the smallest targets on.
        noise: Standard deviation of the noise in that of the targets; 0 for clients without common
            targets.

    Returns:
        Client of every sample.
    """
    noisy = targets + noise * targets.std() * rng.standard_normal(len(targets))
    ends = np.round(np.cumsum(shares)[:-1] * len(targets)).astype(int)
    owners = np.empty(len(targets), int)
    owners[np.argsort(noisy)] = np.searchsorted(ends, np.arange(len(targets)), side="right")
    return owners


def dirichlet(
    targets: Float[np.ndarray, " samples"], num_clients: int, alpha: float, seed: int
) -> Int[np.ndarray, " samples"]:
    """Deal ten quantile bins of the target by Dirichlet shares, ten samples a client at least.

    Args:
        targets: Targets.
        num_clients: Number of clients.
        alpha: Concentration; infinity for equal shares.
        seed: Seed.

    Returns:
        Client of every sample.
    """
    edges = np.quantile(targets, np.linspace(0, 1, 11)[1:-1])
    split = partition.dirichlet(
        np.digitize(targets, edges), num_clients, alpha, seed=seed, min_size=10
    )
    return _owners(split)


def iid(num_samples: int, num_clients: int, seed: int) -> Int[np.ndarray, " samples"]:
    """Deal the samples at random, equally many to each.

    Args:
        num_samples: Number of samples.
        num_clients: Number of clients.
        seed: Seed.

    Returns:
        Client of every sample.
    """
    return _owners(partition.iid(num_samples, num_clients, seed=seed))


def meat() -> Samples:
    """Load the fat of the distinct samples of Tecator, from two ranges of wavelengths.

    Returns:
        193 samples with the modalities 850-950 and 950-1050 nm.
    """
    data = datasets.distinct_samples(datasets.tecator())
    ranges = datasets.spectral_ranges(data.spectra, data.wavelengths, (850, 950, 1050))
    return Samples(tuple(np.asarray(part) for part in ranges), np.asarray(data.contents[:, 1]))


def worlds(num_worlds: int, num_clients: int, num_train: int, num_test: int) -> Worlds:
    """Draw worlds of two modalities, of which every client sees shifted latents.

    Args:
        num_worlds: Number of worlds.
        num_clients: Number of clients.
        num_train: Training samples of a client.
        num_test: Test samples of a client.

    Returns:
        The worlds.
    """
    draws, bayes, errors = [], [], []
    # Rounds, sizes and the clipping norm were chosen on the worlds from 0 on.
    for seed in range(100, 100 + num_worlds):
        keys = jax.random.split(jax.random.key(seed), 4)
        world = synthetic.multimodal_world(key=keys[0])
        shifts = synthetic.client_shifts(world, num_clients, 0.5, key=keys[1])
        train = synthetic.multimodal_clients(world, shifts, num_train, key=keys[2])
        test = synthetic.multimodal_clients(world, shifts, num_test, key=keys[3])
        inputs, targets = jax.tree.map(
            lambda *leaves: np.concatenate([_merge(leaf) for leaf in leaves]),
            (train.inputs, train.targets),
            (test.inputs, test.targets),
        )
        owners = [np.repeat(np.arange(num_clients), count) for count in (num_train, num_test)]
        held_out = np.arange(len(targets)) >= num_clients * num_train
        draws.append(Draw(Samples(inputs, targets), np.concatenate(owners), held_out))
        bayes.append([float(synthetic.bayes_error(world, own)) for own in ((0, 1), (0,), (1,))])
        errors.append(float(np.mean((synthetic.oracle(world, test) - test.targets) ** 2)))
    complete, _, last = np.mean(bayes, axis=0)
    return Worlds(make_problem(draws), float(complete), float(last), float(np.mean(errors)))


def _merge(leaf):
    """Join the axes of clients and samples."""
    return np.asarray(leaf).reshape(-1, *leaf.shape[2:])


def _standardize(samples, train):
    """Standardize all samples by the training samples; return the scale of the targets too."""

    def standard(values):
        mean, spread = values[train].mean(axis=0), values[train].std(axis=0)
        return ((values - mean) / spread).astype(np.float32), spread

    inputs = tuple(standard(np.asarray(value, float))[0] for value in samples.inputs)
    targets, scale = standard(np.asarray(samples.targets, float))
    return Samples(inputs, targets), float(scale)


def _deal(samples, owners, chosen):
    """Give the clients their chosen samples."""
    inputs, targets = jax.tree.map(lambda leaf: leaf[chosen], tuple(samples))
    data = partition.split(partition.by_group(owners[chosen]), inputs, targets)
    return data._replace(inputs=multimodal.all_present(data.inputs, batch_ndim=2))


def _stack(splits):
    """Pad the clients of all splits to the same size, and stack them."""
    width = max(data.mask.shape[1] for data in splits)

    def pad(leaf):
        missing = [(0, 0), (0, width - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2)
        return np.pad(leaf, missing)

    return jax.tree.map(lambda *leaves: np.stack([pad(leaf) for leaf in leaves]), *splits)


def _owners(split: partition.Partition) -> Int[np.ndarray, " samples"]:
    owners = np.empty(split.counts.sum(), int)
    clients = np.broadcast_to(np.arange(len(split.counts))[:, None], split.mask.shape)
    owners[split.indices[split.mask]] = clients[split.mask]
    return owners
