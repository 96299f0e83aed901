"""Finding the layers of a model, however they are nested."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._support.keras_internals import tracked_layers

BatchNormLayer: TypeAlias = keras.layers.BatchNormalization | BatchNormalization
BATCH_NORM_CLASSES = (keras.layers.BatchNormalization, BatchNormalization)


def children(layer: keras.layers.Layer) -> Iterable[keras.layers.Layer]:
    """The layers directly inside a layer that its calls can reach, in order of definition."""
    if isinstance(layer, keras.Model):
        return layer.layers
    return tracked_layers(layer)


def layers_inside(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers directly inside a layer, with those that a Functional model holds outside of its graph."""
    if not isinstance(layer, keras.Function):
        return list(children(layer))
    called = [operation for operation in layer.operations if isinstance(operation, keras.Layer)]
    seen = set(map(id, called))
    return [*called, *(other for other in tracked_layers(layer) if id(other) not in seen)]


def walk(
    layer: keras.layers.Layer,
    inside: Callable[[keras.layers.Layer], Iterable[keras.layers.Layer]] = children,
) -> Iterator[keras.layers.Layer]:
    """This layer and all layers inside it, parents first, each once.

    Args:
        layer: A layer or model.
        inside: Which layers are directly inside a layer: `children` or `layers_inside`.
    """
    seen: set[int] = set()
    waiting = [layer]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += reversed(list(inside(found)))


def batch_norm_layers(
    model: keras.layers.Layer,
    inside: Callable[[keras.layers.Layer], Iterable[keras.layers.Layer]] = children,
) -> list[BatchNormLayer]:
    """All batch normalization layers of a model, Keras's and ours, each once, in order of definition.

    Searches nested Functional, Sequential and subclassed models, layers and wrappers, and the lists, tuples
    and dicts of layers that Keras tracks. A layer with several parents is listed where it is found first.

    Args:
        model: A model, or any layer.
        inside: As in `walk`.

    Returns:
        The layers. Layers that a subclassed model creates in `build` or `call` are missing until then.

    Raises:
        TypeError: If `model` is not a Keras model or layer.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            f"`model` must be a Keras model or layer. Received: model={model!r} of type {type(model).__name__}."
        )
    return [layer for layer in walk(model, inside=inside) if isinstance(layer, BATCH_NORM_CLASSES)]


def name_of(layer: keras.layers.Layer) -> str:
    """The name of a layer in reports: its path, or its name before it is built."""
    return str(layer.path or layer.name)


def require_model(model: Any) -> None:
    """Raises a TypeError if this is not a Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a Keras model. Received: model={model!r} of type {type(model).__name__}."
        )


def strategy_of(model: keras.layers.Layer) -> tf.distribute.Strategy:
    """The strategy that the model was created under, or else the current one."""
    return getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()


def statistics_are_frozen(layer: BatchNormLayer) -> bool:
    """Whether the layer runs in inference mode even when it is called with `training=True`."""
    frozen = not layer.trainable or getattr(layer, "freeze_statistics", False)
    return frozen or getattr(layer, "has_fused_statistics", False)


def learns_statistics(layer: BatchNormLayer) -> bool:
    """Whether training is meant to update the moving statistics of the layer."""
    return not statistics_are_frozen(layer) and layer.momentum != 1


def has_initial_statistics(layer: BatchNormLayer) -> bool:
    """Whether the moving statistics of a built layer are exactly what they were initialized with."""
    mean, variance = layer.moving_mean, layer.moving_variance
    return all(
        np.array_equal(weight.numpy(), initializer(weight.shape, weight.dtype))
        for weight, initializer in (
            (mean, layer.moving_mean_initializer),
            (variance, layer.moving_variance_initializer),
        )
    )
