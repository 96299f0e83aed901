"""The loss and the metrics of a model in training mode, in inference mode, and as if recalibrated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._data.sources import spec_of
from tfbn._models.intercept import isolated_tracing
from tfbn._statistics.measure import StatisticsPasses
from tfbn._statistics.plan import unpacked
from tfbn._support.checks import first_line

MODES = ("training", "inference", "recalibrated")


def has_loss(model: keras.layers.Layer, spec: Any, replicas: int) -> bool:
    """Whether a loss can be computed: the model is compiled, there are labels, and one replica."""
    _, y, _ = unpacked(model, spec)
    return getattr(model, "compiled", False) and y is not None and replicas == 1


def losses_by_mode(
    model: keras.Model, reader: MultiPassReader, passes: StatisticsPasses
) -> dict[str, dict[str, float]]:
    """Computes the loss and the metrics in each mode; takes a pass for each.

    The metrics of the model end up with the counts that they had.
    """
    with _metrics_restored(model):
        return {
            mode: _loss(model, reader, passes, mode, passes.passes + number)
            for number, mode in enumerate(MODES)
        }


@contextlib.contextmanager
def _metrics_restored(model: keras.Model) -> Iterator[None]:
    """On exit, restores the counts of all metrics; those of metrics built since become 0."""
    before = [(variable, variable.numpy()) for variable in model.metrics_variables]
    try:
        yield
    finally:
        model.reset_metrics()
        for variable, value in before:
            variable.assign(value)


def _loss(
    model: keras.Model, reader: MultiPassReader, passes: StatisticsPasses, mode: str, number: int
) -> dict[str, float]:
    def step(batch: Any) -> tf.Tensor:
        if mode == "inference":
            outputs = passes.forward(model, batch)
        else:
            outputs = passes.predict(batch, "batch" if mode == "training" else "population")
        return _compute_loss(model, batch, outputs)

    model.reset_metrics()
    compiled: dict[Any, Any] = {}
    total = 0.0
    for batch, spec in reader.read(number):
        key = tuple(tf.nest.flatten(spec))
        if key not in compiled:
            with isolated_tracing():
                compiled[key] = tf.function(step, autograph=False).get_concrete_function(spec)
        size = reader.size(batch)
        if size:
            total += size * float(compiled[key](batch))
    results = {name: float(np.mean(value)) for name, value in model.get_metrics_result().items()}
    return {**results, "loss": total / reader.examples}


def _compute_loss(model: keras.Model, batch: Any, outputs: Any) -> tf.Tensor:
    x, y, weight = unpacked(model, batch)
    try:
        if any(part.dtype == tf.string for part in tf.nest.flatten(y) if part is not None):
            raise TypeError("Strings must be encoded as numbers.")
        model.compute_metrics(x, y, outputs, weight)
        return model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight, training=False)
    except Exception as error:
        raise ValueError(
            "The compiled loss and metrics cannot be computed on these labels. Pass labels as in `fit`, or "
            "pass data without labels to compare the statistics alone. "
            f"Received: labels {spec_of(y)}, {first_line(error)}"
        ) from error
