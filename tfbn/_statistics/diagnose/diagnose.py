"""Explains why a model performs well in training and badly in inference."""

from collections.abc import Callable
from typing import Any

import keras

from tfbn._data.multi_pass import MultiPassReader
from tfbn._statistics.diagnose.causes import find
from tfbn._statistics.diagnose.collect import collect
from tfbn._statistics.diagnose.evidence import SUMMARIES
from tfbn._statistics.diagnose.report import ChannelStatistics, Diagnosis
from tfbn._statistics.plan import fit_data, plan_passes
from tfbn._statistics.traced_model import Forward
from tfbn._support.progress import prints_result


def diagnose(
    model: keras.layers.Layer,
    data: Any,
    y: Any = None,
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
        y: Labels, if ``data`` is the array or arrays ``x``, as in `keras.Model.evaluate`.
        upstream: As in `tfbn.recalibrate`: how to compute the true statistics.
        forward: As in `tfbn.recalibrate`. With it, the `training` flags inside the model are not examined.
        steps: How many batches to use; by default all.
        batch_size: The batch size for arrays; by default 32.
        verbose: 0: silent. 1: a progress bar, then the result. 2: a line at the end, then the result. "auto": a
            progress bar in a terminal if it takes longer than a second, and no result.

    Returns:
        A `Diagnosis`. Print it, or use its ``findings``.

    Raises:
        TypeError: As `tfbn.recalibrate` does.
        ValueError: As `tfbn.recalibrate` does, except that inputs that are not finite become a finding; or if
            the compiled loss cannot be computed on the labels.

    Example:
        >>> diagnosis = tfbn.diagnose(model, images, labels)
        >>> print(diagnosis)
        >>> [finding.kind for finding in diagnosis.findings]
        ['lagging_statistics']
    """
    reader = MultiPassReader(fit_data(model, data, y), steps, batch_size, verbose)
    layers, passes = plan_passes(
        model, reader, upstream, forward, include_frozen=True, summaries=SUMMARIES
    )
    with passes.variables_restored():  # Looking for causes may run the model again.
        evidence = collect(model, layers, passes, reader, forward)
        findings = find(evidence, _recalibrate_call(upstream, forward))
    diagnosis = Diagnosis(
        findings=findings,
        layers=tuple(evidence.layers),
        modes=evidence.losses.modes if evidence.losses is not None else {},
        no_losses=evidence.no_losses,
        passes=passes.passes,
        batches=reader.batches,
        examples=reader.examples,
        channels={n: ChannelStatistics.of(one) for n, one in evidence.comparisons.items()},
    )
    if prints_result(verbose):
        print(diagnosis)
    return diagnosis


def _recalibrate_call(upstream: str, forward: Forward | None) -> Callable[[bool], str]:
    """Returns what writes the call that recalibrates the model as it was diagnosed."""

    def written(include_frozen: bool) -> str:
        arguments = ["model", "data"]
        arguments += [f"upstream={upstream!r}"] * (upstream != "population")
        arguments += ["forward=forward"] * (forward is not None)
        arguments += ["include_frozen=True"] * include_frozen
        return f"tfbn.recalibrate({', '.join(arguments)})"

    return written
