"""Simulated tensors of low CP rank, alone and linked, with noise and missing entries."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from fedlr import _checks
from fedlr.cp import tensor as cp_

__all__ = ["LinkedTensors", "NoisyCP", "cp_tensor", "linked_tensors", "missing_masks"]


class NoisyCP(NamedTuple):
    """A tensor of low CP rank with noise.

    Attributes:
        tensor: What is measured, the signal and noise.
        signal: The tensor without noise.
        truth: The CP model of the signal.
    """

    tensor: Float[Array, "*shape"]
    signal: Float[Array, "*shape"]
    truth: cp_.CPTensor


class LinkedTensors(NamedTuple):
    """Tensors that share the samples of their first mode and some components, with noise.

    Attributes:
        tensors: What is measured, the signals and noise: K arrays.
        signals: The tensors without noise, each the sum of the next two.
        shared: Parts of the signals made of the components that all tensors have.
        individual: Parts made of the components that only one tensor has.
        truth: The factor A_0 of the first mode, shape (n, R), and for every tensor the tuple of its
            other factors, shape (I, R) each: ``linked.LinkedCP(*truth)`` is the model of the
            signals. Components come as (shared, those of tensor 1, those of tensor 2, ..), and a
            tensor has zero columns for those of the others.
    """

    tensors: tuple[Float[Array, "samples ..."], ...]
    signals: tuple[Float[Array, "samples ..."], ...]
    shared: tuple[Float[Array, "samples ..."], ...]
    individual: tuple[Float[Array, "samples ..."], ...]
    truth: tuple[Float[Array, "samples rank"], tuple[tuple[Float[Array, "size rank"], ...], ...]]


def cp_tensor(
    shape: tuple[int, ...],
    rank: int,
    *,
    snr: float | Float[Array, ""],
    key: Key[Array, ""],
    dtype=jnp.float32,
) -> NoisyCP:
    """Draw a tensor of low CP rank and add noise.

    All entries of the factors are independent N(0, 1). The noise is N(0, 1), scaled so that
    ``var(signal) / var(noise)`` is `snr` exactly, in terms of the variances over all entries.

    Args:
        shape: Shape of the tensor, two modes or more; *static*.
        rank: Number R of components, at least 1; *static*.
        snr: Ratio of the variances, positive, inf for no noise; traced, and then its sign is not
            checked.
        key: Random key.
        dtype: float32 or float64; *static*.

    Returns:
        The tensor, its signal and its model.

    Raises:
        ValueError: If the shape, rank or dtype is out of range, or a concrete `snr` not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import synthetic
        >>> data = synthetic.cp_tensor((6, 5, 4), 2, snr=3.0, key=jax.random.key(0))
        >>> ratio = jnp.var(data.signal) / jnp.var(data.tensor - data.signal)
        >>> data.tensor.shape, round(float(ratio), 3)
        ((6, 5, 4), 3.0)

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, the simulated data.
    """
    _check_design("cp_tensor", [shape], snr, dtype)
    _checks.check_count("cp_tensor", "rank", rank)
    factor_key, noise_key = jax.random.split(key)
    model = cp_.CPTensor(jnp.ones(rank, dtype), cp_.draw_factors(shape, rank, factor_key, dtype))
    signal = cp_.to_dense(model)
    draw = jax.random.normal(noise_key, signal.shape, dtype)
    return NoisyCP(_disturb(signal, draw, snr), signal, model)


def linked_tensors(
    shapes: Sequence[tuple[int, ...]],
    *,
    shared_rank: int,
    individual_ranks: Sequence[int],
    snr: float | Float[Array, ""],
    key: Key[Array, ""],
    dtype=jnp.float32,
) -> LinkedTensors:
    """Draw linked tensors with shared and individual components and add noise.

    Tensor k is the sum of a shared part, whose factor of the first mode is the same for all, and of
    an individual part. All entries of the factors are independent N(0, 1). The noise of every
    tensor is N(0, 1), scaled so that ``var(signal) / var(noise)`` is `snr` exactly, in terms of the
    variances over all its entries.

    Args:
        shapes: Shapes of K >= 1 tensors, two modes or more, with a common first size n; *static*.
        shared_rank: Number of shared components, from 0; *static*.
        individual_ranks: Number of individual components of every tensor, from 0; *static*.
        snr: Ratio of the variances, positive, inf for no noise; traced, and then its sign is not
            checked.
        key: Random key.
        dtype: float32 or float64; *static*.

    Returns:
        The tensors, their signals, the parts of these, and the model.

    Raises:
        ValueError: If the shapes do not fit together, a tensor has no component, there is not one
            individual rank for every tensor, the dtype is another, or a concrete `snr` is not
            positive.

    Example:
        >>> import jax
        >>> from fedlr import synthetic
        >>> data = synthetic.linked_tensors(
        ...     ((10, 10, 8), (10, 14, 5, 3)),
        ...     shared_rank=2,
        ...     individual_ranks=(3, 3),
        ...     snr=3.0,
        ...     key=jax.random.key(0),
        ... )
        >>> [x.shape for x in data.tensors], data.truth[0].shape
        ([(10, 10, 8), (10, 14, 5, 3)], (10, 8))

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, the simulated data, for two tensors.
    """
    _check_design("linked_tensors", shapes, snr, dtype)
    _checks.check_count("linked_tensors", "shared_rank", shared_rank, 0)
    if len(individual_ranks) != len(shapes):
        got = f"individual_ranks {tuple(individual_ranks)}"
        raise _checks.fail("linked_tensors", got, f"{len(shapes)}, one for every tensor")
    for rank in individual_ranks:
        _checks.check_count("linked_tensors", "individual rank", rank, 0 if shared_rank else 1)
    ranks = (shared_rank, *individual_ranks)
    # Which group a component belongs to: 0 = shared, k = only in tensor k, counted from 1.
    group = np.repeat(np.arange(len(ranks)), ranks)
    factor_key, noise_key = jax.random.split(key)
    # One draw for all factors and one for all noise: every draw costs time to compile.
    sizes = [shapes[0][0], *(size for shape in shapes for size in shape[1:])]
    first, *drawn = cp_.draw_factors(sizes, len(group), factor_key, dtype)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    noises = jnp.split(jax.random.normal(noise_key, (ends[-1],), dtype), ends[:-1])
    tensors, signals, shared, individual, factors = [], [], [], [], []
    for k, (shape, draw) in enumerate(zip(shapes, noises, strict=True), start=1):
        own, drawn = drawn[: len(shape) - 1], drawn[len(shape) - 1 :]
        factors.append(
            tuple(jnp.where(((group == 0) | (group == k))[None], factor, 0) for factor in own)
        )
        for part, wanted in ((shared, 0), (individual, k)):
            chosen = jnp.asarray(group == wanted, dtype)
            part.append(cp_.to_dense(cp_.CPTensor(chosen, (first, *own))))
        signals.append(shared[-1] + individual[-1])
        tensors.append(_disturb(signals[-1], draw.reshape(shape), snr))
    return LinkedTensors(
        tuple(tensors), tuple(signals), tuple(shared), tuple(individual), (first, tuple(factors))
    )


def missing_masks(
    shapes: Sequence[tuple[int, ...]],
    *,
    sample_fraction: float = 0.05,
    entry_fraction: float = 0.05,
    key: Key[Array, ""],
) -> tuple[Bool[Array, "samples ..."], ...]:
    """Draw masks of linked tensors that hide whole samples and single entries.

    In every tensor ``ceil(sample_fraction n)`` of the n samples are hidden altogether, chosen for
    every tensor separately, but never one in all of them. Of what is left, as many random entries
    are hidden as ``ceil(entry_fraction n)`` samples have; one entry of every sample stays. So the
    defaults hide about a tenth.

    Args:
        shapes: Shapes of K >= 1 tensors, two modes or more, with a common first size n; *static*.
        sample_fraction: Fraction of the samples to hide in every tensor, at most a half, and 0 for
            a single tensor; *static*.
        entry_fraction: Number of random entries, as a fraction of all; *static*.
        key: Random key.

    Returns:
        The masks, True = observed.

    Raises:
        ValueError: If the shapes do not fit together, a fraction is not within 0 and 1, or so much
            cannot be hidden.

    Example:
        >>> import jax
        >>> from fedlr import synthetic
        >>> masks = synthetic.missing_masks(((40, 6, 5), (40, 8)), key=jax.random.key(0))
        >>> [int((~mask).sum()) for mask in masks], [2 * 2 * 30, 2 * 2 * 8]
        ([120, 32], [120, 32])

    Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, the simulated data, where a sample may be
        hidden in all tensors.
    """
    _check_shapes("missing_masks", shapes)
    _checks.check_fraction("missing_masks", "sample_fraction", sample_fraction)
    _checks.check_fraction("missing_masks", "entry_fraction", entry_fraction)
    samples = shapes[0][0]
    hidden, worth = (_ceil(part * samples) for part in (sample_fraction, entry_fraction))
    if hidden and (len(shapes) == 1 or 2 * hidden > samples):
        got = f"{hidden} of {samples} samples to hide in each of {len(shapes)} tensors"
        raise _checks.fail("missing_masks", got, "at most half of them, and two tensors or more")
    sizes = [math.prod(shape[1:]) for shape in shapes]
    for shape, size in zip(shapes, sizes, strict=True):
        if worth * size > (samples - hidden) * (size - 1):
            got = f"{worth * size} entries to hide beside {hidden} samples of shape {shape}"
            raise _checks.fail("missing_masks", got, "one entry left of every other sample")
    sample_key, entry_key = jax.random.split(key)
    sample_scores = jax.random.uniform(sample_key, (len(shapes), samples))
    ends = np.cumsum(sizes)
    entry_scores = jnp.split(jax.random.uniform(entry_key, (samples, ends[-1])), ends[:-1], axis=1)
    masks, gone = [], jnp.ones(samples, bool)
    for k, (shape, score) in enumerate(zip(shapes, entry_scores, strict=True)):
        # The last tensor takes those that all before it lack only when there are no others.
        late = gone & (k == len(shapes) - 1)
        lacking = _is_among_first(jnp.where(late, 2, sample_scores[k]), hidden)
        gone = gone & lacking
        kept = jnp.arange(score.shape[1])[None] == jnp.argmax(score, axis=1, keepdims=True)
        score = jnp.where(kept | lacking[:, None], 2, score).reshape(-1)
        chosen = _is_among_first(score, worth * sizes[k]).reshape(samples, sizes[k])
        masks.append((~(lacking[:, None] | chosen)).reshape(shape))
    return tuple(masks)


def _ceil(number):
    """Round up, but not what is an integer up to rounding."""
    return math.ceil(number - 1e-9)


def _is_among_first(score, count):
    """Tell which entries are the `count` smallest."""
    order = jnp.argsort(score)
    return jnp.zeros(score.shape, bool).at[order[:count]].set(True)


def _disturb(signal, draw, snr):
    """Add a draw of noise, scaled to 1 / snr of the variance of the signal."""
    ratio = jnp.asarray(snr, signal.dtype) * jnp.var(draw)
    return signal + jnp.sqrt(jnp.var(signal) / ratio) * draw


def _check_shapes(function, shapes):
    """Refuse shapes that are none of tensors with a common first mode."""
    if not isinstance(shapes, (tuple, list)) or not shapes:
        raise _checks.fail(function, f"shapes {shapes!r}", "one or more")
    for shape in shapes:
        if not isinstance(shape, (tuple, list)) or len(shape) < 2 or math.prod(shape) < 2:
            raise _checks.fail(function, f"shape {shape!r}", "two modes and entries or more")
        for size in shape:
            _checks.check_count(function, "size", size)
        if shape[0] != shapes[0][0]:
            wanted = f"{shapes[0][0]} samples in mode 0 as the first"
            raise _checks.fail(function, f"shape {shape}", wanted)


def _check_design(function, shapes, snr, dtype):
    """Refuse shapes, a signal-to-noise ratio or a dtype that are none."""
    _check_shapes(function, shapes)
    if dtype not in (jnp.float32, jnp.float64):
        raise _checks.fail(function, f"dtype {dtype!r}", "float32 or float64")
    _checks.check_ndim(function, "snr", jnp.asarray(snr), 0)
    _checks.check_positive(function, "snr", snr)
