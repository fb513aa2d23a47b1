"""Federated rounds: parts written for one client, composed, compiled and run."""

from fedlr.federated import (
    aggregators,
    channels,
    clients,
    compressors,
    coupling,
    execution,
    local,
    protocol,
    ranks,
    rounds,
    servers,
    stopping,
)
from fedlr.federated.rounds import compose, run, simulate, with_evaluation

__all__ = [
    "aggregators",
    "channels",
    "clients",
    "compose",
    "compressors",
    "coupling",
    "execution",
    "local",
    "protocol",
    "ranks",
    "rounds",
    "run",
    "servers",
    "simulate",
    "stopping",
    "with_evaluation",
]
