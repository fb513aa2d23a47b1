import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr.federated import coupling, local
from tests.reference import rounds as reference

COEFFICIENTS = jnp.array([0.5, 0.3])


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


def test_records_hold_the_relative_violation_of_what_entered(images):
    metrics = local.ReconstructionMetrics(jnp.arange(3.0), jnp.ones(3))
    sent = jnp.arange(3, dtype=jnp.int32)
    info = coupling.round_info(COEFFICIENTS, images, metrics, sent, sent + 1)
    residual = np.asarray(0.5 * images[0] + 0.3 * images[1] - images[2])
    expected = np.linalg.norm(residual) / np.linalg.norm(images[2])
    np.testing.assert_allclose(info.metrics.violation, np.full(3, expected), rtol=1e-13)
    np.testing.assert_array_equal(info.downlink_bytes, [1, 2, 3])


def test_violation_of_zero_images_is_zero_with_a_zero_gradient():
    metrics, sent = local.ReconstructionMetrics(jnp.ones(3), jnp.ones(3)), jnp.ones(3, jnp.int32)

    def violation(images):
        return coupling.round_info(COEFFICIENTS, images, metrics, sent, sent).metrics.violation[0]

    value, gradient = jax.value_and_grad(violation)(jnp.zeros((3, 4)))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
