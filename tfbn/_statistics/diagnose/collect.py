"""Collects all that causes are looked for in: measurements, losses, and how the model uses its layers."""

import functools
import math
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.diagnose.batch_mode import batch_statistics, no_updates
from tfbn._statistics.diagnose.comparison import Comparison
from tfbn._statistics.diagnose.evidence import LayerEvidence, of_inputs, of_weights
from tfbn._statistics.diagnose.experiments import Experiments
from tfbn._statistics.diagnose.held_out import Batch, SplitReader
from tfbn._statistics.diagnose.losses import Losses, NoLossError, has_labels
from tfbn._statistics.diagnose.model_evidence import MEAN_SHIFT, ModelEvidence
from tfbn._statistics.diagnose.not_finite import NotFinite, trace_not_finite
from tfbn._statistics.diagnose.structure import Structure
from tfbn._statistics.layer_call import NotFiniteError
from tfbn._statistics.measure import StatisticsPasses
from tfbn._statistics.plan import unpacked
from tfbn._statistics.traced_model import Forward
from tfbn._support.optimizers import unwrap_optimizer


def collect(
    model: keras.layers.Layer,
    layers: Sequence[BatchNormLayer],
    passes: StatisticsPasses,
    reader: MultiPassReader,
    forward: Forward | None,
) -> ModelEvidence:
    """Measures a model, and computes its losses if it has any.

    Args:
        model: The model.
        layers: All of its batch normalization layers.
        passes: Measures them.
        reader: The data.
        forward: The argument of `tfbn.diagnose`.
    """
    built = [layer for layer in layers if layer.built]
    labels = has_labels(model, reader.spec)
    no_losses = _why_not(model, passes) if labels else ""
    split = SplitReader(
        reader, labels and not no_losses, inputs=lambda batch: unpacked(model, batch)[0]
    )
    reader.expect(1, passes.levels)
    not_finite: NotFinite | None = None
    try:
        passes.measure(split)
    except NotFiniteError as error:
        not_finite = trace_not_finite(model, error.layer, split.is_finite)
    measured, comparisons = _measured(layers, passes, split.measured)
    losses: Losses | None = None
    if labels and not no_losses and not_finite is None:
        try:
            losses = _losses(model, built, passes, split.aside)
        except NoLossError as error:
            no_losses = f"the model was compiled without a loss ({error})"
    if losses is not None and not math.isfinite(losses.modes["recalibrated"]["loss"]):
        where = Experiments(model, built, passes.forward, split.aside).first_not_finite()
        if where is not None:
            losses, not_finite = None, trace_not_finite(model, where, split.is_finite)
        elif not losses.are_finite:
            losses = None
            no_losses = "the loss is NaN or infinite in every mode; look for that in the labels"
    experiments: Experiments | None = None
    if passes.strategy.num_replicas_in_sync == 1:
        experiments = Experiments(model, built, passes.forward, split.aside, losses)
    optimizer = unwrap_optimizer(getattr(model, "optimizer", None))
    return ModelEvidence(
        layers=measured,
        comparisons=comparisons,
        structure=Structure(model, layers, forward, reader.spec),
        losses=losses,
        no_losses=no_losses,
        experiments=experiments,
        steps=_steps(optimizer),
        averages_weights=bool(getattr(optimizer, "use_ema", False)),
        zeros=_zeros(model),
        not_finite=not_finite,
        diverged=[name_of(layer) for layer in built if _replicas_differ(layer, passes.strategy)],
    )


def _why_not(model: keras.layers.Layer, passes: StatisticsPasses) -> str:
    """Returns why no losses can be computed for labels; empty if they can."""
    if not getattr(model, "compiled", False):
        return "the model is not compiled"
    several = passes.strategy.num_replicas_in_sync > 1
    return "the model has several replicas" if several else ""


def _steps(optimizer: keras.optimizers.Optimizer | None) -> int:
    """The number of batches trained on, at least: an optimizer counts updates, and a new one counts from 0."""
    if optimizer is None:
        return 0
    return int(optimizer.iterations.numpy()) * (optimizer.gradient_accumulation_steps or 1)


def _losses(
    model: keras.Model,
    layers: Sequence[BatchNormLayer],
    passes: StatisticsPasses,
    batches: Sequence[Batch],
) -> Losses:
    losses = Losses(model, batches)
    learning = [layer for layer in layers if not statistics_are_frozen(layer)]
    run = functools.partial(passes.forward, model)
    losses.add("training", run, lambda: batch_statistics(learning))
    losses.add("inference", run, lambda: no_updates(layers))
    losses.add("recalibrated", passes.predict)
    return losses


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
