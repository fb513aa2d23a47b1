"""A round that is private for every client.

A round clips the update of every client to norm C and adds Gaussian noise to their sum:

    w+ = server(w, (sum_i clip(d_i) + N(0, (z C)^2 I)) / m),   clip(d) = d min(1, C / ||d||)

with the noise multiplier z and m clients expected in a round. All clients count once, and m is a
constant: weights by examples would raise what one client can change, and a denominator that counts
would tell who was there.

The guarantee is for the params of every round and all that is computed from them. `RoundInfo`
(exact losses) and `FederatedState.clients` have none: they stay with the server, and a rule that
stops on losses is not covered. The server is trusted, as it sees the updates. Whoever knows the key
of a run knows its noise, so the key is secret, and no two runs on the same clients share one. The
noise is drawn in floating point, by the generator of JAX.

Reference: McMahan et al. 2018, arXiv 1710.06963, Algorithm 1, with the estimator of fixed
denominator and all weights 1; Geyer et al. 2017, arXiv 1712.07557.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import aggregators, protocol, servers
from fedlr.federated import clients as clients_
from fedlr.federated.privacy import _numbers

__all__ = ["ClippedSum", "Mechanism", "clip", "gaussian_mechanism"]


class ClippedSum(NamedTuple):
    """What the aggregator of a `Mechanism` hands to its server, and no other server takes.

    Attributes:
        total: Sum of the clipped updates, without noise, a pytree like the update.
    """

    total: PyTree


class Mechanism(NamedTuple):
    """The parts of a private round, named as the arguments of `rounds.compose`.

    Attributes:
        aggregator: Clips the decoded updates and sums them.
        server: Adds the noise, divides, and moves the params.
        client_weights: `(clients) -> ones`, shape (clients,).
    """

    aggregator: protocol.Aggregator
    server: protocol.ServerUpdate
    client_weights: Callable[[PyTree], Float[Array, " clients"]]


def clip(update: PyTree, max_norm: float | Float[Array, ""]) -> PyTree:
    """Scale an update down to a norm of at most C, over all its arrays together.

        clip(d) = d min(1, C / ||d||)

    An update with a NaN or Inf becomes zero, so that no client can spoil the sum. An update within
    the norm stays as it is, bit by bit, and so does zero, with finite derivatives everywhere. No
    square overflows. A clipped norm exceeds C by rounding only, measured at one eps for float32
    with 10 to 5e7 entries.

    Args:
        update: Update of ONE client, arrays of float32 or float64.
        max_norm: The norm C, above 0, traced.

    Returns:
        The clipped update, of the same structure, shapes and dtypes.

    Raises:
        ValueError: If an array is not float32 or float64.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.federated import privacy
        >>> privacy.clip({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, 1.0)
        {'b': Array(0.8, dtype=float32), 'w': Array([0.6, 0. ], dtype=float32)}
        >>> privacy.clip(jnp.array([1e30, jnp.nan]), 1.0)
        Array([0., 0.], dtype=float32)
    """
    leaves = jax.tree.leaves(update)
    for leaf in leaves:
        _checks.check_floating("clip", update=leaf)
    dtype = np.result_type(*(jnp.result_type(leaf) for leaf in leaves))
    peaks = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in leaves]
    peak = jnp.max(jnp.stack(peaks))
    finite = jnp.isfinite(peak)
    # The result does not depend on this scale, so it has no derivative.
    usable = finite & (peak >= jnp.finfo(dtype).tiny)
    scale = jax.lax.stop_gradient(jnp.where(usable, peak, 1.0))
    # Zeros before any arithmetic: a NaN would come back through the derivatives.
    update = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), update)
    units = [leaf.astype(dtype) / scale for leaf in jax.tree.leaves(update)]
    square = jnp.sum(jnp.stack([jnp.sum(unit**2) for unit in units]))
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    radius = jnp.asarray(max_norm, dtype)
    inside = (length <= radius / scale) | (square == 0)
    shrink = radius / length

    def scaled(leaf):
        return jnp.where(inside, leaf, (leaf.astype(dtype) / scale * shrink).astype(leaf.dtype))

    return jax.tree.map(scaled, update)


def gaussian_mechanism(
    max_norm: float | Float[Array, ""],
    noise_multiplier: float | Float[Array, ""],
    *,
    clients_per_round: float | Float[Array, ""],
    server: protocol.ServerUpdate | None = None,
) -> Mechanism:
    """Build the parts that make a composed algorithm private for every client.

        update = (sum_i clip(d_i) + N(0, (z C)^2 I)) / m

    It goes with any local update and any compressor, error feedback too: what is clipped is the
    update that the server decodes, whatever a client has sent, so one client changes the sum by at
    most C. The server has to take differences: `servers.of_values` does not fit, nor do algorithms
    that aggregate in other ways.

    Weights say only who is there. A member without examples is there and counts in m; its update is
    zero. A member whose message does not arrive adds nothing, and the scale stays the same. Who
    arrives must not depend on what the clients hold. If nobody arrives, the params move by the
    noise, so that nothing tells that nobody was there.

    The parts only work together: the server refuses another aggregator's update.

    Args:
        max_norm: C, above 0, traced. Chosen without a look at the clients' updates, or by a
            private method.
        noise_multiplier: z, the standard deviation of the noise of the sum in units of C, from 0
            (clipping only, not private), traced: one program serves, and `jax.vmap` takes, several
            privacy budgets. From `noise_multiplier` for a given epsilon.
        clients_per_round: m, the expected number of clients in a round, traced: the cohort size, or
            the sampling rate times the number of clients. A constant, also where some are lost.
        server: How the params move with the noisy mean update; None for
            ``servers.from_optax(optax.sgd(1.0))``, which adds it.

    Returns:
        The parts, to be handed to `rounds.compose` by name.

    Raises:
        ValueError: If a concrete number is not finite or out of its range; while tracing, if an
            array of the update is not float32 or float64, or the update does not come from the
            aggregator here.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.federated import compressors, local, privacy, protocol
        >>> data = protocol.ClientData(
        ...     inputs=jnp.ones((3, 4, 2)), targets=jnp.ones((3, 4)), mask=jnp.ones((3, 4), bool)
        ... )
        >>> z = privacy.noise_multiplier(epsilon=2.0, delta=1e-3, num_rounds=5)
        >>> private = privacy.gaussian_mechanism(0.1, z, clients_per_round=3)
        >>> algorithm = federated.compose(
        ...     local.local_sgd(lambda w, x, y: (x @ w - y) ** 2, optax.sgd(0.1), num_steps=1),
        ...     compressor=compressors.identity(),
        ...     **private._asdict(),
        ... )
        >>> state = algorithm.init(jnp.zeros(2), data, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=5, key=jax.random.key(1)
        ... )
        >>> infos.weights[0]
        Array([1., 1., 1.], dtype=float32)

    Reference:
        McMahan et al. 2018, arXiv 1710.06963, Algorithm 1. There clients are drawn independently
        and weighted; here they are drawn as the run does, and count equally.
    """
    _numbers.check_size("gaussian_mechanism", "max_norm", max_norm)
    _numbers.check_multiplier("gaussian_mechanism", noise_multiplier)
    _numbers.check_size("gaussian_mechanism", "clients_per_round", clients_per_round)
    inner = servers.from_optax(optax.sgd(1.0)) if server is None else server
    noisy = _noisy_server(inner, max_norm, noise_multiplier, clients_per_round)
    return Mechanism(_clipped_sum(max_norm), noisy, _ones)


def _clipped_sum(max_norm: float | Float[Array, ""]) -> protocol.Aggregator:
    """Build the sum of the clipped updates of those that arrived."""

    def fold_init(update):
        return jax.tree.map(jnp.zeros_like, update)

    def add(sums, messages, weights, *, decompress):
        updates = jax.vmap(lambda message: clip(decompress(message), max_norm))(messages)

        def accumulate(partial, leaf):
            arrived = (weights > 0).reshape(-1, *[1] * (leaf.ndim - 1))
            return partial + jnp.sum(jnp.where(arrived, leaf, 0.0), axis=0)

        return jax.tree.map(accumulate, sums, updates)

    return aggregators.from_fold(protocol.Fold(fold_init, add, ClippedSum))


def _noisy_server(
    server: protocol.ServerUpdate,
    max_norm: float | Float[Array, ""],
    noise_multiplier: float | Float[Array, ""],
    count: float | Float[Array, ""],
) -> protocol.ServerUpdate:
    """Let a server take a `ClippedSum`, with noise and divided by a constant."""

    def apply(params, update, state, *, key):
        if not isinstance(update, ClippedSum):
            got = f"an update of type {type(update).__name__}"
            raise _checks.fail("gaussian_mechanism", got, "that of the mechanism's own aggregator")
        # Noise drawn with the key of anything else would be known to whoever sees that.
        noise_key, server_key = jax.random.split(key)
        leaves, structure = jax.tree.flatten(update.total)
        dtype = np.result_type(*(leaf.dtype for leaf in leaves))
        ends = np.cumsum([leaf.size for leaf in leaves])
        # One draw: to compile one for each of 21 leaves takes twice as long.
        deviation = jnp.asarray(noise_multiplier, dtype) * jnp.asarray(max_norm, dtype)
        noise = deviation * jax.random.normal(noise_key, (ends[-1],), dtype)
        mean = [
            (leaf + own.reshape(leaf.shape).astype(leaf.dtype)) / jnp.asarray(count, leaf.dtype)
            for leaf, own in zip(leaves, jnp.split(noise, ends[:-1]), strict=True)
        ]
        return server.apply(params, jax.tree.unflatten(structure, mean), state, key=server_key)

    return server._replace(apply=apply, needs_messages=False)


def _ones(clients: PyTree) -> Float[Array, " clients"]:
    """Count every client once."""
    return jnp.ones(clients_.num_clients(clients), jnp.result_type(float))
