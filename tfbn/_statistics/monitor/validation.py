"""Comparing what the layers see in validation with what they see in training."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._models.intercept import isolated_tracing
from tfbn._models.walk import BatchNormLayer
from tfbn._moments.moments import Moments
from tfbn._statistics.diagnose.batch_mode import batch_statistics
from tfbn._statistics.diagnose.cause import Cause
from tfbn._statistics.diagnose.causes import PREPARE
from tfbn._statistics.diagnose.evidence import of_weights
from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.diagnose.model_evidence import LOG_VARIANCE_RATIO, MEAN_SHIFT
from tfbn._statistics.diagnose.signs.sign import Sign
from tfbn._statistics.layer_call import values
from tfbn._statistics.monitor.estimate import BatchEstimate
from tfbn._statistics.monitor.findings import CERTAIN
from tfbn._statistics.monitor.snapshot import WatchedLayers
from tfbn._statistics.plan import run_model

AGREE = 0.3
"""The spread of the logarithms of the variance ratios up to which all channels agree on a factor."""

FED_DIFFERENTLY = Cause(
    kind="validation_fed_differently",
    sign=lambda model: None,  # Only a training shows it.
    explanation="Validation feeds the model differently from training. {what}",
    severity="warning",
    advice=PREPARE.split(";")[0],
)


class ValidationWatch:
    """Measures what layers see on one batch, normalizing by the batch as in training.

    Args:
        data: The data. Only its first batch is used.
    """

    def __init__(self, data: Any):
        reader = MultiPassReader(data, 1, None, 0)
        self._batch, self._spec = next(reader.read(0))
        self._measured: tuple[list[BatchNormLayer], Any] | None = None
        self._off_before = False

    def compare(
        self, model: keras.Model, layers: WatchedLayers, training: BatchEstimate
    ) -> Finding | None:
        """Compares the layer that sees the data first with what it saw in training.

        Returns:
            A finding, if the comparison before showed the same.
        """
        called, measure = self._measured or self._trace(model, layers)
        moments = measure(self._batch)
        if not called:
            return None
        index = layers.layers.index(called[0])
        start = int(layers.sizes[:index].sum())
        part = slice(start, start + int(layers.sizes[index]))
        _, mean, variance = (value.numpy().ravel().astype("float64") for value in moments[0])
        sigma2 = np.maximum(training.variance[part], 0) + layers.epsilon[part]
        known = training.known[part] & np.isfinite(mean + variance)
        if not known.any():
            return None
        shift = float(
            np.sqrt(np.mean(np.square(mean - training.mean[part])[known] / sigma2[known]))
        )
        ratios = np.log(sigma2 / (variance + layers.epsilon[part]))[known]
        ratio = float(np.mean(ratios))
        off = shift > CERTAIN * MEAN_SHIFT or abs(ratio) > CERTAIN * LOG_VARIANCE_RATIO
        certain, self._off_before = off and self._off_before, off
        if not certain:
            return None
        what = "Its first layer sees another mean or another variance."
        if abs(ratio) > CERTAIN * LOG_VARIANCE_RATIO and np.std(ratios) < AGREE:
            times = math.exp(float(np.median(ratios)) / 2)
            what = f"All channels of its first layer agree: there, inputs are {1 / times:.3g} times as large."
        numbers = {"mean_shift": shift, "variance_ratio": math.exp(ratio)}
        sign = Sign([of_weights(called[0], 1)], numbers, {"what": what})
        return FED_DIFFERENTLY.finding(sign, FED_DIFFERENTLY.severity, "")

    def _trace(self, model: keras.Model, layers: WatchedLayers) -> Any:
        """Compiles the measurement, once; the model keeps nothing of it."""
        called: list[BatchNormLayer] = []
        found: list[Moments] = []

        def observe(
            layer: BatchNormLayer, x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None
        ) -> None:
            if not called:  # The layer that sees the data first.
                called.append(layer)
                found.append(values(x, axes, mask))

        def run(batch: Any) -> list[Moments]:
            with batch_statistics(layers.layers, observe):
                run_model(model, batch)
            return found

        with isolated_tracing():
            function = tf.function(run, autograph=False).get_concrete_function(self._spec)
        self._measured = (called, function)
        return self._measured
