"""One sweep of MULTIFAC in NumPy by the published recipe, to time against.

Two linked tensors; every block forms the Khatri-Rao matrix of all other factors and inverts, as
the published implementation of Kang, Rao and Lock (arXiv 2502.20286) does. Written from its
description, and held to the same objective as the library by the tests.
"""

import numpy as np

__all__ = ["sweep"]


def khatri_rao(factors):
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None, :] * factor[None, :, :]).reshape(-1, factor.shape[1])
    return product


def unfold(x, mode):
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)


def dense(factors):
    return (factors[0] @ khatri_rao(factors[1:]).T).reshape([len(f) for f in factors])


def sweep(tensors, models, penalty, masks=None):
    """Update all factors in place and impute; return the objective.

    `models` is a list of factor lists, whose first entries are the shared factor.
    """
    rank = models[0][0].shape[1]
    ridge = penalty * np.eye(rank)
    joint = np.concatenate([khatri_rao(factors[1:]) for factors in models])
    flat = np.concatenate([unfold(x, 0) for x in tensors], axis=1)
    shared = flat @ joint @ np.linalg.inv(joint.T @ joint + ridge)
    for factors in models:
        factors[0] = shared
    for x, factors in zip(tensors, models, strict=True):
        for mode in range(1, x.ndim):
            others = khatri_rao([f for n, f in enumerate(factors) if n != mode])
            inverse = np.linalg.inv(others.T @ others + ridge)
            factors[mode] = unfold(x, mode) @ others @ inverse
    estimates = [dense(factors) for factors in models]
    if masks is not None:
        norms = [
            np.prod([np.linalg.norm(f, axis=0) for f in factors], axis=0) for factors in models
        ]
        both = np.all([norm > 1e-5 for norm in norms], axis=0)
        for x, factors, estimate, mask in zip(tensors, models, estimates, masks, strict=True):
            together = dense([factors[0] * both, *factors[1:]])
            unseen = ~mask.reshape(len(mask), -1).any(axis=1)
            x[~mask] = estimate[~mask]
            x[unseen] = together[unseen]
    squares = sum(np.sum((x - e) ** 2) for x, e in zip(tensors, estimates, strict=True))
    own = sum(np.sum(f**2) for factors in models for f in factors[1:])
    return squares + penalty * (np.sum(shared**2) + own)
