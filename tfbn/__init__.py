"""Batch normalization for Keras on TensorFlow, from the first training step to the served model."""

from tfbn import _backend

_backend.require_tensorflow()  # before the imports below have a chance to break

from tfbn._layer import BatchNormalization
from tfbn._training import TrainingLoop

__all__ = ["BatchNormalization", "TrainingLoop"]
__version__ = "0.1.0"
