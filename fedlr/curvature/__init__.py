"""Curvature of losses and agreement of clients, measured without forming a Hessian.

* Hessian: `hvp`, its spectrum in numbers by `stable_rank`, its `leading_eigenspace`; the same
  numbers of the positive semidefinite Gauss-Newton matrix by `gauss_newton_rank`.
* Gradients of clients: `gradient_similarity`, of the gradients themselves, of their
  `truncate_gradients`, or of their coordinates from `project_gradients`.
* Factors and updates: `aggregation_error` of averaging factors instead of products,
  `stable_rank_of_matrix` and `numerical_rank` of a weight's change.

Everything works under jit and under vmap over clients and seeds: data of a client are closed over,
``vmap(lambda data: stable_rank(lambda p: loss(p, data), params, key=key))(clients)``. These are
measurements. Whether the Hessians of clients have a higher stable rank than the server's depends on
the data and on how far training is.
"""

from fedlr.curvature.hessians import (
    Eigenspace,
    Spectrum,
    gauss_newton_product,
    gauss_newton_rank,
    hvp,
    leading_eigenspace,
    stable_rank,
)
from fedlr.curvature.updates import (
    aggregation_error,
    gradient_similarity,
    numerical_rank,
    project_gradients,
    stable_rank_of_matrix,
    truncate_gradients,
)

__all__ = [
    "Eigenspace",
    "Spectrum",
    "aggregation_error",
    "gauss_newton_product",
    "gauss_newton_rank",
    "gradient_similarity",
    "hvp",
    "leading_eigenspace",
    "numerical_rank",
    "project_gradients",
    "stable_rank",
    "stable_rank_of_matrix",
    "truncate_gradients",
]
