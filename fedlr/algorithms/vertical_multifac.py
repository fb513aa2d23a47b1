"""Vertical MULTIFAC: clients with different tensors of the same samples factorize them jointly.

Client k holds a tensor X_k whose first mode counts the n samples that all clients share, and

    f = sum_k |X_k - [[A_0, A_1^k, ..]]|^2 + penalty (|A_0|^2 + sum_k sum_n |A_n^k|^2)

is minimized as by `linked.multifac`: a round is one sweep of its alternating least squares. Neither
a tensor nor a client's own factors are sent, only what the update of A_0 sums over the tensors:

    client:  M_k = X_k contracted with its own factors (MTTKRP of mode 0), n x R
             G_k = Hadamard product of the Gram matrices of its own factors, R x R; both are sent
    server:  A_0 = (sum_k M_k) (sum_k G_k + penalty I)^{-1}, sent to all clients
    client:  A_1^k, A_2^k, .. one after the other, each by exact minimization

With missing data every client imputes its own tensor, as `linked.multifac` does. What is known of a
sample that is hidden altogether are the components of other clients that have it. So all clients
also learn which components are active where, R bits a round of each, and once which samples are
seen where, n bits of each.

Reference: Kang, Rao and Lock 2025, arXiv 2502.20286, for the model and its sweep. That the update
of A_0 needs sums over the tensors only, and so the exchange, is derived here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Int

from fedlr import _alternating, _checks, _partials, _precision
from fedlr.federated import clients as clients_
from fedlr.federated import compressors, execution, protocol
from fedlr.linked import fitting, model

__all__ = ["LinkedClients", "Metrics", "StackedCP", "build", "stack_tensors", "unstack"]


class LinkedClients(NamedTuple):
    """Tensors of all clients in one stack; every leaf has a leading client axis.

    Modes are padded with zeros to the largest size of any client. A tensor of fewer modes than
    another has trailing modes of size 1, padded likewise.

    Attributes:
        tensors: The stack, shape (clients, n, I_1, I_2, ..), zero where there is nothing.
        sizes: Sizes of the modes after the first of every client, int32, shape (clients, modes); 0
            for a mode that the client does not have.
        observed: True = observed, bool of the shape of `tensors`, False in the padding; None if
            nothing is missing. Hidden entries of `tensors` may then hold anything.
    """

    tensors: Float[Array, "clients samples *sizes"]
    sizes: Int[Array, "clients modes"]
    observed: Bool[Array, "clients samples *sizes"] | None


class StackedCP(NamedTuple):
    """A `linked.LinkedCP` whose own factors are stacked over the clients, `FederatedState.params`.

    Attributes:
        shared: Factor A_0 that all clients hold, shape (n, R).
        factors: For every mode after the first the factors of all clients, shape (clients, I, R),
            with zero rows where the tensors are padded. For a mode that a client does not have, the
            first row is of ones and never changes.
    """

    shared: Float[Array, "samples rank"]
    factors: tuple[Float[Array, "clients size rank"], ...]


class Metrics(NamedTuple):
    """Record of a round of vertical MULTIFAC, `RoundInfo.metrics`.

    Attributes:
        misfit: ``|X_k - [[A_0, A_1^k, ..]]|^2`` of the factors that entered, with the tensor as it
            is imputed from them, shape (clients,).
        objective: f of these, the same for every client, shape (clients,): the sum of the losses,
            and the penalty of A_0.
    """

    misfit: Float[Array, " clients"]
    objective: Float[Array, " clients"]


class _Message(NamedTuple):
    """What a client sends: M_k, and the upper triangle of G_k row by row."""

    mttkrp: Array
    gram: Array


def stack_tensors(
    tensors: Sequence[Float[Array, "samples ..."]],
    masks: Sequence[Bool[Array, "samples ..."]] | None = None,
) -> LinkedClients:
    """Stack the tensors of K clients, padded to common sizes.

    Args:
        tensors: K >= 1 tensors of two modes or more with a common first mode of n samples, float32
            or float64. Orders and other sizes may differ.
        masks: True = observed, a bool array for every tensor; all observed if None.

    Returns:
        The stack, whose memory is K times that of a tensor with the largest size of every mode.

    Raises:
        ValueError: If there is no tensor, one has fewer than two modes, or first modes, dtypes or
            masks do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedlr.algorithms import vertical_multifac
        >>> clients = vertical_multifac.stack_tensors((jnp.ones((6, 4, 3)), jnp.ones((6, 5))))
        >>> clients.tensors.shape, clients.sizes.tolist()
        ((2, 6, 5, 3), [[4, 3], [5, 0]])
    """
    found = model.check_tensors("stack_tensors", tensors)
    sizes = np.zeros((len(found), max(x.ndim for x in found) - 1), np.int32)
    for row, x in zip(sizes, found, strict=True):
        row[: x.ndim - 1] = x.shape[1:]
    largest = np.maximum(sizes.max(axis=0), 1)

    def stack(arrays: Sequence[Array]) -> Array:
        padded = []
        for x in arrays:
            full = x.reshape(x.shape + (1,) * (len(largest) + 1 - x.ndim))
            beyond = [(0, int(room)) for room in largest - full.shape[1:]]
            padded.append(jnp.pad(full, [(0, 0), *beyond]))
        return jnp.stack(padded)

    if masks is None:
        return LinkedClients(stack(found), jnp.asarray(sizes), None)
    masks = model.check_masks("stack_tensors", found, masks)
    found = tuple(jnp.where(mask, x, 0) for x, mask in zip(found, masks, strict=True))
    return LinkedClients(stack(found), jnp.asarray(sizes), stack(masks))


def unstack(state: protocol.FederatedState, shapes: Sequence[tuple[int, ...]]) -> model.LinkedCP:
    """Cut the factors of a state to the shapes of the tensors.

    Args:
        state: State of vertical MULTIFAC; its leaves may have leading batch axes.
        shapes: Shapes of the tensors of all clients, in their order; *static*.

    Returns:
        The linked CP model, for all functions of `linked`.

    Raises:
        ValueError: If the shapes do not fit the state.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import linked
        >>> from fedlr.algorithms import vertical_multifac
        >>> tensors = (jnp.ones((6, 4, 3)), jnp.ones((6, 5)))
        >>> algorithm = vertical_multifac.build(penalty=0.1)
        >>> start = linked.random_init(tensors, 2, key=jax.random.key(0))
        >>> clients = vertical_multifac.stack_tensors(tensors)
        >>> state = algorithm.init(start, clients, key=jax.random.key(1))
        >>> vertical_multifac.unstack(state, [x.shape for x in tensors]).shapes
        ((6, 4, 3), (6, 5))
    """
    shared, factors = state.params
    rows = (shared.shape[-2], *(factor.shape[-2] for factor in factors))
    count = factors[0].shape[-3]
    shapes = tuple(tuple(shape) for shape in shapes)
    if len(shapes) != count or not all(_fits(shape, rows) for shape in shapes):
        raise _checks.fail("unstack", f"shapes {shapes}", f"{count} that fit within {rows}")
    own = [
        tuple(factor[..., k, :size, :] for factor, size in zip(factors, shape[1:], strict=False))
        for k, shape in enumerate(shapes)
    ]
    return model.LinkedCP(shared, tuple(own))


def build(
    *, penalty: float | Float[Array, ""], chunk_size: int | None = None
) -> protocol.FederatedAlgorithm:
    """Build vertical MULTIFAC.

    `init` takes the start as `params`, a `linked.LinkedCP` of the tensors' shapes and dtype, and
    the `clients` of `stack_tensors`; the key is not used. A column that is zero in one of a
    client's own factors stays zero in all of them. T rounds give the factors that `linked.multifac`
    gives after T sweeps from the same start, up to the order of summation.

    Losses are those of the factors that entered the round: ``|X_k - [[A_0, A_1^k, ..]]|^2 +
    penalty sum_n |A_n^k|^2`` of client k. With the penalty of A_0, counted once, their sum is the
    metric `objective`: that of round t + 1 is the objective of `linked.multifac` after sweep t, and
    that of round 1 belongs to the start.

    `round` needs every client in the cohort, in any order: a sweep without one of the tensors would
    fit A_0 to the others alone.

    Bytes, with n samples, rank R, K clients and b bytes per number: up go ``b (n R + R (R + 1) /
    2)``, down ``b n R``, whatever the sizes of the tensors. With missing data there are ``ceil(R /
    8)`` more up and ``ceil(K R / 8)`` more down, and in the first round also ``ceil(n / 8)`` and
    ``ceil(K n / 8)``.

    Args:
        penalty: Weight of the squared factors, from 0, without a factor 1/2; traced.
        chunk_size: Clients mapped at once, see `execution`. *Static.*

    Returns:
        A `FederatedAlgorithm` with a `StackedCP` as params, which `unstack` cuts to a
        `linked.LinkedCP`, and `Metrics` in its records. Weights are ones.

    Raises:
        ValueError: If a concrete penalty is negative or it is no scalar; in `init`, if the start
            does not fit the tensors; while tracing, if a cohort leaves clients out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import federated, linked
        >>> from fedlr.algorithms import vertical_multifac
        >>> tensors = (jnp.ones((6, 4, 3)), -jnp.ones((6, 5)))
        >>> clients = vertical_multifac.stack_tensors(tensors)
        >>> algorithm = vertical_multifac.build(penalty=0.1)
        >>> start = linked.random_init(tensors, 2, key=jax.random.key(0))
        >>> state = algorithm.init(start, clients, key=jax.random.key(1))
        >>> state, infos = federated.run(
        ...     algorithm, state, clients, num_rounds=30, key=jax.random.key(2)
        ... )
        >>> fit = vertical_multifac.unstack(state, [x.shape for x in tensors])
        >>> round(float(linked.to_dense(fit)[1][0, 0]), 1)
        -1.0
        >>> int(infos.uplink_bytes[0, 0]), 4 * (6 * 2 + 2 * 3 // 2)
        (60, 60)
    """
    _checks.check_ndim("vertical_multifac", "penalty", jnp.asarray(penalty), 0)
    _checks.check_non_negative("vertical_multifac", "penalty", penalty)

    def init(params, clients, *, key):
        del key
        _check_start(params, clients)
        rows = clients.tensors.shape[2:]
        own = [tuple(map(jnp.asarray, factors)) for factors in params.factors]
        in_tensor = [model.used_columns(factors) for factors in own]
        somewhere = jnp.any(jnp.stack(in_tensor), axis=0)
        stacked = []
        for mode, size in enumerate(rows):
            absent = jnp.zeros((size, params.rank), params.shared.dtype).at[0].set(1)
            stacked.append(
                jnp.stack(
                    [
                        _pad(jnp.where(keep[None], factors[mode], 0), size)
                        if mode < len(factors)
                        else absent
                        for factors, keep in zip(own, in_tensor, strict=True)
                    ]
                )
            )
        shared = jnp.where(somewhere[None], params.shared, 0)
        return protocol.FederatedState(StackedCP(shared, tuple(stacked)), (), (), jnp.int32(0))

    @_precision.highest
    def round_(state, clients, cohort, *, key):
        del key
        clients_.check_everyone("vertical_multifac", cohort, clients)
        count = clients_.num_clients(clients)
        shared, factors = state.params
        ridge = jnp.asarray(penalty, shared.dtype)
        is_start = state.round == 0
        tables = _tables(shared, factors, clients.observed, chunk_size)
        known = _count_clients(*tables) if tables else ()

        def send(own, sizes, x, observed, own_tables):
            filled = x
            if observed is not None:
                filled = _fill(shared, own, x, observed, own_tables, known, is_start)
            mttkrp = _partials.contract(filled, (shared, *own), 1, x.ndim)
            gram = _alternating.gram_product(own)
            fit = jnp.sum(mttkrp * shared), jnp.sum(gram * (shared.T @ shared))
            norm = _alternating.squares(filled)
            misfit = _alternating.residual(filled, None, (shared, *own), norm, fit)
            squares = jnp.stack([jnp.sum(factor * factor) for factor in own])
            loss = misfit + ridge * jnp.sum(jnp.where(sizes > 0, squares, 0))
            message = _Message(mttkrp, gram[np.triu_indices(gram.shape[0])])
            return message, (loss, misfit, () if observed is None else filled)

        rank = shared.shape[1]
        triangle = jnp.zeros((rank * (rank + 1) // 2,), shared.dtype)
        total, (losses, misfit, filled) = execution.fold_clients(
            send,
            _add,
            _Message(jnp.zeros_like(shared), triangle),
            jnp.ones(count, shared.dtype),
            factors,
            clients.sizes,
            clients.tensors,
            clients.observed,
            tables,
            chunk_size=chunk_size,
        )
        gram = _alternating.unpack(total.gram[None], rank)[..., 0]
        new_shared = _alternating.solve(
            [(gram, total.mttkrp)], shared, ridge, jnp.diagonal(gram) > 0
        )
        new_factors = execution.map_clients(
            lambda own, sizes, x: _update(new_shared, own, sizes, x, ridge),
            factors,
            clients.sizes,
            clients.tensors if clients.observed is None else filled,
            chunk_size=chunk_size,
        )
        objective = jnp.sum(losses) + ridge * jnp.sum(shared * shared)
        of_one = jax.tree.map(lambda table: table[0], tables)
        info = protocol.RoundInfo(
            losses=losses,
            weights=jnp.ones_like(losses),
            uplink_bytes=jnp.broadcast_to(_count(total, of_one, is_start), (count,)),
            downlink_bytes=jnp.broadcast_to(_count(new_shared, tables, is_start), (count,)),
            metrics=Metrics(misfit, jnp.broadcast_to(objective, (count,))),
        )
        params = StackedCP(new_shared, new_factors)
        return (
            protocol.FederatedState(params, (), (), state.round + 1),
            clients_.take(info, cohort),
        )

    return protocol.FederatedAlgorithm(init, round_)


def _tables(shared, factors, observed, chunk_size):
    """Find what clients with missing data tell each other: components active, samples seen."""
    if observed is None:
        return ()
    active = execution.map_clients(
        lambda own: model.active_components(model.LinkedCP(shared, (own,)))[0],
        factors,
        chunk_size=chunk_size,
    )
    return active, jnp.any(observed, axis=tuple(range(2, observed.ndim)))


def _count_clients(active, seen):
    """Count the clients that have both a sample and a component: (n, R)."""
    return jnp.sum(seen[:, :, None] & active[:, None, :], axis=0, dtype=jnp.int32)


def _add(total, messages, weights):
    return jax.tree.map(lambda a, b: a + jnp.tensordot(weights, b, axes=1), total, messages)


def _update(shared, own, sizes, x, ridge):
    """Update the factors of one client in the order of their modes."""
    num_modes = len(own) + 1
    found, _ = _alternating.sweep(
        [x],
        [None],
        [range(num_modes)],
        (shared, *own),
        order=range(1, num_modes),
        ridge=ridge,
        active=[model.used_columns(own)] * num_modes,
    )
    # Modes that the client does not have come last, so nothing has followed from their update.
    return tuple(
        jnp.where(size > 0, new, old) for size, new, old in zip(sizes, found[1:], own, strict=True)
    )


def _fill(shared, own, x, observed, tables, known, is_start):
    """Impute the hidden entries of one client as `linked.multifac` does.

    `known` counts, for every sample and component, the clients that have both.
    """
    active, seen = tables
    vouched = known - (seen[:, None] & active[None]).astype(jnp.int32) > 0
    keep = seen[:, None] | (vouched & active[None])
    data = jnp.where(observed, x, 0)
    filled, misfit = fitting.fill_tensor(shared, own, data, observed, keep)
    # A start that fits worse than zero does says nothing of the hidden entries.
    use = (misfit < jnp.sum(data * data)) | ~is_start
    return jnp.where(use, filled, data)


def _count(message, tables, is_start):
    """Count the bytes of a message with the tables, as bits; `seen` is only sent at the start."""
    if not tables:
        return compressors.message_bytes(message)
    active, seen = map(jnp.packbits, tables)
    return jnp.where(
        is_start,
        compressors.message_bytes((message, active, seen)),
        compressors.message_bytes((message, active)),
    )


def _pad(factor, size):
    return jnp.pad(factor, ((0, size - factor.shape[0]), (0, 0)))


def _fits(shape, rows):
    """Whether a tensor is of the samples and within the sizes of a stack."""
    return (
        2 <= len(shape) <= len(rows)
        and shape[0] == rows[0]
        and all(size <= room for size, room in zip(shape[1:], rows[1:], strict=False))
    )


def _check_start(params, clients):
    """Refuse a start that does not fit the stack of tensors."""
    name = "vertical_multifac"
    if not isinstance(clients, LinkedClients):
        got = f"clients of type {type(clients).__name__}"
        raise _checks.fail(name, got, "those of stack_tensors")
    if not isinstance(params, model.LinkedCP):
        raise _checks.fail(name, f"params of type {type(params).__name__}", "a linked.LinkedCP")
    model.check_linked(name, params)
    rows, dtype = clients.tensors.shape, clients.tensors.dtype
    if params.shared.dtype != dtype:
        raise _checks.fail(
            name, f"params of dtype {params.shared.dtype}", f"{dtype} as the tensors"
        )
    shapes = params.shapes
    if len(shapes) != rows[0] or not all(_fits(shape, rows[1:]) for shape in shapes):
        expected = f"{rows[0]} that fit within {rows[1:]}"
        raise _checks.fail(name, f"params of shapes {shapes}", expected)
    if isinstance(clients.sizes, core.Tracer):
        return
    expected = tuple(
        (rows[1], *(int(size) for size in sizes if size)) for sizes in np.asarray(clients.sizes)
    )
    if shapes != expected:
        raise _checks.fail(name, f"params of shapes {shapes}", f"{expected} as the tensors")
