"""Simulated regressions from several modalities, with known Bayes errors.

A world is drawn once and samples come from it as often as one likes, so that training and test data
belong together:

    u ~ N(shift, I)                        shared by all modalities
    v_m ~ N(0, I)                          private to modality m
    x_m = link([u, v_m] W_m) + s e_m       inputs
    y = h(u) + c . v_1 + sigma e           target

with standard normal e_m and e. Modalities are counted from 0 in indices, so v_1 belongs to index 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from fedlr import _checks

__all__ = [
    "MultimodalClients",
    "MultimodalWorld",
    "bayes_error",
    "client_shifts",
    "curved_response",
    "linear_response",
    "multimodal_clients",
    "multimodal_world",
    "mutual_information",
    "oracle",
]

# Target of the samples from what they have in common: the last axis goes.
Response = Callable[[Float[Array, "*batch k"]], Float[Array, "*batch"]]


class MultimodalWorld(eqx.Module):
    """What the inputs and targets of all clients have in common.

    Attributes:
        weights: W_m of every modality, shape (r + r_m, p_m): shared latents, private ones.
        directions: Unit vectors a and b that the response sees u through, shape (2, r).
        private: Coefficients c of the private latents of the first modality, shape (r_1,).
        noise: Standard deviations sigma of the target's noise and s of the inputs'. *Static.*
        link: What the inputs pass through, elementwise and one-to-one. *Static.*
        response: Function h of (a . u, b . u). *Static.*
    """

    weights: tuple[Float[Array, "latents channels"], ...]
    directions: Float[Array, "2 shared"]
    private: Float[Array, " private"]
    noise: tuple[float, float] = eqx.field(static=True)
    link: Callable[[Array], Array] = eqx.field(static=True)
    response: Response = eqx.field(static=True)


class MultimodalClients(NamedTuple):
    """Samples of every client with the latents that they come from.

    Attributes:
        inputs: Inputs of every modality, shape (clients, samples, p_m).
        targets: Targets, shape (clients, samples).
        shared: Latents u that all modalities share, shape (clients, samples, r).
        private: Latents v_m of every modality's own, shape (clients, samples, r_m).
    """

    inputs: tuple[Float[Array, "clients samples channels"], ...]
    targets: Float[Array, "clients samples"]
    shared: Float[Array, "clients samples shared"]
    private: tuple[Float[Array, "clients samples private"], ...]


def curved_response(projections: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """Compute ``tanh(2 a . u) + (b . u)^2 / 2``.

    Args:
        projections: The two numbers a . u and b . u on the last axis.

    Returns:
        The response, of the shape without the last axis.
    """
    return jnp.tanh(2 * projections[..., 0]) + projections[..., 1] ** 2 / 2


def linear_response(projections: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """Return ``a . u``.

    Args:
        projections: The two numbers a . u and b . u on the last axis.

    Returns:
        The first of them, of the shape without the last axis.
    """
    return projections[..., 0]


def multimodal_world(
    num_channels: tuple[int, ...] = (40, 30),
    num_latents: tuple[int, ...] = (3, 2, 2),
    *,
    noise: tuple[float, float] = (0.2, 0.0),
    link: Callable[[Array], Array] = jnp.tanh,
    response: Response = curved_response,
    key: Key[Array, ""],
    dtype=jnp.float32,
) -> MultimodalWorld:
    """Draw the fixed part of a regression from several modalities.

    Entries of W_m are N(0, 1 / (r + r_m)), so what enters the link has variance 1. The directions a
    and b are random unit vectors, and c is one of length 1/2: `equinox.tree_at` gives a world with
    another, `dataclasses.replace` one with the same numbers and another link, response or noise.
    ``jax.nn.identity`` as the link and `linear_response` make inputs and target jointly Gaussian.

    Args:
        num_channels: Width p_m of every modality. *Static.*
        num_latents: Number r of shared latents, then r_m of the private ones of every modality.
            *Static.*
        noise: Standard deviation sigma of the target's noise and s of the inputs', from 0.
            *Static.*
        link: Elementwise, one-to-one. *Static.*
        response: Function h of the projections (a . u, b . u) on a last axis, `curved_response` or
            `linear_response` or the caller's own. *Static.*
        key: Random key.
        dtype: float32 or float64. *Static.*

    Returns:
        The world.

    Raises:
        ValueError: If there is no modality, the numbers are not positive integers or not one more
            than modalities, the noise is no pair of non-negative numbers, or the dtype is another.

    Example:
        >>> import jax
        >>> from fedlr import synthetic
        >>> world_key, shift_key, train_key, test_key = jax.random.split(jax.random.key(0), 4)
        >>> world = synthetic.multimodal_world(key=world_key)
        >>> shifts = synthetic.client_shifts(world, 4, 0.5, key=shift_key)
        >>> train = synthetic.multimodal_clients(world, shifts, 100, key=train_key)
        >>> test = synthetic.multimodal_clients(world, shifts, 50, key=test_key)
        >>> [x.shape for x in train.inputs], test.targets.shape
        ([(4, 100, 40), (4, 100, 30)], (4, 50))
        >>> round(float(synthetic.bayes_error(world)), 6)
        0.04
    """
    _check_design(num_channels, num_latents, noise)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        got = f"dtype {jnp.dtype(dtype)}"
        raise _checks.fail("multimodal_world", got, "float32 or float64")
    shared, *private = num_latents
    shapes = [(shared + own, wide) for own, wide in zip(private, num_channels, strict=True)]
    shapes += [(2, shared), (1, private[0])]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    # One draw for all: every draw costs time to compile.
    numbers = jnp.split(jax.random.normal(key, (ends[-1],), dtype), ends[:-1])
    *weights, directions, own = (
        numbers.reshape(shape) for numbers, shape in zip(numbers, shapes, strict=True)
    )
    return MultimodalWorld(
        tuple(weight / math.sqrt(len(weight)) for weight in weights),
        _normalize(directions),
        _normalize(own)[0] / 2,
        (float(noise[0]), float(noise[1])),
        link,
        response,
    )


def client_shifts(
    world: MultimodalWorld,
    num_clients: int,
    length: float | Float[Array, ""],
    *,
    key: Key[Array, ""],
) -> Float[Array, "clients shared"]:
    """Draw how far every client's mean of the shared latents is from 0.

    Args:
        world: World that the clients belong to.
        num_clients: Number of clients, at least 1. *Static.*
        length: Length of every shift, from 0; traced, and then its sign is not checked.
        key: Random key.

    Returns:
        Vectors of that length in random directions, shape (num_clients, r).

    Raises:
        ValueError: If the number is not a positive integer, or a concrete `length` negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import synthetic
        >>> world = synthetic.multimodal_world(key=jax.random.key(0))
        >>> shifts = synthetic.client_shifts(world, 4, 0.5, key=jax.random.key(1))
        >>> jnp.linalg.norm(shifts, axis=1).round(5).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    _checks.check_count("client_shifts", "num_clients", num_clients)
    _checks.check_non_negative("client_shifts", "length", length)
    dtype = world.directions.dtype
    draws = jax.random.normal(key, (num_clients, world.directions.shape[1]), dtype)
    return jnp.asarray(length, dtype) * _normalize(draws)


def multimodal_clients(
    world: MultimodalWorld,
    shifts: Float[Array, "clients shared"],
    num_samples: int,
    *,
    key: Key[Array, ""],
) -> MultimodalClients:
    """Draw samples of several clients of one world.

    A key gives the same latents and targets whatever the link and the noise of the inputs.

    Args:
        world: World, of `multimodal_world`.
        shifts: Mean of the shared latents u for every client, shape (clients, r), of the world's
            dtype; `client_shifts` draws them, zeros make all clients alike.
        num_samples: Number of samples of every client, at least 1. *Static.*
        key: Random key.

    Returns:
        Inputs, targets and latents.

    Raises:
        ValueError: If the number is not a positive integer, or the shifts do not fit the world.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import synthetic
        >>> world = synthetic.multimodal_world((6, 5), key=jax.random.key(0))
        >>> data = synthetic.multimodal_clients(world, jnp.zeros((2, 3)), 9, key=jax.random.key(1))
        >>> [x.shape for x in data.inputs], data.targets.shape, data.shared.shape
        ([(2, 9, 6), (2, 9, 5)], (2, 9), (2, 9, 3))
    """
    function = "multimodal_clients"
    _checks.check_count(function, "num_samples", num_samples)
    _checks.check_ndim(function, "shifts", shifts, 2)
    _checks.check_shape(function, "shifts", shifts, (len(shifts), world.directions.shape[1]))
    if jnp.result_type(shifts) != world.directions.dtype:
        got = f"shifts of dtype {jnp.result_type(shifts)}"
        raise _checks.fail(function, got, f"the world's dtype {world.directions.dtype}")

    def draw(shift, key):
        return _draw_client(world, shift, num_samples, key)

    return jax.vmap(draw)(shifts, jax.random.split(key, len(shifts)))


def oracle(world: MultimodalWorld, data: MultimodalClients) -> Float[Array, "clients samples"]:
    """Predict the targets from the latents, ``h(u) + c . v_1``.

    Its mean squared error is sigma^2. No predictor from the inputs has a smaller one, and where
    the inputs determine the latents the best has this one; elsewhere it is only a bound, as for
    noisy inputs behind a curved link.

    Args:
        world: World that the samples come from.
        data: Samples with their latents.

    Returns:
        The predictions, shape (clients, samples).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import synthetic
        >>> world = synthetic.multimodal_world(noise=(0.0, 0.0), key=jax.random.key(0))
        >>> data = synthetic.multimodal_clients(world, jnp.zeros((2, 3)), 9, key=jax.random.key(1))
        >>> bool(jnp.allclose(synthetic.oracle(world, data), data.targets, atol=1e-5))
        True
    """
    return _expect_target(world, data.shared, data.private[0])


def bayes_error(world: MultimodalWorld, observed: Sequence[int] | None = None) -> Float[Array, ""]:
    """Compute the smallest mean squared error of any predictor of the target from the inputs.

    * Inputs without noise, at least as many channels as latents, ``p_m >= r + r_m``: sigma^2, as
      u and v_1 are functions of x_1, whatever the response.
    * The same with the first modality missing: sigma^2 + |c|^2, as v_1 is independent of all else.
    * Identity link, noisy inputs, `linear_response`: sigma^2 + t^T P t, where ``P = (I + W W^T /
      s^2)^-1`` is the posterior covariance of the latents (u, v_1, .., v_M), t their coefficients
      in the target, and W has the blocks of all W_m, with zeros where v_k does not enter x_m.

    These hold for every client; the third for a predictor that knows the client's shift. The first
    two take the rows of W_m for linearly independent, as drawn ones almost surely are.

    Args:
        world: World.
        observed: Indices of the modalities that the predictor sees, from 0; None for all. *Static.*

    Returns:
        The Bayes error in the world's dtype, shape ().

    Raises:
        ValueError: If only the bound sigma^2 is known, or `observed` names no modality, one twice
            or one that is not there.

    Example:
        >>> import jax
        >>> from fedlr import synthetic
        >>> world = synthetic.multimodal_world(key=jax.random.key(0))
        >>> [round(float(synthetic.bayes_error(world, seen)), 6) for seen in ((0, 1), (1,))]
        [0.04, 0.29]
    """
    observed = _check_observed("bayes_error", world, observed)
    sigma, disturbance = world.noise
    floor = jnp.asarray(sigma**2, world.private.dtype)
    if disturbance == 0:
        wide = [m for m in observed if world.weights[m].shape[0] <= world.weights[m].shape[1]]
        if 0 in wide:
            return floor
        if wide and 0 not in observed:
            return floor + jnp.sum(world.private**2)
    elif world.link is jax.nn.identity and world.response is linear_response:
        return floor + _posterior_variance(world, observed)
    got = f"noise {world.noise} with modalities {observed} of shapes " + ", ".join(
        str(world.weights[m].shape) for m in observed
    )
    expected = (
        "inputs without noise and with a channel for every latent, or jax.nn.identity and "
        "linear_response: else only the bound noise[0]**2 is known"
    )
    raise _checks.fail("bayes_error", got, expected)


def mutual_information(
    world: MultimodalWorld, observed: Sequence[int] | None = None
) -> Float[Array, ""]:
    """Compute the mutual information of a client's inputs and target, in nats.

        I(x; y) = log(Var y / Bayes error) / 2,    Var y = |a|^2 + |c|^2 + sigma^2

    For `linear_response`, which makes the target Gaussian; given the inputs it is Gaussian as well,
    with the Bayes error for its variance, where `bayes_error` knows that.

    Args:
        world: World with `linear_response`.
        observed: Indices of the modalities that count as inputs, from 0; None for all. *Static.*

    Returns:
        The mutual information in the world's dtype, shape ().

    Raises:
        ValueError: If the response is another, or `bayes_error` refuses.

    Example:
        >>> import jax
        >>> from fedlr import synthetic
        >>> world = synthetic.multimodal_world(
        ...     response=synthetic.linear_response, key=jax.random.key(0)
        ... )
        >>> round(float(synthetic.mutual_information(world)), 4)  # log(1.29 / 0.04) / 2
        1.7368
    """
    if world.response is not linear_response:
        got = f"a world with {getattr(world.response, '__name__', world.response)}"
        raise _checks.fail("mutual_information", got, "linear_response")
    spread = jnp.sum(world.directions[0] ** 2) + jnp.sum(world.private**2) + world.noise[0] ** 2
    return jnp.log(spread / bayes_error(world, observed)) / 2


def _normalize(vectors):
    """Scale every vector on the last axis to length 1."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _num_private(world):
    """Return how many private latents every modality has."""
    return [weight.shape[0] - world.directions.shape[1] for weight in world.weights]


def _expect_target(world, shared, private):
    """Return h(u) + c . v_1."""
    projections = jnp.matmul(shared, world.directions.T, precision="highest")
    return world.response(projections) + jnp.matmul(private, world.private, precision="highest")


def _draw_client(world, shift, num_samples, key):
    """Draw the samples of one client."""
    dtype, (sigma, disturbance) = shift.dtype, world.noise
    latent_key, noise_key = jax.random.split(key)
    ends = np.cumsum([len(shift), *_num_private(world)])
    draws = jax.random.normal(latent_key, (num_samples, ends[-1] + 1), dtype)
    shared, *private, error = jnp.split(draws, ends, axis=1)
    shared = shared + shift[None]
    inputs = [
        world.link(jnp.matmul(jnp.concatenate([shared, own], 1), weight, precision="highest"))
        for own, weight in zip(private, world.weights, strict=True)
    ]
    if disturbance:
        ends = np.cumsum([x.shape[1] for x in inputs])
        draws = jax.random.normal(noise_key, (num_samples, ends[-1]), dtype)
        errors = jnp.split(draws, ends[:-1], axis=1)
        inputs = [x + disturbance * e for x, e in zip(inputs, errors, strict=True)]
    targets = _expect_target(world, shared, private[0]) + sigma * error[:, 0]
    return MultimodalClients(tuple(inputs), targets, shared, tuple(private))


def _posterior_variance(world, observed):
    """Return t^T P t, the variance of the latents' part of the target given the inputs."""
    shared = world.directions.shape[1]
    starts = shared + np.cumsum([0, *_num_private(world)])
    # W W^T and t over the latents (u, v_1, .., v_M).
    gram = jnp.zeros((starts[-1], starts[-1]), world.private.dtype)
    for m in observed:
        weight = world.weights[m]
        rows = np.r_[:shared, starts[m] : starts[m + 1]]
        gram = gram.at[np.ix_(rows, rows)].add(jnp.matmul(weight, weight.T, precision="highest"))
    coefficients = jnp.zeros(starts[-1], world.private.dtype)
    coefficients = coefficients.at[:shared].set(world.directions[0])
    coefficients = coefficients.at[starts[0] : starts[1]].set(world.private)
    precision = jnp.eye(starts[-1], dtype=gram.dtype) + gram / world.noise[1] ** 2
    return jnp.dot(coefficients, jnp.linalg.solve(precision, coefficients), precision="highest")


def _check_design(num_channels, num_latents, noise):
    """Refuse numbers of channels or latents, or noise, that make no world."""
    for name, counts in (("num_channels", num_channels), ("num_latents", num_latents)):
        if not isinstance(counts, (tuple, list)) or not counts:
            raise _checks.fail("multimodal_world", f"{name} {counts!r}", "a tuple of ints")
        for count in counts:
            _checks.check_count("multimodal_world", name, count)
    if len(num_latents) != len(num_channels) + 1:
        got = f"num_latents {num_latents} for {len(num_channels)} modalities"
        expected = f"{len(num_channels) + 1}: of the shared, then of every modality's own"
        raise _checks.fail("multimodal_world", got, expected)
    if not isinstance(noise, (tuple, list)) or len(noise) != 2:
        raise _checks.fail("multimodal_world", f"noise {noise!r}", "a pair of numbers")
    for level in noise:
        _checks.check_non_negative("multimodal_world", "noise", level)


def _check_observed(function, world, observed):
    """Return the modalities that are seen as a tuple of different indices."""
    everything = range(len(world.weights))
    observed = tuple(everything if observed is None else observed)
    if not observed or len(set(observed)) < len(observed) or set(observed) - set(everything):
        expected = f"different indices from 0 to {len(world.weights) - 1}"
        raise _checks.fail(function, f"observed {observed}", expected)
    return observed
