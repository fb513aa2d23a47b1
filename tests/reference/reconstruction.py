"""Naive float64 rounds of FIRM, FIRM+ and CompJF with dense matrices, one client at a time."""

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
