"""Rounds in other packages, each run in an environment of its own, see `benchmarks.rounds`."""
