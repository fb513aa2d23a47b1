"""Naive float64 rounds of coupled reconstruction with dense matrices, one client at a time."""

import itertools

import numpy as np


def signed_coefficients(coefficients):
    """Append the -1 of the last client."""
    return np.append(np.asarray(coefficients, np.float64), -1.0)


def clipped_step(matrix, image, data, step_size):
    """One gradient step on 1/2 |A w - b|^2 and the clip at zero, with the residual before it."""
    residual = matrix @ image.ravel() - data
    stepped = image - step_size * (matrix.T @ residual).reshape(image.shape)
    return np.maximum(stepped, 0.0), np.linalg.norm(residual)


def firm_round(matrices, images, data, coefficients, step_size, penalty, multiplier=None):
    """One prox-form round; with a multiplier image (times the step size), one of FIRM+."""
    signed = signed_coefficients(coefficients)
    stepped, norms = zip(
        *(clipped_step(a, w, b, step_size) for a, w, b in zip(matrices, images, data, strict=True)),
        strict=True,
    )
    residual = sum(c * z for c, z in zip(signed, stepped, strict=True))
    offset = 0.0 if multiplier is None else multiplier
    scale = 1.0 + penalty * np.sum(signed**2)
    coupled = [
        np.maximum(z - c * (offset + penalty * residual) / scale, 0.0)
        for c, z in zip(signed, stepped, strict=True)
    ]
    return np.stack(coupled), np.array(norms)


def truncate(image, rank):
    """Best rank-`rank` approximation of a matrix, which ST-HOSVD equals for equal ranks."""
    u, s, vt = np.linalg.svd(image)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def comp_jf_round(matrices, images, data, coefficients, step_size, penalty, ranks, joint_rank):
    """One CompJF round on matrices through dense truncated images and full SVDs."""
    signed = signed_coefficients(coefficients)
    truncated, norms = [], []
    for a, w, b, rank in zip(matrices, images, data, ranks, strict=True):
        stepped, norm = clipped_step(a, w, b, step_size)
        truncated.append(truncate(stepped, rank))
        norms.append(norm)
    left = np.linalg.svd(np.concatenate(truncated, axis=1))[0][:, :joint_rank]
    right = np.linalg.svd(np.concatenate([t.T for t in truncated], axis=1))[0][:, :joint_rank]
    projected = [left @ (left.T @ t @ right) @ right.T for t in truncated]
    residual = sum(c * p for c, p in zip(signed, projected, strict=True))
    gamma = penalty / (1.0 + penalty * np.sum(signed**2))
    coupled = [p - gamma * c * residual for c, p in zip(signed, projected, strict=True)]
    return np.stack(coupled), np.array(norms)


def project_coupled(coefficients, stacked, lower):
    """Project onto r(w) = 0, w >= lower by trying every set of entries that sit at the bound.

    For each set the others solve an equality-constrained least-squares problem; of the candidates
    that are feasible the nearest one is the projection.
    """
    signed = signed_coefficients(coefficients)
    z = np.asarray(stacked, np.float64).reshape(len(signed), -1)
    scale = 1.0 + np.abs(z).max()
    best, nearest = np.full_like(z, np.nan), np.full(z.shape[1], np.inf)
    for chosen in itertools.product([False, True], repeat=len(signed)):
        free = np.array(chosen)
        slope = np.sum(signed[free] ** 2)
        value = signed[free] @ z[free] + lower * np.sum(signed[~free])
        t = value / slope if slope > 0 else np.zeros_like(value)
        w = np.where(free[:, None], z - t * signed[:, None], lower)
        feasible = (np.abs(signed @ w) < 1e-11 * scale) & (w >= lower - 1e-11 * scale).all(axis=0)
        distance = np.where(feasible, np.sum((w - z) ** 2, axis=0), np.inf)
        best = np.where(distance < nearest, w, best)
        nearest = np.minimum(distance, nearest)
    return best.reshape(np.shape(stacked))


def fed_pgd_round(matrices, images, data, coefficients, step_size):
    """One step of projected gradient descent on all images that satisfy the coupling."""
    moved = [
        w - step_size * (a.T @ (a @ w.ravel() - b)).reshape(w.shape)
        for a, w, b in zip(matrices, images, data, strict=True)
    ]
    return project_coupled(coefficients, np.stack(moved), 0.0)


def encoded_firm_round(matrices, images, data, coefficients, step_size, encode):
    """One round of FIRM (eta rho = 1) in which every image is encoded before it travels."""
    signed = signed_coefficients(coefficients)
    arrived = [
        encode(clipped_step(a, w, b, step_size)[0])
        for a, w, b in zip(matrices, images, data, strict=True)
    ]
    residual = sum(c * z for c, z in zip(signed, arrived, strict=True))
    gamma = 1.0 / (1.0 + np.sum(signed**2))
    coupled = [
        np.maximum(z - gamma * c * residual, 0.0) for c, z in zip(signed, arrived, strict=True)
    ]
    return np.stack([encode(image) for image in coupled])


def keep_largest(image, k):
    """Set all but the k entries of largest modulus to zero."""
    kept = np.zeros(image.size)
    order = np.argsort(-np.abs(image.ravel()), kind="stable")[:k]
    kept[order] = image.ravel()[order]
    return kept.reshape(image.shape)


def penalized_objective(matrices, images, data, coefficients, weight):
    """F(X) = sum_i 1/2 |A_i X_i - b_i|^2 + weight/2 |R|^2."""
    misfit = sum(
        np.sum((a @ w.ravel() - b) ** 2) for a, w, b in zip(matrices, images, data, strict=True)
    )
    residual = np.tensordot(signed_coefficients(coefficients), images, axes=1)
    return misfit / 2 + weight / 2 * np.sum(residual**2)


def penalized_gradient(matrices, images, data, coefficients, weight):
    """Gradient of `penalized_objective`."""
    signed = signed_coefficients(coefficients)
    residual = np.tensordot(signed, images, axes=1)
    return np.stack(
        [
            (a.T @ (a @ w.ravel() - b)).reshape(w.shape) + weight * c * residual
            for a, w, b, c in zip(matrices, images, data, signed, strict=True)
        ]
    )


def low_rank_descent_round(matrices, images, data, coefficients, step_size, weight, ranks):
    """One gradient step on F and the best approximation of every matrix at its rank."""
    gradient = penalized_gradient(matrices, images, data, coefficients, weight)
    moved = images - step_size * gradient
    return np.stack([truncate(target, rank) for target, rank in zip(moved, ranks, strict=True)])
