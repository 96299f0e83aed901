"""A summary of a model's batch normalization layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tfbn._models.walk import (
    BatchNormLayer,
    batch_norm_layers,
    has_initial_statistics,
    name_of,
    statistics_are_frozen,
)
from tfbn._support import html
from tfbn._support.reports import TableReport, count


@dataclass(frozen=True)
class LayerSummary:
    """The settings of one layer, and the range of its weights.

    Attributes:
        layer: Its path.
        kind: Its package and class, such as ``"keras.BatchNormalization"``.
        state: "initial" if its moving statistics were never updated, "updated", "not finite" or "not
            built"; followed by ", frozen" if its statistics are frozen.
        channels: How many means it has.
        axis: Its channel axis or axes.
        momentum: Its momentum; None for the cumulative average.
        epsilon: What is added to the variance.
        mean: The smallest and the largest moving mean; None if it is not built.
        variance: The smallest and the largest moving variance; None if it is not built.
        gamma: The smallest and the largest γ; None if it has none.
    """

    layer: str
    kind: str
    state: str
    channels: int
    axis: int | list[int]
    momentum: float | None
    epsilon: float
    mean: tuple[float, float] | None
    variance: tuple[float, float] | None
    gamma: tuple[float, float] | None

    @classmethod
    def of(cls, layer: BatchNormLayer) -> LayerSummary:
        """Summarizes a layer."""
        built = layer.moving_mean is not None
        package = type(layer).__module__.split(".")[0]
        return cls(
            layer=name_of(layer),
            kind=f"{package}.{type(layer).__name__}",
            state=_state(layer),
            channels=int(np.prod(layer.moving_mean.shape)) if built else 0,
            axis=layer.axis,
            momentum=layer.momentum,
            epsilon=layer.epsilon,
            mean=_range(layer.moving_mean),
            variance=_range(layer.moving_variance),
            gamma=_range(layer.gamma),
        )


@dataclass(frozen=True)
class Inspection(TableReport):
    """A summary of a model's batch normalization layers. It prints as a table.

    Attributes:
        model: The name of the model.
        layers: A `LayerSummary` of each layer, in order of definition.
    """

    _header = ("layer", "package", "state", "channels", "moving mean", "moving variance", "γ")

    model: str
    layers: tuple[LayerSummary, ...]

    @classmethod
    def of(cls, model: keras.layers.Layer) -> Inspection:
        """Summarizes a model.

        Args:
            model: A Keras model or layer.

        Raises:
            TypeError: If `model` is not a Keras model or layer.
        """
        return cls(model.name, tuple(LayerSummary.of(layer) for layer in batch_norm_layers(model)))

    def _page(self) -> tuple[str, list[str]]:
        states = [layer.state for layer in self.layers]
        legend = sorted(set(states), key=lambda state: ("updated" not in state, "not" in state))
        names = [f"{layer.layer}: {layer.state}" for layer in self.layers]
        bars = {3: [float(layer.channels) for layer in self.layers]}
        numeric = [False, False, False, True, True, True, True]
        parts = [html.squares(states, names, legend)] if 0 < len(legend) <= 4 else []
        return self._title(), [*parts, html.table(self._header, self._rows(), numeric, bars)]

    def _title(self) -> str:
        return f"{self.model}: {count(len(self.layers), 'batch normalization layer')}"

    def _rows(self) -> list[list[str]]:
        return [
            [
                layer.layer,
                layer.kind.split(".")[0],
                layer.state,
                str(layer.channels),
                *(_shown(values) for values in (layer.mean, layer.variance, layer.gamma)),
            ]
            for layer in self.layers
        ]


def _state(layer: BatchNormLayer) -> str:
    if layer.moving_mean is None:
        return "not built"
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance))):
        return "not finite"
    state = "initial" if has_initial_statistics(layer) else "updated"
    return f"{state}, frozen" if statistics_are_frozen(layer) else state


def _range(weight: Any) -> tuple[float, float] | None:
    if weight is None:
        return None
    values = np.asarray(weight.numpy(), np.float64)
    return float(values.min()), float(values.max())


def _shown(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.2g} … {values[1]:.2g}"
