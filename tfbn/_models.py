"""Finding the batch normalization layers of a model, however they are nested.

This is the one room that knows where Keras keeps the layers inside a layer.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import keras

from tfbn._layer import BatchNormalization

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
    return [layer for layer in _walk(model, set()) if isinstance(layer, CLASSES)]


def _walk(layer: keras.layers.Layer, seen: set[int]) -> Iterator[keras.layers.Layer]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer
    for child in _children(layer):
        yield from _walk(child, seen)


def _children(layer: keras.layers.Layer) -> Iterable[keras.layers.Layer]:
    """The layers directly inside, in order of definition."""
    if isinstance(layer, keras.Model):
        return layer.layers
    # Keras has no public name for what a plain layer tracks. Its `_flatten_layers` reverses siblings.
    tracked = getattr(layer, "_layers", None)
    if tracked is not None:
        return tracked
    # Keras's own lists come first among the attributes: a layer's own place is its last.
    return reversed(dict.fromkeys(reversed(list(_held(vars(layer).values())))))


def _held(values: Iterable[object]) -> Iterator[keras.layers.Layer]:
    """The layers among attributes: what Keras tracks too, found without its help."""
    for value in values:
        if isinstance(value, keras.layers.Layer):
            yield value
        elif isinstance(value, dict):
            yield from _held(value.values())
        elif isinstance(value, list | tuple):
            yield from _held(value)
