"""What every federated algorithm promises. A new algorithm is one more line in `CASES`."""

import functools
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fedlr import federated, linked, multimodal
from fedlr.algorithms import (
    comp_jf,
    fdrmfl,
    fedavg,
    fedloru,
    fedlrt,
    fednova,
    firm,
    flora,
    local_only,
    low_rank_descent,
    mfedloru,
    moon,
    pfedloru,
    scaffold,
    vertical_multifac,
)
from fedlr.federated import (
    channels,
    clients,
    compressors,
    coupling,
    execution,
    local,
    protocol,
    ranks,
    rounds,
    servers,
)
from fedlr.federated.rounds import simulation

NUM_CLIENTS = 4
DATA_SHAPES = {"samples": 5, "features": (3, 2)}


class Case(NamedTuple):
    """An algorithm and what may be expected of it.

    build: `(chunk_size) -> algorithm`.
    params: `(dtype) -> params` given to `init`.
    sent: Bytes a client sends and receives in a round, float32.
    partial: Whether a cohort may leave clients out.
    symmetric: Whether permuted clients give the permuted result (no randomness per client).
    observe: `(state) -> pytree` of what is determined up to rounding (no signs of factors).
    smooth: Whether a run can be differentiated (effective ranks of a truncation cannot).
    """

    build: Callable[[int | None], protocol.FederatedAlgorithm]
    params: Callable[[Any], Any]
    sent: tuple[int, int]
    partial: bool = True
    symmetric: bool = True
    observe: Callable[[protocol.FederatedState], Any] = lambda state: state
    smooth: bool = True


def forward(image, inputs):
    return jnp.sum(inputs * image[None], axis=(1, 2))


def squared_error(weights, inputs, target):
    return (jnp.sum(weights * inputs) - target) ** 2 / 2


def zeros(dtype):
    return jnp.zeros(DATA_SHAPES["features"], dtype)


def zeros_for_everyone(dtype):
    return jnp.zeros((NUM_CLIENTS, *DATA_SHAPES["features"]), dtype)


def coupled(build, **options):
    """Build an algorithm of coupled images; no cohort may leave clients out."""
    coefficients = jnp.array([0.5, 0.3, 0.2])
    return lambda chunk: build(forward, coefficients, step_size=0.05, chunk_size=chunk, **options)


def both_ways(channel):
    return {"uplink": channel, "downlink": channel}


def sgd(**options):
    return local.local_sgd(squared_error, optax.sgd(0.1), **options)


def linked_start(dtype):
    """The same start for everyone, of rank two."""
    samples, (rows, columns) = DATA_SHAPES["samples"], DATA_SHAPES["features"]
    sizes = [samples, *[rows, columns] * NUM_CLIENTS]
    shared, *own = [jnp.cos(jnp.arange(2 * size, dtype=dtype).reshape(size, 2)) for size in sizes]
    return linked.LinkedCP(shared, tuple(zip(own[::2], own[1::2], strict=True)))


def converting(algorithm, convert):
    """Let an algorithm have its clients made of those that all have."""

    def init(params, clients, *, key):
        return algorithm.init(params, convert(clients), key=key)

    def round(state, clients, cohort, *, key):
        return algorithm.round(state, convert(clients), cohort, key=key)

    return protocol.FederatedAlgorithm(init, round)


def linked_clients(data):
    """Stack tensors, that of a client its inputs times its targets."""
    tensors = data.inputs * data.targets[:, :, None, None]
    observed = jnp.broadcast_to(data.mask[:, :, None, None], tensors.shape)
    sizes = np.tile(np.array(DATA_SHAPES["features"], np.int32), (NUM_CLIENTS, 1))
    return vertical_multifac.LinkedClients(tensors, jnp.asarray(sizes), observed)


def two_modalities(dtype=jnp.float32):
    """Make a network for the two columns of the inputs, of 19 numbers."""

    def make(key):
        encoders = tuple(eqx.nn.Linear(3, 2, key=key) for _ in range(2))
        head = eqx.nn.Linear(2, 1, key=key)
        return multimodal.Network(encoders, lambda means, *_: jnp.sum(means, axis=0), head, None)

    def fill(leaf):
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.cos(jnp.arange(leaf.size, dtype=dtype)).reshape(leaf.shape) if is_array else leaf

    return jax.tree.map(fill, eqx.filter_eval_shape(make, jax.random.key(0)))


def columns(data):
    return data._replace(
        inputs=multimodal.all_present([data.inputs[..., 0], data.inputs[..., 1]], batch_ndim=2)
    )


def affine(dtype):
    """Make a model with a matrix, of which a pair of factors of rank one has five numbers."""
    weight = jnp.cos(jnp.arange(6, dtype=dtype)).reshape(DATA_SHAPES["features"])
    return {"weight": weight, "bias": jnp.zeros((), dtype)}


def affine_error(params, inputs, target):
    return squared_error(params["weight"], inputs, target - params["bias"])


def factored(module, *sent, ranked=False, **options):
    """Make the case of a method of factors, by the numbers that it sends up and down."""

    def build(chunk):
        algorithm = module.build(
            affine_error, optax.sgd(0.1), rank=1, local_steps=2, chunk_size=chunk, **options
        )
        return converting(algorithm, of_rank_one) if ranked else algorithm

    up, down = sent
    model = fedlrt if module is fedlrt else fedloru
    return Case(build, affine, (4 * up, 4 * down), observe=model.merged_params)


def of_rank_one(data):
    return clients.RankedClients(data, jnp.ones(NUM_CLIENTS, jnp.int32))


CASES = {
    "fedavg": Case(lambda chunk: fedavg.build(sgd(num_steps=2), chunk_size=chunk), zeros, (24, 24)),
    "fedavg_adam_batches": Case(
        lambda chunk: fedavg.build(
            sgd(num_steps=2, batch_size=2),
            server=servers.from_optax(optax.adam(0.1)),
            chunk_size=chunk,
        ),
        zeros,
        (24, 24),
        symmetric=False,
    ),
    "fedavg_low_rank": Case(
        lambda chunk: fedavg.build(
            sgd(num_steps=2), compressor=compressors.truncated_tucker((1, 1)), chunk_size=chunk
        ),
        zeros,
        (4 * (1 + 3 + 2), 24),
        smooth=False,
    ),
    "fedavg_top_k": Case(
        lambda chunk: fedavg.build(
            sgd(num_steps=2),
            compressor=compressors.error_feedback(compressors.top_k(2)),
            chunk_size=chunk,
        ),
        zeros,
        (2 * (4 + 4), 24),
    ),
    "fedavg_quantized": Case(
        lambda chunk: fedavg.build(
            sgd(num_steps=2), compressor=compressors.quantize(8), chunk_size=chunk
        ),
        zeros,
        (6 + 2 * 4, 24),
        symmetric=False,
        smooth=False,
    ),
    "scaffold": Case(
        lambda chunk: scaffold.build(squared_error, 0.1, num_steps=2, chunk_size=chunk),
        zeros,
        (48, 48),
    ),
    "fednova": Case(
        lambda chunk: fednova.build(
            squared_error,
            local.Training(optax.sgd(0.1), 3, active_steps=lambda count: count - 1),
            chunk_size=chunk,
        ),
        zeros,
        (24 + 4, 24),
    ),
    "moon": Case(
        lambda chunk: moon.build(
            squared_error,
            lambda weights, inputs: jnp.sum(inputs * weights[None], axis=1),
            local.Training(optax.sgd(0.1), 2),
            chunk_size=chunk,
        ),
        lambda dtype: zeros(dtype) + 1,
        (24, 24),
    ),
    "fdrmfl": Case(
        lambda chunk: converting(
            fdrmfl.build(
                two_modalities(),
                local.Training(optax.sgd(0.1), 1),
                weights=fdrmfl.Weights(None, 0.1, 0.1),
                contrast=local.history_and_batch(1),
                chunk_size=chunk,
            ),
            columns,
        ),
        lambda dtype: eqx.filter(two_modalities(dtype), eqx.is_inexact_array),
        (4 * 19, 4 * 19),
    ),
    "fedloru": factored(fedloru, 6, 6, accumulate_every=1),
    # A client's own factors are drawn by its index.
    "pfedloru": factored(pfedloru, 6, 6, accumulate_every=1)._replace(symmetric=False),
    "mfedloru": factored(mfedloru, 6, 6, ranked=True, accumulate_every=None)._replace(
        symmetric=False
    ),
    "flora": factored(flora, 6, 1),
    "fedlrt": factored(fedlrt, 10, 12, threshold=0.0),
    "local_only": Case(
        lambda chunk: local_only.build(
            local.projected_gradient(forward, step_size=0.05), chunk_size=chunk
        ),
        zeros,
        (0, 0),
    ),
    "firm": Case(coupled(firm.build), zeros_for_everyone, (24, 24), False, False),
    "firm_plus": Case(
        coupled(firm.build, server=coupling.augmented_lagrangian),
        zeros_for_everyone,
        (24, 24),
        False,
        False,
    ),
    "firm_fed_pgd": Case(
        coupled(firm.build, server=coupling.exact_projection, clip_clients=False),
        zeros_for_everyone,
        (24, 24),
        False,
        False,
    ),
    "firm_full_decomp": Case(
        coupled(firm.build, **both_ways(channels.states(compressors.truncated_tucker((1, 1))))),
        zeros_for_everyone,
        (4 * (1 + 3 + 2), 4 * (1 + 3 + 2)),
        False,
        False,
        smooth=False,
    ),
    "firm_top_k": Case(
        coupled(
            firm.build,
            **both_ways(channels.increments(compressors.error_feedback(compressors.top_k(2)))),
        ),
        zeros_for_everyone,
        (2 * (4 + 4), 2 * (4 + 4)),
        False,
        False,
    ),
    "firm_quantized": Case(
        coupled(firm.build, **both_ways(channels.increments(compressors.quantize(8)))),
        zeros_for_everyone,
        (6 + 2 * 4, 6 + 2 * 4),
        False,
        False,
        smooth=False,
    ),
    "comp_jf": Case(
        coupled(comp_jf.build, ranks=(2, 2)),
        zeros_for_everyone,
        (4 * (4 + 6 + 4), 4 * (4 + 6 + 4)),
        False,
        False,
        comp_jf.images,
    ),
    "comp_rand_jf": Case(
        coupled(comp_jf.build, ranks=(2, 2), joint_basis=comp_jf.sketched()),
        zeros_for_everyone,
        (4 * (4 + 6 + 4), 4 * (4 + 6 + 4)),
        False,
        False,
        comp_jf.images,
        False,
    ),
    "comp_jf_adaptive": Case(
        # A residual that falls by less than 99 % is stuck: the ranks grow in the second round.
        coupled(
            comp_jf.build,
            ranks=(2, 2),
            client_ranks=ranks.grow(
                jnp.zeros(NUM_CLIENTS), start=1, step=1, every=1, tolerance=0.99
            ),
        ),
        zeros_for_everyone,
        (4 * (1 + 3 + 2), 4 * (1 + 3 + 2)),
        False,
        False,
        lambda state: (comp_jf.images(state), state.clients),
        False,
    ),
    "low_rank_descent": Case(
        # Four clients of rank one span all of 3 x 2 pixels.
        coupled(low_rank_descent.build, ranks=(1, 1)),
        zeros_for_everyone,
        (4 * (1 + 3 + 2), 24),
        False,
        False,
        low_rank_descent.images,
        False,
    ),
    "vertical_multifac": Case(
        # The first round: five samples, rank two, and the two tables in bits.
        lambda chunk: converting(
            vertical_multifac.build(penalty=1.0, chunk_size=chunk), linked_clients
        ),
        linked_start,
        (4 * (5 * 2 + 3) + 1 + 1, 4 * 5 * 2 + 1 + 3),
        False,
        False,
    ),
}


def make_clients(dtype=jnp.float32, garbage=0.0):
    """Ragged clients, whose masked entries hold `garbage`."""
    rng = np.random.default_rng(0)
    samples, features = DATA_SHAPES["samples"], DATA_SHAPES["features"]
    mask = np.arange(samples) < np.array([5, 2, 4, 3])[:, None]
    inputs = rng.normal(size=(NUM_CLIENTS, samples, *features))
    targets = rng.normal(size=(NUM_CLIENTS, samples))
    return protocol.ClientData(
        jnp.asarray(np.where(mask[:, :, None, None], inputs, garbage), dtype),
        jnp.asarray(np.where(mask, targets, garbage), dtype),
        jnp.asarray(mask),
    )


@functools.partial(jax.jit, static_argnames="algorithm")
def advance(algorithm, state, data, cohort, *, key):
    return algorithm.round(state, data, cohort, key=key)


@functools.partial(jax.jit, static_argnames=("algorithm", "cohort_size"))
def run(algorithm, params, data, *, key, cohort_size=None):
    """Start and do two rounds, with everyone if no size of the cohorts is given."""
    state = algorithm.init(params, data, key=jax.random.key(0))
    return federated.run(algorithm, state, data, num_rounds=2, cohort_size=cohort_size, key=key)


class Setting(NamedTuple):
    """A case with its algorithm built once, so that the tests share compiled functions."""

    case: Case
    algorithm: protocol.FederatedAlgorithm
    params: Any
    data: protocol.ClientData
    start: protocol.FederatedState


@pytest.fixture(scope="module", params=CASES)
def setting(request):
    case, data = CASES[request.param], make_clients()
    algorithm, params = case.build(1), case.params(jnp.float32)
    start = algorithm.init(params, data, key=jax.random.key(0))
    return Setting(case, algorithm, params, data, start)


def everyone():
    return jnp.arange(NUM_CLIENTS)


def kinds(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def assert_close(a, b):
    # Some ten sums of about ten numbers, each in another order.
    eps = jnp.finfo(jnp.float32).eps
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=100 * eps, atol=100 * eps), a, b
    )


def assert_same_run(case, a, b):
    """Compare what two runs `(state, infos)` determine."""
    assert_close((case.observe(a[0]), a[1]), (case.observe(b[0]), b[1]))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_signatures_have_the_agreed_names(setting):
    expected = {
        "init": (["params", "clients"], ["key"]),
        "round": (["state", "clients", "cohort"], ["key"]),
    }
    for name, (positional, keywords) in expected.items():
        parameters = inspect.signature(getattr(setting.algorithm, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == keywords
        assert all(p.default is p.empty for p in parameters)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_round_preserves_structure_shapes_and_dtypes_of_the_state(setting, dtype):
    data, params = make_clients(dtype), setting.case.params(dtype)
    key = jax.random.key(0)
    start = jax.eval_shape(setting.algorithm.init, params, data, key=key)
    state, info = jax.eval_shape(setting.algorithm.round, start, data, everyone(), key=key)
    assert kinds(state) == kinds(start)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.params)}
    # Whole numbers only count rounds.
    assert dtypes - {jnp.dtype(jnp.int32)} == {jnp.dtype(dtype)}
    assert info.losses.shape == info.weights.shape == (NUM_CLIENTS,)
    assert info.losses.dtype == dtype


def test_three_rounds_cause_one_trace(setting):
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(setting.algorithm.round, n=1))
    state = setting.start
    for i in range(3):
        state, _ = step(state, setting.data, everyone(), key=jax.random.key(i))
    assert state.round == 3


def test_bytes_are_those_of_the_arrays_sent(setting):
    _, info = advance(
        setting.algorithm, setting.start, setting.data, everyone(), key=jax.random.key(0)
    )
    up, down = setting.case.sent
    np.testing.assert_array_equal(info.uplink_bytes, np.full(NUM_CLIENTS, up))
    np.testing.assert_array_equal(info.downlink_bytes, np.full(NUM_CLIENTS, down))
    assert info.uplink_bytes.dtype == info.downlink_bytes.dtype == jnp.int32


def test_rounds_can_be_scanned_and_are_reproducible(setting):
    state, infos = run(setting.algorithm, setting.params, setting.data, key=jax.random.key(3))
    again, _ = run(setting.algorithm, setting.params, setting.data, key=jax.random.key(3))
    assert_equal(again, state)
    assert state.round == 2
    assert infos.losses.shape == (2, NUM_CLIENTS)
    assert (infos.losses[1] < infos.losses[0]).any()


def test_seeds_can_be_vmapped(setting):
    keys = jax.random.split(jax.random.key(5), 2)
    mapped = jax.jit(
        jax.vmap(
            lambda key: run.__wrapped__(setting.algorithm, setting.params, setting.data, key=key)
        )
    )(keys)
    for i in range(2):
        alone = run(setting.algorithm, setting.params, setting.data, key=keys[i])
        assert_same_run(setting.case, jax.tree.map(lambda leaf: leaf[i], mapped), alone)  # noqa: B023


def test_masked_entries_change_nothing(setting):
    key = jax.random.key(0)
    clean = run(setting.algorithm, setting.params, setting.data, key=key)
    spoilt = run(setting.algorithm, setting.params, make_clients(garbage=1e30), key=key)
    assert_equal(spoilt, clean)


def test_order_of_the_cohort_does_not_matter(setting):
    key, order = jax.random.key(0), jnp.array([2, 0, 3, 1])
    state, info = advance(setting.algorithm, setting.start, setting.data, everyone(), key=key)
    other, other_info = advance(setting.algorithm, setting.start, setting.data, order, key=key)
    reordered = jax.tree.map(lambda leaf: leaf[order], info)
    assert_same_run(setting.case, (other, other_info), (state, reordered))


@pytest.mark.parametrize(
    "setting", [name for name, case in CASES.items() if case.smooth], indirect=True
)
def test_gradient_of_everything_a_run_records_is_finite(setting):
    """From zero images too, where norms in the record have no derivative."""

    def total(params, targets):
        data = setting.data._replace(targets=targets)
        result = run.__wrapped__(setting.algorithm, params, data, key=jax.random.key(0))
        leaves = [jnp.sum(leaf) for leaf in jax.tree.leaves(result) if leaf.dtype == jnp.float32]
        return sum(leaves)

    derivative = jax.jit(jax.grad(total, argnums=(0, 1)))
    at_start, gradient = derivative(setting.params, setting.data.targets)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(at_start))
    assert jnp.isfinite(gradient).all()
    assert (gradient[setting.data.mask] != 0).all()
    np.testing.assert_array_equal(gradient[~setting.data.mask], 0)


@pytest.mark.parametrize(
    "setting", [name for name, case in CASES.items() if case.symmetric], indirect=True
)
def test_permuted_clients_give_the_permuted_result(setting):
    key, order = jax.random.key(0), jnp.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda leaf: leaf[order], setting.data)
    state, infos = run(setting.algorithm, setting.params, setting.data, key=key)
    other, other_infos = run(setting.algorithm, setting.params, permuted, key=key)
    assert_close(other_infos.losses, infos.losses[:, order])
    # Params of every client, or of one model.
    if all(leaf.shape[:1] == (NUM_CLIENTS,) for leaf in jax.tree.leaves(state.params)):
        state = state._replace(params=jax.tree.map(lambda leaf: leaf[order], state.params))
        assert_close(other.params, state.params)
    else:
        one = state._replace(clients=())
        assert_close(setting.case.observe(other._replace(clients=())), setting.case.observe(one))


def test_chunks_of_clients_give_the_numbers_of_single_clients(setting):
    key = jax.random.key(0)
    expected = run(setting.algorithm, setting.params, setting.data, key=key)
    # Three is no divisor of four: the second chunk is padded.
    found = run(setting.case.build(3), setting.params, setting.data, key=key)
    assert_same_run(setting.case, found, expected)
    with pytest.raises(ValueError, match="got chunk_size 0"):
        setting.case.build(0).round(setting.start, setting.data, everyone(), key=key)


def test_cohorts_out_of_range_are_refused(setting):
    wrong = np.array([0, 1, 2, NUM_CLIENTS])
    with pytest.raises(ValueError, match=rf"got cohort with index {NUM_CLIENTS}, expected client"):
        setting.algorithm.round(setting.start, setting.data, wrong, key=jax.random.key(0))


def test_cohorts_that_leave_clients_out_are_done_or_refused(setting):
    def attempt():
        return advance(
            setting.algorithm, setting.start, setting.data, jnp.array([3, 1]), key=jax.random.key(0)
        )

    if setting.case.partial:
        assert attempt()[1].losses.shape == (2,)
    else:
        with pytest.raises(ValueError, match=f"expected all {NUM_CLIENTS} clients"):
            attempt()


def compare_sharded_with_unsharded():
    """Run every case on four devices and on one; called in a process that has four."""
    mesh = jax.make_mesh((NUM_CLIENTS,), ("clients",), axis_types=(AxisType.Auto,))
    data, key = make_clients(), jax.random.key(0)
    sharded = clients.shard_clients(data, mesh)
    assert len(sharded.targets.sharding.device_set) == NUM_CLIENTS
    for name, case in CASES.items():
        params = case.params(jnp.float32)
        expected = run(case.build(1), params, data, key=key)
        # One after the other is slow on sharded clients, and the same program but for that.
        for chunk_size in (1, NUM_CLIENTS) if name in ("fedavg", "firm") else (NUM_CLIENTS,):
            found = run(case.build(chunk_size), params, sharded, key=key)
            assert_same_run(case, found, expected)
        print(f"{name} is the same")
    check_cohorts_in_a_mesh(mesh, data, sharded)
    check_runs_in_a_mesh(mesh, data)
    check_traffic_between_devices(sharded)


def check_cohorts_in_a_mesh(mesh, data, sharded):
    """Within a mesh sampled cohorts are spread as well, and every device does its part alone."""
    key = jax.random.key(0)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, -leaf]), data._replace(mask=()))
    twice = twice._replace(mask=jnp.concatenate([data.mask, data.mask]))
    # Fewer than the devices; more, in chunks that are no multiple of them.
    for name, placed, cohort_size, chunk_size in (
        ("scaffold", sharded, 3, None),
        ("fedavg_top_k", twice, 5, 3),
    ):
        case, options = CASES[name], {"cohort_size": cohort_size, "key": key}
        expected = run(case.build(1), zeros(jnp.float32), placed, **options)
        with jax.set_mesh(mesh):
            found = run(case.build(chunk_size), zeros(jnp.float32), placed, **options)
        assert_same_run(case, found, expected)

    def operations(chunk_size, cohort_size):
        algorithm = CASES["fedavg"].build(chunk_size)
        lowered = run.lower(algorithm, zeros(jnp.float32), data, cohort_size=cohort_size, key=key)
        return lowered.compile().cost_analysis()["flops"]

    alone = operations(1, NUM_CLIENTS)
    assert alone < 0.6 * operations(NUM_CLIENTS, NUM_CLIENTS)
    with jax.set_mesh(mesh):
        assert execution.default_chunk_size() == NUM_CLIENTS
        for chunk_size, cohort_size in ((None, NUM_CLIENTS), (None, 3), (3, NUM_CLIENTS)):
            assert operations(chunk_size, cohort_size) < 1.1 * alone


def check_runs_in_a_mesh(mesh, data):
    """A run in a mesh compiles once, goes on bit by bit, and elsewhere with a warning."""
    case = CASES["scaffold"]
    algorithm = case.build(None)
    start = algorithm.init(case.params(jnp.float32), data, key=jax.random.key(0))

    def simulate(folder, num_rounds, **options):
        output = rounds.Output(folder, checkpoint_every=2)
        return federated.simulate(
            algorithm,
            start,
            data,
            num_rounds=num_rounds,
            cohort_size=3,
            key=jax.random.key(1),
            segment_rounds=2,
            progress=False,
            output=output,
            **options,
        )

    with tempfile.TemporaryDirectory() as folder:
        with jax.set_mesh(mesh):
            before = simulation._segment._cache_size()
            whole = simulate(f"{folder}/whole", 6)
            assert simulation._segment._cache_size() == before + 1
            simulate(f"{folder}/pieces", 4)
            assert_equal(simulate(f"{folder}/pieces", 6), whole)
            assert_equal(simulate(f"{folder}/donated", 6, donate=True), whole)
            simulate(f"{folder}/moved", 4)
        with pytest.warns(UserWarning, match="was written by .* may differ from that of an"):
            assert_same_run(case, simulate(f"{folder}/moved", 6), whole)


def check_traffic_between_devices(sharded):
    """With the whole cohort in one chunk, only the weighted update travels: one all-reduce."""
    algorithm = CASES["fedavg"].build(NUM_CLIENTS)
    key = jax.random.key(0)
    state = algorithm.init(zeros(jnp.float32), sharded, key=key)
    step = jax.jit(
        lambda state, data, key: algorithm.round(state, data, np.arange(NUM_CLIENTS), key=key)
    )
    program = step.lower(state, sharded, key).compile().as_text()
    assert len(re.findall(r"all-reduce(?:-start)?\(", program)) == 1
    assert not re.findall(r"(all-gather|all-to-all|collective-permute)(?:-start)?\(", program)


@pytest.mark.slow
def test_clients_spread_over_four_devices_give_the_same_numbers():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    code = "from tests import test_algorithm_contracts as t; t.compare_sharded_with_unsharded()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} is the same" for name in CASES]
