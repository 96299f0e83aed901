"""Which batch normalization layers of a model can be measured on a data set, and what measures them."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.measure import Forward, StatisticsPasses, Summary

UPSTREAM = ("population", "batch")


def plan_passes(
    model: keras.layers.Layer,
    feed: MultiPassReader,
    upstream: str,
    forward: Forward | None,
    *,
    include_frozen: bool,
    summaries: Sequence[Summary] = (),
) -> tuple[list[BatchNormLayer], StatisticsPasses]:
    """All batch normalization layers of a model, and what measures those whose statistics can move.

    Raises:
        TypeError: If `model` is no Keras layer.
        ValueError: If there is nothing to measure, or ``upstream`` is unknown.
    """
    if upstream not in UPSTREAM:
        raise ValueError(f"`upstream` must be one of {UPSTREAM}. Received: upstream={upstream!r}.")
    forward = run_model if forward is None else forward
    batch_norm_layers(model)  # Refuses what is no layer.
    if not model.built:
        tf.function(lambda batch: forward(model, batch), autograph=False).get_concrete_function(
            feed.spec
        )
    layers = batch_norm_layers(model)
    if not layers:
        raise ValueError(
            "The model has no batch normalization layers, hence no statistics of theirs. "
            f"Received: model {model.name!r} of type {type(model).__name__}."
        )
    live = [layer for layer in layers if include_frozen or not statistics_are_frozen(layer)]
    if not live:
        raise ValueError(
            "All batch normalization layers of the model are frozen: pass include_frozen=True, or "
            f"`tfbn.unfreeze` it. Received: model {model.name!r}, {len(layers)} frozen layers."
        )
    for layer in live:
        _check_call_is_known(layer)
    population = StatisticsPasses(
        model,
        [layer for layer in live if layer.built],
        forward=forward,
        spec=feed.spec,
        upstream=upstream,
        summaries=summaries,
    )
    if not population.sites:
        raise ValueError(
            "The model, run on a batch, calls none of its batch normalization layers: pass the function "
            "that does as `forward`. "
            f"Received: model {model.name!r}, layers {[name_of(layer) for layer in live]}."
        )
    return layers, population


def run_model(model: keras.layers.Layer, batch: Any, training: bool = False) -> Any:
    """Runs the model on the inputs in a batch."""
    return model(unpacked(model, batch)[0], training=training)


def unpacked(model: keras.layers.Layer, batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, labels and weights in a batch, or in its spec."""
    inputs = len(getattr(model, "inputs", None) or [None])
    several = isinstance(batch, tuple) and len(batch) == inputs > 1
    # Without labels, the inputs of a model with several may come as the batch itself.
    if several and not isinstance(batch[0], dict | list | tuple):
        return batch, None, None
    return keras.utils.unpack_x_y_sample_weight(batch)


def _check_call_is_known(layer: BatchNormLayer) -> None:
    """Raises for a subclass that computes something of its own."""
    known = (keras.layers.BatchNormalization.call, BatchNormalization.call)
    if type(layer).call not in known:
        raise ValueError(
            "This layer has a `call` of its own, and what it does with the statistics is unknown: only "
            "keras.layers.BatchNormalization, tfbn.BatchNormalization and subclasses that leave `call` "
            f"alone are understood. Received: layer {name_of(layer)!r} of type {type(layer).__name__}."
        )
