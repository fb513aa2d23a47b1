"""Rounds: put the parts of one together, and run many of them."""

from fedlr.federated.rounds.composition import ClientMemory, ServerMemory, compose, with_evaluation
from fedlr.federated.rounds.running import run
from fedlr.federated.rounds.simulation import simulate

__all__ = ["ClientMemory", "ServerMemory", "compose", "run", "simulate", "with_evaluation"]
