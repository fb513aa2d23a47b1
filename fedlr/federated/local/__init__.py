"""What one client does between receiving and sending: the local updates.

A local update is `(params, client_state, data, *, key) -> (update, client_state, metrics)`, written
for ONE client: no leaf of `data` has a client axis.
"""

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
    "LocalMetrics",
    "ReconstructionMetrics",
    "Training",
    "epochs",
    "gradient_step",
    "initial_step_size",
    "local_low_rank",
    "local_proximal",
    "local_sgd",
    "mean_loss",
    "operator_norm",
    "projected_gradient",
    "train",
    "trained_values",
]
