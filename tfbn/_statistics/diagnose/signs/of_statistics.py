"""Signs of why moving statistics are off."""

import numpy as np

from tfbn._statistics.diagnose.explanations import (
    best_class_fraction,
    best_initial_weight,
    best_pull_to_zero,
    initial_values,
    input_scale,
    scaled_inputs,
)
from tfbn._statistics.diagnose.model_evidence import ModelEvidence, is_off
from tfbn._statistics.diagnose.signs.sign import (
    Layers,
    Sign,
    compared,
    distances,
    explained_by,
    harm,
    named,
    off_sign,
)
from tfbn._support.reports import count, percent


def replicas_diverged(model: ModelEvidence) -> Sign | None:
    return named(model, model.diverged)


def purely_rescaled_inputs(model: ModelEvidence) -> Sign | None:
    """Large means hide which of three causes it is: each of them brings the mean nearer to 0."""
    first = compared(model, [layer for layer in model.to_blame if layer.level == 0])
    found = [scaled_inputs(c) for _, c in first if len(c.mean) >= 4]
    others = [
        max(best_pull_to_zero(c).explained, best_initial_weight(c).explained) for _, c in first
    ]
    if not found or 0.8 < (scale := float(np.median([one.value for one in found]))) < 1.25:
        return None
    rest = 1 - min(one.explained for one in found)
    if rest > 0.1 or rest > 0.1 * (1 - max(others)):
        return None
    return _rescaled(model, scale)


def empty_batches(model: ModelEvidence) -> Sign | None:
    found = [best_pull_to_zero(c) for _, c in compared(model, model.off)]
    if not found:
        return None
    explained = np.median([one.explained for one in found])
    lag = np.median([best_initial_weight(c).explained for _, c in compared(model, model.off)])
    kept = float(np.median([one.value for one in found]))
    apart = max(abs(one.value - kept) for one in found)
    if explained < max(0.9, lag) or kept > 0.97 or apart > 0.1:
        return None
    masked = [layer for layer in model.candidates if layer.layer in model.structure.masked]
    # They pull all layers that see the masks: among many, one or two have another reason.
    if 2 * len(found) < len(masked or model.candidates):
        return None
    return Sign(model.off, {**distances(model.off), "kept": kept}, {"kept": kept})


def masks_ignored(model: ModelEvidence) -> Sign | None:
    masked = [layer for layer in model.off if layer.layer in model.structure.masked]
    if not masked or model.experiments is None:
        return None
    first = min(layer.level for layer in masked)
    unmasked = model.experiments.without_masks
    explained = [
        explained_by(c, unmasked[layer.layer])
        for layer, c in compared(model, masked)
        if layer.level == first
    ]
    if not explained or np.median(explained) < 0.8:
        return None
    effect = "The weights were trained that way, and recalibrating would raise the loss."
    return off_sign(masked, {"effect": harm(model, effect)})


ON_TRAINING_DATA = (
    "Diagnose the model on its training data, prepared as in training. If that has no finding, the data "
    "here is different. If it has the same finding, the weights are."
)
LAG = 0.03
"""How much of the moving statistics may be old if inputs have a variance of about 1."""
LEAST_WEIGHT = 2e-3
"""The smallest weight of old statistics that can be told from chance."""


def lagging_statistics(model: ModelEvidence) -> Sign | None:
    layers = [layer for layer in model.to_blame if layer.momentum is not None]
    if not layers:
        return None
    return _lag_by_steps(model, layers) or _lag_by_statistics(model, layers)


def _lag_by_steps(model: ModelEvidence, layers: Layers) -> Sign | None:
    """How much is old after the steps that the optimizer counted."""
    if not model.steps:
        return None
    weights = [(layer.momentum or 0.0) ** model.steps for layer in layers]
    weight = float(np.median(weights))
    explained = [
        initial_values(c, (c.layer.momentum or 0.0) ** model.steps)
        for _, c in compared(model, layers)
    ]
    if weight < LAG or not explained:
        return None
    steps = f"{count(model.steps, 'training step')} {'was' if model.steps == 1 else 'were'}"
    if np.median(explained) > 0.5:
        return _lag(layers, weight, "are still the initial values", steps)
    if weight > 0.5:  # It was trained before, with another optimizer.
        experiment = (
            "The optimizer counts the steps since the model was compiled. " + ON_TRAINING_DATA
        )
        return _lag(layers, weight, "are older than these steps", steps, experiment)
    return None


def _lag_by_statistics(model: ModelEvidence, layers: Layers) -> Sign | None:
    """How much is the initial values, if the layers agree on that."""
    weight, explained = map(float, np.median([layer.initial_weight for layer in layers], axis=0))
    if weight < LAG:
        # Where the true variance is small, a hundredth of the initial 1 is much. Other layers do not show it.
        alike, least, tolerance = layers, 0.95, 0.2 * weight
    else:
        alike = [layer for layer in model.candidates if layer.momentum is not None]
        least, tolerance = 0.8, max(0.1, 0.25 * weight)
    agree = [abs(layer.initial_weight[0] - weight) <= tolerance for layer in alike]
    if weight < LEAST_WEIGHT or explained < least or np.mean(agree) < 0.8:
        return None
    what = "are still the initial values"
    if weight < LAG:
        what += ", and the initial variance of 1 is large beside the true one"
    return _lag(layers, weight, what, "The training steps were")


def _lag(layers: Layers, weight: float, what: str, steps: str, experiment: str = "") -> Sign:
    momentum = max(layer.momentum or 0 for layer in layers)
    words = {"part": percent(weight), "what": what, "steps": steps, "momentum": momentum}
    numbers = {**distances(layers), "initial_weight": weight}
    return Sign(layers, numbers, words, experiment=experiment)


def variance_shift(model: ModelEvidence) -> Sign | None:
    behind = [
        layer
        for layer in model.candidates
        if is_off(layer, 0.5) and layer.layer in model.structure.behind_noise
    ]
    # Augmentation by layers is meant to: the loss tells whether inference suffers from it.
    if not behind or model.experiments is None or model.recalibrating_helps is False:
        return None
    noisy = model.experiments.with_noise
    explained = [explained_by(c, noisy[layer.layer]) for layer, c in compared(model, behind)]
    if not explained or np.median(explained) < 0.6:
        return None
    return off_sign(behind)


FEW_EXAMPLES = 16


def unlike_batches(model: ModelEvidence) -> Sign | None:
    layers = _missing_variance(model)
    if not layers or model.experiments is None:
        return None
    between = model.experiments.between_classes
    gains = [
        best_class_fraction(c, between[layer.layer][c.live]).explained - layer.batch_size[1]
        for layer, c in compared(model, layers)
        if layer.layer in between
    ]
    return off_sign(layers) if gains and np.median(gains) > 0.02 else None


def small_batches(model: ModelEvidence) -> Sign | None:
    layers = _missing_variance(model)
    if not layers:
        return None
    size = float(np.median([layer.batch_size[0] for layer in layers]))
    return Sign(layers, {**distances(layers), "batch_size": size}, {"size": size})


def _missing_variance(model: ModelEvidence) -> Layers:
    """Layers whose variance misses part of the spread between examples; all layers off must agree."""
    short = [layer for layer in model.off if layer.log_variance_ratio < -0.2]
    fitting = [
        layer
        for layer in short
        if layer.batch_size[0] < FEW_EXAMPLES and layer.batch_size[1] > 0.75
    ]
    return fitting if 2 * len(fitting) > len(model.off) else []


def noisy_statistics(model: ModelEvidence) -> Sign | None:
    quick = [
        layer
        for layer in model.candidates
        if layer.momentum is not None and layer.momentum < 0.5
        if layer.mean_shift > 2 * layer.sampling_error
    ]
    return off_sign(quick, {"momentum": min((layer.momentum or 0 for layer in quick), default=0)})


def rescaled_inputs(model: ModelEvidence) -> Sign | None:
    first = [layer for layer in model.to_blame if layer.level == 0]
    scales = [input_scale(c) for _, c in compared(model, first) if len(c.mean) >= 4]
    if not scales:
        return None
    scale = float(np.median([one.value for one in scales]))
    if min(one.explained for one in scales) < 0.9 or 0.8 < scale < 1.25:
        return None
    return _rescaled(model, scale)


def _rescaled(model: ModelEvidence, scale: float) -> Sign:
    times = 1 / scale
    numbers = {**distances(model.to_blame), "scale": times}
    return Sign(model.to_blame, numbers, {"times": times})


def varied_batches(model: ModelEvidence) -> Sign | None:
    # The first layers see the same values, whatever normalizes.
    behind = [layer for layer in model.to_blame if layer.level]
    if not behind or model.experiments is None:
        return None
    seen = model.experiments.in_training
    explained = [explained_by(c, seen[layer.layer]) for layer, c in compared(model, behind)]
    return off_sign(behind) if explained and np.median(explained) > 0.7 else None


def averaged_weights(model: ModelEvidence) -> Sign | None:
    return off_sign(model.to_blame) if model.averages_weights else None


PRUNED = 0.1


def pruned_weights(model: ModelEvidence) -> Sign | None:
    return off_sign(model.to_blame, {"zeros": model.zeros}) if model.zeros > PRUNED else None


def changed_epsilon(model: ModelEvidence) -> Sign | None:
    small = any(np.median(c.variance) < 0.01 for c in model.comparisons.values())
    if not model.to_blame or not small or model.experiments is None:
        return None
    epsilon = model.experiments.better_epsilon
    if epsilon is None or model.losses is None:
        return None
    if model.losses.gain(f"epsilon={epsilon:g}", over="inference") < 0.5 * model.gain:
        return None
    return off_sign(model.to_blame, {"epsilon": epsilon})


def changed_weights(model: ModelEvidence) -> Sign | None:
    off = model.to_blame
    if not off:
        return None
    level = min(layer.level for layer in off)
    before = [layer for layer in model.layers if layer.examples and layer.level < level]
    matching = all(layer.mean_shift < 0.1 for layer in before)
    if not before or not matching:
        return None
    words = {
        "last": max(before, key=lambda layer: layer.level).layer,
        "first": min(off, key=lambda layer: layer.level).layer,
    }
    return off_sign(off, words)


def other_data_or_weights(model: ModelEvidence) -> Sign | None:
    return off_sign(model.to_blame)
