"""Tensor kernels as loops over single entries, straight from their definitions."""

import itertools

import numpy as np


def unfold(x, mode):
    others = [size for axis, size in enumerate(x.shape) if axis != mode]
    matrix = np.zeros((x.shape[mode], int(np.prod(others))))
    for index in itertools.product(*(range(size) for size in x.shape)):
        column = 0
        for axis, i in enumerate(index):
            if axis != mode:
                column = column * x.shape[axis] + i
        matrix[index[mode], column] = x[index]
    return matrix


def mode_dot(x, matrix, mode):
    shape = list(x.shape)
    shape[mode] = matrix.shape[0]
    result = np.zeros(shape)
    for index in itertools.product(*(range(size) for size in x.shape)):
        for j in range(matrix.shape[0]):
            target = (*index[:mode], j, *index[mode + 1 :])
            result[target] += matrix[j, index[mode]] * x[index]
    return result


def khatri_rao(a, b):
    result = np.zeros((a.shape[0] * b.shape[0], a.shape[1]))
    for i, j, r in itertools.product(range(a.shape[0]), range(b.shape[0]), range(a.shape[1])):
        result[i * b.shape[0] + j, r] = a[i, r] * b[j, r]
    return result


def cp_to_dense(factors):
    shape = tuple(factor.shape[0] for factor in factors)
    result = np.zeros(shape)
    for index in itertools.product(*(range(size) for size in shape)):
        for r in range(factors[0].shape[1]):
            result[index] += np.prod([f[i, r] for f, i in zip(factors, index, strict=True)])
    return result


def mttkrp(x, factors, mode):
    rank = factors[0].shape[1]
    result = np.zeros((x.shape[mode], rank))
    for index in itertools.product(*(range(size) for size in x.shape)):
        for r in range(rank):
            weights = [
                f[i, r] for m, (f, i) in enumerate(zip(factors, index, strict=True)) if m != mode
            ]
            result[index[mode], r] += x[index] * np.prod(weights)
    return result
