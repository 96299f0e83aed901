"""Batch normalization for Keras on TensorFlow, from the first training step to the served model."""

from tfbn._support import backend

backend.quiet_command()
backend.require_tensorflow()  # before the imports below have a chance to break

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._moments.moments import Moments
from tfbn._shipping.convert import convert
from tfbn._shipping.export import ExportError, export
from tfbn._shipping.fold.check import FoldError
from tfbn._shipping.fold.fold import fold
from tfbn._shipping.fold.report import FoldedCall, FoldReport
from tfbn._shipping.fuse.fuse import fuse, unfuse
from tfbn._shipping.fuse.report import FuseReport
from tfbn._statistics.diagnose.diagnose import diagnose
from tfbn._statistics.diagnose.evidence import LayerEvidence
from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.diagnose.report import Diagnosis
from tfbn._statistics.freeze import freeze, unfreeze
from tfbn._statistics.layer_call import NotFiniteError
from tfbn._statistics.monitor.monitor import StatisticsMonitor
from tfbn._statistics.monitor.record import LayerRecord
from tfbn._statistics.pause import pause_statistics
from tfbn._statistics.recalibrate import RecalibrateAfterTraining, recalibrate
from tfbn._statistics.recalibration import LayerChange, Recalibration
from tfbn._support.version import VERSION as __version__  # noqa: F401
from tfbn._training.guard import StatisticsNotUpdatedError
from tfbn._training.loop import TrainingLoop

__all__ = [
    "BatchNormalization",
    "Diagnosis",
    "ExportError",
    "Finding",
    "FoldError",
    "FoldReport",
    "FoldedCall",
    "FuseReport",
    "LayerChange",
    "LayerEvidence",
    "LayerRecord",
    "Moments",
    "NotFiniteError",
    "RecalibrateAfterTraining",
    "Recalibration",
    "StatisticsMonitor",
    "StatisticsNotUpdatedError",
    "TrainingLoop",
    "convert",
    "diagnose",
    "export",
    "fold",
    "freeze",
    "fuse",
    "pause_statistics",
    "recalibrate",
    "unfreeze",
    "unfuse",
]
