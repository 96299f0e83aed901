"""Signs of a wrong use of layers: flags, frozen layers, statistics that were never updated."""

from tfbn._statistics.diagnose.model_evidence import ModelEvidence, is_frozen, is_off
from tfbn._statistics.diagnose.signs.sign import Layers, Sign, harm, named, off_sign

TRAIN_IN_TRAINING_MODE = (
    "call the model with training=True in the training loop, or use tfbn.TrainingLoop"
)
PASS_LABELS = (
    "Pass labels, with a compiled model, to see whether the loss is lower with the statistics of the data. If "
    "the other weights were trained while these layers were frozen, it is not."
)


def training_forced(model: ModelEvidence) -> Sign | None:
    return named(model, model.structure.forced)


def training_false_overridden(model: ModelEvidence) -> Sign | None:
    return named(model, model.structure.overridden)


def training_not_passed_on(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in _initial(model) if layer.layer in model.structure.ignored]
    effect = (
        "The weights were trained that way, and recalibrating would raise the loss: correct the call and "
        "train again."
    )
    return off_sign(layers, {"effect": harm(model, effect)})


def trained_in_inference_mode(model: ModelEvidence) -> Sign | None:
    works = model.losses is not None and model.losses.works("inference")
    return off_sign(_initial(model)) if works and model.recalibrating_harms else None


def never_updated(model: ModelEvidence) -> Sign | None:
    layers = _initial(model)
    if layers and all(layer.state == "momentum=1" for layer in layers):
        words = {
            "why": "with momentum=1, no batch changes them",
            "advice": "a momentum of 0.9 or 0.99",
        }
    else:
        why = "the training ran without training=True, or its updates were lost, or there was none"
        words = {"why": why, "advice": TRAIN_IN_TRAINING_MODE}
    return off_sign(layers, words)


def frozen_but_recalibrating_helps(model: ModelEvidence) -> Sign | None:
    helps = model.suffers and model.recalibrating_helps
    return off_sign(_frozen(model)) if helps else None


def frozen_from_the_start(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in _frozen(model) if layer.never_updated]
    effect = "The other weights were trained that way: recalibrating would raise the loss."
    return off_sign(layers, {"effect": harm(model, effect)})


def frozen_rightly(model: ModelEvidence) -> Sign | None:
    return off_sign(_frozen(model)) if model.recalibrating_harms else None


def frozen_and_unclear(model: ModelEvidence) -> Sign | None:
    if model.losses is not None and not model.suffers:
        return None
    if model.losses is not None:
        return off_sign(_frozen(model), {"effect": "Recalibrating them does not help."})
    return off_sign(_frozen(model), {"effect": ""}, experiment=PASS_LABELS)


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
