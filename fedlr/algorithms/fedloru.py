"""FedLoRU: federated learning by accumulated low-rank updates.

    clients:  train factors (U, D) of every chosen matrix W, and the full leaves, on f(W + s U D)
    server:   averages the factors, and every tau rounds merges them, W <- W + s U D

Only factors and full leaves travel, r (m + n) numbers for a matrix of m x n, and yet the sum of the
merged updates has a rank up to r times the number of accumulations. A client that was absent when
factors were merged does not hold the present W. On its next participation it also receives the
pairs it missed, or W where that is smaller; published figures leave this out. `Metrics.catch_up`
has these bytes, `RoundInfo.downlink_bytes` includes them.

Reference: Park and Klabjan 2024, arXiv 2409.12371. What the text does not fix (initial values, the
average of factors rather than of products, merging without a restart) follows the published code,
see `paper_code`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fedlr import _checks, lowrank
from fedlr.federated import aggregators, compressors, local, protocol, rounds, servers, traffic

__all__ = ["Metrics", "Settings", "assemble", "build", "merged_params", "paper_code"]


class Settings(NamedTuple):
    """The switches of FedLoRU, all *static*.

    Attributes:
        rank: r of every factorized leaf.
        accumulate_every: tau, rounds between two accumulations; None for never (FedLoRA).
        where: ``(path, leaf) -> bool``, which leaves to factorize.
        alpha: The scale is ``alpha / r``; None for 1.
        start: How factors are drawn, `lowrank.zero_up` or `lowrank.both_random`.
        restart: What an accumulation does, `servers.reinit`, `servers.keep` or
            `servers.reinit_subtract`.
        zero_base: Whether the factorized leaves begin at W = 0, so that the model has low rank
            until the first accumulation.
    """

    rank: int
    accumulate_every: int | None
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix
    alpha: float | None = None
    start: lowrank.Start = lowrank.zero_up
    restart: servers.Restart = servers.reinit
    zero_base: bool = False


class Metrics(NamedTuple):
    """Record of one client in one round.

    Attributes:
        loss: Loss at the received params, on the first batch, shape ().
        num_examples: Number of present examples, int32, shape ().
        num_steps: Number of local steps done, int32, shape ().
        catch_up: Bytes it received to hold the present W, int32, shape ().
    """

    loss: Float[Array, ""]
    num_examples: Int[Array, ""]
    num_steps: Int[Array, ""]
    catch_up: Int[Array, ""]


def build(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    *,
    rank: int,
    local_steps: int,
    accumulate_every: int | None,
    batch_size: int | None = None,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FedLoRU with its defaults: U starts at zero, and factors are drawn anew when merged.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        optimizer: Any optax optimizer; it starts afresh in every round.
        rank: r, *static*.
        local_steps: Local steps per round, *static*.
        accumulate_every: tau, *static*; None never merges.
        batch_size: Examples per step, *static*; None takes all.
        where: ``(path, leaf) -> bool``, which leaves to factorize, see `lowrank.init`.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm. Its `init` takes the params of the model; the params of its state are
        a `lowrank.Adapted`, and `merged_params` gives back a model. Metrics are `Metrics`.

    Raises:
        ValueError: If a number is not a positive integer; from `init`, if no leaf is left to
            factorize; as `rounds.compose`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import federated
        >>> from fedlr.algorithms import fedloru
        >>> from fedlr.federated import protocol
        >>> inputs = jax.random.normal(jax.random.key(0), (3, 20, 6))
        >>> data = protocol.ClientData(inputs, inputs @ jnp.ones((6, 8)), jnp.ones((3, 20), bool))
        >>> algorithm = fedloru.build(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2),
        ...     optax.sgd(0.1),
        ...     rank=1,
        ...     local_steps=5,
        ...     accumulate_every=2,
        ... )
        >>> state = algorithm.init(jnp.zeros((8, 6)), data, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, data, num_rounds=20, key=jax.random.key(2)
        ... )
        >>> bool(infos.losses[-1].mean() < 0.6 * infos.losses[0].mean())
        True
        >>> infos.uplink_bytes[0]
        Array([56, 56, 56], dtype=int32)
        >>> fedloru.merged_params(state).shape
        (8, 6)

    Reference:
        Park and Klabjan 2024, arXiv 2409.12371.
    """
    return assemble(
        loss,
        local.Training(optimizer, local_steps, batch_size),
        Settings(rank, accumulate_every, where),
        chunk_size=chunk_size,
    )


def paper_code(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    *,
    rank: int = 128,
    local_steps: int,
    accumulate_every: int | None = 50,
    batch_size: int = 32,
    where: Callable[[tuple, Array], bool] = lowrank.is_matrix,
    num_rounds: int = 400,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FedLoRU as its published code does.

    W of the factorized leaves is reset to zero, both factors begin at random with s = 64 / 128, and
    an accumulation keeps the factors, so that the model moves by ``s U D`` at that moment. The
    gradient is clipped to a norm of 0.1, then come decay of 1e-4 on the factors and momentum 0.9;
    the learning rate falls from 0.2 to 1e-3 as a cosine over the rounds. Deviations: a number of
    steps takes the place of epochs, and batches of one example are not skipped.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        rank: r, *static*.
        local_steps: Local steps per round, *static*.
        accumulate_every: tau, *static*.
        batch_size: Examples per step, *static*.
        where: Which leaves to factorize; published: the convolutions of the residual stages.
        num_rounds: Rounds over which the learning rate falls.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm as that of `build`.

    Raises:
        ValueError: As `build`.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import fedloru
        >>> algorithm = fedloru.paper_code(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2), rank=2, local_steps=5
        ... )
        >>> callable(algorithm.round)
        True

    Reference:
        The published code of arXiv 2409.12371.
    """
    _checks.check_count("paper_code", "num_rounds", num_rounds)
    cosine = optax.cosine_decay_schedule(0.2, num_rounds, alpha=1e-3 / 0.2)
    settings = Settings(
        rank,
        accumulate_every,
        where,
        alpha=rank / 2,
        start=lowrank.both_random,
        restart=servers.keep,
        zero_base=True,
    )

    def of_rate(rate):
        optimizer = optax.chain(
            optax.clip_by_global_norm(0.1),
            optax.add_decayed_weights(1e-4),
            optax.sgd(rate, momentum=0.9),
        )
        training = local.Training(optimizer, local_steps, batch_size)
        return assemble(loss, training, settings, chunk_size=chunk_size)

    return rounds.scheduled(of_rate, cosine)


def assemble(
    loss: Callable[[PyTree, PyTree, Array], Float[Array, ""]],
    training: local.Training,
    settings: Settings,
    *,
    form: Callable[[PyTree, PyTree], PyTree] = lowrank.merge,
    aggregator: protocol.Aggregator | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Put FedLoRU together from all its switches.

    Args:
        loss: Loss of one example ``(params, inputs, target) -> scalar`` of the whole model.
        training: The optimizer, steps and batches.
        settings: Ranks, accumulation and starts.
        form: `lowrank.merge`, or `lowrank.apply` for models that use their matrices by ``@``.
        aggregator: How the *values* of factors and full leaves are joined, e.g.
            `aggregators.measured_factor_mean`; None for their weighted mean.
        chunk_size: Clients worked on at once, *static*.

    Returns:
        A federated algorithm as that of `build`.

    Raises:
        ValueError: As `build`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from fedlr import lowrank
        >>> from fedlr.algorithms import fedloru
        >>> from fedlr.federated import local, servers
        >>> algorithm = fedloru.assemble(
        ...     lambda w, x, y: jnp.mean((w @ x - y) ** 2),
        ...     local.Training(optax.adam(1e-2), num_steps=3),
        ...     fedloru.Settings(2, 5, start=lowrank.both_random, restart=servers.reinit_subtract),
        ... )
        >>> callable(algorithm.init)
        True
    """
    every = settings.accumulate_every
    train = local.local_low_rank(loss, training, form=form)
    server = servers.accumulate_low_rank(every, restart=settings.restart, start=settings.start)
    if aggregator is not None:
        train, server = local.trained_values(train), servers.of_values(server)

    def recorded(params, client_state, data, *, key):
        update, _, metrics = train(params, (), data, key=key)
        missed = traffic.accumulated(params, client_state, every)
        record = Metrics(metrics.loss, metrics.num_examples, metrics.num_steps, missed)
        return update, params.round, record

    composed = rounds.compose(
        recorded,
        compressor=compressors.identity(),
        aggregator=aggregators.weighted_mean() if aggregator is None else aggregator,
        server=server,
        client_state=traffic.never,
        traffic=traffic.factors(
            catch_up=lambda params, last_round: traffic.accumulated(params, last_round, every)
        ),
        chunk_size=chunk_size,
    )

    def prepare(params, *, key):
        model = lowrank.adapt(
            params,
            settings.rank,
            key=key,
            where=settings.where,
            start=settings.start,
            alpha=settings.alpha,
        )
        if settings.zero_base:
            full = lowrank.rest(model.base, model.factors)
            zeros = jax.tree.map(jnp.zeros_like, model.base)
            model = model._replace(base=lowrank.replace_rest(zeros, full))
        return model

    return rounds.prepared(composed, prepare)


def merged_params(state: protocol.FederatedState) -> PyTree:
    """Return the model of a state, ``W + s U D`` and the full leaves.

    Args:
        state: State whose params are a `lowrank.Adapted`.

    Returns:
        The params of the model.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from fedlr import lowrank
        >>> from fedlr.algorithms import fedloru
        >>> from fedlr.federated import protocol
        >>> model = lowrank.adapt(jnp.ones((8, 6)), 1, key=jax.random.key(0))
        >>> bool((fedloru.merged_params(protocol.FederatedState(model, (), (), 0)) == 1).all())
        True
    """
    return lowrank.merge(state.params.base, state.params.factors)
