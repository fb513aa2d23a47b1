"""What one client does between receiving and sending: the local updates.

A local update is `(params, client_state, data, *, key) -> (update, client_state, metrics)`, written
for ONE client: no leaf of `data` has a client axis.
"""

from fedlr.federated.local.contrastive import (
    Anchors,
    Contrast,
    Memory,
    empty_memory,
    history,
    history_and_batch,
    in_batch,
    local_contrastive,
    previous_local,
)
from fedlr.federated.local.low_rank import local_low_rank, trained_values
from fedlr.federated.local.reconstruction import (
    ReconstructionMetrics,
    gradient_step,
    initial_step_size,
    operator_norm,
    projected_gradient,
)
from fedlr.federated.local.training import (
    LocalMetrics,
    Training,
    epochs,
    local_proximal,
    local_sgd,
    mean_loss,
    train,
)

__all__ = [
    "Anchors",
    "Contrast",
    "LocalMetrics",
    "Memory",
    "ReconstructionMetrics",
    "Training",
    "empty_memory",
    "epochs",
    "gradient_step",
    "history",
    "history_and_batch",
    "in_batch",
    "initial_step_size",
    "local_contrastive",
    "local_low_rank",
    "local_proximal",
    "local_sgd",
    "mean_loss",
    "operator_norm",
    "previous_local",
    "projected_gradient",
    "train",
    "trained_values",
]
