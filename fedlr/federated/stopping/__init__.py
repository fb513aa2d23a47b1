"""When a run of rounds should stop: rules, and the noise levels that some compare with."""

from fedlr.federated.stopping.levels import (
    edge_noise_levels,
    noise_thresholds,
    noisy_maximum_thresholds,
    num_measurements,
)
from fedlr.federated.stopping.rules import (
    Outcome,
    Rule,
    Verdict,
    any_of,
    as_rule,
    corrected,
    discrepancy,
    every_client,
    replay,
    settled,
    stagnation,
)

__all__ = [
    "Outcome",
    "Rule",
    "Verdict",
    "any_of",
    "as_rule",
    "corrected",
    "discrepancy",
    "edge_noise_levels",
    "every_client",
    "noise_thresholds",
    "noisy_maximum_thresholds",
    "num_measurements",
    "replay",
    "settled",
    "stagnation",
]
