"""The table of causes: what each one looks like in the evidence, and what to do about it.

`find` reads the table from top to bottom. The causes of a group explain the same evidence: only the first
one that applies becomes a finding. The causes without a group are independent.
"""

import dataclasses
from collections.abc import Callable

from tfbn._statistics.diagnose.cause import Cause
from tfbn._statistics.diagnose.finding import SEVERITIES, Finding
from tfbn._statistics.diagnose.model_evidence import ModelEvidence, is_frozen, is_off
from tfbn._statistics.diagnose.signs import of_statistics, of_use, of_values

INITIAL = "statistics that were never updated"
FROZEN = "frozen statistics"
MOVING = "moving statistics that are off"
CONSTANT = "constant inputs"

IN_CALL = (
    "self.bn(x, training=training) in the model's `call`, with the `training` that it receives"
)
RESCALED = "All channels of the first layer agree: the inputs are {times:.3g} times as large as in training."
PREPARE = "prepare the inputs as in training; if that is not possible, recalibrate"


def find(model: ModelEvidence, recalibrate: Callable[[bool], str]) -> tuple[Finding, ...]:
    """Returns all findings, the most severe first.

    Args:
        model: The evidence.
        recalibrate: Returns the call that recalibrates the model; its argument says whether frozen layers
            are included.
    """
    findings: list[Finding] = []
    explained: set[str] = set()
    # The losses were computed with new statistics in all layers.
    off = [layer for layer in model.layers if is_off(layer)]
    for cause in CAUSES:
        if explained.intersection(cause.groups) or (cause.last_resort and findings):
            continue
        sign = cause.sign(model)
        if sign is None:
            continue
        explained.update(cause.groups)
        withheld = cause.recalibrate and model.recalibrating_helps is False
        if withheld and not sign.words.get("effect"):
            sign = sign._replace(remark=model.why_no_cure)
        by_effect = cause.severity == "by effect"
        cure = ""
        if cause.recalibrate and not withheld:
            cure = recalibrate(any(map(is_frozen, [*off, *sign.layers])))
        findings.append(
            cause.finding(
                sign,
                severity=model.severity(sign.layers) if by_effect else cause.severity,
                cure=cure,
            )
        )
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


WHY_OFF = (
    Cause(
        kind="replicas_diverged",
        sign=of_statistics.replicas_diverged,
        explanation="The replicas hold different moving statistics. Keras's layer updates each replica's copy "
        "from that replica's share of the data, and saves only one of them.",
        severity="error",
        recalibrate=True,
        advice="model = tfbn.convert(model) under the strategy: tfbn's layers keep the copies equal",
    ),
    Cause(
        kind="rescaled_inputs",
        sign=of_statistics.purely_rescaled_inputs,
        explanation=RESCALED,
        recalibrate=True,
        advice=PREPARE,
    ),
    Cause(
        kind="empty_batches",
        sign=of_statistics.empty_batches,
        explanation="Mean and variance are both {kept:.2g} times the true ones: batches without a single "
        "value, fully masked ones, pulled the moving statistics towards 0.",
        recalibrate=True,
        advice="model = tfbn.convert(model) before training on: tfbn's layers skip such batches",
    ),
    Cause(
        kind="masks_ignored",
        sign=of_statistics.masks_ignored,
        explanation="The moving statistics include the masked values: training ignored the masks. {effect}",
        severity="warning",
        recalibrate=True,
        advice="pass the masks on in training and in inference alike, and train again",
    ),
    Cause(
        kind="lagging_statistics",
        sign=of_statistics.lagging_statistics,
        explanation="The moving statistics lag behind: {part} of them {what}. {steps} too few for a "
        "momentum of {momentum}.",
        recalibrate=True,
        advice="tfbn.BatchNormalization(momentum=None) for short trainings, or a lower momentum",
    ),
    Cause(
        kind="variance_shift",
        sign=of_statistics.variance_shift,
        explanation="A random layer, such as dropout, comes before these layers. It changes the variance in "
        "training, and the moving variances include that change. In inference, it does nothing.",
        recalibrate=True,
        advice="move dropout and noise behind the last batch normalization layer",
    ),
    Cause(
        kind="unlike_batches",
        sign=of_statistics.unlike_batches,
        explanation="The moving variances miss the spread between classes: in training, each batch held "
        "examples of few classes.",
        recalibrate=True,
        advice="shuffle the training data, and train again",
    ),
    Cause(
        kind="small_batches",
        sign=of_statistics.small_batches,
        explanation="The moving variances fit a batch size of about {size:.2g}: they miss much of the spread "
        "between examples.",
        recalibrate=True,
        advice="larger batches for training, or keras.layers.GroupNormalization()",
        experiment="Look at a batch of the training data. If it has more examples, they are alike, such as "
        "those of one class, and shuffling is the cure.",
    ),
    Cause(
        kind="noisy_statistics",
        sign=of_statistics.noisy_statistics,
        explanation="The momentum of {momentum:g} makes the moving statistics those of the last batches. "
        "PyTorch's momentum of 0.1 is Keras's 0.9.",
        recalibrate=True,
        advice="momentum=0.9 or 0.99",
    ),
    Cause(
        kind="rescaled_inputs",
        sign=of_statistics.rescaled_inputs,
        explanation=RESCALED,
        recalibrate=True,
        advice=PREPARE,
    ),
    Cause(
        kind="varied_batches",
        sign=of_statistics.varied_batches,
        explanation="The moving statistics are those that training gives under these weights. But the batches "
        "vary so much that normalizing by them is not normalizing by all data, as inference does: the inputs "
        "have rare, large values, or the batches are small.",
        recalibrate=True,
        advice="larger batches for training; logarithms or limits for inputs with rare, large values",
    ),
    Cause(
        kind="averaged_weights",
        sign=of_statistics.averaged_weights,
        explanation="The optimizer averages the weights (use_ema), but the moving statistics were collected "
        "under the weights before averaging.",
        recalibrate=True,
        advice="callbacks=[tfbn.RecalibrateAfterTraining(data)] in `fit`",
    ),
    Cause(
        kind="pruned_weights",
        sign=of_statistics.pruned_weights,
        explanation="{zeros:.0%} of the weights are exactly 0: they were pruned, and the moving statistics are "
        "those from before.",
        recalibrate=True,
    ),
    Cause(
        kind="changed_epsilon",
        sign=of_statistics.changed_epsilon,
        explanation="With an epsilon of {epsilon:g} the loss is lower than with that of these layers: the "
        "weights were trained with another epsilon. PyTorch's default is 1e-5, Keras's 1e-3.",
        recalibrate=True,
        advice="build the layers with epsilon={epsilon:g}",
    ),
    Cause(
        kind="changed_weights",
        sign=of_statistics.changed_weights,
        explanation="The layers up to {last} match the data, those from {first} on do not. So the data is "
        "like the training data, and weights between these layers were changed after training.",
        recalibrate=True,
        experiment="Recalibrate, train for another epoch, and diagnose again. If the finding comes back, the "
        "training itself changes the weights faster than the moving average follows.",
    ),
    Cause(
        kind="other_data_or_weights",
        sign=of_statistics.other_data_or_weights,
        explanation="The moving statistics do not belong to this data under these weights. Either the data "
        "differs from the training data, or the weights were loaded, averaged or changed after training.",
        recalibrate=True,
        experiment=of_statistics.ON_TRAINING_DATA,
    ),
)
"""Why moving statistics are off, the surest signs first."""

CAUSES = (
    # Values that no training gives
    Cause(
        kind="not_finite_statistics",
        sign=of_values.not_finite_statistics,
        explanation="The moving statistics contain NaN or infinity. In Keras's layer, a single batch that "
        "is empty or not finite causes this.",
        severity="error",
        recalibrate=True,
        advice="model = tfbn.convert(model) before training on: tfbn's layers skip such batches",
    ),
    Cause(
        kind="negative_variance",
        sign=of_values.negative_variance,
        explanation="Some moving variances are negative. No data gives such a variance: the weights were "
        "damaged when they were converted or edited.",
        severity="error",
        recalibrate=True,
    ),
    Cause(
        kind="half_precision_overflow",
        sign=of_values.half_precision_overflow,
        explanation="The inputs of {where} are too large for float16, although the data and the weights are "
        "finite.",
        severity="error",
        advice='keras.config.set_dtype_policy("mixed_bfloat16") before building the model, or smaller inputs',
    ),
    Cause(
        kind="not_finite_inputs",
        sign=of_values.not_finite_inputs,
        explanation="The inputs of layer {layer!r} contain NaN or infinity. {what}",
        severity="error",
        advice="{advice}",
    ),
    # How the model uses its layers
    Cause(
        kind="training_forced",
        sign=of_use.training_forced,
        explanation="The model calls these layers with training=True even in inference: the output for an "
        "example depends on the rest of its batch, and every prediction updates the moving statistics.",
        severity="error",
        advice=IN_CALL,
    ),
    Cause(
        kind="training_not_passed_on",
        sign=of_use.training_not_passed_on,
        explanation="The moving statistics still have their initial values, 0 and 1, because the model's "
        "`call` does not pass `training` on to these layers. {effect}",
        severity="error",
        recalibrate=True,
        advice=IN_CALL,
        groups=(INITIAL,),
    ),
    Cause(
        kind="frozen_statistics",
        sign=of_use.frozen_but_recalibrating_helps,
        explanation="These layers are frozen with statistics that do not match the data. Freezing them was a "
        "mistake: the loss is lower with the statistics of the data.",
        recalibrate=True,
        advice="tfbn.unfreeze(model) to train them",
        groups=(FROZEN,),
    ),
    Cause(
        kind="frozen_statistics",
        sign=of_use.frozen_from_the_start,
        explanation="These layers were frozen before they had seen any data: their statistics are still 0 and "
        "1, and they do not normalize anything. {effect}",
        severity="warning",
        recalibrate=True,
        advice="tfbn.unfreeze(model), or trainable=True, and train again",
        groups=(FROZEN,),
    ),
    Cause(
        kind="frozen_statistics",
        sign=of_use.frozen_rightly,
        explanation="The statistics of these frozen layers do not match the data, and freezing them is right: "
        "the other weights were trained with them, and recalibrating would raise the loss.",
        severity="note",
        advice="tfbn.unfreeze(model) and train on, to adapt the statistics and the weights together",
        groups=(FROZEN,),
    ),
    Cause(
        kind="frozen_statistics",
        sign=of_use.frozen_and_unclear,
        explanation="The statistics of these frozen layers do not match the data. {effect}",
        groups=(FROZEN,),
    ),
    Cause(
        kind="trained_in_inference_mode",
        sign=of_use.trained_in_inference_mode,
        explanation="The moving statistics still have their initial values, 0 and 1, and the weights were "
        "trained with them, in inference mode: recalibrating would raise the loss. The model works, but "
        "nothing is normalized.",
        severity="warning",
        advice=f"{of_use.TRAIN_IN_TRAINING_MODE}, and train again",
        groups=(INITIAL,),
    ),
    Cause(
        kind="never_updated",
        sign=of_use.never_updated,
        explanation="The moving statistics still have their initial values, 0 and 1: {why}.",
        severity="error",
        recalibrate=True,
        advice="{advice}",
        groups=(INITIAL,),
    ),
    Cause(
        kind="training_false_overridden",
        sign=of_use.training_false_overridden,
        explanation="These layers are in a part of the model that is called with training=False. Keras "
        "overrides that: in `fit` they run in training mode and update their statistics (keras#20285).",
        severity="warning",
        advice="tfbn.freeze(model, within=base)",
    ),
    # What reaches a layer
    Cause(
        kind="constant_channels",
        sign=of_values.constant_layer,
        explanation="All channels of {first} have a constant input: {why}. Its output is beta, whatever the "
        "data.",
        severity="error",
        advice="{advice}",
        groups=(CONSTANT, MOVING),
    ),
    Cause(
        kind="constant_channels",
        sign=of_values.constant_channels,
        explanation="Channels of {first} have a constant input: {why}. Their output is beta.",
        severity="warning",
        advice="{advice}",
        groups=(CONSTANT,),
    ),
    Cause(
        kind="shared_domains",
        sign=of_values.shared_domains,
        explanation="One layer is called on inputs from different distributions. Training normalizes each by "
        "its own statistics, inference normalizes all of them by the statistics of the mixture.",
        severity="warning",
        advice="give each of the calls a BatchNormalization layer of its own",
    ),
    Cause(
        kind="dead_gammas",
        sign=of_values.dead_gammas,
        explanation="Some channels have a gamma of 0, so their input is lost.",
        severity="note",
        advice="prune the channels, or train without a regularizer on gamma",
    ),
    *(dataclasses.replace(cause, groups=(MOVING,)) for cause in WHY_OFF),
    Cause(
        kind="nothing_learned",
        sign=of_values.nothing_learned,
        explanation="The model is no better than a constant output on these labels, whatever its statistics. "
        "Either it has not learned yet, or the labels do not belong to these examples.",
        severity="warning",
        advice="look at the labels and their order, and at the loss of the training",
        last_resort=True,
    ),
    Cause(
        kind="loss_gap",
        sign=of_values.loss_gap,
        explanation="The loss in inference mode is higher than it would be with the statistics of this data, "
        "although no layer is far off.",
        recalibrate=True,
        last_resort=True,
    ),
)
