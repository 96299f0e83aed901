"""Explains why a model performs well in training and badly in inference."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.diagnose.batch_mode import batch_statistics, no_updates
from tfbn._statistics.diagnose.causes import find
from tfbn._statistics.diagnose.comparison import Comparison
from tfbn._statistics.diagnose.evidence import SUMMARIES, LayerEvidence, of_inputs, of_weights
from tfbn._statistics.diagnose.experiments import Experiments
from tfbn._statistics.diagnose.held_out import SplitReader
from tfbn._statistics.diagnose.losses import Losses, has_loss
from tfbn._statistics.diagnose.model_evidence import MEAN_SHIFT, ModelEvidence
from tfbn._statistics.diagnose.not_finite import trace_not_finite
from tfbn._statistics.diagnose.report import ChannelStatistics, Diagnosis
from tfbn._statistics.diagnose.structure import structure_of
from tfbn._statistics.layer_call import NotFiniteError
from tfbn._statistics.measure import StatisticsPasses
from tfbn._statistics.plan import plan_passes
from tfbn._statistics.traced_model import Forward
from tfbn._support.optimizers import unwrap_optimizer
from tfbn._support.progress import prints_result


def diagnose(
    model: keras.layers.Layer,
    data: Any,
    *,
    upstream: str = "population",
    forward: Forward | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    verbose: int | str = "auto",
) -> Diagnosis:
    r"""Compares a model's moving statistics with those of a data set and explains what is wrong.

    For each batch normalization layer, Keras's or tfbn's, frozen or not, it measures how far the moving mean
    is from the true mean (in units of :math:`\sigma`) and the moving variance from the true variance (as the
    logarithm of their ratio); how much the batch means vary; and whether the layer has constant channels,
    dead gammas, or values that are not finite. If the model is compiled and the data has labels, it also
    computes the loss and the metrics in training mode, in inference mode, and as they would be after
    `tfbn.recalibrate`, on batches that were set aside for that: every fourth, at most. From all this it
    derives findings. A finding prints a cure only if the cure lowers the loss. The model does not change.

    Pass the data that the model is used on, in batches as large as in training. To look for mistakes in the
    training, pass training data.

    Under a `tf.distribute` strategy, call it on each worker with the same data. With more than one replica it
    computes no losses.

    It takes the passes of `tfbn.recalibrate`. If something is off, it may run the model a few more times on
    the batches set aside, to tell causes apart.

    Args:
        model: A Keras model or layer. It is built if necessary.
        data: As in `tfbn.recalibrate`; with labels, the losses can be compared too.
        upstream: As in `tfbn.recalibrate`: how to compute the true statistics.
        forward: As in `tfbn.recalibrate`. With it, the `training` flags inside the model are not examined.
        steps: How many batches to use; by default all.
        batch_size: The batch size for arrays; by default 32.
        verbose: 0 for silence; 1 for a progress bar, or 2 for a line at the end, and the printed result; "auto"
            for a progress bar in a terminal if it takes longer than a second.

    Returns:
        A `Diagnosis`. Print it, or use its ``findings``.

    Raises:
        TypeError: As `tfbn.recalibrate` does.
        ValueError: As `tfbn.recalibrate` does, except that inputs that are not finite become a finding; if
            the compiled loss cannot be computed on the labels; or if the model preprocesses its inputs in
            `predict` alone.

    Example:
        >>> diagnosis = tfbn.diagnose(model, (images, labels))
        >>> print(diagnosis)
        >>> [finding.kind for finding in diagnosis.findings]
        ['lagging_statistics']
    """
    if forward is None and getattr(model, "preprocessor", None) is not None:
        raise ValueError(
            "This model preprocesses its inputs in `fit`, `evaluate` and `predict`, but not when it is "
            "called. Preprocess the data, and pass "
            "forward=lambda model, batch: model(batch[0], training=False) to confirm it. "
            f"Received: model {model.name!r} with preprocessor {type(model.preprocessor).__name__}."
        )
    reader = MultiPassReader(data, steps, batch_size, verbose)
    plan = functools.partial(plan_passes, model, reader, upstream, forward)
    layers, passes = plan(include_frozen=True, summaries=SUMMARIES)
    built = [layer for layer in layers if layer.built]
    with_losses = has_loss(model, reader.spec, passes.strategy.num_replicas_in_sync)
    split = SplitReader(reader, hold_out=with_losses)
    reader.expect(1, passes.levels)
    with passes.variables_restored():
        losses, not_finite = None, None
        try:
            passes.measure(split)
        except NotFiniteError as error:
            layer = str(error).rsplit("'", 2)[1]  # The text ends with its name.
            not_finite = trace_not_finite(model, layer, split.is_finite)
        measured, comparisons = _measured(layers, passes, reader.batches)
        if with_losses and not_finite is None:
            losses = Losses(model, split.aside)
            learning = [layer for layer in built if not statistics_are_frozen(layer)]
            run = functools.partial(passes.forward, model)
            losses.add("training", run, lambda: batch_statistics(learning))
            losses.add("inference", run, lambda: no_updates(built))
            losses.add("recalibrated", passes.predict)
        experiments = None
        if passes.strategy.num_replicas_in_sync == 1:
            experiments = Experiments(model, built, passes.forward, split.aside, losses)
            if losses is not None and not math.isfinite(losses.modes["recalibrated"]["loss"]):
                where = experiments.first_not_finite()
                if where is not None:
                    losses, not_finite = None, trace_not_finite(model, where, split.is_finite)
        optimizer = unwrap_optimizer(getattr(model, "optimizer", None))
        evidence = ModelEvidence(
            layers=measured,
            comparisons=comparisons,
            structure=structure_of(model, layers, forward, reader.spec),
            losses=losses,
            experiments=experiments,
            steps=int(optimizer.iterations.numpy()) if optimizer is not None else 0,
            averages_weights=bool(getattr(optimizer, "use_ema", False)),
            zeros=_zeros(model),
            not_finite=not_finite,
            diverged=[
                name_of(layer) for layer in built if _replicas_differ(layer, passes.strategy)
            ],
        )
        diagnosis = Diagnosis(
            findings=find(evidence, _recalibrate_call(upstream, forward)),
            layers=tuple(evidence.layers),
            modes=losses.modes if losses is not None else {},
            passes=passes.passes,
            batches=reader.batches,
            examples=reader.examples,
            channels={name: ChannelStatistics.of(one) for name, one in comparisons.items()},
        )
        if prints_result(verbose):
            print(diagnosis)
        return diagnosis


def _measured(
    layers: Sequence[BatchNormLayer], passes: StatisticsPasses, batches: int
) -> tuple[list[LayerEvidence], dict[str, Comparison]]:
    """Returns the evidence on each layer, and the comparisons where there is something to compare."""
    evidence, comparisons = [], {}
    for layer in layers:
        calls = [call for call in passes.calls if call.layer is layer]
        if not calls or not all(call.moments for call in calls):
            evidence.append(of_weights(layer, len(calls)))
            continue
        # A layer that is not synchronized normalizes each replica's share by itself.
        synchronized = getattr(layer, "synchronized", False)
        shares = 1 if synchronized else passes.strategy.num_replicas_in_sync
        found, comparison = of_inputs(layer, calls, shares * batches)
        evidence.append(found)
        if comparison is not None:
            comparisons[found.layer] = comparison
    return evidence, comparisons


def _replicas_differ(layer: BatchNormLayer, strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas of this worker hold moving means that are far apart."""
    if strategy.num_replicas_in_sync == 1:
        return False
    means, variances = (
        [part.numpy() for part in strategy.experimental_local_results(weight.value)]
        for weight in (layer.moving_mean, layer.moving_variance)
    )
    sigma = np.sqrt(np.maximum(np.max(variances, axis=0), 0) + layer.epsilon)
    apart = (np.max(means, axis=0) - np.min(means, axis=0)) / sigma
    return bool(np.sqrt(np.mean(np.square(apart))) > MEAN_SHIFT / 2)


def _zeros(model: keras.layers.Layer) -> float:
    """The fraction of zeros in the matrices and kernels of a model."""
    statistics = {id(v) for layer in batch_norm_layers(model) for v in layer.weights}
    kernels = [v for v in model.weights if len(v.shape) > 1 and id(v) not in statistics]
    zeros = sum(int(np.sum(keras.ops.convert_to_numpy(v) == 0)) for v in kernels)
    return zeros / max(sum(int(np.prod(v.shape)) for v in kernels), 1)


def _recalibrate_call(upstream: str, forward: Forward | None) -> Callable[[bool], str]:
    """Returns what writes the call that recalibrates the model as it was diagnosed."""

    def written(include_frozen: bool) -> str:
        arguments = ["model", "data"]
        arguments += [f"upstream={upstream!r}"] * (upstream != "population")
        arguments += ["forward=forward"] * (forward is not None)
        arguments += ["include_frozen=True"] * include_frozen
        return f"tfbn.recalibrate({', '.join(arguments)})"

    return written
