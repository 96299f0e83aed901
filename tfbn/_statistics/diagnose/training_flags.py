"""Which `training` each layer receives when the model is called in training and in inference mode."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._models.intercept import intercept_calls, isolated_tracing
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, name_of, statistics_are_frozen
from tfbn._statistics.plan import run_model


def training_flags(
    model: keras.layers.Layer, layers: Sequence[BatchNormLayer], spec: Any
) -> dict[str, tuple[str, ...]]:
    """Returns the layers that do not run in the mode in which the model is called.

    See ``forced``, ``ignored`` and ``overridden`` of `ModelEvidence`.
    """
    learning = [layer for layer in layers if layer.built and not statistics_are_frozen(layer)]
    in_inference = _received(model, learning, spec, training=False)
    in_training = _received(model, learning, spec, training=True)
    asked_for_inference = {id(layer) for layer in _called_with_training_false(model)}
    return {
        "forced": tuple(name_of(layer) for layer, flags in in_inference if any(flags)),
        "ignored": tuple(
            name_of(layer)
            for layer, flags in in_training
            if flags and not any(flags) and id(layer) not in asked_for_inference
        ),
        "overridden": tuple(
            name_of(layer)
            for layer, flags in in_training
            if any(flags) and id(layer) in asked_for_inference
        ),
    }


def _received(
    model: keras.layers.Layer, layers: Sequence[BatchNormLayer], spec: Any, training: bool
) -> list[tuple[BatchNormLayer, list[bool]]]:
    """Returns the `training` that each call of each layer receives."""
    received: dict[int, list[bool]] = {id(layer): [] for layer in layers}

    def record(
        layer: BatchNormLayer, call: Any, inputs: Any, training: Any = None, mask: Any = None
    ) -> tf.Tensor:
        value = tf.get_static_value(training) if tf.is_tensor(training) else training
        received[id(layer)].append(bool(value))
        return call(inputs, training=False, mask=mask)

    def trace(batch: Any) -> None:
        with intercept_calls(layers, record):
            run_model(model, batch, training)

    with isolated_tracing():
        tf.function(trace, autograph=False).get_concrete_function(spec)
    return [(layer, received[id(layer)]) for layer in layers]


def _called_with_training_false(model: keras.layers.Layer) -> list[BatchNormLayer]:
    """Returns the layers in parts of Functional models that are called with ``training=False``."""
    found: list[BatchNormLayer] = []
    if not isinstance(model, keras.Model):
        return found
    try:
        configs = model.get_config().get("layers", [])
    except NotImplementedError:  # A subclassed model: only its code shows what it passes on.
        configs = []
    for config in configs:
        nodes = config.get("inbound_nodes", [])
        if any(node["kwargs"].get("training") is False for node in nodes):
            found += batch_norm_layers(model.get_layer(config["name"]))
    for part in model.layers:
        found += _called_with_training_false(part)
    return found
