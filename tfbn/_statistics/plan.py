"""Selecting the batch normalization layers of a model to measure, and how to run the model on a batch."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.measure import Forward, StatisticsPasses, Summary
from tfbn._support.reports import count

UPSTREAM = ("population", "batch")


def plan_passes(
    model: keras.layers.Layer,
    reader: MultiPassReader,
    upstream: str,
    forward: Forward | None,
    *,
    include_frozen: bool,
    summaries: Sequence[Summary] = (),
) -> tuple[list[BatchNormLayer], StatisticsPasses]:
    """Returns all batch normalization layers of a model, and the passes that measure those not frozen.

    Args:
        model: A Keras model or layer. It is built if necessary.
        reader: The data.
        upstream: "population" or "batch".
        forward: Runs the model on a batch; by default `run_model`.
        include_frozen: Whether to measure frozen layers, too.
        summaries: What else to measure of each call.

    Raises:
        TypeError: If `model` is not a Keras model or layer.
        ValueError: If there is nothing to measure, or ``upstream`` is unknown.
    """
    if upstream not in UPSTREAM:
        raise ValueError(f"`upstream` must be one of {UPSTREAM}. Received: upstream={upstream!r}.")
    forward = run_model if forward is None else forward
    batch_norm_layers(model)  # Raises if it is not a layer.
    if not model.built:
        tf.function(lambda batch: forward(model, batch), autograph=False).get_concrete_function(
            reader.spec
        )
    layers = batch_norm_layers(model)
    if not layers:
        raise ValueError(
            "The model has no batch normalization layers. "
            f"Received: model {model.name!r} of type {type(model).__name__}."
        )
    measured = [layer for layer in layers if include_frozen or not statistics_are_frozen(layer)]
    if not measured:
        raise ValueError(
            "All batch normalization layers of the model are frozen. Pass include_frozen=True, or call "
            f"`tfbn.unfreeze(model)`. Received: model {model.name!r}, {count(len(layers), 'frozen layer')}."
        )
    for layer in measured:
        _check_call(layer)
    passes = StatisticsPasses(
        model,
        [layer for layer in measured if layer.built],
        forward=forward,
        spec=reader.spec,
        upstream=upstream,
        summaries=summaries,
    )
    if not passes.sites:
        raise ValueError(
            "Running the model on a batch called none of its batch normalization layers. Pass a `forward` "
            f"that does. Received: model {model.name!r}, layers {[name_of(layer) for layer in measured]}."
        )
    return layers, passes


def run_model(model: keras.layers.Layer, batch: Any, training: bool = False) -> Any:
    """Runs the model on the inputs in a batch."""
    return model(unpacked(model, batch)[0], training=training)


def unpacked(model: keras.layers.Layer, batch: Any) -> tuple[Any, Any, Any]:
    """Returns the inputs, labels and sample weights in a batch, or in its spec."""
    inputs = len(getattr(model, "inputs", None) or [None])
    several = isinstance(batch, tuple) and len(batch) == inputs > 1
    # Without labels, the batch may be the tuple of the model's inputs.
    if several and not isinstance(batch[0], dict | list | tuple):
        return batch, None, None
    return keras.utils.unpack_x_y_sample_weight(batch)


def _check_call(layer: BatchNormLayer) -> None:
    """Raises if a subclass overrides `call`."""
    known = (keras.layers.BatchNormalization.call, BatchNormalization.call)
    if type(layer).call not in known:
        raise ValueError(
            "This layer overrides `call`, so it is unknown how it uses its statistics. Only "
            "keras.layers.BatchNormalization, tfbn.BatchNormalization and subclasses that inherit `call` are "
            f"supported. Received: layer {name_of(layer)!r} of type {type(layer).__name__}."
        )
