"""The batch normalization layers of a model at a glance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

from tfbn._models.walk import BatchNormLayer, batch_norm_layers, statistics_are_frozen
from tfbn._support import tables

HEADER = ("layer", "of", "state", "channels", "moving mean", "moving variance", "γ")


@dataclass(frozen=True)
class LayerSummary:
    """One layer: how it is set up, and between what values its weights lie.

    Attributes:
        layer: Its path.
        kind: The package and the class.
        state: "initial" while no batch has moved its statistics, "updated", "not finite" or "not built";
            and whether they are frozen.
        channels: How many means it has.
        axis: Of the channels.
        momentum: None for the cumulative average.
        epsilon: What is added to the variance.
        mean: The least and the largest moving mean.
        variance: The least and the largest moving variance.
        gamma: The least and the largest γ; None without one.
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
        built = layer.moving_mean is not None
        package = type(layer).__module__.split(".")[0]
        return cls(
            layer=layer.path or layer.name,
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

    def cells(self) -> list[str]:
        ranges = [_shown(values) for values in (self.mean, self.variance, self.gamma)]
        package = self.kind.split(".")[0]
        return [self.layer, package, self.state, str(self.channels), *ranges]


@dataclass(frozen=True)
class Inspection:
    """The layers of a model in order of definition; it prints as a table."""

    model: str
    layers: tuple[LayerSummary, ...]

    @classmethod
    def of(cls, model: keras.Model) -> Inspection:
        return cls(model.name, tuple(LayerSummary.of(layer) for layer in batch_norm_layers(model)))

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types; what is not finite is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [number if np.isfinite(number) else None for number in value]
            return value

        layers = [{k: plain(v) for k, v in asdict(layer).items()} for layer in self.layers]
        return {"model": self.model, "layers": layers}

    def __str__(self) -> str:
        title = f"{self.model}: {len(self.layers)} batch normalization layers"
        if not self.layers:
            return title
        return tables.text(title, HEADER, [layer.cells() for layer in self.layers])


def _state(layer: BatchNormLayer) -> str:
    if layer.moving_mean is None:
        return "not built"
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(variance))):
        return "not finite"
    state = "initial" if not np.any(mean) and np.all(variance == 1) else "updated"
    return f"{state}, frozen" if statistics_are_frozen(layer) else state


def _range(weight: Any) -> tuple[float, float] | None:
    if weight is None:
        return None
    values = np.asarray(weight.numpy(), np.float64)
    return float(values.min()), float(values.max())


def _shown(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.2g} … {values[1]:.2g}"
