"""fedlr: federated low-rank learning in JAX."""

from fedlr import (
    algorithms,
    federated,
    iteration,
    masking,
    multilinear,
    noise,
    phantoms,
    sketching,
    subspace,
    synthetic,
    tomography,
    tucker,
)

__all__ = [
    "algorithms",
    "federated",
    "iteration",
    "masking",
    "multilinear",
    "noise",
    "phantoms",
    "sketching",
    "subspace",
    "synthetic",
    "tomography",
    "tucker",
]
__version__ = "0.1.0"
