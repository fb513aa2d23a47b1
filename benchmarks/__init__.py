"""The papers' experiments, and speed beside the peers: `python -m benchmarks NAME`."""
