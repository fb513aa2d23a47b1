"""Rounds: put the parts of one together, and run many of them."""

from fedlr.federated.rounds.combining import for_cohorts, in_turn, prepared, scheduled
from fedlr.federated.rounds.composition import (
    ClientMemory,
    ServerMemory,
    compose,
    with_evaluation,
)
from fedlr.federated.rounds.recording import Output
from fedlr.federated.rounds.running import run
from fedlr.federated.rounds.simulation import Evaluation, simulate

__all__ = [
    "ClientMemory",
    "Evaluation",
    "Output",
    "ServerMemory",
    "compose",
    "for_cohorts",
    "in_turn",
    "prepared",
    "run",
    "scheduled",
    "simulate",
    "with_evaluation",
]
