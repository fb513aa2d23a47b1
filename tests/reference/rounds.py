"""One federated round in plain NumPy loops."""

import numpy as np


def least_squares_descent(weights, inputs, targets, mask, *, step_size, num_steps):
    """Full-batch gradient descent on the mean of 1/2 (x w - y)^2 over the rows that are present."""
    weights = weights.copy()
    for _ in range(num_steps):
        gradient = np.zeros_like(weights)
        for x, y, present in zip(inputs, targets, mask, strict=True):
            if present:
                gradient += (x @ weights - y) * x / mask.sum()
        weights -= step_size * gradient
    return weights


def fedavg_round(weights, clients, *, step_size, num_steps):
    """One round of federated averaging of `least_squares_descent`."""
    total, update = 0, np.zeros_like(weights)
    for inputs, targets, mask in zip(*clients, strict=True):
        if mask.any():
            new = least_squares_descent(
                weights, inputs, targets, mask, step_size=step_size, num_steps=num_steps
            )
            total += mask.sum()
            update += mask.sum() * (new - weights)
    return weights + update / max(total, 1)


def projected_gradient_step(image, matrix, targets, mask, *, step_size):
    """Max(w - step A^T (A w - b), 0) with the masked rows of A removed, and ||A w - b||."""
    rows, data = matrix[mask], targets[mask]
    residual = rows @ image - data
    return np.maximum(image - step_size * rows.T @ residual, 0), np.linalg.norm(residual)


def largest_squared_norm(matrices, masks):
    """Largest squared spectral norm of matrices whose masked rows are removed."""
    return max(
        np.linalg.norm(matrix[mask], 2) ** 2 if mask.any() else 0.0
        for matrix, mask in zip(matrices, masks, strict=True)
    )


def proximal_coupling(coefficients, stacked, penalty):
    """Solve (I + penalty c c^T) w = z entry by entry, c = (c_1, ..., c_{N-1}, -1)."""
    signed = np.append(coefficients, -1.0)
    system = np.eye(len(signed)) + penalty * np.outer(signed, signed)
    flat = np.linalg.solve(system, stacked.reshape(len(signed), -1))
    return flat.reshape(stacked.shape)
