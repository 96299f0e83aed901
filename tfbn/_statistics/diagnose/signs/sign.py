"""What shows a cause, and what the signs of several causes share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfbn._statistics.diagnose.comparison import Comparison
from tfbn._statistics.diagnose.evidence import LayerEvidence
from tfbn._statistics.diagnose.model_evidence import ModelEvidence

Layers = Sequence[LayerEvidence]


class Sign(NamedTuple):
    """What shows a cause.

    Attributes:
        layers: The layers concerned; empty for the model as a whole.
        numbers: The evidence.
        words: What is filled into the texts.
        remark: What is added to the explanation.
        experiment: What tells similar causes apart, if it depends on the evidence.
    """

    layers: Layers = ()
    numbers: Mapping[str, float] = {}
    words: Mapping[str, Any] = {}
    remark: str = ""
    experiment: str = ""


def counted(model: ModelEvidence, attribute: str, name: str) -> Sign | None:
    layers = [layer for layer in model.layers if getattr(layer, attribute)]
    total = sum(getattr(layer, attribute) for layer in layers)
    return Sign(layers, {name: total}) if layers else None


def named(model: ModelEvidence, names: Iterable[str]) -> Sign | None:
    wanted = set(names)
    layers = [layer for layer in model.layers if layer.layer in wanted]
    return Sign(layers, {"layers": len(layers)}) if layers else None


def off_sign(layers: Layers, words: Mapping[str, Any] | None = None, **more: Any) -> Sign | None:
    """The sign that these layers are off, if there are any."""
    return Sign(layers, distances(layers), words or {}, **more) if layers else None


def harm(model: ModelEvidence, text: str) -> str:
    """This text if recalibrating raises the loss."""
    return text if model.recalibrating_harms else ""


def compared(model: ModelEvidence, layers: Layers) -> list[tuple[LayerEvidence, Comparison]]:
    found = ((layer, model.comparisons.get(layer.layer)) for layer in layers)
    return [(layer, comparison) for layer, comparison in found if comparison is not None]


def explained_by(comparison: Comparison, statistics: tuple[np.ndarray, np.ndarray]) -> float:
    mean, variance = (np.asarray(part, "float64")[comparison.live] for part in statistics)
    return comparison.explained(mean, variance)


def distances(layers: Layers) -> dict[str, float]:
    ratio = max((layer.log_variance_ratio for layer in layers), key=abs, default=0.0)
    return {
        "mean_shift": max((layer.mean_shift for layer in layers), default=0.0),
        "variance_ratio": math.exp(ratio),
    }
