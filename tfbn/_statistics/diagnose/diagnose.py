"""Explains why a model performs well in training and badly in inference."""

from collections.abc import Sequence
from typing import Any

import keras

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.walk import BatchNormLayer
from tfbn._statistics.diagnose.causes import ModelEvidence, find
from tfbn._statistics.diagnose.evidence import SUMMARIES, LayerEvidence, of_inputs, of_weights
from tfbn._statistics.diagnose.losses import MODES, has_loss, losses_by_mode
from tfbn._statistics.diagnose.report import Diagnosis
from tfbn._statistics.diagnose.training_flags import training_flags
from tfbn._statistics.layer_call import NotFiniteError
from tfbn._statistics.measure import StatisticsPasses
from tfbn._statistics.plan import plan_passes
from tfbn._statistics.traced_model import Forward
from tfbn._support.optimizers import unwrap_optimizer


def diagnose(
    model: keras.layers.Layer,
    data: Any,
    *,
    upstream: str = "population",
    forward: Forward | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    include_frozen: bool = False,
    verbose: bool = False,
) -> Diagnosis:
    r"""Compares a model's moving statistics with those of a data set and explains what is wrong.

    For each batch normalization layer, Keras's or tfbn's, it measures how far the moving mean is from the
    true mean (in units of :math:`\sigma`) and the moving variance from the true variance (as the logarithm
    of their ratio); how much the batch means vary; and whether the layer has constant channels, dead gammas,
    or values that are not finite. If the model is compiled and the data has labels, it computes the loss and
    the metrics in training mode, in inference mode, and as they would be after `tfbn.recalibrate`. From this
    it derives findings, each with the code that cures it. The model does not change.

    Pass the data that the model is used on. To look for mistakes in the training, pass training data.

    Under a `tf.distribute` strategy, call it on each worker with the same data. With more than one replica it
    computes no losses, and a "batch" is what a layer normalizes together: the share of one replica, or of all
    of them.

    It takes the passes of `tfbn.recalibrate` and three more for the losses. To save time, limit ``steps`` or
    pass ``upstream="batch"``.

    Args:
        model: A Keras model or layer. It is built if necessary.
        data: As in `tfbn.recalibrate`; with labels, the losses can be compared too.
        upstream: As in `tfbn.recalibrate`: how to compute the true statistics.
        forward: As in `tfbn.recalibrate`. With it, the `training` flags inside the model are not examined.
        steps: How many batches to use; by default all.
        batch_size: The batch size for arrays; by default 32.
        include_frozen: Whether to compare frozen layers with the data too.
        verbose: Whether to show a progress bar and print the result.

    Returns:
        A `Diagnosis`. Print it, or use its ``findings``.

    Raises:
        TypeError: As `tfbn.recalibrate` does.
        ValueError: As `tfbn.recalibrate` does, except that inputs that are not finite become a finding; or if
            the compiled loss cannot be computed on the labels.

    Example:
        >>> diagnosis = tfbn.diagnose(model, (images, labels))
        >>> print(diagnosis)
        >>> [finding.kind for finding in diagnosis.findings]
        ['lagging_statistics']
    """
    reader = MultiPassReader(data, steps, batch_size, verbose)
    layers, passes = plan_passes(
        model, reader, upstream, forward, include_frozen=include_frozen, summaries=SUMMARIES
    )
    with_losses = has_loss(model, reader.spec, passes.strategy.num_replicas_in_sync)
    reader.expect(1 + len(MODES) * with_losses, passes.levels + len(MODES) * with_losses)
    not_finite, modes = "", {}
    try:
        passes.measure(reader)
    except NotFiniteError as error:
        not_finite = str(error)
    if with_losses and not not_finite:
        modes = losses_by_mode(model, reader, passes)
    evidence = ModelEvidence(
        layers=_measured(layers, passes, reader.batches),
        modes=modes,
        averages_weights=_averages_weights(model),
        not_finite=not_finite,
        **({} if forward is not None else training_flags(model, layers, reader.spec)),
    )
    diagnosis = Diagnosis(
        findings=find(evidence),
        layers=tuple(evidence.layers),
        modes=modes,
        passes=passes.passes + len(modes),
        batches=reader.batches,
        examples=reader.examples,
    )
    if verbose:
        print(diagnosis)
    return diagnosis


def _measured(
    layers: Sequence[BatchNormLayer], passes: StatisticsPasses, batches: int
) -> list[LayerEvidence]:
    """Returns the evidence on each layer."""
    found = []
    for layer in layers:
        calls = [call for call in passes.calls if call.layer is layer]
        if calls and all(call.moments for call in calls):
            # A layer that is not synchronized normalizes each replica's share by itself.
            synchronized = getattr(layer, "synchronized", False)
            shares = 1 if synchronized else passes.strategy.num_replicas_in_sync
            found.append(of_inputs(layer, calls, shares * batches))
        else:
            found.append(of_weights(layer, len(calls)))
    return found


def _averages_weights(model: keras.layers.Layer) -> bool:
    optimizer = unwrap_optimizer(getattr(model, "optimizer", None))
    return bool(getattr(optimizer, "use_ema", False))
