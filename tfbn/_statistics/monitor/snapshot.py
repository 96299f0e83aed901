"""The weights of all batch normalization layers at one moment, as flat arrays over all channels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbn._models.walk import BatchNormLayer, batch_norm_layers, learns_statistics, name_of

RESOLUTION = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}
"""How far rounding moves a number at most, relative to it. Other dtypes have that of bfloat16."""


class Snapshot(NamedTuple):
    """The moving statistics of all layers, one value for each channel.

    Attributes:
        mean: The moving means.
        spread: What a layer averages beside the mean: the variance or, with ``renorm``, the standard deviation.
        counts: The number of updates so far where a layer counts them (``momentum=None``), and otherwise 0.
    """

    mean: np.ndarray
    spread: np.ndarray
    counts: np.ndarray


class WatchedLayers:
    """The built batch normalization layers of a model, and where their channels are in flat arrays.

    Args:
        model: The model.

    Attributes:
        layers: The layers.
        names: Their names in reports.
        sizes: How many channels each has.
        learns: Whether training is meant to update each layer's statistics.
        epsilon: The epsilon of each channel.
        resolution: The relative precision of the statistics of each channel.
        renorm: Whether each channel's layer averages standard deviations.
    """

    def __init__(self, model: keras.layers.Layer):
        self.layers = [layer for layer in batch_norm_layers(model) if layer.built]
        self.names = [name_of(layer) for layer in self.layers]
        self.sizes = np.array([int(np.prod(layer.moving_mean.shape)) for layer in self.layers], int)
        self.learns = np.array([learns_statistics(layer) for layer in self.layers], bool)
        self.epsilon = self.to_channels([layer.epsilon for layer in self.layers])
        self.resolution = self.to_channels(
            [RESOLUTION.get(str(layer.moving_mean.dtype), 2.0**-8) for layer in self.layers]
        )
        self.renorm = self.to_channels([layer.renorm for layer in self.layers])
        self._starts = np.cumsum([0, *self.sizes])[:-1].astype(int)

    @property
    def key(self) -> list[tuple[int, bool]]:
        """What differs when layers were built, frozen or unfrozen in the meantime."""
        return [
            (id(layer), bool(learns))
            for layer, learns in zip(self.layers, self.learns, strict=True)
        ]

    def snapshot(self) -> Snapshot:
        """Reads the moving statistics."""
        return Snapshot(
            self._read(lambda layer: layer.moving_mean),
            self._read(
                lambda layer: layer.moving_stddev if layer.renorm else layer.moving_variance
            ),
            self._read(lambda layer: layer.update_count if layer.momentum is None else None, 0),
        )

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads gamma and beta; 1 and 0 where a layer has none."""
        return self._read(lambda layer: layer.gamma, 1), self._read(lambda layer: layer.beta, 0)

    def variance(self, spread: np.ndarray) -> np.ndarray:
        """The variances that belong to the spreads of a snapshot."""
        derived = np.square(spread) - self.epsilon
        return np.where(self.renorm, derived, spread)

    def to_channels(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """One value for each layer, repeated for each of its channels."""
        return np.repeat(np.asarray(values), self.sizes)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the channels of each layer."""
        return np.add.reduceat(np.asarray(values, np.float64), self._starts)

    def means(self, values: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Means over those channels of each layer where this holds; NaN where it holds nowhere."""
        number = self.sums(where)
        total = self.sums(np.where(where, values, 0.0))
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    def _read(self, weight: Callable[[BatchNormLayer], Any], default: float = 0.0) -> np.ndarray:
        values = []
        for layer, size in zip(self.layers, self.sizes, strict=True):
            variable = weight(layer)
            if variable is None:
                values.append(np.full(size, default))
            else:
                values.append(np.asarray(variable.numpy(), np.float64).ravel())
        return np.concatenate(values)
