"""Federated rounds: parts written for one client, composed, compiled and run."""

from fedlr.federated import (
    aggregators,
    clients,
    compressors,
    coupling,
    execution,
    local,
    protocol,
    rounds,
    servers,
    stopping,
)
from fedlr.federated.rounds import compose, run, simulate, with_evaluation

__all__ = [
    "aggregators",
    "clients",
    "compose",
    "compressors",
    "coupling",
    "execution",
    "local",
    "protocol",
    "rounds",
    "run",
    "servers",
    "simulate",
    "stopping",
    "with_evaluation",
]
