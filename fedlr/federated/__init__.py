"""Federated rounds: parts written for one client, composed, compiled and run."""

from fedlr.federated import (
    aggregators,
    availability,
    channels,
    checkpoints,
    clients,
    compressors,
    coupling,
    execution,
    local,
    partition,
    protocol,
    ranks,
    rounds,
    servers,
    stopping,
)
from fedlr.federated.rounds import compose, run, scheduled, simulate, with_evaluation

__all__ = [
    "aggregators",
    "availability",
    "channels",
    "checkpoints",
    "clients",
    "compose",
    "compressors",
    "coupling",
    "execution",
    "local",
    "partition",
    "protocol",
    "ranks",
    "rounds",
    "run",
    "scheduled",
    "servers",
    "simulate",
    "stopping",
    "with_evaluation",
]
