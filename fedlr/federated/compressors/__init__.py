"""How one client encodes its update, and how many bytes the message has."""

from fedlr.federated.compressors.feedback import (
    ErrorFeedbackState,
    error_feedback,
    identity,
    scaled,
)
from fedlr.federated.compressors.low_rank import (
    FactorMessage,
    SVDMessage,
    TuckerMessage,
    power_sgd,
    truncated_svd,
    truncated_tucker,
)
from fedlr.federated.compressors.messages import message_bytes
from fedlr.federated.compressors.quantization import QuantizedMessage, quantize
from fedlr.federated.compressors.sketches import SketchMessage, gaussian_sketch, hadamard_sketch
from fedlr.federated.compressors.sparse import CSRMessage, SparseMessage, csr, top_k

__all__ = [
    "CSRMessage",
    "ErrorFeedbackState",
    "FactorMessage",
    "QuantizedMessage",
    "SVDMessage",
    "SketchMessage",
    "SparseMessage",
    "TuckerMessage",
    "csr",
    "error_feedback",
    "gaussian_sketch",
    "hadamard_sketch",
    "identity",
    "message_bytes",
    "power_sgd",
    "quantize",
    "scaled",
    "top_k",
    "truncated_svd",
    "truncated_tucker",
]
