"""Local training of low-rank updates of a linear layer in plain NumPy."""

import numpy as np


def train_factors(base, bias, up, down, inputs, targets, *, rate, num_steps, frozen=()):
    """Full-batch descent of the mean of 1/2 |(base + up down) x + bias - y|^2."""
    for _ in range(num_steps):
        residual = inputs @ (base + up @ down).T + bias - targets
        slope = residual.T @ inputs / len(inputs)
        new_up = up if "up" in frozen else up - rate * slope @ down.T
        new_down = down if "down" in frozen else down - rate * up.T @ slope
        bias = bias if "bias" in frozen else bias - rate * residual.mean(axis=0)
        up, down = new_up, new_down
    return up, down, bias


def train_core(left, core, right, bias, inputs, targets, *, rate, num_steps):
    """Full-batch descent of S and the bias for the weights left S right^T."""
    for _ in range(num_steps):
        residual = inputs @ (left @ core @ right.T).T + bias - targets
        slope = residual.T @ inputs / len(inputs)
        core = core - rate * left.T @ slope @ right
        bias = bias - rate * residual.mean(axis=0)
    return core, bias


def basis_gradients(left, core, right, bias, inputs, targets):
    """Gradients of the loss with respect to the bases."""
    residual = inputs @ (left @ core @ right.T).T + bias - targets
    slope = residual.T @ inputs / len(inputs)
    return slope @ right @ core.T, slope.T @ left @ core


def truncate(matrix, rank):
    """Best approximation of a rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]
