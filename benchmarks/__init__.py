"""Measurements of batch normalization layers against each other: ``python -m benchmarks --help``."""
