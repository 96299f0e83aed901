"""Batch normalization for Keras on TensorFlow, from the first training step to the served model."""

from tfbn import _backend

_backend.require_tensorflow()  # before the imports below have a chance to break

from tfbn._convert import convert
from tfbn._diagnose import diagnose
from tfbn._export import export
from tfbn._fold import fold
from tfbn._freeze import freeze, unfreeze
from tfbn._layer import BatchNormalization
from tfbn._pause import pause_statistics
from tfbn._recalibrate import recalibrate
from tfbn._recalibrate_callback import RecalibrateAfterTraining
from tfbn._training import StatisticsNotUpdatedError, TrainingLoop

__all__ = [
    "BatchNormalization",
    "RecalibrateAfterTraining",
    "StatisticsNotUpdatedError",
    "TrainingLoop",
    "convert",
    "diagnose",
    "export",
    "fold",
    "freeze",
    "pause_statistics",
    "recalibrate",
    "unfreeze",
]
__version__ = "0.1.0"
