"""fedlr: federated low-rank learning in JAX."""

__version__ = "0.1.0"
