"""Linked tensors: shared and individual components, missing data, and the choice of the penalty."""

from fedlr.linked import coupled
from fedlr.linked.fitting import (
    Explained,
    explained,
    impute,
    multifac,
    penalty_path,
    predict_rows,
)
from fedlr.linked.model import (
    LinkedCP,
    active_components,
    balance,
    individual_part,
    normalize,
    random_init,
    selected_part,
    shared_part,
    to_dense,
    weights,
)
from fedlr.linked.selection import PenaltySelection, draw_folds, select_penalty
from fedlr.linked.theory import noise_scale, theory_grid, theory_penalty
from fedlr.linked.variational import VariationalFit, variational_multifac

__all__ = [
    "Explained",
    "LinkedCP",
    "PenaltySelection",
    "VariationalFit",
    "active_components",
    "balance",
    "coupled",
    "draw_folds",
    "explained",
    "impute",
    "individual_part",
    "multifac",
    "noise_scale",
    "normalize",
    "penalty_path",
    "predict_rows",
    "random_init",
    "select_penalty",
    "selected_part",
    "shared_part",
    "theory_grid",
    "theory_penalty",
    "to_dense",
    "variational_multifac",
    "weights",
]
