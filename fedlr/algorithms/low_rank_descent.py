"""Low-rank descent: coupled reconstruction with an objective that provably never rises.

CompJF truncates in a subspace that all clients share and couples by a splitting, for which no
convergence is known. Here the coupling is a penalty inside the clients' gradient,

    F(X) = sum_i 1/2 ||A_i X_i - b_i||^2 + rho/2 ||R||^2,   R = sum_{j<N} c_j X_j - X_N

and a round is one projected gradient step on F over all tensors of multilinear rank at most r_i:

    client:  T_i = X_i - eta (A_i^T (A_i X_i - b_i) + rho c~_i R)
             X_i = a low-rank tensor at least as near to T_i as the old X_i; sent to the server
    server:  R of the new X_i, sent to all clients

Because F is smooth with constant ``L_F = max_i ||A_i||^2 + rho ||c~||^2``, every step with
``eta <= 1 / L_F`` that brings no X_i further from T_i does not raise F. The client takes the nearer
one of the ST-HOSVD of T_i, which for matrices of equal ranks is the nearest of all, and of the
projection of T_i on the factors of X_i, which never is further away. For matrices, bounded iterates
converge to a critical point.

Reference: derived for arXiv 2502.02761, which has no such variant; the convergence for matrices is
Attouch, Bolte and Svaiter 2013, "Convergence of descent methods for semi-algebraic and tame
problems", Mathematical Programming 137, theorem 5.3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, Int, PyTree

from fedlr import _checks, _precision, masking, multilinear, tucker
from fedlr.federated import clients as clients_
from fedlr.federated import compressors, coupling, execution, local, protocol
from fedlr.federated import ranks as ranks_

__all__ = ["Metrics", "ServerState", "build", "images"]

# The power iterations approach the largest norm from below.
_SAFETY = 0.95


class ServerState(NamedTuple):
    """Server state of low-rank descent.

    Attributes:
        step_size: Gradient step eta of every client, scalar.
        weight: Weight rho of the penalty, scalar.
        residual: The R of the tensors that the clients hold, as it is sent: core and joint factors
            without loss, or dense.
    """

    step_size: Float[Array, ""]
    weight: Float[Array, ""]
    residual: tucker.TuckerTensor | Array


class Metrics(NamedTuple):
    """Record of a round of low-rank descent, `RoundInfo.metrics`.

    Attributes:
        residual_norm: ``||A_i X_i - b_i||`` of the tensors that entered, shape (clients,).
        violation: ``||R|| / ||X_N||`` of these, the same for every client, shape (clients,).
        change: ``||X_i+ - X_i|| / ||X_i+||``, shape (clients,). It goes to zero. Where the
            denominator is zero both are as in `coupling.relative_norm`.
        objective: F of the tensors that entered, the same for every client, shape (clients,).
    """

    residual_norm: Float[Array, " clients"]
    violation: Float[Array, " clients"]
    change: Float[Array, " clients"]
    objective: Float[Array, " clients"]


def images(state: protocol.FederatedState) -> Array:
    """Form the dense tensors of all clients.

    Args:
        state: State of an algorithm of this module.

    Returns:
        The tensors, shape (clients, n_1, ..., n_d).
    """
    return jax.vmap(tucker.to_dense)(state.params)


def build(
    forward: Callable[[Array, PyTree], Array],
    coefficients: Float[Array, " others"],
    *,
    ranks: tuple[int, ...],
    client_ranks: Int[Array, "clients modes"] | None = None,
    penalty: Float[Array, ""] | float = 1.0,
    step_size: Float[Array, ""] | float | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build low-rank descent.

    `init` takes the stacked start tensors (clients, ...) as `params`, which are truncated to the
    ranks (zeros are the usual start). The state's `params` is a `tucker.TuckerTensor` whose leaves
    have a leading client axis: every client has factors of its own. `round` needs every client in
    the cohort. There is no bound on the entries: a clip and a rank together have no projection in
    closed form.

    Bytes: a client sends its core and factors at its own ranks. It receives R in the span of the
    factors of all clients, counted at `ranks` for each of them, or dense where that is smaller.

    Args:
        forward: Forward model ``forward(tensor, inputs) -> prediction``, linear in the tensor,
            for ONE client. Its adjoint is its vjp. *Static.*
        coefficients: Coupling coefficients c_1 .. c_(N-1), shape (clients - 1,).
        ranks: Largest rank of every mode. *Static.*
        client_ranks: Rank of every client in every mode, int, at most `ranks`, shape
            (clients, modes); None for `ranks`.
        penalty: Weight rho of the coupling in units of ``max_i ||A_i||^2``, which `init` estimates
            by 40 power iterations; traced.
        step_size: Gradient step eta, traced. None for 0.95 / L_F, with the estimate of L_F that the
            power iterations reach from below; the descent is only guaranteed up to 1 / L_F.
        chunk_size: Clients mapped at once, see `execution`. *Static.*

    Returns:
        A `FederatedAlgorithm` whose `RoundInfo.metrics` is a `Metrics`; losses are
        1/2 ||A_i X_i - b_i||^2 of the tensors that entered the round.

    Raises:
        ValueError: If a coefficient or the penalty is not finite, or the penalty negative or no
            scalar; in `init`, if `forward` is not linear or its adjoint does not match; while
            tracing, if `ranks` or `client_ranks` do not fit the tensors, if a cohort leaves clients
            out, or if there are not clients - 1 coefficients.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import low_rank_descent
        >>> from fedlr.federated import protocol
        >>> clients = protocol.ClientData(
        ...     jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4), bool)
        ... )
        >>> algorithm = low_rank_descent.build(
        ...     lambda image, inputs: image * inputs, jnp.ones(1), ranks=(1, 1)
        ... )
        >>> state = algorithm.init(jnp.zeros((2, 3, 4)), clients, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, clients, num_rounds=40, key=jax.random.key(1)
        ... )
        >>> bool(jnp.all(jnp.diff(infos.metrics.objective[:, 0]) <= 0))
        True
        >>> bool(jnp.allclose(low_rank_descent.images(state), 1.0, atol=1e-3))
        True
    """
    coupling.check_satisfiable("low_rank_descent", coefficients, None)
    _checks.check_ndim("low_rank_descent", "penalty", jnp.asarray(penalty), 0)
    _checks.check_non_negative("low_rank_descent", "penalty", penalty)
    if not isinstance(penalty, core.Tracer) and not np.isfinite(penalty):
        raise _checks.fail("low_rank_descent", f"penalty {penalty}", "a finite number")

    def init(params, clients, *, key):
        params = jnp.asarray(params)
        _checks.check_floating("low_rank_descent", params=params)
        count = clients_.num_clients(clients)
        _checks.check_shape("low_rank_descent", "params", params, (count, *params.shape[1:]))
        _checks.check_ranks("low_rank_descent", ranks, params.shape[1:])
        effective = ranks_.fixed("low_rank_descent", client_ranks, ranks, count)
        norm = 1.0 / local.initial_step_size(
            None, forward, clients, params[0], key=key, function="low_rank_descent"
        )
        weight = jnp.asarray(penalty, params.dtype) * norm
        signed = coupling.signed_coefficients("low_rank_descent", coefficients, params)
        largest = _SAFETY / (norm + weight * jnp.sum(signed**2))
        step = largest if step_size is None else jnp.asarray(step_size, params.dtype)
        tensors = jax.vmap(lambda tensor, own: _truncate(tensor, ranks, own))(params, effective)
        server = ServerState(step, weight, _residual(signed, tensors))
        return protocol.FederatedState(tensors, effective, server, jnp.int32(0))

    def round_(state, clients, cohort, *, key):
        step_size, weight, residual = state.server
        clients_.check_everyone("low_rank_descent", cohort, clients)
        signed = coupling.signed_coefficients("low_rank_descent", coefficients, state.params.core)
        pull = _decode(residual)
        misfit = local.projected_gradient(forward, step_size=step_size, lower=None)

        def client(old, effective, coefficient, data):
            before = tucker.to_dense(old)
            update, _, metrics = misfit(before, (), data, key=key)
            target = before + update - step_size * weight * coefficient * pull
            new = _truncate(target, ranks, effective)
            kept = old._replace(core=_project(target, old.factors))
            after, fallback = tucker.to_dense(new), tucker.to_dense(kept)
            nearer = jnp.sum((after - target) ** 2) <= jnp.sum((fallback - target) ** 2)
            new, after = jax.tree.map(
                lambda a, b: jnp.where(nearer, a, b), (new, after), (kept, fallback)
            )
            change = coupling.relative_norm(after - before, after)
            return new, metrics, change, _norm(before)

        tensors, metrics, change, norms = execution.map_clients(
            client, state.params, state.clients, signed, clients, chunk_size=chunk_size
        )
        sent = jax.vmap(compressors.message_bytes)(
            compressors.TuckerMessage(tensors, state.clients)
        )
        new_residual = _residual(signed, tensors)
        received = compressors.message_bytes(new_residual)
        gap = _norm(pull)
        objective = jnp.sum(metrics.loss) + weight / 2 * gap**2
        violation = coupling.relative_norm(gap, norms[-1])
        info = protocol.RoundInfo(
            losses=metrics.loss,
            weights=jnp.ones_like(metrics.loss),
            uplink_bytes=sent,
            downlink_bytes=jnp.broadcast_to(received, sent.shape),
            metrics=Metrics(
                metrics.residual_norm,
                jnp.broadcast_to(violation, change.shape),
                change,
                jnp.broadcast_to(objective, change.shape),
            ),
        )
        server = ServerState(step_size, weight, new_residual)
        state = protocol.FederatedState(tensors, state.clients, server, state.round + 1)
        return state, clients_.take(info, cohort)

    return protocol.FederatedAlgorithm(init, round_)


def _truncate(tensor, ranks, effective):
    return tucker.sthosvd(tensor, ranks, effective_ranks=effective)


@_precision.highest
def _project(tensor, factors):
    """Return the core of the projection of a dense tensor on orthonormal factors."""
    return multilinear.multi_mode_dot(tensor, [factor.T for factor in factors])


@_precision.highest
def _residual(signed, tensors):
    """Form ``R = sum_i c~_i X_i`` in the span of all factors, or dense where that is smaller."""
    sizes, ranks, count = tensors.shape, tensors.ranks, len(signed)
    spans = tuple(min(n, count * r) for n, r in zip(sizes, ranks, strict=True))
    if math.prod(spans) + sum(n * s for n, s in zip(sizes, spans, strict=True)) >= math.prod(sizes):
        return jnp.tensordot(signed, jax.vmap(tucker.to_dense)(tensors), axes=1)
    # The unweighted span: a basis that singular values rank would lose the weakest directions.
    joint = tuple(
        jnp.linalg.qr(jnp.moveaxis(factor, 0, 1).reshape(factor.shape[1], -1))[0]
        for factor in tensors.factors
    )
    cores = jax.vmap(lambda tensor: tucker.project_core(tensor, joint))(tensors)
    return tucker.TuckerTensor(jnp.tensordot(signed, cores, axes=1), joint)


def _decode(residual):
    return tucker.to_dense(residual) if isinstance(residual, tucker.TuckerTensor) else residual


def _norm(tensor):
    """Take the Euclidean norm, whose gradient at zero is 0."""
    return masking.masked_norm(tensor, jnp.array(True))
