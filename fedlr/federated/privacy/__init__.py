"""Differential privacy of clients: a private round, and what a run of such rounds costs."""

from fedlr.federated.privacy.accounting import (
    Accountant,
    Budget,
    check_rounds,
    fixed_size_epsilon,
    gaussian_epsilon,
    noise_multiplier,
    poisson_epsilon,
    rounds_left,
)
from fedlr.federated.privacy.mechanism import ClippedSum, Mechanism, clip, gaussian_mechanism

__all__ = [
    "Accountant",
    "Budget",
    "ClippedSum",
    "Mechanism",
    "check_rounds",
    "clip",
    "fixed_size_epsilon",
    "gaussian_epsilon",
    "gaussian_mechanism",
    "noise_multiplier",
    "poisson_epsilon",
    "rounds_left",
]
