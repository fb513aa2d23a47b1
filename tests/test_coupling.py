import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import optimize

from fedlr.federated import coupling, local, stopping
from tests.reference import reconstruction
from tests.reference import rounds as reference

COEFFICIENTS = jnp.array([0.5, 0.3])
# Positive, zero and negative, so that every kind of entry meets the bound; cut to N - 1.
MIXED = np.array([0.8, -0.4, 0.0, 1.7, -1.2])
BOUNDS = [0.0, 0.3, -0.4]

project = jax.jit(coupling.project_coupled, static_argnames="lower")


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 5)))


def norm(x):
    return float(jnp.sqrt(jnp.sum(x**2)))


@pytest.mark.parametrize("penalty", [0.0, 0.7, 30.0])
def test_coupling_solves_the_proximal_problem(images, penalty):
    coupled = coupling.couple(COEFFICIENTS, images, penalty=penalty)
    expected = reference.proximal_coupling(np.asarray(COEFFICIENTS), np.asarray(images), penalty)
    np.testing.assert_allclose(coupled, expected, rtol=1e-12, atol=1e-13)


def test_infinite_penalty_projects_orthogonally(images):
    coupled = coupling.couple(COEFFICIENTS, images, penalty=jnp.inf)
    assert norm(coupling.constraint_residual(COEFFICIENTS, coupled)) < 1e-14
    again = coupling.couple(COEFFICIENTS, coupled, penalty=jnp.inf)
    np.testing.assert_allclose(again, coupled, atol=1e-15)
    # The residual of a projection is orthogonal to the subspace.
    assert abs(float(jnp.sum((images - coupled) * coupled))) < 1e-13


def test_coupled_images_are_left_alone(images):
    images = images.at[-1].set(jnp.tensordot(COEFFICIENTS, images[:-1], axes=1))
    np.testing.assert_allclose(coupling.couple(COEFFICIENTS, images), images, atol=1e-15)


def test_coupling_commutes_with_a_joint_orthonormal_basis(images, rng):
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0])
    turned = jnp.einsum("ij,cjk->cik", basis, images)
    np.testing.assert_allclose(
        coupling.couple(COEFFICIENTS, turned),
        jnp.einsum("ij,cjk->cik", basis, coupling.couple(COEFFICIENTS, images)),
        rtol=1e-12,
        atol=1e-13,
    )


def test_multiplier_drives_the_violation_to_zero_where_a_penalty_alone_does_not(images, key):
    """Minimize sum |w - z|^2 / 2 under the coupling by gradient steps and either server."""
    target, step = images, 0.5

    def violation(server):
        def iterate(carry, _):
            w, state = carry
            return server.apply(w, step * (target - w), state, key=key), None

        start = (jnp.zeros_like(target), server.init(jnp.zeros_like(target)))
        (w, _), _ = jax.lax.scan(iterate, start, None, length=200)
        return norm(coupling.constraint_residual(COEFFICIENTS, w)), w

    penalized, _ = violation(coupling.proximal_coupling(COEFFICIENTS))
    exact, solution = violation(coupling.augmented_lagrangian(COEFFICIENTS))
    assert penalized > 0.1
    assert exact < 1e-10
    projected = coupling.couple(COEFFICIENTS, target, penalty=jnp.inf)
    np.testing.assert_allclose(solution, projected, atol=1e-9)


def test_multiplier_of_zero_gives_the_proximal_coupling(images):
    coupled, multiplier = coupling.couple_with_multiplier(
        COEFFICIENTS, images, jnp.zeros((4, 5)), penalty=0.7
    )
    np.testing.assert_allclose(
        coupled, coupling.couple(COEFFICIENTS, images, penalty=0.7), rtol=1e-13
    )
    expected = 0.7 * coupling.constraint_residual(COEFFICIENTS, coupled)
    np.testing.assert_allclose(multiplier, expected, rtol=1e-12)


def test_multiplier_can_be_carried_to_other_orthonormal_factors(images, rng):
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0])
    multiplier = jnp.asarray(rng.normal(size=(4, 5)))
    step = functools.partial(coupling.couple_with_multiplier, COEFFICIENTS)
    coupled, new = step(jnp.einsum("ij,cjk->cik", basis, images), basis @ multiplier)
    plain, plain_new = step(images, multiplier)
    np.testing.assert_allclose(coupled, jnp.einsum("ij,cjk->cik", basis, plain), atol=1e-13)
    np.testing.assert_allclose(new, basis @ plain_new, atol=1e-13)


@pytest.mark.parametrize("build", [coupling.proximal_coupling, coupling.augmented_lagrangian])
def test_servers_clip_last(images, key, build):
    server = build(COEFFICIENTS, lower=0.0)
    coupled, _ = server.apply(images, images, server.init(images), key=key)
    free, _ = build(COEFFICIENTS).apply(images, images, server.init(images), key=key)
    np.testing.assert_array_equal(coupled, jnp.maximum(free, 0.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_servers_keep_dtypes_under_jit(images, key, dtype):
    server = coupling.augmented_lagrangian((0.5, 0.3), penalty=0.5)
    images = images.astype(dtype)
    state = server.init(images)
    coupled, new_state = jax.jit(server.apply)(images, images, state, key=key)
    assert coupled.dtype == new_state.dtype == state.dtype == dtype


@pytest.mark.parametrize("build", [coupling.proximal_coupling, coupling.augmented_lagrangian])
def test_wrong_number_of_coefficients_is_refused(images, build):
    message = r"got coefficients of shape \(3,\), expected 2 coefficients for 3 clients"
    with pytest.raises(ValueError, match=message):
        build(jnp.ones(3)).init(images)
    with pytest.raises(ValueError, match=f"couple: {message}"):
        jax.jit(coupling.couple)(jnp.ones(3), images)
    with pytest.raises(ValueError, match=r"constraint_residual: got stacked of dtype int"):
        coupling.constraint_residual(jnp.ones(2), jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"couple_with_multiplier: got multiplier of shape \(4,\)"):
        coupling.couple_with_multiplier(COEFFICIENTS, images, jnp.zeros(4))


def test_one_image_alone_is_refused(images):
    """Its coupling would be w_1 = 0."""
    with pytest.raises(ValueError, match=r"couple: got 1 client, expected at least 2"):
        coupling.couple(jnp.zeros(0), images[:1])


@pytest.fixture
def metrics():
    return local.ReconstructionMetrics(jnp.arange(3.0), jnp.ones(3))


def record(images, after, metrics):
    sent = jnp.arange(3, dtype=jnp.int32)
    return coupling.round_info(COEFFICIENTS, images, after, metrics, sent, sent + 1)


def test_records_hold_the_violation_of_what_entered_and_the_change(images, metrics):
    after = images + jnp.arange(1.0, 4.0)[:, None, None]
    info = record(images, after, metrics)
    residual = np.asarray(0.5 * images[0] + 0.3 * images[1] - images[2])
    expected = np.linalg.norm(residual) / np.linalg.norm(images[2])
    np.testing.assert_allclose(info.metrics.violation, np.full(3, expected), rtol=1e-13)
    lengths = [i * np.sqrt(20) / np.linalg.norm(w) for i, w in enumerate(after, start=1)]
    np.testing.assert_allclose(info.metrics.change, lengths, rtol=1e-13)
    np.testing.assert_array_equal(info.metrics.residual_norm, metrics.residual_norm)
    np.testing.assert_array_equal(info.uplink_bytes, [0, 1, 2])
    np.testing.assert_array_equal(info.downlink_bytes, [1, 2, 3])


def test_record_of_zero_images_is_zero_with_a_zero_gradient(metrics):
    def total(before, after):
        info = record(before, after, metrics)
        return info.metrics.violation.sum() + info.metrics.change.sum()

    zero = jnp.zeros((3, 4))
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(zero, zero)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_relative_norm_is_a_ratio_of_norms_that_ignores_a_common_scale(rng):
    part, whole = jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(rng.normal(size=(3, 2)))
    expected = np.linalg.norm(part) / np.linalg.norm(whole)
    np.testing.assert_allclose(coupling.relative_norm(part, whole), expected, rtol=1e-14)
    scaled = coupling.relative_norm(1e9 * part, 1e9 * whole)
    np.testing.assert_allclose(scaled, expected, rtol=1e-14)


def test_relative_norm_to_zero_is_infinite_unless_both_are_zero(rng):
    part, zero = jnp.asarray(rng.normal(size=(4, 5))), jnp.zeros(2)
    for whole, expected in ((zero, jnp.inf), (jnp.ones(2), jnp.linalg.norm(part) / np.sqrt(2))):
        np.testing.assert_allclose(coupling.relative_norm(part, whole), expected, rtol=1e-14)
    assert coupling.relative_norm(zero, zero) == 0
    for argument in (0, 1):
        gradient = jax.grad(coupling.relative_norm, argument)(part, zero)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("part", "whole"), [(np.nan, 1.0), (1.0, np.nan), (np.nan, 0.0), (0.0, np.nan)]
)
def test_relative_norm_hides_no_nan(part, whole):
    assert jnp.isnan(coupling.relative_norm(jnp.array([part, 0.0]), jnp.array([whole, 0.0])))


def test_images_that_diverge_or_vanish_do_not_look_settled(images, metrics):
    zero = jnp.zeros_like(images)
    settled = stopping.settled(tolerance=1.5)
    for before, after, change in (
        (images, zero, jnp.inf),
        (zero, images, 1.0),
        (images, images * jnp.nan, jnp.nan),
        (images * jnp.nan, images, jnp.nan),
    ):
        info = record(before, after, metrics)
        np.testing.assert_allclose(info.metrics.change, np.full(3, change))
        assert bool(settled(info)) == (change == 1)
    gone = record(images.at[-1].set(0), images, metrics)
    np.testing.assert_array_equal(gone.metrics.violation, np.inf)
    assert jnp.isnan(record(images * jnp.nan, images, metrics).metrics.violation).all()


def test_violation_is_the_same_in_a_joint_basis_and_zero_for_coupled_images(images, rng):
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(6, 4)))[0])
    np.testing.assert_allclose(
        coupling.relative_violation(COEFFICIENTS, jnp.einsum("ij,cjk->cik", basis, images)),
        coupling.relative_violation(COEFFICIENTS, images),
        rtol=1e-13,
    )
    coupled = coupling.couple(COEFFICIENTS, images, penalty=jnp.inf)
    assert coupling.relative_violation(COEFFICIENTS, coupled) < 1e-14


def pixels(rng, num_clients):
    """Random pixels, and those where breakpoints coincide or no image is free."""
    special = np.stack(
        [
            np.zeros(num_clients),
            np.ones(num_clients),
            np.full(num_clients, 0.3),
            np.full(num_clients, -0.4),
            -np.arange(1.0, num_clients + 1),
            np.eye(num_clients)[0],
            -np.eye(num_clients)[-1],
            np.append(MIXED[: num_clients - 1], -1.0),
            np.append(-MIXED[: num_clients - 1], 1.0),
        ],
        axis=1,
    )
    return np.concatenate([rng.normal(size=(num_clients, 40)), special], axis=1)


@pytest.mark.parametrize("lower", BOUNDS)
@pytest.mark.parametrize("num_clients", range(2, 7))
def test_projection_is_the_nearest_of_all_active_sets(num_clients, lower):
    coefficients = MIXED[: num_clients - 1]
    for seed in range(3):
        z = pixels(np.random.default_rng(seed), num_clients)
        found = project(jnp.asarray(coefficients), jnp.asarray(z), lower=lower)
        expected = reconstruction.project_coupled(coefficients, z, lower)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("coefficients", [(-0.5, -0.3), (0.0, 0.0), (0.0, -2.0)])
def test_projection_without_a_positive_coefficient(coefficients, rng):
    """Below zero there is room for it; at zero it can only be traced, and clears the last image."""
    z = pixels(rng, 3)
    for lower in (-0.4, 0.0):
        found = project(jnp.array(coefficients), jnp.asarray(z), lower=lower)
        expected = reconstruction.project_coupled(coefficients, z, lower)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(found[-1], 0)


@pytest.mark.parametrize("lower", BOUNDS)
def test_projection_agrees_with_a_general_solver(lower, rng):
    z = rng.normal(size=(4, 3))
    signed = np.append(MIXED[:3], -1.0)
    found = project(jnp.asarray(MIXED[:3]), jnp.asarray(z), lower=lower)
    for column in range(3):
        solved = optimize.minimize(
            lambda w, goal: np.sum((w - goal) ** 2),
            np.full(4, lower + 1.0),
            args=(z[:, column],),
            method="SLSQP",
            bounds=[(lower, None)] * 4,
            constraints={"type": "eq", "fun": lambda w: signed @ w},
            tol=1e-14,
        )
        assert solved.success
        np.testing.assert_allclose(found[:, column], solved.x, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("lower", BOUNDS)
def test_projection_is_feasible_idempotent_and_makes_an_obtuse_angle(lower, dtype):
    """<z - Pz, v - Pz> <= 0 for all feasible v is what defines the projection."""
    eps = float(jnp.finfo(dtype).eps)
    coefficients = jnp.asarray(MIXED, dtype)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        z, other = (jnp.asarray(pixels(rng, 6), dtype) for _ in range(2))
        found, near = (project(coefficients, x, lower=lower) for x in (z, other))
        assert found.dtype == dtype
        assert (found >= jnp.asarray(lower, dtype)).all()
        scale = jnp.abs(found).max()
        residual = coupling.constraint_residual(coefficients, found)
        assert jnp.abs(residual).max() <= 20 * eps * scale
        again = project(coefficients, found, lower=lower)
        np.testing.assert_allclose(again, found, atol=20 * eps * scale)
        angle = jnp.sum((z - found) * (near - found), axis=0)
        assert angle.max() <= 100 * eps * scale**2
        assert norm(found - near) <= norm(z - other) * (1 + 10 * eps)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_projection_onto_a_cone_scales_with_the_images(scale, rng):
    z = jnp.asarray(pixels(rng, 4), jnp.float32)
    coefficients = jnp.asarray(MIXED[:3], jnp.float32)
    expected = project(coefficients, z, lower=0.0)
    found = project(coefficients, jnp.float32(scale) * z, lower=0.0) / jnp.float32(scale)
    np.testing.assert_allclose(found, expected, atol=20 * np.finfo(np.float32).eps * 4)


def test_projection_without_a_bound_is_the_limit_of_the_penalty(images):
    np.testing.assert_array_equal(
        project(COEFFICIENTS, images, lower=None),
        jax.jit(functools.partial(coupling.couple, penalty=jnp.inf))(COEFFICIENTS, images),
    )
    # Far above the bound nothing meets it, up to the rounding of the bound itself.
    np.testing.assert_allclose(
        project(COEFFICIENTS, images, lower=-100.0),
        project(COEFFICIENTS, images, lower=None),
        atol=1e-13,
    )


@pytest.mark.parametrize("lower", [0.0, 0.3])
def test_gradient_of_the_projection_agrees_with_finite_differences(lower):
    """Away from kinks: the smallest distance of a free entry from the bound is far above 1e-4."""
    z = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6)))
    coefficients = jnp.asarray([0.8, -0.4, 1.7])
    found = np.asarray(project(coefficients, z, lower=lower))
    assert 0 < (found == lower).sum() < found.size
    assert np.abs(found - lower)[found != lower].min() > 1e-3
    weights = jnp.asarray(np.random.default_rng(1).normal(size=z.shape))

    def total(coefficients, z):
        return jnp.sum(weights * coupling.project_coupled(coefficients, z, lower=lower) ** 2)

    check_grads(jax.jit(total), (coefficients, z), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_gradient_of_the_projection_is_finite_at_ties(rng):
    z = jnp.asarray(pixels(rng, 6))

    def total(coefficients, z):
        return jnp.sum(coupling.project_coupled(coefficients, z))

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(MIXED), z):
        assert jnp.isfinite(gradient).all()


def test_exact_server_projects_what_the_clients_send(images, key):
    server = coupling.exact_projection(COEFFICIENTS, lower=0.1)
    state = server.init(images)
    assert state == ()
    found, after = server.apply(images, 0.5 * images, state, key=key)
    assert after == ()
    expected = reconstruction.project_coupled(COEFFICIENTS, 1.5 * np.asarray(images), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"exact_projection: got coefficients of shape \(3,\)"):
        coupling.exact_projection(jnp.ones(3)).init(images)


@pytest.mark.parametrize("lower", [0.0, 0.5])
@pytest.mark.parametrize("coefficients", [(-0.5, -0.3), (0.0, -1.0), (0.0, 0.0)])
def test_couplings_without_a_positive_coefficient_are_refused(images, coefficients, lower):
    message = rf"got coefficients \[.*\] for images of at least {lower}, expected a positive one"
    with pytest.raises(ValueError, match=f"caller: {message}"):
        coupling.check_satisfiable("caller", jnp.array(coefficients), lower)
    with pytest.raises(ValueError, match=f"project_coupled: {message}"):
        coupling.project_coupled(jnp.array(coefficients), images, lower=lower)
    for free in (None, -1.0):
        coupling.check_satisfiable("caller", jnp.array(coefficients), free)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_coefficients_that_are_not_finite_are_refused(bad):
    for lower in (None, 0.0, -1.0):
        with pytest.raises(ValueError, match=r"caller: got coefficients .*, expected finite num"):
            coupling.check_satisfiable("caller", jnp.array([0.5, bad]), lower)


def test_traced_coefficients_are_not_checked():
    jax.jit(lambda c: coupling.check_satisfiable("caller", c, 0.0))(jnp.array([-1.0, jnp.nan]))
    coupling.check_satisfiable("caller", np.zeros(0), 0.0)
