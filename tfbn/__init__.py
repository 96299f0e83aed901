"""Batch normalization for Keras on TensorFlow, from the first training step to the served model."""

from tfbn._support import backend

backend.require_tensorflow()  # before the imports below have a chance to break

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._shipping.convert import convert
from tfbn._shipping.export import export
from tfbn._shipping.fold.fold import fold
from tfbn._statistics.diagnose.diagnose import diagnose
from tfbn._statistics.freeze import freeze, unfreeze
from tfbn._statistics.pause import pause_statistics
from tfbn._statistics.recalibrate import RecalibrateAfterTraining, recalibrate
from tfbn._support.version import VERSION
from tfbn._training.guard import StatisticsNotUpdatedError
from tfbn._training.loop import TrainingLoop

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
__version__ = VERSION
