"""Seeded data sets for tests, benchmarks and notebooks alike."""

from fedlr.synthetic.scans import (
    MultimodalScans,
    coupled_channels,
    multimodal_scans,
    multimodal_volumes,
    scan_phantoms,
    uniform_angles,
)
from fedlr.synthetic.tensors import (
    LinkedTensors,
    NoisyCP,
    cp_tensor,
    linked_tensors,
    missing_masks,
)

__all__ = [
    "LinkedTensors",
    "MultimodalScans",
    "NoisyCP",
    "coupled_channels",
    "cp_tensor",
    "linked_tensors",
    "missing_masks",
    "multimodal_scans",
    "multimodal_volumes",
    "scan_phantoms",
    "uniform_angles",
]
