"""Federated algorithms, one file per paper, each with `build(...)`."""

from fedlr.algorithms import (
    comp_jf,
    fedavg,
    firm,
    local_only,
    low_rank_descent,
    vertical_multifac,
)

__all__ = [
    "comp_jf",
    "fedavg",
    "firm",
    "local_only",
    "low_rank_descent",
    "vertical_multifac",
]
