"""CP decompositions: fitting, comparison of fits, the rank, and standard errors."""

from fedlr.cp.diagnostics import (
    Degeneracy,
    core_consistency,
    degeneracy,
    factor_match_score,
    permute_to_match,
)
from fedlr.cp.fitting import als, compressed_als, random_init, svd_init
from fedlr.cp.tensor import CPTensor, normalize, relative_error, to_dense
from fedlr.cp.uncertainty import JackknifeErrors, StandardErrors, jackknife, standard_errors
from fedlr.cp.validation import RankScores, cross_validate

__all__ = [
    "CPTensor",
    "Degeneracy",
    "JackknifeErrors",
    "RankScores",
    "StandardErrors",
    "als",
    "compressed_als",
    "core_consistency",
    "cross_validate",
    "degeneracy",
    "factor_match_score",
    "jackknife",
    "normalize",
    "permute_to_match",
    "random_init",
    "relative_error",
    "standard_errors",
    "svd_init",
    "to_dense",
]
