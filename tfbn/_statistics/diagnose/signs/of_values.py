"""Signs of values that no training gives, and of inputs that a layer cannot normalize."""

from tfbn._statistics.diagnose.losses import Losses
from tfbn._statistics.diagnose.model_evidence import ModelEvidence
from tfbn._statistics.diagnose.signs.sign import Layers, Sign, counted


def not_finite_statistics(model: ModelEvidence) -> Sign | None:
    return counted(model, "not_finite", "values")


def negative_variance(model: ModelEvidence) -> Sign | None:
    return counted(model, "negative", "values")


def dead_gammas(model: ModelEvidence) -> Sign | None:
    return counted(model, "dead_gammas", "channels")


def half_precision_overflow(model: ModelEvidence) -> Sign | None:
    found = model.not_finite
    return Sign(words={"where": found.layer}) if found and found.source == "overflow" else None


def not_finite_inputs(model: ModelEvidence) -> Sign | None:
    found = model.not_finite
    if not found or found.source == "overflow":
        return None
    return Sign(words={"layer": found.layer, "what": found.what, "advice": found.advice})


FEW = 0.05
"""The fraction of constant channels in a layer that is usual."""


def constant_layer(model: ModelEvidence) -> Sign | None:
    layers = [
        layer for layer in model.layers if layer.constant and layer.constant == layer.channels
    ]
    if not layers or (model.losses is not None and model.losses.skill("inference") > 0.5):
        return None
    return _constant(model, layers)


def constant_channels(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in model.layers if layer.constant > FEW * layer.channels]
    return _constant(model, layers) if layers else None


def _constant(model: ModelEvidence, layers: Layers) -> Sign:
    first = min(layers, key=lambda layer: layer.level)
    if first.layer in model.structure.behind_rectifier:
        why = "the ReLU units before it are dead"
        advice = "keras.layers.LeakyReLU() in place of ReLU before it, or a lower learning rate"
    elif first.level == 0:
        why = "the data is constant there, or the weights of the layer before it are 0"
        advice = "look at the data, and at the weights of the layer before it if there is one"
    else:
        why = "the weights of the layer before it are 0, or its own input is constant"
        advice = "look at the weights of the layer before it, and at the data"
    numbers = {"channels": sum(layer.constant for layer in layers)}
    return Sign(layers, numbers, {"first": first.layer, "why": why, "advice": advice})


def shared_domains(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in model.layers if layer.calls_apart > 1]
    numbers = {"calls_apart": max((layer.calls_apart for layer in layers), default=0.0)}
    return Sign(layers, numbers) if layers else None


def nothing_learned(model: ModelEvidence) -> Sign | None:
    if model.losses is None or model.losses.show_learning:
        return None
    return _by_mode(model.losses)


def loss_gap(model: ModelEvidence) -> Sign | None:
    if not model.suffers or not model.recalibrating_helps or model.losses is None:
        return None
    return _by_mode(model.losses)


def _by_mode(losses: Losses) -> Sign:
    return Sign(numbers={mode: values["loss"] for mode, values in losses.modes.items()})
