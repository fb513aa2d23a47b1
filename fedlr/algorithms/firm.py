"""FIRM: federated reconstruction of coupled images with dense messages, and its relatives.

Client i holds the data b_i of its own image w_i; the images obey the known linear coupling
``r(w) = sum_{j<N} c_j w_j - w_N = 0``. One round (prox form):

    client:  z_i = prox(P(w_i - eta A_i^T (A_i w_i - b_i)))
    server:  w = P(coupling(z))

The coupling is an argument: `coupling.proximal_coupling` gives FIRM, and
`coupling.augmented_lagrangian` FIRM+.

Reference: FIRM, arXiv 2501.05642. Its full text was not at hand: the prox form, its step sizes
and the multiplier of FIRM+ are derived from the stated problem, and are not the authors' text.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import clients as clients_
from fedlr.federated import compressors, coupling, execution, local, protocol

__all__ = ["ServerState", "build"]


class ServerState(NamedTuple):
    """Server state of FIRM.

    Attributes:
        step_size: Gradient step eta of every client, scalar.
        coupling: State of the coupling (the multiplier image of FIRM+, else ()).
    """

    step_size: Float[Array, ""]
    coupling: PyTree


def build(
    forward: Callable[[Array, PyTree], Array],
    coefficients: Float[Array, " others"],
    *,
    server: coupling.Builder = coupling.proximal_coupling,
    step_size: Float[Array, ""] | float | None = None,
    lower: float | None = 0.0,
    proximal: Callable[[Array], Array] | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FIRM, or FIRM+ with ``server=coupling.augmented_lagrangian``.

    `init` takes the stacked start images (clients, ...) as `params` (zeros are the usual start).
    `round` needs all clients in the cohort, because the coupling ties them. A client sends its
    dense image and receives a dense image.

    Args:
        forward: Forward model ``forward(image, inputs) -> prediction``, linear in the image,
            for ONE client. Its adjoint is its vjp. *Static.*
        coefficients: Coupling coefficients c_1 .. c_(N-1), shape (clients - 1,).
        server: Builder ``(coefficients, *, lower) -> ServerUpdate`` of the coupling; another
            penalty than the default eta rho = 1 by `functools.partial`. *Static.*
        step_size: Gradient step eta, traced. Default: 1 / max_i ||A_i||_2^2, estimated in `init`
            by 40 power iterations. It is kept in the server's state.
        lower: Lower bound of the images, on the clients and after the coupling. None leaves them
            free. *Static.*
        proximal: Proximal map ``image -> image`` after the client's clip. *Static.*
        chunk_size: Clients mapped at once, see `execution`. *Static.*

    Returns:
        A `FederatedAlgorithm` whose `RoundInfo.metrics` is a `coupling.CoupledMetrics`; losses
        are 1/2 ||A_i w_i - b_i||^2 of the images that entered the round.

    Raises:
        ValueError: While tracing, if a cohort leaves clients out, if the images are not floating
            point, if their number differs from that of the clients, or if there are not
            clients - 1 coefficients.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedlr import federated
        >>> from fedlr.algorithms import firm
        >>> from fedlr.federated import protocol
        >>> clients = protocol.ClientData(
        ...     inputs=jnp.ones((2, 3)), targets=jnp.ones((2, 3)), mask=jnp.ones((2, 3), bool)
        ... )
        >>> algorithm = firm.build(lambda image, inputs: image * inputs, jnp.ones(1))
        >>> state = algorithm.init(jnp.zeros((2, 3)), clients, key=jax.random.key(0))
        >>> state, infos = federated.run(
        ...     algorithm, state, clients, num_rounds=5, key=jax.random.key(1)
        ... )
        >>> bool(jnp.allclose(state.params, 1.0, atol=1e-3))
        True
    """
    couple = server(coefficients, lower=lower)

    def init(params, clients, *, key):
        params = jnp.asarray(params)
        _checks.check_floating("firm", params=params)
        count = clients_.num_clients(clients)
        _checks.check_shape("firm", "params", params, (count, *params.shape[1:]))
        step = local.initial_step_size(step_size, forward, clients, params[0], key=key)
        return protocol.FederatedState(
            params, (), ServerState(step, couple.init(params)), jnp.int32(0)
        )

    def round_(state, clients, cohort, *, key):
        images, (step_size, memory) = state.params, state.server
        clients_.check_everyone("firm", cohort, clients)
        local_update = local.projected_gradient(
            forward, step_size=step_size, lower=lower, proximal=proximal
        )
        updates, _, metrics = execution.map_clients(
            lambda image, data: local_update(image, (), data, key=key),
            images,
            clients,
            chunk_size=chunk_size,
        )
        coupled, memory = couple.apply(images, updates, memory, key=key)
        sent = jax.vmap(compressors.message_bytes)(updates)
        info = coupling.round_info(coefficients, images, metrics, sent, sent)
        server_state = ServerState(step_size, memory)
        state = protocol.FederatedState(coupled, (), server_state, state.round + 1)
        return state, clients_.take(info, cohort)

    return protocol.FederatedAlgorithm(init, round_)
