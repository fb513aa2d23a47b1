"""fedlr: federated low-rank learning in JAX."""

from fedlr import (
    algorithms,
    cp,
    datasets,
    ellipsoids,
    federated,
    iteration,
    linked,
    masking,
    multilinear,
    noise,
    operators,
    phantoms,
    proximal,
    sketching,
    subspace,
    synthetic,
    tomography,
    tucker,
)

__all__ = [
    "algorithms",
    "cp",
    "datasets",
    "ellipsoids",
    "federated",
    "iteration",
    "linked",
    "masking",
    "multilinear",
    "noise",
    "operators",
    "phantoms",
    "proximal",
    "sketching",
    "subspace",
    "synthetic",
    "tomography",
    "tucker",
]
__version__ = "0.1.0"
