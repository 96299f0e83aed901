"""From evidence to findings: what is wrong, how bad it is, and the call that cures it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfbn._statistics.diagnose.evidence import LayerEvidence

SEVERITIES = ("error", "warning", "note")

# Healthy models that were measured stayed under a quarter of these.
SHIFT = 0.25  # of the mean, in sigma
RATIO = 0.35  # of the variances, in logarithms
GROSS = 4.0  # times these it is an error
LOSS = 0.25  # relative; a healthy average over the last steps costs some too

RECALIBRATE = "tfbn.recalibrate(model, data)"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: "error": predictions are wrong; "warning": they suffer; "note": good to know.
        kind: A name for it, such as "lagging_statistics".
        layers: The layers that show it; none, if it is about the model.
        what: What it is, in a sentence.
        evidence: The numbers behind it.
        cure: The call that cures it.
    """

    severity: str
    kind: str
    layers: tuple[str, ...]
    what: str
    evidence: Mapping[str, float]
    cure: str


@dataclasses.dataclass(frozen=True)
class ModelEvidence:
    """What was seen of the model as a whole.

    Attributes:
        modes: The loss and the metrics by mode: "training" (batch statistics), "inference" (moving
            statistics), "recalibrated" (those of all data). Empty without labels or a loss.
        averaged: Whether the optimizer averages the weights.
        not_finite: The error that a NaN or an infinity on the way raised, if one did.
        forced: Layers that run in training mode though the model is called with ``training=False``.
        ignored: Layers that run in inference mode though the model is called with ``training=True``.
        overridden: Layers in a part that is called with ``training=False``, and train all the same.
    """

    modes: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    averaged: bool = False
    not_finite: str = ""
    forced: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()


def find(layers: Sequence[LayerEvidence], model: ModelEvidence) -> tuple[Finding, ...]:
    """All findings, the worst first."""
    found = [*_of_weights(layers, model), *_of_structure(model), *_of_inputs(layers)]
    known = {name for finding in found if finding.kind in BROKEN for name in finding.layers}
    off = [layer for layer in layers if _is_off(layer) and layer.layer not in known]
    found += _of_statistics(off, layers, model)
    if not found:
        found += _of_loss(model)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


BROKEN = ("not_finite_statistics", "negative_variance", "never_updated", "shared_domains")


def _of_weights(layers: Sequence[LayerEvidence], model: ModelEvidence) -> Iterator[Finding]:
    bad = [layer for layer in layers if layer.not_finite]
    if bad:
        yield Finding(
            "error",
            "not_finite_statistics",
            _names(bad),
            "Moving statistics are NaN or infinite: one batch that was not finite, or empty, is enough for "
            "Keras's layer.",
            {"values": sum(layer.not_finite for layer in bad)},
            f"{RECALIBRATE}; and model = tfbn.convert(model) before training on, whose layers leave such "
            "batches out",
        )
    bad = [layer for layer in layers if layer.negative]
    if bad:
        yield Finding(
            "error",
            "negative_variance",
            _names(bad),
            "Moving variances are below 0, which no data gives: the weights were spoiled on their way here.",
            {"values": sum(layer.negative for layer in bad)},
            RECALIBRATE,
        )
    bad = [layer for layer in layers if layer.never_updated and layer.state != "not called"]
    bad = [layer for layer in bad if _is_off(layer) or not layer.measured]
    if bad:
        ignored = set(_names(bad)) & set(model.ignored)
        why = (
            "the model's own call does not pass `training` on to them"
            if ignored
            else "training ran without training=True, or never ran"
        )
        yield Finding(
            "error",
            "never_updated",
            _names(bad),
            f"The moving statistics are the initial ones, 0 and 1: {why}.",
            {"mean_shift": _worst(bad, "mean_shift")},
            f"{RECALIBRATE}; and train by model(x, training=True), or tfbn.TrainingLoop(model, ...)",
        )
    if model.not_finite:
        yield Finding(
            "error", "not_finite_inputs", (), model.not_finite, {}, "model.load_weights(path)"
        )


def _of_structure(model: ModelEvidence) -> Iterator[Finding]:
    if model.forced:
        yield Finding(
            "error",
            "training_forced",
            model.forced,
            "They are called with training=True by the model itself: in inference an example's output depends "
            "on the others in its batch, and every prediction moves the statistics.",
            {"layers": len(model.forced)},
            "self.bn(x, training=training) in the model's call, with the `training` that it receives",
        )
    if model.overridden:
        yield Finding(
            "warning",
            "training_false_overridden",
            model.overridden,
            "They are in a part of the model that is called with training=False, which Keras overrides: in "
            "`fit` they run in training mode and their statistics move (keras#20285).",
            {"layers": len(model.overridden)},
            "tfbn.freeze(model, within=base)",
        )


def _of_inputs(layers: Sequence[LayerEvidence]) -> Iterator[Finding]:
    bad = [layer for layer in layers if layer.calls_apart > 1]
    if bad:
        yield Finding(
            "warning",
            "shared_domains",
            _names(bad),
            "One layer is called on inputs of different domains: training normalizes each by its own "
            "statistics, inference all by those of the mixture.",
            {"calls_apart": _worst(bad, "calls_apart")},
            "tfbn.BatchNormalization() of its own for each of the calls",
        )
    bad = [layer for layer in layers if layer.constant]
    if bad:
        yield Finding(
            "warning",
            "constant_channels",
            _names(bad),
            "Channels whose input never changes: dead units before them. What comes out is beta.",
            {"channels": sum(layer.constant for layer in bad)},
            "keras.layers.LeakyReLU() in place of ReLU before them, or a lower learning rate; or prune them",
        )
    bad = [layer for layer in layers if layer.dead_gammas]
    if bad:
        yield Finding(
            "note",
            "dead_gammas",
            _names(bad),
            "Channels whose gamma is 0: nothing of their input passes.",
            {"channels": sum(layer.dead_gammas for layer in bad)},
            "tfbn.BatchNormalization(gamma_regularizer=None), or prune the channels",
        )


def _of_statistics(
    off: Sequence[LayerEvidence], layers: Sequence[LayerEvidence], model: ModelEvidence
) -> Iterator[Finding]:
    """Why moving statistics are not those of the data: one explanation for all of them, the best."""
    tiny = [layer for layer in layers if layer.within_batch and math.log(_bessel(layer)) > 0.1]
    if tiny and all(_is_unbiased(layer) for layer in tiny) and any(layer.level for layer in tiny):
        yield Finding(
            "warning",
            "unbiased_variance",
            _names(tiny),
            "The moving variances are the unbiased ones of batches as tiny as these, N/(N-1) times what "
            "normalizes in training: PyTorch and tf_keras keep them so, Keras does not.",
            {
                "ratio": math.exp(_worst(tiny, "within_batch")),
                "N/(N-1)": max(_bessel(layer) for layer in tiny),
            },
            RECALIBRATE,
        )
        return
    if not off:
        return
    evidence = {
        "mean_shift": _worst(off, "mean_shift"),
        "variance_ratio": math.exp(max((layer.log_variance_ratio for layer in off), key=abs)),
    }
    gross = _costs(model) or any(_is_off(layer, GROSS) for layer in off)
    severity = "error" if gross else "warning"
    weights = [layer.initial_weight[0] for layer in off]
    if all(_lags(layer) for layer in off) and max(weights) - min(weights) < 0.2:
        yield Finding(
            severity,
            "lagging_statistics",
            _names(off),
            "The moving statistics still hold much of their initial values: there were too few steps for the "
            "momentum.",
            {**evidence, "initial_weight": max(weights)},
            f"{RECALIBRATE}; and tfbn.BatchNormalization(momentum=None), or a smaller momentum, for short "
            "trainings",
        )
        return
    small = [layer for layer in off if _is_of_small_batches(layer)]
    if small and all(layer.mean_shift < 2 * SHIFT for layer in off):
        yield Finding(
            severity,
            "small_batches",
            _names(off),
            "The moving variances are those in batches of very few examples: training saw hardly any of the "
            "spread between examples.",
            {**evidence, "batch_size": min(layer.batch_size[0] for layer in small)},
            f"{RECALIBRATE}; and for training larger batches, or keras.layers.GroupNormalization()",
        )
        return
    if model.averaged:
        yield Finding(
            severity,
            "averaged_weights",
            _names(off),
            "The optimizer averages the weights (use_ema), and the moving statistics are not those of the "
            "averaged weights: they were collected for the others.",
            evidence,
            f"{RECALIBRATE}; or callbacks=[tfbn.RecalibrateAfterTraining(data)]",
        )
        return
    yield Finding(
        severity,
        "other_data_or_weights",
        _names(off),
        "The moving statistics are not those of this data under these weights: the data is of another domain "
        "than in training, or the weights were loaded, averaged or changed since.",
        evidence,
        RECALIBRATE,
    )


def _of_loss(model: ModelEvidence) -> Iterator[Finding]:
    if _costs(model):
        yield Finding(
            "warning",
            "loss_gap",
            (),
            "The loss in inference mode is above what it would be with the statistics of this data.",
            {mode: values["loss"] for mode, values in model.modes.items()},
            RECALIBRATE,
        )


def _costs(model: ModelEvidence) -> bool:
    """Whether the loss suffers from the moving statistics."""
    if not model.modes:
        return False
    now, cured = (model.modes[mode]["loss"] for mode in ("inference", "recalibrated"))
    return now > (1 + LOSS) * cured + 0.01


def _is_off(layer: LayerEvidence, times: float = 1.0) -> bool:
    return layer.mean_shift > times * SHIFT or layer.log_variance_ratio_rms > times * RATIO


def _lags(layer: LayerEvidence) -> bool:
    weight, explained = layer.initial_weight
    return 0.01 < weight <= 1.001 and explained > 0.8


def _is_of_small_batches(layer: LayerEvidence) -> bool:
    size, off = layer.batch_size
    return size < 16 and off < 0.25 and layer.log_variance_ratio < -0.2


def _bessel(layer: LayerEvidence) -> float:
    """N/(N-1) for the batches of this data."""
    return layer.values_per_batch / max(layer.values_per_batch - 1, 1e-9)


def _is_unbiased(layer: LayerEvidence) -> bool:
    """Whether the moving variance is the unbiased one, and not just that of larger batches.

    The latter is not above the true variance. The former is, behind another normalization: there, what
    a batch has of the spread between batches was taken out before.
    """
    expected = math.log(_bessel(layer))
    return (
        expected < 1
        and 0.6 < layer.within_batch / expected < 1.4
        and (layer.level == 0 or layer.log_variance_ratio > 0.25 * expected)
    )


def _names(layers: Sequence[LayerEvidence]) -> tuple[str, ...]:
    return tuple(layer.layer for layer in layers)


def _worst(layers: Sequence[LayerEvidence], attribute: str) -> float:
    return max((getattr(layer, attribute) for layer in layers), key=abs)


def as_dict(finding: Finding) -> dict[str, Any]:
    """The finding in plain Python."""
    return dataclasses.asdict(finding) | {"evidence": dict(finding.evidence)}
