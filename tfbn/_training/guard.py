"""A check for the most common mistake of custom loops: moving statistics that training never updates."""

import keras
import numpy as np

from tfbn._models.walk import BatchNormLayer, batch_norm_layers, statistics_are_frozen


class StatisticsNotUpdatedError(RuntimeError):
    """A model was trained, but its batch normalization layers learned no moving statistics."""


def learns_statistics(layer: BatchNormLayer) -> bool:
    """Returns whether training is meant to update the layer's moving statistics."""
    return not statistics_are_frozen(layer) and layer.momentum != 1


class StatisticsWatch:
    """Remembers a model's moving statistics, to see whether training updates them."""

    def __init__(self, model: keras.Model):
        self._before = [
            (layer, _statistics(layer))
            for layer in batch_norm_layers(model)
            if layer.built and learns_statistics(layer)
        ]

    def check(self, steps: int) -> None:
        """Checks that the statistics have changed after this many steps.

        Raises:
            StatisticsNotUpdatedError: If not. It names the layers, the likely causes and the cure.
        """
        unchanged = [
            layer
            for layer, before in self._before
            if learns_statistics(layer) and np.array_equal(before, _statistics(layer))
        ]
        if not unchanged:
            return
        names = ", ".join(repr(layer.name) for layer in unchanged)
        raise StatisticsNotUpdatedError(
            "Batch normalization learned nothing for inference: the moving statistics of "
            f"{len(unchanged)} of {len(self._before)} layers did not change in the first epoch. "
            f"Received: {names}, after {steps} step{'s' * (steps > 1)}.\n"
            "Likely causes, most common first:\n"
            "- The model's own `call` has no `training` argument, or passes `training=False` to them instead "
            "of the value it received. Write `def call(self, x, training=None)` and "
            "`self.bn(x, training=training)`.\n"
            "- The model never calls them in training. Remove them, or freeze them.\n"
            "- They skipped every batch, because each was empty, fully masked or not finite. Look for NaN and "
            "infinity in the data and in the preceding layers.\n"
            "If their statistics are meant to stay fixed, freeze them: `tfbn.freeze(model)`."
        )


def _statistics(layer: BatchNormLayer) -> np.ndarray:
    return np.stack([layer.moving_mean.numpy(), layer.moving_variance.numpy()])
