"""Finding the batch normalization layers of a model, however they are nested.

This is the one room that knows where Keras keeps the layers inside a layer.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._support.keras_internals import tracked_layers

BatchNormLayer: TypeAlias = keras.layers.BatchNormalization | BatchNormalization
CLASSES = (keras.layers.BatchNormalization, BatchNormalization)


def batch_norm_layers(model: keras.layers.Layer) -> list[BatchNormLayer]:
    """All batch normalization layers of a model, Keras's and ours, each once, in order of definition.

    They are found in nested Functional, Sequential and subclassed models, inside plain layers and
    wrappers, and in lists, tuples and dicts of layers that Keras tracks. A layer that is shared by several
    parents comes where it is met first.

    Args:
        model: A model, or any layer.

    Returns:
        The layers, possibly none. A subclassed model shows the layers that it makes in `build` or on its
        first call only after that.

    Raises:
        TypeError: if `model` is no Keras model or layer.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            "Batch normalization layers can be looked for in a Keras model or layer only. "
            f"Received: model={model!r} of type {type(model).__name__}."
        )
    return [layer for layer in walk(model, set()) if isinstance(layer, CLASSES)]


def walk(layer: keras.layers.Layer, seen: set[int]) -> Iterator[keras.layers.Layer]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for child in children(layer):
        yield from walk(child, seen)


def children(layer: keras.layers.Layer) -> Iterable[keras.layers.Layer]:
    """The layers directly inside, in order of definition."""
    if isinstance(layer, keras.Model):
        return layer.layers
    return tracked_layers(layer)


def name_of(layer: keras.layers.Layer) -> str:
    """What to call a layer in reports: its name, after those of the models it is in."""
    return str(layer.path or layer.name)  # Only a built one has a path.


def strategy_of(model: keras.layers.Layer) -> tf.distribute.Strategy:
    """The strategy that the model was made under, or the one in scope."""
    return getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()


def statistics_are_frozen(layer: BatchNormLayer) -> bool:
    """Whether the layer runs in inference mode though it is called with ``training=True``."""
    return not layer.trainable or getattr(layer, "freeze_statistics", False)
