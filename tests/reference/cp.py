"""CP models by alternating least squares written naively in NumPy, from the definitions."""

import functools
import math

import numpy as np

from tests.reference import tensors
from tests.reference.tucker import unfold


def design(factors, mode):
    """Khatri-Rao product of all factors but one."""
    others = [factor for other, factor in enumerate(factors) if other != mode]
    return functools.reduce(tensors.khatri_rao, others)


def dense(factors):
    shape = tuple(factor.shape[0] for factor in factors)
    return (factors[0] @ design(factors, 0).T).reshape(shape)


def penalty(factors):
    return sum(np.sum(factor**2) for factor in factors)


def objective(x, factors, ridge=0.0, mask=None):
    difference = x - dense(factors)
    if mask is not None:
        difference = difference[mask]
    return np.sum(difference**2) + ridge * penalty(factors)


def update(x, factors, mode, ridge):
    """Solve the normal equations of one factor."""
    columns = design(factors, mode)
    gram = columns.T @ columns + ridge * np.eye(columns.shape[1])
    return np.linalg.solve(gram, (unfold(x, mode) @ columns).T).T


def masked_update(x, mask, factors, mode, ridge):
    """Solve a least-squares problem for every row, moving it as little as possible."""
    columns, rank = design(factors, mode), factors[mode].shape[1]
    rows = []
    for row, seen, before in zip(unfold(x, mode), unfold(mask, mode), factors[mode], strict=True):
        matrix = np.concatenate([columns[seen], math.sqrt(ridge) * np.eye(rank)])
        target = np.concatenate([row[seen], np.zeros(rank)])
        rows.append(before + np.linalg.lstsq(matrix, target - matrix @ before)[0])
    return np.array(rows)


def absorb(weights, factors, modes):
    """Spread the weights evenly over some modes, their signs into the last of them."""
    factors = list(factors)
    for mode in modes:
        factors[mode] = factors[mode] * np.abs(weights) ** (1 / len(modes))
    factors[modes[-1]] = factors[modes[-1]] * np.sign(weights)
    return factors


def als(x, factors, num_sweeps, *, ridge=0.0, mask=None, fixed=()):
    """Factors after some sweeps, and the objective after each."""
    factors, objectives = list(factors), []
    for _ in range(num_sweeps):
        for mode in range(x.ndim):
            if mode in fixed:
                continue
            if mask is None:
                factors[mode] = update(x, factors, mode, ridge)
            else:
                factors[mode] = masked_update(x, mask, factors, mode, ridge)
        objectives.append(objective(x, factors, ridge, mask))
    return factors, objectives
