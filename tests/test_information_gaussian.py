import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import information

DTYPES = [np.float32, np.float64]
DIVERGENCES = {"kl": information.gaussian_kl, "symmetric": information.symmetric_kl}


@jax.jit
def divergences(*arguments):
    return {name: function(*arguments) for name, function in DIVERGENCES.items()}


@jax.jit
def slopes(*arguments):
    return {
        name: jax.grad(lambda *args, function=function: jnp.sum(function(*args)), range(4))(
            *arguments
        )
        for name, function in DIVERGENCES.items()
    }


gaussian_information = jax.jit(information.gaussian_information, static_argnums=1)


def encoders(seed, dtype=np.float64, shape=(3, 4)):
    """Means and logarithms of variances of two Gaussians."""
    return tuple(np.random.default_rng(seed).standard_normal((4, *shape)).astype(dtype))


def general_kl(mean_a, cov_a, mean_b, cov_b):
    """KL divergence of Gaussians with full covariances."""
    precision, shift = np.linalg.inv(cov_b), mean_b - mean_a
    determinants = np.linalg.slogdet(cov_b)[1] - np.linalg.slogdet(cov_a)[1]
    trace = np.trace(precision @ cov_a)
    return (trace + shift @ precision @ shift - len(shift) + determinants) / 2


def random_covariance(size, seed):
    a = np.random.default_rng(seed).standard_normal((size, 2 * size))
    return a @ a.T / (2 * size)


# Divergences.


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_is_that_of_the_general_formula(dtype):
    arguments = encoders(0, dtype)
    found = divergences(*arguments)
    eps = np.finfo(dtype).eps
    for i, (m, u, n, v) in enumerate(zip(*(x.astype(np.float64) for x in arguments), strict=True)):
        forward = general_kl(m, np.diag(np.exp(u)), n, np.diag(np.exp(v)))
        backward = general_kl(n, np.diag(np.exp(v)), m, np.diag(np.exp(u)))
        np.testing.assert_allclose(found["kl"][i], forward, rtol=20 * eps)
        np.testing.assert_allclose(found["symmetric"][i], forward + backward, rtol=20 * eps)
    for name in DIVERGENCES:
        assert found[name].shape == (3,)
        assert found[name].dtype == dtype


def test_kl_is_that_of_quadrature():
    m, u, n, v = (float(x[0, 0]) for x in encoders(1))
    t = np.linspace(m - 12 * np.exp(u / 2), m + 12 * np.exp(u / 2), 20001)

    def log_density(mean, log_var):
        return -((t - mean) ** 2) / (2 * np.exp(log_var)) - (log_var + math.log(2 * np.pi)) / 2

    difference = np.exp(log_density(m, u)) * (log_density(m, u) - log_density(n, v))
    expected = np.sum(difference) * (t[1] - t[0])
    found = information.gaussian_kl(*(jnp.full(1, x) for x in (m, u, n, v)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_symmetric_kl_is_the_sum_of_both_directions_and_of_a_common_variance_a_distance():
    m, u, n, v = encoders(2)
    both = divergences(m, u, n, v)["kl"] + divergences(n, v, m, u)["kl"]
    np.testing.assert_allclose(divergences(m, u, n, v)["symmetric"], both, rtol=1e-13)
    found = divergences(m, u, n, u)
    np.testing.assert_allclose(found["symmetric"], np.sum((m - n) ** 2 / np.exp(u), 1), rtol=1e-13)
    np.testing.assert_allclose(found["kl"], found["symmetric"] / 2, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_distributions_have_no_divergence_and_no_gradient(dtype):
    mean, log_var, *_ = encoders(3, dtype)
    arguments = (mean, 8 * log_var, mean, 8 * log_var)
    for leaf in jax.tree.leaves((divergences(*arguments), slopes(*arguments))):
        np.testing.assert_array_equal(leaf, 0)


def test_near_distributions_keep_their_digits():
    step = np.float32(1e-3)
    mean, log_var, *_ = encoders(4, np.float32)
    # second order: the Fisher metric
    expected = 4 * step.astype(np.float64) ** 2 / 2
    found = divergences(mean, 0 * log_var, mean, 0 * log_var + step)["symmetric"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Mutual informations.


@pytest.mark.parametrize("dtype", DTYPES)
def test_information_is_that_of_determinants(dtype):
    covariance = random_covariance(5, 5)
    for split in (1, 2, 4):
        parts = [covariance[:split, :split], covariance[split:, split:], covariance]
        x, y, whole = (np.linalg.slogdet(part)[1] for part in parts)
        found = gaussian_information(covariance.astype(dtype), split)
        assert found.dtype == dtype
        condition = np.linalg.cond(covariance)
        atol = condition * np.finfo(dtype).eps
        np.testing.assert_allclose(found, (x + y - whole) / 2, atol=atol)


def test_information_does_not_see_invertible_maps_and_order():
    covariance = random_covariance(5, 6)
    expected = gaussian_information(covariance, 2)
    rng = np.random.default_rng(6)
    for _ in range(3):
        maps = np.zeros((5, 5))
        maps[:2, :2], maps[2:, 2:] = rng.standard_normal((2, 2)), rng.standard_normal((3, 3))
        found = gaussian_information(maps @ covariance @ maps.T, 2)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    order = [2, 3, 4, 0, 1]
    swapped = gaussian_information(covariance[order][:, order], 3)
    np.testing.assert_allclose(swapped, expected, rtol=1e-13)


def test_information_of_independent_pairs_is_the_sum_over_pairs():
    rho = np.array([0.5, -0.75])
    covariance = np.block([[np.eye(2), np.diag(rho)], [np.diag(rho), np.eye(2)]])
    pairs = information.correlation_information(rho)
    np.testing.assert_allclose(pairs, -0.5 * np.log(1 - rho**2), rtol=1e-14)
    np.testing.assert_allclose(gaussian_information(covariance, 2), np.sum(pairs), rtol=1e-13)
    ends = information.correlation_information(jnp.array([-1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(ends, [np.inf, 0, np.inf])


def test_information_of_a_small_correlation_keeps_its_digits():
    found = information.correlation_information(jnp.array(1e-3, jnp.float32))
    # the next term of the series is smaller by a factor of 2e6
    np.testing.assert_allclose(found, 1e-6 / 2, rtol=1e-6)


def test_information_of_a_channel_is_that_of_its_joint_covariance():
    a, noise = np.array([[0.5, -2.0, 1.0]]), 0.7
    x = random_covariance(3, 7)
    signal = a @ x @ a.T
    joint = np.block([[x, x @ a.T], [a @ x, signal + noise]])
    found = information.channel_information(signal[0, 0], np.array(noise))
    # gaussian_information splits after x
    whole = np.linalg.slogdet(x)[1] + math.log(signal[0, 0] + noise) - np.linalg.slogdet(joint)[1]
    np.testing.assert_allclose(found, whole / 2, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_log_ratios_of_densities(dtype):
    rng = np.random.default_rng(8)
    x, y = (rng.standard_normal((size, 3)).astype(dtype) for size in (4, 5))
    rho = 0.8
    expected = np.zeros((4, 5))
    for i, j, k in np.ndindex(4, 5, 3):
        u, v = float(x[i, k]), float(y[j, k])
        conditional = -((v - rho * u) ** 2) / (2 * (1 - rho**2)) - math.log(1 - rho**2) / 2
        expected[i, j] += conditional + v**2 / 2
    found = jax.jit(information.gaussian_scores)(x, y, rho)
    assert found.dtype == dtype
    atol = 10 * np.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol)


def test_expected_club_is_that_of_quadrature_and_above_the_information():
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    for rho in (0.0, 0.5, -0.9):
        # y = rho x + sqrt(1 - rho^2) e for joint pairs, x and y free for the product
        scores = information.gaussian_scores(nodes[:, None], nodes[:, None], rho)
        product = weights @ scores @ weights
        joint = 0.0
        for x, w in zip(nodes, weights, strict=True):
            y = rho * x + math.sqrt(1 - rho**2) * nodes
            ratio = -((y - rho * x) ** 2) / (2 * (1 - rho**2)) + y**2 / 2
            joint += w * (weights @ ratio) - w * math.log(1 - rho**2) / 2
        found = information.correlation_club(jnp.array(rho))
        np.testing.assert_allclose(found, joint - product, atol=1e-12)
        assert found >= information.correlation_information(jnp.array(rho))


def test_vmap_is_a_loop():
    stack = np.stack([random_covariance(4, seed) for seed in range(3)])
    found = jax.jit(jax.vmap(lambda c: information.gaussian_information(c, 1)))(stack)
    for covariance, value in zip(stack, found, strict=True):
        np.testing.assert_allclose(value, gaussian_information(covariance, 1), rtol=1e-13)
    arguments = encoders(9)
    found = jax.jit(jax.vmap(information.symmetric_kl))(*arguments)
    np.testing.assert_allclose(found, divergences(*arguments)["symmetric"], rtol=1e-14)


# Errors.

X = jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: information.gaussian_kl(X, X, X, jnp.ones((3, 4))),
            r"gaussian_kl: got log_var_b of shape \(3, 4\), expected shape \(3, 2\)",
        ),
        (
            lambda: information.symmetric_kl(X, X, X.astype(jnp.bfloat16), X),
            "symmetric_kl: got mean_b of dtype bfloat16, expected float32 or float64",
        ),
        (
            lambda: information.gaussian_kl(X, X, X, X.astype(jnp.float32)),
            "gaussian_kl: got mean_a, log_var_a, mean_b, log_var_b of dtypes float32 and float64",
        ),
        (
            functools.partial(information.gaussian_kl, *[jnp.array(1.0)] * 4),
            r"gaussian_kl: got mean_a of shape \(\), expected 1 axes or more",
        ),
        (
            lambda: information.gaussian_information(X, 1),
            r"gaussian_information: got covariance of shape \(3, 2\), expected shape \(3, 3\)",
        ),
        (
            lambda: information.gaussian_information(jnp.eye(3), 3),
            "gaussian_information: got split 3, expected an integer from 1 to 2",
        ),
        (
            lambda: information.correlation_information(jnp.array([0.5, 1.5])),
            r"correlation_information: got correlation \[0.5 1.5\], expected numbers from -1 to 1",
        ),
        (
            lambda: information.correlation_club(1),
            "correlation_club: got correlation of dtype int",
        ),
        (
            lambda: information.channel_information(jnp.array(-1.0), jnp.array(1.0)),
            "channel_information: got signal -1.0, expected a non-negative number",
        ),
        (
            lambda: information.gaussian_scores(X, jnp.ones((4, 3)), 0.5),
            r"gaussian_scores: got y of shape \(4, 3\), expected shape \(4, 2\)",
        ),
        (
            lambda: information.gaussian_scores(X, X.astype(jnp.float32), 0.5),
            "gaussian_scores: got x, y of dtypes float32 and float64, expected one dtype",
        ),
        (
            lambda: information.gaussian_scores(X, X, -1.1),
            "gaussian_scores: got correlation -1.1, expected numbers from -1 to 1",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        call()
