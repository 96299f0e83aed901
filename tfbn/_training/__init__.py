"""The GradientTape loop."""

from tfbn._training._guard import StatisticsNotUpdatedError
from tfbn._training._loop import TrainingLoop

__all__ = ["StatisticsNotUpdatedError", "TrainingLoop"]
