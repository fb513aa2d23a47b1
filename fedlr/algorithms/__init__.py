"""Published algorithms, one file each, with `build(...)` returning a `FederatedAlgorithm`."""
