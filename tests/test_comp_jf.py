import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from fedlr import federated, operators, subspace, tucker
from fedlr.algorithms import comp_jf
from fedlr.federated import coupling, protocol
from fedlr.federated import ranks as ranks_
from tests.reference import reconstruction as reference

COEFFICIENTS = np.array([0.5, 0.3])
STEP = 0.02
SHAPE = (6, 7)


def forward(image, matrix):
    """A dense operator per client: the data's inputs are its matrix."""
    return matrix @ image.ravel()


def make_clients(shape, dtype=jnp.float64, seed=3):
    """Three clients with 12 measurements each."""
    rng = np.random.default_rng(seed)
    matrices = rng.normal(size=(3, 12, int(np.prod(shape))))
    data = rng.normal(size=(3, 12)) + 1.0
    return protocol.ClientData(
        jnp.asarray(matrices, dtype), jnp.asarray(data, dtype), jnp.ones((3, 12), bool)
    )


@pytest.fixture(scope="module")
def clients():
    """Data of three clients with 6 x 7 images."""
    return make_clients(SHAPE)


def run(clients, shape=SHAPE, num_rounds=4, keys=(1,), **options):
    """State and records of a run, or a list of them for several keys."""
    dtype = clients.targets.dtype
    algorithm = comp_jf.build(
        forward, jnp.asarray(COEFFICIENTS, dtype), **{"step_size": STEP} | options
    )

    @jax.jit
    def simulate(clients, key):
        state = algorithm.init(jnp.zeros((3, *shape), dtype), clients, key=jax.random.key(0))
        return federated.run(algorithm, state, clients, num_rounds=num_rounds, key=key)

    runs = [simulate(clients, jax.random.key(key)) for key in keys]
    return runs[0] if len(keys) == 1 else runs


@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 1, 2)])
def test_rounds_equal_the_naive_rounds(clients, ranks):
    client_ranks = jnp.asarray([(rank, rank) for rank in ranks])
    state, infos = run(clients, ranks=(3, 3), client_ranks=client_ranks)
    images = np.zeros((3, *SHAPE))
    matrices, data = np.asarray(clients.inputs), np.asarray(clients.targets)
    for t in range(4):
        images, norms = reference.comp_jf_round(
            matrices, images, data, COEFFICIENTS, STEP, 1.0, ranks, 3
        )
        np.testing.assert_allclose(infos.metrics.residual_norm[t], norms, rtol=1e-9)
    np.testing.assert_allclose(comp_jf.images(state), images, rtol=1e-8, atol=1e-9)


def test_lossless_joint_subspace_couples_the_truncated_images_exactly(clients):
    joint = 6
    client_ranks = jnp.full((3, 2), 2)
    state, _ = run(clients, ranks=(joint, joint), client_ranks=client_ranks, num_rounds=1)
    matrices, data = np.asarray(clients.inputs), np.asarray(clients.targets)
    truncated = []
    for a, b in zip(matrices, data, strict=True):
        stepped, _ = reference.clipped_step(a, np.zeros(SHAPE), b, STEP)
        truncated.append(reference.truncate(stepped, 2))
    expected = coupling.couple(jnp.asarray(COEFFICIENTS), jnp.asarray(np.stack(truncated)))
    np.testing.assert_allclose(comp_jf.images(state), expected, rtol=1e-9, atol=1e-10)


def test_padding_the_joint_ranks_changes_nothing_if_the_subspace_already_fits(clients):
    client_ranks = jnp.full((3, 2), 2)
    exact, _ = run(clients, ranks=(6, 6), client_ranks=client_ranks)
    wider, _ = run(clients, ranks=(6, 7), client_ranks=client_ranks)
    np.testing.assert_allclose(comp_jf.images(wider), comp_jf.images(exact), rtol=1e-8, atol=1e-9)


def test_multiplier_moves_with_the_joint_factors(clients):
    """With a complete basis the compressed FIRM+ is FIRM+ without a clip after the coupling."""
    state, _ = run(clients, ranks=(6, 7), server=coupling.augmented_lagrangian, num_rounds=3)
    matrices, data = np.asarray(clients.inputs), np.asarray(clients.targets)
    images, multiplier = np.zeros((3, *SHAPE)), np.zeros(SHAPE)
    signed = reference.signed_coefficients(COEFFICIENTS)
    for _ in range(3):
        stepped = np.stack(
            [
                reference.clipped_step(a, w, b, STEP)[0]
                for a, w, b in zip(matrices, images, data, strict=True)
            ]
        )
        residual = np.tensordot(signed, stepped, axes=1)
        pull = (multiplier + residual) / (1 + np.sum(signed**2))
        images = stepped - signed[:, None, None] * pull
        multiplier = multiplier + np.tensordot(signed, images, axes=1)
    np.testing.assert_allclose(comp_jf.images(state), images, rtol=1e-8, atol=1e-9)


def test_cheap_bases_agree_with_exact_ones_where_the_rank_is_complete(clients):
    exact, _ = run(clients, ranks=(6, 7), num_rounds=3)
    for basis in (comp_jf.sketched(), comp_jf.warm_started(), comp_jf.exact(subspace.lq())):
        other, _ = run(clients, ranks=(6, 7), joint_basis=basis, client_basis=basis, num_rounds=3)
        np.testing.assert_allclose(
            comp_jf.images(other), comp_jf.images(exact), rtol=1e-8, atol=1e-9
        )
        for factor in other.params.factors:
            np.testing.assert_allclose(factor.T @ factor, np.eye(len(factor)), atol=1e-12)


def test_sketch_follows_the_key_of_the_run_and_differs_between_rounds(clients):
    runs = run(clients, ranks=(2, 2), joint_basis=comp_jf.sketched(), keys=(1, 1, 2))
    first, again, other = (np.asarray(comp_jf.images(state)) for state, _ in runs)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-6 * np.abs(first).max()


def test_bytes_are_those_of_the_arrays_sent(clients):
    ranks = np.array([(3, 3), (1, 2), (2, 1)])
    _, infos = run(clients, ranks=(3, 4), client_ranks=jnp.asarray(ranks), num_rounds=1)
    sent = [8 * (np.prod(r) + 6 * r[0] + 7 * r[1]) for r in ranks]
    np.testing.assert_array_equal(infos.uplink_bytes[0], sent)
    np.testing.assert_array_equal(infos.downlink_bytes[0], [8 * (12 + 6 * 3 + 7 * 4)] * 3)


def test_permuting_clients_with_their_coefficients_permutes_the_images(clients):
    turned = jnp.array([1, 0, 2])
    state, _ = run(clients, ranks=(3, 3))
    algorithm = comp_jf.build(
        forward, jnp.asarray(COEFFICIENTS[::-1].copy()), ranks=(3, 3), step_size=STEP
    )
    swapped = jax.tree.map(lambda leaf: leaf[turned], clients)

    @jax.jit
    def simulate(clients):
        start = algorithm.init(jnp.zeros((3, *SHAPE)), clients, key=jax.random.key(0))
        return federated.run(algorithm, start, clients, num_rounds=4, key=jax.random.key(1))

    other, _ = simulate(swapped)
    np.testing.assert_allclose(
        comp_jf.images(other)[turned], comp_jf.images(state), rtol=1e-8, atol=1e-9
    )


def test_three_modes_with_float32(clients):
    del clients
    shape = (3, 4, 5)
    state, infos = run(make_clients(shape, jnp.float32), shape=shape, ranks=(2, 3, 2), num_rounds=2)
    assert comp_jf.images(state).shape == (3, *shape)
    assert comp_jf.images(state).dtype == jnp.float32
    assert bool(jnp.isfinite(comp_jf.images(state)).all())
    np.testing.assert_array_equal(infos.uplink_bytes[0], [4 * (12 + 6 + 12 + 10)] * 3)


def test_a_start_in_the_joint_subspace_is_kept(clients):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(6, 2)), rng.normal(size=(7, 2))
    start = jnp.asarray(np.einsum("ir,crs,js->cij", left, rng.normal(size=(3, 2, 2)), right))
    algorithm = comp_jf.build(forward, jnp.asarray(COEFFICIENTS), ranks=(2, 2), step_size=STEP)
    state = jax.jit(algorithm.init)(start, clients, key=jax.random.key(0))
    np.testing.assert_allclose(comp_jf.images(state), start, rtol=1e-10, atol=1e-11)


def test_derivative_of_a_run_agrees_with_finite_differences(clients):
    algorithm = comp_jf.build(forward, jnp.asarray(COEFFICIENTS), ranks=(3, 3), step_size=STEP)

    @jax.jit
    def last_loss(targets):
        data = clients._replace(targets=targets)
        state = algorithm.init(jnp.zeros((3, *SHAPE)), data, key=jax.random.key(0))
        _, infos = federated.run(algorithm, state, data, num_rounds=3, key=jax.random.key(1))
        return infos.losses[-1].sum()

    test_util.check_grads(last_loss, (clients.targets,), order=1, modes=["rev"])


# Ranks wanted by each client in each round, below and above what is allowed: 1 to 4.
WANTED = np.array([(1, 2, 1), (3, 2, 1), (3, 9, 2), (1, 2, 0), (1, 1, 1), (4, 2, 3)])
LARGEST = 4


def scheduled(wanted):
    """A rule whose memory is the list of the ranks to come, for both modes alike."""

    def init(clients, max_ranks):
        plan = jnp.asarray(np.repeat(wanted.T[:, :, None], 2, axis=2), jnp.int32)
        return plan[:, 0], plan

    def update(ranks, residual_norm, plan):
        return plan[0], jnp.roll(plan, -1, axis=0)

    return ranks_.RankRule(init, update)


@pytest.fixture(scope="module")
def scheduled_run(clients):
    return run(
        clients, ranks=(LARGEST, LARGEST), client_ranks=scheduled(WANTED), num_rounds=len(WANTED)
    )


def test_rounds_under_a_rule_equal_naive_rounds_at_the_ranks_of_each_round(clients, scheduled_run):
    """Rising and falling ranks, with the joint rank of each round the largest of its clients."""
    state, infos = scheduled_run
    images = np.zeros((3, *SHAPE))
    matrices, data = np.asarray(clients.inputs), np.asarray(clients.targets)
    for t, ranks in enumerate(np.clip(WANTED, 1, LARGEST)):
        before = images
        images, norms = reference.comp_jf_round(
            matrices, images, data, COEFFICIENTS, STEP, 1.0, ranks, max(ranks)
        )
        np.testing.assert_allclose(infos.metrics.residual_norm[t], norms, rtol=1e-8)
        moved = np.linalg.norm(images - before, axis=(1, 2)) / np.linalg.norm(images, axis=(1, 2))
        np.testing.assert_allclose(infos.metrics.change[t], moved, rtol=1e-7)
    np.testing.assert_allclose(comp_jf.images(state), images, rtol=1e-7, atol=1e-8)


def test_bytes_follow_the_recorded_ranks_up_and_down(scheduled_run):
    _, infos = scheduled_run
    ranks = np.clip(WANTED, 1, LARGEST)
    np.testing.assert_array_equal(infos.metrics.ranks, np.repeat(ranks[:, :, None], 2, axis=2))
    assert infos.metrics.ranks.dtype == jnp.int32
    np.testing.assert_array_equal(infos.uplink_bytes, 8 * (ranks**2 + 13 * ranks))
    largest = ranks.max(axis=1)
    np.testing.assert_array_equal(
        infos.downlink_bytes, np.repeat(8 * (largest**2 + 13 * largest)[:, None], 3, axis=1)
    )


def test_a_rule_that_changes_nothing_gives_the_run_of_fixed_ranks(clients):
    given = jnp.array([(3, 2), (1, 3), (2, 2)], jnp.int32)
    rule = ranks_.RankRule(lambda *_: (given, ()), lambda ranks, _, memory: (ranks, memory))
    ruled, infos = run(clients, ranks=(5, 6), client_ranks=rule, num_rounds=3)
    fixed, expected = run(clients, ranks=(3, 3), client_ranks=given, num_rounds=3)
    np.testing.assert_allclose(comp_jf.images(ruled), comp_jf.images(fixed), rtol=1e-8, atol=1e-9)
    for name in ("residual_norm", "violation", "change", "truncation", "joining"):
        np.testing.assert_allclose(
            getattr(infos.metrics, name),
            getattr(expected.metrics, name),
            rtol=1e-7,
            atol=1e-12,
            err_msg=name,
        )
    np.testing.assert_array_equal(infos.uplink_bytes, expected.uplink_bytes)
    np.testing.assert_array_equal(infos.downlink_bytes, expected.downlink_bytes)


@pytest.mark.parametrize("basis", [comp_jf.sketched(), comp_jf.warm_started()])
def test_cheap_bases_work_with_a_rule(clients, basis):
    """The joint factors have as many columns as the largest rank of the last round, 4."""
    wanted = np.array([(2, 3, 1), (3, 1, 2), (2, 2, 2), (4, 3, 3)])
    state, infos = run(clients, ranks=(6, 7), client_ranks=scheduled(wanted), joint_basis=basis)
    np.testing.assert_array_equal(
        infos.metrics.ranks, np.broadcast_to(wanted[:, :, None], (4, 3, 2))
    )
    for factor in state.params.factors:
        kept = np.diag(np.arange(factor.shape[1]) < 4)
        np.testing.assert_allclose(factor.T @ factor, kept, atol=1e-12)
    losses = infos.losses.sum(axis=1)
    assert jnp.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_record_measures_what_truncation_and_joining_lose(clients):
    """One round from images of full rank, with averaged factors, whose messages are looked at."""
    messages = []

    def join(stacked, ranks, *, basis):
        jax.debug.callback(messages.append, stacked)
        return tucker.average_factors(stacked, ranks, basis=basis)

    start = np.random.default_rng(0).normal(size=(3, *SHAPE))
    ranks = jnp.array([(3, 3), (2, 2), (1, 1)], jnp.int32)
    algorithm = comp_jf.build(
        forward,
        jnp.asarray(COEFFICIENTS),
        ranks=(3, 3),
        client_ranks=ranks,
        join=join,
        step_size=STEP,
    )
    key = jax.random.key(0)
    state = jax.jit(algorithm.init)(jnp.asarray(start), clients, key=key)
    before = np.asarray(comp_jf.images(state))
    after, info = jax.jit(algorithm.round)(state, clients, jnp.arange(3), key=key)
    jax.effects_barrier()
    images, found = np.asarray(comp_jf.images(after)), info.metrics
    (stacked,) = messages
    dense = jax.vmap(tucker.to_dense)(stacked)
    left, right = (np.linalg.qr(np.asarray(factors).mean(axis=0))[0] for factors in stacked.factors)
    projected = []
    for i in range(3):
        stepped, _ = reference.clipped_step(
            np.asarray(clients.inputs[i]), before[i], np.asarray(clients.targets[i]), STEP
        )
        sent = reference.truncate(stepped, int(ranks[i, 0]))
        np.testing.assert_allclose(dense[i], sent, atol=1e-9)
        projected.append(left @ left.T @ sent @ right @ right.T)
        lost = np.linalg.norm(stepped - sent) / np.linalg.norm(stepped)
        np.testing.assert_allclose(found.truncation[i], lost, rtol=1e-7)
        missed = np.linalg.norm(sent - projected[i]) / np.linalg.norm(sent)
        np.testing.assert_allclose(found.joining[i], missed, rtol=1e-7)
        moved = np.linalg.norm(images[i] - before[i]) / np.linalg.norm(images[i])
        np.testing.assert_allclose(found.change[i], moved, rtol=1e-7)
    expected = coupling.couple(jnp.asarray(COEFFICIENTS), jnp.asarray(np.stack(projected)))
    np.testing.assert_allclose(images, expected, rtol=1e-7, atol=1e-8)
    assert found.joining.max() > 0.3
    signed = reference.signed_coefficients(COEFFICIENTS)
    gap = np.linalg.norm(np.tensordot(signed, before, axes=1)) / np.linalg.norm(before[-1])
    np.testing.assert_allclose(found.violation, np.full(3, gap), rtol=1e-9)


def test_change_of_images_that_vanish_or_diverge_is_not_that_of_rest(rng):
    """A unit step on the misfit of an identity brings every image to its data at once."""
    start = jnp.asarray(np.abs(rng.normal(size=(3, *SHAPE))))
    algorithm = comp_jf.build(
        lambda image, inputs: image * inputs, jnp.asarray(COEFFICIENTS), ranks=SHAPE, step_size=1.0
    )
    mask = jnp.ones(start.shape, bool)
    for target, changes in ((0.0, [jnp.inf, 0.0]), (jnp.nan, [jnp.nan, jnp.nan])):
        clients = protocol.ClientData(jnp.ones_like(start), jnp.full_like(start, target), mask)
        state = algorithm.init(start, clients, key=jax.random.key(0))
        _, infos = federated.run(algorithm, state, clients, num_rounds=2, key=jax.random.key(1))
        np.testing.assert_array_equal(infos.metrics.change, np.repeat([changes], 3, axis=0).T)
        assert (np.isnan(infos.metrics.joining) == np.isnan(target)).all()
        assert (np.isnan(infos.metrics.truncation) == np.isnan(target)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_change_of_a_run_that_settles_goes_to_rounding(dtype):
    """To eps, not to its root, though the joint factors turn where the images are deficient."""
    rng = np.random.default_rng(0)
    left, right = np.abs(rng.normal(size=(2, 6))), np.abs(rng.normal(size=(2, 7)))
    truth = np.stack([np.outer(left[0], right[0]), np.outer(left[1], right[1]), np.zeros(SHAPE)])
    truth[2] = 0.5 * truth[0] + 0.3 * truth[1]
    matrices = rng.normal(size=(3, 120, 42))
    data = np.einsum("cmn,cn->cm", matrices, truth.reshape(3, -1))
    clients = protocol.ClientData(
        jnp.asarray(matrices, dtype), jnp.asarray(data, dtype), jnp.ones(data.shape, bool)
    )
    state, infos = run(clients, ranks=(4, 4), num_rounds=300, step_size=0.003)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(comp_jf.images(state), truth, atol=1e3 * eps)
    assert infos.metrics.change[-1].max() < 100 * eps
    assert infos.metrics.joining[-1].max() < 100 * eps


def test_forward_models_and_couplings_are_checked_before_any_round(clients):
    key, start = jax.random.key(0), jnp.zeros((3, *SHAPE))

    def transposed(measurements, matrix):
        return 1.01 * (matrix.T @ measurements).reshape(SHAPE)

    wrong = operators.from_pair(forward, transposed)
    algorithm = comp_jf.build(wrong, jnp.asarray(COEFFICIENTS), ranks=(3, 3), step_size=STEP)
    with pytest.raises(ValueError, match="comp_jf: got a forward model whose adjoint does not mat"):
        algorithm.init(start, clients, key=key)
    # Where nothing has a value there is nothing to compare.
    jax.eval_shape(algorithm.init, start, clients, key=key)
    message = r"comp_jf: got coefficients \[-0.5, -0.3\] for images of at least 0.0, expected a pos"
    with pytest.raises(ValueError, match=message):
        comp_jf.build(forward, -jnp.asarray(COEFFICIENTS), ranks=(3, 3))
    comp_jf.build(forward, -jnp.asarray(COEFFICIENTS), ranks=(3, 3), lower=None)
    with pytest.raises(ValueError, match=r"grow: got start of mode 0 4, expected .* from 1 to 3"):
        comp_jf.build(
            forward,
            jnp.asarray(COEFFICIENTS),
            ranks=(3, 3),
            client_ranks=ranks_.grow(jnp.ones(3), start=4),
            step_size=STEP,
        ).init(start, clients, key=key)


def test_bad_input_is_refused(clients):
    key = jax.random.key(0)

    def init(start=None, **options):
        start = jnp.zeros((3, *SHAPE)) if start is None else start
        coefficients = jnp.asarray(options.pop("coefficients", COEFFICIENTS))
        options = {"ranks": (3, 3), "step_size": STEP} | options
        algorithm = comp_jf.build(forward, coefficients, **options)
        init = functools.partial(algorithm.init, key=key)
        return algorithm, jax.eval_shape(init, start, clients)

    with pytest.raises(ValueError, match=r"comp_jf: got ranks .7, 3."):
        init(ranks=(7, 3))
    with pytest.raises(ValueError, match=r"comp_jf: got ranks .3, 3. of type list"):
        init(ranks=[3, 3])
    with pytest.raises(ValueError, match=r"comp_jf: got client_ranks of shape .3,."):
        init(client_ranks=jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"comp_jf: got client_ranks .*, expected 1 to .3, 3."):
        init(client_ranks=jnp.full((3, 2), 4))
    with pytest.raises(ValueError, match="comp_jf: got client_ranks of dtype float"):
        init(client_ranks=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="comp_jf: got params of dtype int"):
        init(start=jnp.zeros((3, *SHAPE), int))
    with pytest.raises(ValueError, match="expected 2 coefficients for 3 clients"):
        init(coefficients=np.ones(3))
    algorithm, state = init()
    with pytest.raises(ValueError, match="comp_jf: got cohort of 2 clients, expected all 3"):
        algorithm.round(state, clients, jnp.arange(2), key=key)
