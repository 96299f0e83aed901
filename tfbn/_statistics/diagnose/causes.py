"""The table of causes: what each one looks like in the evidence, and what cures it.

`find` reads the table from top to bottom. Causes of the same group exclude each other: the first one
that applies explains the evidence. The other causes are independent of each other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from tfbn._statistics.diagnose.evidence import LayerEvidence
from tfbn._statistics.diagnose.finding import SEVERITIES, Finding

# Healthy models that were measured stayed under a quarter of these.
MEAN_SHIFT = 0.25
"""In standard deviations."""
LOG_VARIANCE_RATIO = 0.35
GROSS = 4.0
"""How many times these limits make an error of a warning."""
LOSS = 0.25
"""Relative. Even a healthy moving average, over the last steps, costs something."""

RECALIBRATE = "tfbn.recalibrate(model, data)"


@dataclasses.dataclass(frozen=True)
class ModelEvidence:
    """What was observed of a model.

    Attributes:
        layers: What was measured of each layer.
        modes: The loss and the metrics by mode: "training" (batch statistics), "inference" (moving
            statistics) and "recalibrated" (statistics of all data). Empty without labels or a loss.
        averages_weights: Whether the optimizer keeps averages of the weights.
        not_finite: The text of the error about the first layer whose inputs were not finite, if any.
        forced: Layers that run in training mode although the model is called with ``training=False``.
        ignored: Layers that run in inference mode although the model is called with ``training=True``.
        overridden: Layers inside a part of the model that is called with ``training=False``, which run in
            training mode all the same.
    """

    layers: Sequence[LayerEvidence]
    modes: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    averages_weights: bool = False
    not_finite: str = ""
    forced: Sequence[str] = ()
    ignored: Sequence[str] = ()
    overridden: Sequence[str] = ()

    @property
    def off(self) -> list[LayerEvidence]:
        """The layers whose moving statistics differ from those of the data, for no reason of their own."""
        return [
            layer
            for layer in self.layers
            if _is_off(layer) and not (layer.never_updated or layer.calls_apart > 1)
        ]

    @property
    def loss_suffers(self) -> bool:
        """Whether the moving statistics cost loss."""
        if not self.modes:
            return False
        inference, recalibrated = (self.modes[m]["loss"] for m in ("inference", "recalibrated"))
        return inference > (1 + LOSS) * recalibrated + 0.01


Layers = Sequence[LayerEvidence]


@dataclasses.dataclass(frozen=True)
class Cause:
    """One row of the table.

    Attributes:
        kind: The name of the cause.
        severity: "error", "warning" or "note"; "by effect" lets the evidence decide between the first two.
        concerns: Returns the layers that show the cause, or True where it concerns the model as a whole.
        explanation: What the finding says. ``{names}`` in braces refer to `ModelEvidence`.
        evidence: Returns the numbers that the finding rests on, from the layers concerned.
        cure: What the finding recommends.
        group: Of the causes of one group, only the first that applies becomes a finding.
    """

    kind: str
    severity: str
    concerns: Callable[[ModelEvidence], Layers | bool]
    explanation: str
    cure: str
    evidence: Callable[[Layers, ModelEvidence], Mapping[str, float]] = lambda layers, model: {}
    group: str = ""


def find(model: ModelEvidence) -> tuple[Finding, ...]:
    """Returns all findings, the most severe first."""
    findings: list[Finding] = []
    explained = set()
    for cause in CAUSES:
        concerned = cause.concerns(model)
        if not concerned or cause.group in explained:
            continue
        if cause.group:
            explained.add(cause.group)
        layers = [] if concerned is True else list(concerned)
        findings.append(
            Finding(
                severity=_severity(cause, layers, model),
                kind=cause.kind,
                layers=tuple(layer.layer for layer in layers),
                explanation=cause.explanation.format_map(vars(model)),
                evidence=cause.evidence(layers, model),
                cure=cause.cure,
            )
        )
    if model.loss_suffers and not findings:
        findings.append(_unexplained(model))
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def _severity(cause: Cause, layers: Layers, model: ModelEvidence) -> str:
    if cause.severity != "by effect":
        return cause.severity
    gross = model.loss_suffers or any(_is_off(layer, GROSS) for layer in layers)
    return "error" if gross else "warning"


def _unexplained(model: ModelEvidence) -> Finding:
    return Finding(
        "warning",
        "loss_gap",
        (),
        "The loss in inference mode is higher than it would be with the statistics of this data.",
        {mode: values["loss"] for mode, values in model.modes.items()},
        RECALIBRATE,
    )


# What the causes look for


def _named(names: Callable[[ModelEvidence], Iterable[str]]) -> Callable[[ModelEvidence], Layers]:
    def concerned(model: ModelEvidence) -> Layers:
        wanted = set(names(model))
        return [layer for layer in model.layers if layer.layer in wanted]

    return concerned


def _where(condition: Callable[[LayerEvidence], object]) -> Callable[[ModelEvidence], Layers]:
    return lambda model: [layer for layer in model.layers if condition(layer)]


def _never_updated(model: ModelEvidence) -> Layers:
    return [
        layer
        for layer in model.layers
        if layer.never_updated and layer.state != "not called"
        if _is_off(layer) or not layer.measured
    ]


def _never_updated_and_ignored(model: ModelEvidence) -> Layers:
    bad = _never_updated(model)
    return bad if any(layer.layer in model.ignored for layer in bad) else []


def _lagging(model: ModelEvidence) -> Layers:
    off = model.off
    weights = [layer.initial_weight[0] for layer in off]
    lags = all(
        0.01 < weight <= 1.001 and explained > 0.8
        for weight, explained in (layer.initial_weight for layer in off)
    )
    return off if off and lags and max(weights) - min(weights) < 0.2 else []


def _of_small_batches(model: ModelEvidence) -> Layers:
    off = model.off
    small = any(
        layer.batch_size[0] < 16 and layer.batch_size[1] < 0.25 and layer.log_variance_ratio < -0.2
        for layer in off
    )
    return off if small and all(layer.mean_shift < 2 * MEAN_SHIFT for layer in off) else []


def _is_off(layer: LayerEvidence, times: float = 1.0) -> bool:
    return (
        layer.mean_shift > times * MEAN_SHIFT
        or layer.log_variance_ratio_rms > times * LOG_VARIANCE_RATIO
    )


def _total(name: str, attribute: str) -> Callable[[Layers, ModelEvidence], Mapping[str, float]]:
    return lambda layers, model: {name: sum(getattr(layer, attribute) for layer in layers)}


def _distances(layers: Layers, model: ModelEvidence) -> dict[str, float]:
    ratio = max((layer.log_variance_ratio for layer in layers), key=abs)
    return {
        "mean_shift": max(layer.mean_shift for layer in layers),
        "variance_ratio": math.exp(ratio),
    }


CAUSES = (
    Cause(
        kind="not_finite_statistics",
        severity="error",
        concerns=_where(lambda layer: layer.not_finite),
        explanation="The moving statistics contain NaN or infinity. In Keras's layer, a single batch that "
        "is empty or not finite causes this.",
        evidence=_total("values", "not_finite"),
        cure=f"{RECALIBRATE}; and model = tfbn.convert(model) before training on: its layers skip such "
        "batches",
    ),
    Cause(
        kind="negative_variance",
        severity="error",
        concerns=_where(lambda layer: layer.negative),
        explanation="Some moving variances are negative. No data gives such a variance: the weights were "
        "damaged when they were converted or edited.",
        evidence=_total("values", "negative"),
        cure=RECALIBRATE,
    ),
    Cause(
        kind="never_updated",
        severity="error",
        group="initial statistics",
        concerns=_never_updated_and_ignored,
        explanation="The moving statistics still have their initial values, 0 and 1: the model's `call` does "
        "not pass `training` on to these layers.",
        evidence=_distances,
        cure=f"{RECALIBRATE}; and self.bn(x, training=training) in the model's `call`",
    ),
    Cause(
        kind="never_updated",
        severity="error",
        group="initial statistics",
        concerns=_never_updated,
        explanation="The moving statistics still have their initial values, 0 and 1: the model was trained "
        "without training=True, or not at all.",
        evidence=_distances,
        cure=f"{RECALIBRATE}; and train with model(x, training=True), or tfbn.TrainingLoop(model, ...)",
    ),
    Cause(
        kind="not_finite_inputs",
        severity="error",
        concerns=lambda model: bool(model.not_finite),
        explanation="{not_finite}",
        cure="model.load_weights(path)",
    ),
    Cause(
        kind="training_forced",
        severity="error",
        concerns=_named(lambda model: model.forced),
        explanation="The model calls these layers with training=True even in inference: the output for an "
        "example depends on the rest of its batch, and every prediction updates the moving statistics.",
        cure="self.bn(x, training=training) in the model's `call`, with the `training` that it receives",
    ),
    Cause(
        kind="training_false_overridden",
        severity="warning",
        concerns=_named(lambda model: model.overridden),
        explanation="These layers are in a part of the model that is called with training=False. Keras "
        "overrides that: in `fit` they run in training mode and update their statistics (keras#20285).",
        cure="tfbn.freeze(model, within=base)",
    ),
    Cause(
        kind="shared_domains",
        severity="warning",
        concerns=_where(lambda layer: layer.calls_apart > 1),
        explanation="One layer is called on inputs from different distributions. Training normalizes each by "
        "its own statistics, inference normalizes all of them by the statistics of the mixture.",
        evidence=lambda layers, model: {"calls_apart": max(x.calls_apart for x in layers)},
        cure="a BatchNormalization layer of its own for each of the calls",
    ),
    Cause(
        kind="constant_channels",
        severity="warning",
        concerns=_where(lambda layer: layer.constant),
        explanation="Some channels have a constant input: the units before them are dead. The output of such a "
        "channel is beta.",
        evidence=_total("channels", "constant"),
        cure="keras.layers.LeakyReLU() instead of ReLU before them, or a lower learning rate; or prune them",
    ),
    Cause(
        kind="dead_gammas",
        severity="note",
        concerns=_where(lambda layer: layer.dead_gammas),
        explanation="Some channels have a gamma of 0, so their input is lost.",
        evidence=_total("channels", "dead_gammas"),
        cure="tfbn.BatchNormalization(gamma_regularizer=None), or prune the channels",
    ),
    Cause(
        kind="lagging_statistics",
        severity="by effect",
        group="moving statistics",
        concerns=_lagging,
        explanation="The moving statistics still contain much of their initial values: there were too few "
        "training steps for this momentum.",
        evidence=lambda layers, model: {
            **_distances(layers, model),
            "initial_weight": max(layer.initial_weight[0] for layer in layers),
        },
        cure=f"{RECALIBRATE}; and for short trainings tfbn.BatchNormalization(momentum=None), or a lower "
        "momentum",
    ),
    Cause(
        kind="small_batches",
        severity="by effect",
        group="moving statistics",
        concerns=_of_small_batches,
        explanation="The moving variances are those within batches of very few examples: they miss most of the "
        "spread between examples.",
        evidence=lambda layers, model: {
            **_distances(layers, model),
            "batch_size": min(layer.batch_size[0] for layer in layers),
        },
        cure=f"{RECALIBRATE}; and larger batches for training, or keras.layers.GroupNormalization()",
    ),
    Cause(
        kind="averaged_weights",
        severity="by effect",
        group="moving statistics",
        concerns=lambda model: model.off if model.averages_weights else [],
        explanation="The optimizer averages the weights (use_ema), but the moving statistics were collected "
        "under the weights before averaging.",
        evidence=_distances,
        cure=f"{RECALIBRATE}; or callbacks=[tfbn.RecalibrateAfterTraining(data)] in `fit`",
    ),
    Cause(
        kind="other_data_or_weights",
        severity="by effect",
        group="moving statistics",
        concerns=lambda model: model.off,
        explanation="The moving statistics do not belong to this data under these weights. Either the data "
        "differs from the training data, or the weights were loaded, averaged or changed after training.",
        evidence=_distances,
        cure=RECALIBRATE,
    ),
)
