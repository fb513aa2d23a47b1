"""FIRM: federated reconstruction of coupled images with one message an image, and its relatives.

Client i holds the data b_i of its own image w_i; the images obey the known linear coupling
``r(w) = sum_{j<N} c_j w_j - w_N = 0``. One round (prox form):

    client:  z_i = prox(P(w_i - eta A_i^T (A_i w_i - b_i)))
    server:  w = P(coupling(z))

The coupling and the two directions of the traffic are arguments:

====================  ==========================================================================
method                arguments
====================  ==========================================================================
FIRM                  none
FIRM+                 ``server=coupling.augmented_lagrangian``
FedPGD                ``server=coupling.exact_projection, clip_clients=False``
FullDecomp            both channels ``channels.states(compressors.truncated_tucker(ranks))``
Top-k, CSR of states  both channels ``channels.states(compressors.top_k(k))``, ``csr(num_nonzeros)``
Top-k of increments   both channels ``channels.increments(compressors.error_feedback(top_k(k)))``
quantized FIRM        both channels ``channels.increments(compressors.quantize(8))``
====================  ==========================================================================

With ``clip_clients=False`` FIRM+ has the limit of FedPGD; clipping on both sides, as FIRM does,
moves it a little.

Reference: FIRM, arXiv 2501.05642. Its full text was not at hand: the prox form, its step sizes
and the multiplier of FIRM+ are derived from the stated problem, and are not the authors' text.
FullDecomp is named in arXiv 2502.02761 but not defined in what could be read of it; here the server
decodes the images, couples them, and encodes each of them again.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fedlr import _checks
from fedlr.federated import channels, coupling, execution, local, protocol
from fedlr.federated import clients as clients_

__all__ = ["ClientState", "ServerState", "build"]


class ClientState(NamedTuple):
    """What the two channels of every client remember, leaves (clients, ...).

    Attributes:
        uplink: State of the client's end of the uplink.
        downlink: State of the server's end of this client's downlink.
    """

    uplink: PyTree
    downlink: PyTree


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
    uplink: channels.Channel | None = None,
    downlink: channels.Channel | None = None,
    step_size: Float[Array, ""] | float | None = None,
    lower: float | None = 0.0,
    clip_clients: bool = True,
    proximal: Callable[[Array], Array] | None = None,
    chunk_size: int | None = None,
) -> protocol.FederatedAlgorithm:
    """Build FIRM, or one of its relatives in the table above.

    `init` takes the stacked start images (clients, ...) as `params` (zeros are the usual start).
    `round` needs all clients in the cohort, because the coupling ties them. The state's params are
    the images that the clients have received.

    Args:
        forward: Forward model ``forward(image, inputs) -> prediction``, linear in the image,
            for ONE client. Its adjoint is its vjp. *Static.*
        coefficients: Coupling coefficients c_1 .. c_(N-1), shape (clients - 1,).
        server: Builder ``(coefficients, *, lower) -> ServerUpdate`` of the coupling; another
            penalty than the default eta rho = 1 by `functools.partial`. *Static.*
        uplink: How a client sends its z_i; both ends know the w_i it started from. None for
            ``channels.states()``, which sends it dense. *Static.*
        downlink: How the server sends w_i back; both ends know the z_i that arrived. None for
            ``channels.states()``. *Static.*
        step_size: Gradient step eta, traced. Default: 1 / max_i ||A_i||_2^2, estimated in `init`
            by 40 power iterations. It is kept in the server's state.
        lower: Lower bound of the images, on the clients and after the coupling. A downlink with
            loss may send images below it. None leaves them free. *Static.*
        clip_clients: Whether the clients clip at `lower` too. *Static.*
        proximal: Proximal map ``image -> image`` after the client's clip, as a partial of
            `proximal.total_variation`. *Static.*
        chunk_size: Clients mapped at once, see `execution`. *Static.*

    Returns:
        A `FederatedAlgorithm` whose `RoundInfo.metrics` is a `coupling.CoupledMetrics`; losses
        are 1/2 ||A_i w_i - b_i||^2 of the images that entered the round. Bytes are those of the
        messages.

    Raises:
        ValueError: If the coupling and the bound leave no non-zero w_N; in `init`, if `forward`
            is not linear or its adjoint does not match; while tracing, if a cohort leaves clients
            out, if the images are not floating point, if their number differs from that of the
            clients, or if there are not clients - 1 coefficients.

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
    coupling.check_satisfiable("firm", coefficients, lower)
    uplink = channels.states() if uplink is None else uplink
    downlink = channels.states() if downlink is None else downlink
    couple = server(coefficients, lower=lower)

    def init(params, clients, *, key):
        params = jnp.asarray(params)
        _checks.check_floating("firm", params=params)
        count = clients_.num_clients(clients)
        _checks.check_shape("firm", "params", params, (count, *params.shape[1:]))
        step = local.initial_step_size(
            step_size, forward, clients, params[0], key=key, function="firm"
        )
        memory = jax.vmap(lambda image: ClientState(uplink.init(image), downlink.init(image)))
        return protocol.FederatedState(
            params, memory(params), ServerState(step, couple.init(params)), jnp.int32(0)
        )

    def round_(state, clients, cohort, *, key):
        images, (step_size, memory) = state.params, state.server
        clients_.check_everyone("firm", cohort, clients)
        up_key, down_key, server_key = jax.random.split(key, 3)
        local_update = local.projected_gradient(
            forward,
            step_size=step_size,
            lower=lower if clip_clients else None,
            proximal=proximal,
        )

        def client(image, own, data, key):
            update, _, metrics = local_update(image, (), data, key=key)
            return *uplink.send(image + update, image, own, key=key), metrics

        def answer(image, known, own, key):
            return downlink.send(image, known, own, key=key)

        each = partial(execution.map_clients, chunk_size=chunk_size)
        arrived, sent, up_state, metrics = each(
            client, images, state.clients.uplink, clients, jax.random.split(up_key, len(images))
        )
        coupled, memory = couple.apply(arrived, jnp.zeros_like(arrived), memory, key=server_key)
        returned, received, down_state = each(
            answer,
            coupled,
            arrived,
            state.clients.downlink,
            jax.random.split(down_key, len(images)),
        )
        info = coupling.round_info(coefficients, images, returned, metrics, sent, received)
        state = protocol.FederatedState(
            returned,
            ClientState(up_state, down_state),
            ServerState(step_size, memory),
            state.round + 1,
        )
        return state, clients_.take(info, cohort)

    return protocol.FederatedAlgorithm(init, round_)
