"""The mistake that custom loops make most: moving statistics that no training step ever moves."""

import keras
import numpy as np

from tfbn._models.walk import BatchNormLayer, batch_norm_layers, statistics_are_frozen


class StatisticsNotUpdatedError(RuntimeError):
    """A model was trained, and its batch normalization learned no statistics for inference."""


def learns_statistics(layer: BatchNormLayer) -> bool:
    """Whether training is meant to move the layer's moving statistics."""
    return not statistics_are_frozen(layer) and layer.momentum != 1


class StatisticsWatch:
    """Remembers the moving statistics of a model, to see whether training moves them."""

    def __init__(self, model: keras.Model):
        self._before = [
            (layer, _statistics(layer))
            for layer in batch_norm_layers(model)
            if layer.built and learns_statistics(layer)
        ]

    def check(self, steps: int) -> None:
        """Raises if a layer still has, after `steps` steps, the very statistics that it began with.

        Raises:
            StatisticsNotUpdatedError: naming the layers, the likely causes and the cure.
        """
        stuck = [
            layer
            for layer, before in self._before
            if learns_statistics(layer) and np.array_equal(before, _statistics(layer))
        ]
        if not stuck:
            return
        names = ", ".join(repr(layer.name) for layer in stuck)
        raise StatisticsNotUpdatedError(
            "Batch normalization learned nothing for inference: the moving statistics of "
            f"{len(stuck)} of {len(self._before)} layers did not move in the first epoch. "
            f"Received: {names}, after {steps} step{'s' * (steps > 1)}.\n"
            "Likely causes, most common first:\n"
            "- The model's own call has no argument `training`, or passes them `training=False` instead of "
            "what it receives. Write `def call(self, x, training=None)` and "
            "`self.bn(x, training=training)`.\n"
            "- The model never calls them in training. Remove them, or freeze them.\n"
            "- They left out every batch: each one was empty, masked altogether, or not finite. Look for "
            "NaN and infinity in the data and in the layers before.\n"
            "If they are meant to stand still, say so: `tfbn.freeze(model)`."
        )


def _statistics(layer: BatchNormLayer) -> np.ndarray:
    return np.stack([layer.moving_mean.numpy(), layer.moving_variance.numpy()])
