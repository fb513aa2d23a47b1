"""CompJF and CompRandJF: federated reconstruction with low-rank tensor messages.

Client i holds the data b_i of its own tensor X_i; the tensors obey ``sum_{j<N} c_j X_j = X_N``.
All tensors live in one joint Tucker subspace S_1, ..., S_d with a personal core G_i each. A round:

    client:  X_i = [[G_i; S_1..S_d]]
             Z_i = P(X_i - eta A_i^T (A_i X_i - b_i))
             (G_i, S_i1..S_id) = ST-HOSVD(Z_i; r_i1..r_id), sent to the server
    server:  S_k = leading left singular vectors of [S_1k G_1(k), ..., S_Nk G_N(k)]  (Lemma II.1)
             G'_i = G_i x_1 (S_1^T S_i1) ... x_d (S_d^T S_id)
             G_i = the coupling applied to the G'_i

CompJF and CompRandJF differ in one argument: how the leading subspace S_k is found. The ranks r_i
are equal, given (drawn once), or follow a rule (`federated.ranks`).

Reference: federated low-rank tensor estimation, arXiv 2502.02761, Lemma II.1 and the algorithms
CompJF and CompRandJF. Its full text was not at hand: clip, prox form, initial values and the
fresh sketch of every epoch are inferred or derived, and are not the authors' text.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from fedlr import _checks, masking, subspace, tucker
from fedlr.federated import clients as clients_
from fedlr.federated import compressors, coupling, execution, local, protocol
from fedlr.federated import ranks as ranks_

__all__ = [
    "Basis",
    "ClientState",
    "Join",
    "Metrics",
    "ServerState",
    "build",
    "exact",
    "images",
    "sketched",
    "warm_started",
]

Basis = Callable[[tuple[Array, ...], Int[Array, ""], Key[Array, ""]], subspace.BasisFinder]
"""How a round finds its bases: ``(previous factors, round, key) -> subspace.BasisFinder``."""


Join = Callable[..., tuple[Array, ...]]
"""How joint factors come out of the messages: `tucker.joint_factors` and functions like it."""


class ClientState(NamedTuple):
    """What the clients of CompJF remember.

    Attributes:
        ranks: Rank of every client in every mode at its last message, int32 (clients, modes).
        rule: Memory of the rank rule, leaves (clients, ...).
    """

    ranks: Int[Array, "clients modes"]
    rule: PyTree


class Metrics(NamedTuple):
    """Record of a round of CompJF, `RoundInfo.metrics`.

    Attributes:
        residual_norm: ``||A_i X_i - b_i||`` of the tensors that entered, shape (clients,).
        violation: ``||sum_j c_j X_j - X_N|| / ||X_N||`` of these, the same for every client, shape
            (clients,).
        change: ``||X_i+ - X_i|| / ||X_i+||``, how far the round moved the tensors, shape
            (clients,). It goes to zero where the run settles; a fresh sketch in every round keeps
            it up.
        truncation: ``||Z_i - [[G_i; S_i1..S_id]]|| / ||Z_i||``, what the clients' own ranks cost,
            shape (clients,).
        joining: The same for what the joint factors leave of the messages, shape (clients,).
        ranks: Rank of every message in every mode, int32, shape (clients, modes).
    """

    residual_norm: Float[Array, " clients"]
    violation: Float[Array, " clients"]
    change: Float[Array, " clients"]
    truncation: Float[Array, " clients"]
    joining: Float[Array, " clients"]
    ranks: Int[Array, "clients modes"]


class ServerState(NamedTuple):
    """Server state of CompJF.

    Attributes:
        step_size: Gradient step eta of every client, scalar.
        coupling: State of the coupling, in the joint subspace.
    """

    step_size: Float[Array, ""]
    coupling: PyTree


def exact(finder: subspace.BasisFinder | None = None) -> Basis:
    """Use one basis finder in every round (CompJF).

    Args:
        finder: Any basis finder without randomness, by default `subspace.gram`.

    Returns:
        A `Basis`.
    """
    finder = subspace.gram() if finder is None else finder

    def basis(previous, index, key):
        del previous, index, key
        return finder

    return basis


def sketched(*, oversampling: int = 0, power_iters: int = 0) -> Basis:
    """Draw a fresh randomized sketch in every round (CompRandJF).

    The defaults are the paper's: as many Gaussian columns as ranks, no power step. With
    ``oversampling=10, power_iters=1`` the sketch follows CompJF closely at small ranks too.

    Args:
        oversampling: Columns of the sketch beyond the rank. *Static.*
        power_iters: Power steps. *Static.*

    Returns:
        A `Basis`.
    """

    def basis(previous, index, key):
        del previous, index
        return subspace.randomized(key=key, oversampling=oversampling, power_iters=power_iters)

    return basis


def warm_started() -> Basis:
    """Do one subspace iteration from the previous joint factors; nothing random is drawn.

    The first round uses `subspace.gram`: the start factors know nothing of the data.

    Returns:
        A `Basis`.
    """

    def basis(previous, index, key):
        del key
        first, later = subspace.gram(), subspace.warm_started(previous)

        def find(matrix, rank, *, mode):
            return jax.lax.cond(
                index == 0,
                lambda: first(matrix, rank, mode=mode),
                lambda: later(matrix, rank, mode=mode),
            )

        return find

    return basis


def images(state: protocol.FederatedState) -> Array:
    """Form the dense tensors of all clients.

    Args:
        state: State of an algorithm of this module.

    Returns:
        The tensors ``[[G_i; S_1..S_d]]``, shape (clients, n_1, ..., n_d). They are not clipped.
    """
    core, factors = state.params
    return jax.vmap(lambda g: tucker.to_dense(tucker.TuckerTensor(g, factors)))(core)


def build(
    forward: Callable[[Array, PyTree], Array],
    coefficients: Float[Array, " others"],
    *,
    ranks: tuple[int, ...],
    client_ranks: Int[Array, "clients modes"] | ranks_.RankRule | None = None,
    join: Join = tucker.joint_factors,
    joint_basis: Basis | None = None,
    client_basis: Basis | None = None,
    server: coupling.Builder = coupling.proximal_coupling,
    step_size: Float[Array, ""] | float | None = None,
    lower: float | None = 0.0,
    proximal: Callable[[Array], Array] | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build CompJF, or CompRandJF with ``joint_basis=sketched()``.

    `init` takes the stacked start tensors (clients, ...) as `params` (zeros are the usual start).
    The state's `params` is a `tucker.TuckerTensor`: cores (clients, *ranks) and the shared
    factors; `images(state)` forms the dense tensors. `round` needs every client in the cohort,
    because the coupling ties all of them. A run can be differentiated where every client has the
    ranks `ranks`; given `client_ranks` it has no derivative, see `tucker.sthosvd`.

    Bytes: a client sends its core and factors at its own ranks, and receives its core and the
    joint factors at `ranks`; under a rule at the largest rank that any client has in this round.

    `ranks` above all client ranks make the joint subspace richer: with ``min(n_k, sum_i r_ik)`` it
    holds all messages and the server couples them without loss.

    Args:
        forward: Forward model ``forward(tensor, inputs) -> prediction``, linear in the tensor,
            for ONE client. Its adjoint is its vjp. *Static.*
        coefficients: Coupling coefficients c_1 .. c_(N-1), shape (clients - 1,).
        ranks: Ranks r* of the joint subspace, one for every mode. *Static.*
        client_ranks: Rank of every client in every mode, int, at most `ranks`, shape
            (clients, modes), e.g. from `ranks.draw`; or a rule like `ranks.grow`, whose ranks
            stop at `ranks`. Default: `ranks` for all. Smaller ones are zero padded.
        join: How the joint factors come out of the messages, `tucker.joint_factors` or
            `tucker.average_factors`. *Static.*
        joint_basis: How the server finds the joint factors, default `exact()`. *Static.*
        client_basis: How a client finds its own factors, default `exact()`. *Static.*
        server: Builder ``(coefficients, *, lower) -> ServerUpdate`` of the coupling, applied to
            the cores; it is linear, so it commutes with the joint factors. *Static.*
        step_size: Gradient step eta, traced. Default: 1 / max_i ||A_i||_2^2, estimated in `init`
            by 40 power iterations. It is kept in the server's state.
        lower: Lower bound of the tensors, applied by the clients after their gradient step; it
            cannot act on cores, so `images` may fall below it. *Static.*
        proximal: Proximal map ``tensor -> tensor`` applied after the client's clip. *Static.*
        chunk_size: Clients mapped at once, see `execution`. *Static.*

    Returns:
        A `FederatedAlgorithm` whose `RoundInfo.metrics` is a `Metrics`; losses are
        1/2 ||A_i X_i - b_i||^2 of the tensors that entered the round.

    Raises:
        ValueError: If the coupling and the bound leave no non-zero w_N; in `init`, if `forward`
            is not linear or its adjoint does not match; while tracing, if `ranks` or
            `client_ranks` do not fit the tensors, if a cohort leaves clients out, or if there are
            not clients - 1 coefficients.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import comp_jf
        >>> from fedlr.federated import protocol
        >>> clients = protocol.ClientData(
        ...     inputs=jnp.ones((2, 3, 4)),
        ...     targets=jnp.ones((2, 3, 4)),
        ...     mask=jnp.ones((2, 3, 4), bool),
        ... )
        >>> algorithm = comp_jf.build(
        ...     lambda image, inputs: image * inputs, jnp.ones(1), ranks=(2, 2)
        ... )
        >>> start = jnp.zeros((2, 3, 4))
        >>> state = algorithm.init(start, clients, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, clients, num_rounds=5, key=jax.random.key(1)
        ... )
        >>> bool(jnp.allclose(comp_jf.images(state), 1.0, atol=1e-3))
        True
    """
    coupling.check_satisfiable("comp_jf", coefficients, lower)
    joint_basis = exact() if joint_basis is None else joint_basis
    client_basis = exact() if client_basis is None else client_basis
    couple = server(coefficients, lower=None)
    rule = client_ranks if isinstance(client_ranks, ranks_.RankRule) else None
    given = None if isinstance(client_ranks, ranks_.RankRule) else client_ranks

    def init(params, clients, *, key):
        params = jnp.asarray(params)
        _checks.check_floating("comp_jf", params=params)
        count = clients_.num_clients(clients)
        _checks.check_shape("comp_jf", "params", params, (count, *params.shape[1:]))
        _checks.check_ranks("comp_jf", ranks, params.shape[1:])
        step = local.initial_step_size(
            step_size, forward, clients, params[0], key=key, function="comp_jf"
        )
        stacked = jax.vmap(lambda tensor: tucker.sthosvd(tensor, ranks))(params)
        factors = tucker.joint_factors(stacked, ranks, basis=subspace.gram())
        cores = jax.vmap(lambda tensor: tucker.project_core(tensor, factors))(stacked)
        if rule is None:
            own = ClientState(ranks_.fixed("comp_jf", given, ranks, count), ())
        else:
            own = ClientState(*rule.init(clients, ranks))
        return protocol.FederatedState(
            tucker.TuckerTensor(cores, factors),
            own,
            ServerState(step, couple.init(cores)),
            jnp.int32(0),
        )

    def round_(state, clients, cohort, *, key):
        (cores, factors), (step_size, memory) = state.params, state.server
        clients_.check_everyone("comp_jf", cohort, clients)
        client_key, joint_key, server_key = jax.random.split(key, 3)
        local_update = local.projected_gradient(
            forward, step_size=step_size, lower=lower, proximal=proximal
        )

        def client(core, own, data, key):
            tensor = tucker.to_dense(tucker.TuckerTensor(core, factors))
            update, _, metrics = local_update(tensor, (), data, key=key)
            if rule is not None:
                wanted, memory = rule.update(own.ranks, metrics.residual_norm, own.rule)
                own = ClientState(jnp.clip(wanted, 1, jnp.asarray(ranks, jnp.int32)), memory)
            moved = tensor + update
            truncated = tucker.sthosvd(
                moved,
                ranks,
                basis=client_basis(factors, state.round, key),
                effective_ranks=None if client_ranks is None else own.ranks,
            )
            lost = coupling.relative_norm(moved - tucker.to_dense(truncated), moved)
            return compressors.TuckerMessage(truncated, own.ranks), own, metrics, lost

        messages, own, metrics, lost = execution.map_clients(
            client,
            cores,
            state.clients,
            clients,
            jax.random.split(client_key, cores.shape[0]),
            chunk_size=chunk_size,
        )
        joint = join(messages.tensor, ranks, basis=joint_basis(factors, state.round, joint_key))
        joint_ranks = jnp.asarray(ranks, jnp.int32)
        if rule is not None:
            joint_ranks = jnp.max(own.ranks, axis=0)
            joint = tucker.truncate(tucker.TuckerTensor(cores[0], joint), joint_ranks).factors
        projected = jax.vmap(lambda tensor: tucker.project_core(tensor, joint))(messages.tensor)
        memory = _change_basis(memory, factors, joint)
        coupled, memory = couple.apply(projected, jnp.zeros_like(projected), memory, key=server_key)
        sent = jax.vmap(compressors.message_bytes)(messages)
        answer = compressors.TuckerMessage(tucker.TuckerTensor(coupled[0], joint), joint_ranks)
        violation = coupling.relative_violation(coefficients, cores)
        info = protocol.RoundInfo(
            losses=metrics.loss,
            weights=jnp.ones_like(metrics.loss),
            uplink_bytes=sent,
            downlink_bytes=jnp.broadcast_to(compressors.message_bytes(answer), sent.shape),
            metrics=Metrics(
                residual_norm=metrics.residual_norm,
                violation=jnp.broadcast_to(violation, metrics.loss.shape),
                change=_change(cores, factors, coupled, joint),
                truncation=lost,
                joining=jax.vmap(lambda t: tucker.projection_error(t, joint))(messages.tensor),
                ranks=own.ranks,
            ),
        )
        state = protocol.FederatedState(
            tucker.TuckerTensor(coupled, joint),
            own,
            ServerState(step_size, memory),
            state.round + 1,
        )
        return state, clients_.take(info, cohort)

    return protocol.FederatedAlgorithm(init, round_)


def _change(old_cores, old_factors, cores, factors):
    """Compute ``||X_i+ - X_i|| / ||X_i+||`` of all clients from cores in two bases."""

    def of_client(old_core, new_core):
        old = tucker.TuckerTensor(old_core, old_factors)
        everything = jnp.array(True)
        inside = masking.masked_norm(new_core - tucker.project_core(old, factors), everything)
        outside = tucker.projection_error(old, factors) * masking.masked_norm(old_core, everything)
        return coupling.relative_norm(jnp.stack([inside, outside]), new_core)

    return jax.vmap(of_client)(old_cores, cores)


def _change_basis(memory, old, new):
    """Re-express every core-shaped array of the coupling's state in the new joint factors."""
    return jax.tree.map(
        lambda core: tucker.project_core(tucker.TuckerTensor(core, old), new), memory
    )
