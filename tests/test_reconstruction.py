"""The reconstruction methods beside each other, on data that no projector of the library made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import federated, synthetic, tomography
from fedlr.algorithms import comp_jf, fedavg, firm, local_only
from fedlr.federated import coupling, local, protocol, ranks, stopping

SIZE, VIEWS, RANK, ROUNDS = 32, 16, 8, 40
SIGMA = 0.1
GEOMETRY = tomography.ParallelBeam(shape=(SIZE, SIZE), num_bins=46)


def make_scans(geometry, views, sigma=SIGMA):
    """Noisy scans of the four coupled images, and the same as data of a federation."""
    angles = synthetic.uniform_angles(views)
    scans = synthetic.multimodal_scans(geometry, angles, sigma=sigma, key=jax.random.key(0))
    mask = jnp.ones(scans.angles.shape, bool)
    return scans, protocol.ClientData(scans.angles, scans.sinograms, mask)


def make_follow(geometry, scans, clients, rank):
    """Return a function that runs a method by name: PSNR of every round, and the records."""
    forward = functools.partial(tomography.project, geometry)
    start = jnp.zeros_like(scans.images)
    step_size = 1 / local.operator_norm(forward, clients, start[0], key=jax.random.key(1))
    gradient = local.projected_gradient(forward, step_size=step_size)
    dense = functools.partial(firm.build, forward, scans.coefficients, step_size=step_size)
    low_rank = functools.partial(
        comp_jf.build, forward, scans.coefficients, ranks=(rank, rank), step_size=step_size
    )
    accurate = comp_jf.sketched(oversampling=10, power_iters=1)

    def own(state):
        return state.params

    def repeated(state):
        return jnp.broadcast_to(state.params, start.shape)

    methods = {
        "FedAvg": (fedavg.build(gradient), start[0], repeated),
        "single client": (local_only.build(gradient), start[0], own),
        "FIRM": (dense(), start, own),
        "FIRM+": (dense(server=coupling.augmented_lagrangian), start, own),
        "FedPGD": (dense(server=coupling.exact_projection, clip_clients=False), start, own),
        "CompJF": (low_rank(), start, comp_jf.images),
        "CompRandJF, accurate": (low_rank(joint_basis=accurate), start, comp_jf.images),
        "CompJF, warm": (
            low_rank(joint_basis=comp_jf.warm_started(), client_basis=comp_jf.warm_started()),
            start,
            comp_jf.images,
        ),
    }
    peak = scans.images.max(axis=(1, 2))

    def psnr(images):
        error = jnp.mean((images - scans.images) ** 2, axis=(1, 2))
        return jnp.mean(10 * jnp.log10(peak**2 / error))

    @functools.cache
    def run(name):
        algorithm, begin, images = methods[name]
        algorithm = federated.with_evaluation(algorithm, lambda state: psnr(images(state)))

        @jax.jit
        def trajectory(clients):
            state = algorithm.init(begin, clients, key=jax.random.key(2))
            return federated.run(
                algorithm, state, clients, num_rounds=ROUNDS, key=jax.random.key(3)
            )[1]

        infos = trajectory(clients)
        return np.asarray(infos.evaluation), infos

    return run


@pytest.fixture(scope="module")
def problem():
    """Scans and clients of the small setting."""
    return make_scans(GEOMETRY, VIEWS)


@pytest.fixture(scope="module")
def follow(problem):
    """Runner of the methods in the small setting."""
    return make_follow(GEOMETRY, *problem, RANK)


def assert_order(follow, low_rank_margin):
    best = {name: follow(name)[0].max() for name in ("CompJF", "FIRM", "single client", "FedAvg")}
    assert best["CompJF"] > best["FIRM"] + low_rank_margin
    assert best["FIRM"] > best["single client"] + 0.1
    assert best["FIRM"] > best["FedAvg"] + 2.0


def test_low_rank_beats_firm_beats_lone_clients_beat_fedavg(follow):
    assert_order(follow, 0.1)


@pytest.mark.slow
def test_low_rank_gains_more_at_a_real_size():
    geometry = tomography.ParallelBeam(shape=(100, 100), num_bins=142)
    assert_order(make_follow(geometry, *make_scans(geometry, 40), 20), 0.4)


@pytest.mark.parametrize("name", ["FIRM+", "FedPGD"])
def test_servers_are_as_good_as_firm(follow, name):
    assert follow(name)[0].max() == pytest.approx(follow("FIRM")[0].max(), abs=0.05)


@pytest.mark.parametrize("name", ["CompRandJF, accurate", "CompJF, warm"])
def test_cheap_bases_are_as_good_as_exact_ones(follow, name):
    assert follow(name)[0].max() == pytest.approx(follow("CompJF")[0].max(), abs=0.1)


def test_multiplier_enforces_the_coupling_better_than_the_penalty(follow):
    violation = {
        name: float(follow(name)[1].metrics.violation[-1, 0]) for name in ("FIRM", "FIRM+")
    }
    assert violation["FIRM+"] < 0.5 * violation["FIRM"]


def test_discrepancy_stops_near_the_best_round_and_the_paper_rule_too_early(follow, problem):
    scans, clients = problem
    curve, infos = follow("FIRM")
    counts = stopping.num_measurements(clients)
    rules = {
        "pooled": stopping.discrepancy(scans.noise_levels, counts),
        "single": stopping.every_client(stopping.noise_thresholds(scans.noise_levels, counts)),
        "paper": stopping.every_client(stopping.noisy_maximum_thresholds(clients, SIGMA)),
    }
    stops = {}
    for name, rule in rules.items():
        fired = np.asarray(jax.vmap(rule)(infos._replace(evaluation=())))
        assert fired.any()
        stops[name] = int(fired.argmax())
    assert curve.max() - curve[stops["single"]] < 0.3
    assert stops["paper"] < stops["pooled"]
    assert stops["paper"] < stops["single"]
    assert curve[stops["paper"]] < curve[stops["single"]]


@pytest.mark.parametrize("name", ["single client", "FIRM", "FIRM+", "CompJF"])
def test_corrected_rule_returns_a_state_near_the_best(follow, problem, name):
    scans, clients = problem
    curve, infos = follow(name)
    rule = stopping.corrected(scans.noise_levels, stopping.num_measurements(clients))

    @jax.jit
    def verdicts(infos):
        def step(memory, info):
            verdict, memory = rule.update(info, memory)
            return memory, verdict

        return jax.lax.scan(step, rule.init(), infos)[1]

    stop, best = map(np.asarray, verdicts(infos._replace(evaluation=())))
    assert stop.any()
    (kept,) = np.nonzero(best[: stop.argmax() + 1])
    assert curve.max() - curve[kept[-1]] < 0.3


@functools.partial(jax.jit, static_argnames="adaptive")
def low_rank_curve(scans, clients, rank, *, adaptive):
    """PSNR of every round of CompJF with a traced rank, fixed or grown from 4 by steps of 2."""
    forward = functools.partial(tomography.project, GEOMETRY)
    fixed = ranks.RankRule(
        lambda *_: (jnp.full((4, 2), rank, jnp.int32), ()),
        lambda ranks, _, memory: (ranks, memory),
    )
    grown = ranks.grow(scans.noise_levels, start=4, step=2, every=5)
    algorithm = comp_jf.build(
        forward, scans.coefficients, ranks=(12, 12), client_ranks=grown if adaptive else fixed
    )
    peak = scans.images.max(axis=(1, 2))

    def psnr(state):
        error = jnp.mean((comp_jf.images(state) - scans.images) ** 2, axis=(1, 2))
        return jnp.mean(10 * jnp.log10(peak**2 / error))

    algorithm = federated.with_evaluation(algorithm, psnr)
    state = algorithm.init(jnp.zeros_like(scans.images), clients, key=jax.random.key(2))
    infos = federated.run(algorithm, state, clients, num_rounds=100, key=jax.random.key(3))[1]
    return infos.evaluation, infos.metrics.ranks


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_ranks_that_grow_are_as_good_as_the_best_fixed_rank(sigma):
    scans, clients = make_scans(GEOMETRY, VIEWS, sigma)
    best = {
        rank: float(low_rank_curve(scans, clients, rank, adaptive=False)[0].max())
        for rank in (4, 6, 8, 10, 12)
    }
    curve, found = low_rank_curve(scans, clients, 4, adaptive=True)
    assert float(curve.max()) > max(best.values()) - 0.2
    assert (jnp.diff(found, axis=0) >= 0).all()
    assert found[0].max() == 4
    assert found[-1].max() > 4


def test_noise_level_from_the_detector_edge_is_close_to_the_truth(problem):
    scans, clients = problem
    estimated = stopping.edge_noise_levels(clients, num_bins=5)
    # The standard error of a MAD estimate is about 1.17 / sqrt(count) of the level.
    count = 2 * 5 * VIEWS
    np.testing.assert_allclose(estimated, scans.noise_levels, rtol=4 * 1.17 / np.sqrt(count))


def test_low_rank_messages_are_smaller_below_the_threshold(follow):
    sent = {name: int(follow(name)[1].uplink_bytes[0, 0]) for name in ("FIRM", "CompJF")}
    assert sent["FIRM"] == 4 * SIZE**2
    assert sent["CompJF"] == 4 * (RANK**2 + 2 * SIZE * RANK)
    assert SIZE * (np.sqrt(2) - 1) > RANK
    assert sent["CompJF"] < sent["FIRM"]
