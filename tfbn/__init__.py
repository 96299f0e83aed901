"""Batch normalization for Keras on TensorFlow, from the first training step to the served model."""

from tfbn import _backend

_backend.require_tensorflow()

__version__ = "0.1.0"
__all__: list[str] = []
