"""Seeded data sets for tests, benchmarks and notebooks alike."""

from fedlr.synthetic.features import (
    MultimodalClients,
    MultimodalWorld,
    bayes_error,
    client_shifts,
    curved_response,
    linear_response,
    multimodal_clients,
    multimodal_world,
    mutual_information,
    oracle,
)
from fedlr.synthetic.scans import (
    MultimodalScans,
    coupled_channels,
    multimodal_scans,
    multimodal_volumes,
    scan_phantoms,
    uniform_angles,
)
from fedlr.synthetic.sums import (
    FusedSums,
    fused_sums,
    sech_response,
    softplus_response,
    tanh_response,
)
from fedlr.synthetic.tensors import (
    LinkedTensors,
    NoisyCP,
    cp_tensor,
    linked_tensors,
    missing_masks,
)

__all__ = [
    "FusedSums",
    "LinkedTensors",
    "MultimodalClients",
    "MultimodalScans",
    "MultimodalWorld",
    "NoisyCP",
    "bayes_error",
    "client_shifts",
    "coupled_channels",
    "cp_tensor",
    "curved_response",
    "fused_sums",
    "linear_response",
    "linked_tensors",
    "missing_masks",
    "multimodal_clients",
    "multimodal_scans",
    "multimodal_volumes",
    "multimodal_world",
    "mutual_information",
    "oracle",
    "scan_phantoms",
    "sech_response",
    "softplus_response",
    "tanh_response",
    "uniform_angles",
]
