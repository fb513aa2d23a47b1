"""Tucker decompositions written naively in NumPy, by full singular value decompositions."""

import numpy as np


def unfold(x, mode):
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)


def multiply(x, matrix, mode):
    """Multiply mode `mode` of a tensor by a matrix, entry by definition."""
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, mode)), 0, mode)


def dense(core, factors):
    for mode, factor in enumerate(factors):
        core = multiply(core, factor, mode)
    return core


def project(x, factors):
    return dense(x, [factor.T for factor in factors])


def leading(matrix, rank):
    """Leading left singular vectors and the energy of what they leave out."""
    left, values, _ = np.linalg.svd(matrix)
    return left[:, :rank], np.sum(values[rank:] ** 2)


def tails(x, ranks):
    """Discarded energies of every unfolding: t_n^2."""
    return [leading(unfold(x, mode), rank)[1] for mode, rank in enumerate(ranks)]


def hosvd(x, ranks):
    factors = [leading(unfold(x, mode), rank)[0] for mode, rank in enumerate(ranks)]
    return project(x, factors), factors


def sthosvd(x, ranks, order):
    """Core, factors and the energies discarded on the way."""
    core, factors, discarded = x, [None] * x.ndim, []
    for mode in order:
        factors[mode], tail = leading(unfold(core, mode), ranks[mode])
        core = multiply(core, factors[mode].T, mode)
        discarded.append(tail)
    return core, factors, discarded


def hooi(x, ranks, sweeps):
    """Alternate exact singular value decompositions, from the HOSVD."""
    _, factors = hosvd(x, ranks)
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            others = [
                np.eye(size) if other == mode else factors[other]
                for other, size in enumerate(x.shape)
            ]
            factors[mode], _ = leading(unfold(project(x, others), mode), rank)
    return project(x, factors), factors
