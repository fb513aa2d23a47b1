"""The reconstruction methods by name: ``FAMILY[ ARGUMENT][ + TV]``, as "CompJF 20 + TV".

The argument is a number (rank, entries, bits), or the ranks of the clients with commas between.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.problems import Draw, Problem
from fedlr import proximal, tucker
from fedlr.algorithms import comp_jf, fedavg, firm, local_only, low_rank_descent
from fedlr.federated import channels, compressors, coupling, local, protocol, ranks

__all__ = ["BASES", "FAMILIES", "Method", "build"]


class Method(NamedTuple):
    """A federated algorithm, the start its `init` wants, and how to see its images."""

    algorithm: protocol.FederatedAlgorithm
    start: Array
    images: Callable[[protocol.FederatedState], Array]


class Setting(NamedTuple):
    """What a family builds a method from; `numbers` is its argument."""

    problem: Problem
    draw: Draw
    numbers: tuple[int, ...]
    prox: Callable[[Array], Array] | None

    @property
    def start(self) -> Array:
        """Zero images of all clients."""
        return jnp.zeros_like(self.problem.truth)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The largest number, for every mode."""
        return (max(self.numbers),) * (self.problem.truth.ndim - 1)

    @property
    def client_ranks(self) -> Array | None:
        """The numbers as ranks of the clients in every mode, None if all have the same."""
        if len(self.numbers) == 1:
            return None
        return jnp.asarray([[number] * len(self.ranks) for number in self.numbers])

    def step(self, prox: Callable[[Array], Array] | None) -> protocol.LocalUpdate:
        """Build the client's gradient step with a proximal map."""
        problem = self.problem
        return local.projected_gradient(problem.forward, step_size=problem.step_size, proximal=prox)


_ACCURATE = comp_jf.sketched(oversampling=10, power_iters=1)
_WARM = comp_jf.warm_started()
BASES: dict[str, tuple[comp_jf.Basis | None, comp_jf.Basis | None]] = {
    "CompJF": (None, None),
    "CompRandJF": (comp_jf.sketched(), None),
    "CompRandJF p=0 q=1": (comp_jf.sketched(power_iters=1), None),
    "CompRandJF p=10 q=0": (comp_jf.sketched(oversampling=10), None),
    "CompRandJF p=10 q=1": (_ACCURATE, None),
    "CompJF warm": (_WARM, None),
    "CompJF sketched everywhere": (_ACCURATE, _ACCURATE),
    "CompJF warm everywhere": (_WARM, _WARM),
}
"""How the server and the clients find their bases, by family."""


def _dense(setting: Setting, **options) -> Method:
    """Build FIRM or a relative."""
    problem = setting.problem
    algorithm = firm.build(
        problem.forward,
        problem.coefficients,
        step_size=problem.step_size,
        proximal=setting.prox,
        **options,
    )
    return Method(algorithm, setting.start, _params)


def _compressed(channel, compressor) -> Callable[[Setting], Method]:
    """Give FIRM two channels with a compressor of the first number."""

    def family(setting):
        both = channel(compressor(setting))
        return _dense(setting, uplink=both, downlink=both)

    return family


def _low_rank(setting: Setting, *, client_ranks=None, **options) -> Method:
    """Build CompJF or a relative."""
    problem = setting.problem
    algorithm = comp_jf.build(
        problem.forward,
        problem.coefficients,
        ranks=setting.ranks,
        client_ranks=setting.client_ranks if client_ranks is None else client_ranks,
        step_size=problem.step_size,
        proximal=setting.prox,
        **options,
    )
    return Method(algorithm, setting.start, comp_jf.images)


def _growing(setting: Setting, *, known: bool) -> Method:
    levels = setting.draw.noise_levels if known else None
    start = min(8, max(1, setting.ranks[0] // 2))
    return _low_rank(setting, client_ranks=ranks.grow(levels, start=start))


def _descent(setting: Setting) -> Method:
    problem = setting.problem
    algorithm = low_rank_descent.build(problem.forward, problem.coefficients, ranks=setting.ranks)
    return Method(algorithm, setting.start, low_rank_descent.images)


def _alone(setting: Setting) -> Method:
    return Method(local_only.build(setting.step(setting.prox)), setting.start[0], _params)


def _low_rank_alone(setting: Setting) -> Method:
    def truncate(image):
        return tucker.to_dense(tucker.sthosvd(image, setting.ranks))

    return Method(local_only.build(setting.step(truncate)), setting.start[0], _params)


def _average(setting: Setting) -> Method:
    shape = setting.problem.truth.shape
    algorithm = fedavg.build(setting.step(setting.prox))
    return Method(algorithm, setting.start[0], lambda state: jnp.broadcast_to(state.params, shape))


def _params(state: protocol.FederatedState) -> Array:
    return state.params


def _of_number(compressor) -> Callable[[Setting], protocol.Compressor]:
    return lambda setting: compressor(setting.numbers[0])


def _with_feedback(setting: Setting) -> protocol.Compressor:
    return compressors.error_feedback(compressors.top_k(setting.numbers[0]))


_top_k = _of_number(compressors.top_k)
FAMILIES: dict[str, Callable[[Setting], Method]] = {
    "single client": _alone,
    "FIRM": _dense,
    "FIRM+": partial(_dense, server=coupling.augmented_lagrangian),
    "FedPGD": partial(_dense, server=coupling.exact_projection, clip_clients=False),
    "FedAvg": _average,
    "factor averaging": partial(_low_rank, join=tucker.average_factors),
    "low rank without coupling": _low_rank_alone,
    "FullDecomp": _compressed(
        channels.states, lambda setting: compressors.truncated_tucker(setting.ranks)
    ),
    "Top-k": _compressed(channels.states, _top_k),
    "CSR": _compressed(channels.states, _of_number(compressors.csr)),
    "Top-k increments": _compressed(channels.increments, _top_k),
    "Top-k increments with feedback": _compressed(channels.increments, _with_feedback),
    "quantized": _compressed(channels.increments, _of_number(compressors.quantize)),
    "growing ranks, known noise": partial(_growing, known=True),
    "growing ranks, estimated noise": partial(_growing, known=False),
    "low-rank descent": _descent,
    **{
        name: partial(_low_rank, joint_basis=joint, client_basis=client)
        for name, (joint, client) in BASES.items()
    },
}
"""What builds the methods of every name."""


def build(name: str, problem: Problem, draw: Draw) -> Method:
    """Build a method by its name.

    Args:
        name: Family, argument and "+ TV" with spaces between, e.g. "CompJF 35,10,14,16 + TV".
        problem: Gives the forward model, the coupling and the step size.
        draw: The noise it is for; may be traced.

    Returns:
        The method.

    Raises:
        KeyError: If there is no such family.
    """
    base, plus, _ = name.partition(" + TV")
    family, _, last = base.rpartition(" ")
    numbers = ()
    if last.replace(",", "").isdigit():
        numbers = tuple(int(number) for number in last.split(","))
    prox = partial(proximal.total_variation, weight=draw.tv_weight) if plus else None
    setting = Setting(problem, draw, numbers, prox)
    return FAMILIES[family if numbers else base](setting)
