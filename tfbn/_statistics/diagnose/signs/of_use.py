"""Signs of a wrong use of layers: flags, frozen layers, statistics that were never updated."""

from tfbn._statistics.diagnose.model_evidence import ModelEvidence, is_frozen, is_off
from tfbn._statistics.diagnose.signs.sign import Layers, Sign, distances, named


def training_forced(model: ModelEvidence) -> Sign | None:
    return named(model, model.structure.forced)


def training_false_overridden(model: ModelEvidence) -> Sign | None:
    return named(model, model.structure.overridden)


def training_not_passed_on(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in _initial(model) if layer.layer in model.structure.ignored]
    effect = (
        "The weights were trained that way, and recalibrating would raise the loss: correct the call and "
        "train again."
        if model.recalibrating_harms
        else ""
    )
    return Sign(layers, distances(layers), {"effect": effect}) if layers else None


def trained_in_inference_mode(model: ModelEvidence) -> Sign | None:
    layers = _initial(model)
    return Sign(layers, distances(layers)) if layers and model.recalibrating_harms else None


def never_updated(model: ModelEvidence) -> Sign | None:
    layers = _initial(model)
    if not layers:
        return None
    why = "the training ran without training=True, or its updates were lost, or there was none"
    return Sign(layers, distances(layers), {"why": why})


def frozen_but_recalibrating_helps(model: ModelEvidence) -> Sign | None:
    layers = _frozen(model)
    if not layers or not model.suffers or not model.recalibrating_helps:
        return None
    return Sign(layers, distances(layers), includes_frozen=True)


def frozen_from_the_start(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in _frozen(model) if layer.never_updated]
    effect = (
        "The other weights were trained that way: recalibrating would raise the loss."
        if model.recalibrating_harms
        else ""
    )
    return Sign(layers, distances(layers), {"effect": effect}, True) if layers else None


def frozen_rightly(model: ModelEvidence) -> Sign | None:
    layers = _frozen(model)
    return Sign(layers, distances(layers)) if layers and model.recalibrating_harms else None


def frozen_and_unclear(model: ModelEvidence) -> Sign | None:
    layers = _frozen(model)
    if not layers or (model.losses is not None and not model.suffers):
        return None
    effect = "Recalibrating them does not help." if model.losses is not None else ""
    return Sign(layers, distances(layers), {"effect": effect}, True)


def _initial(model: ModelEvidence) -> Layers:
    """Layers that were never updated although they are not frozen."""
    return [
        layer
        for layer in model.layers
        if layer.never_updated and layer.state != "not called" and not is_frozen(layer)
        if is_off(layer) or not layer.measured
    ]


def _frozen(model: ModelEvidence) -> Layers:
    return [layer for layer in model.layers if is_frozen(layer) and is_off(layer)]
