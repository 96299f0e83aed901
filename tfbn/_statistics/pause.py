"""Forward passes in training mode that leave the moving statistics unchanged."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._layer import collect_moments
from tfbn._models.intercept import intercept_calls
from tfbn._models.walk import BatchNormLayer, batch_norm_layers


@contextlib.contextmanager
def pause_statistics(model: keras.layers.Layer) -> Iterator[None]:
    """A context manager in which training-mode calls do not update the moving statistics.

    Use it for extra forward passes: gradient penalties, adversarial examples, sharpness-aware
    minimization. With ``training=True`` the layers still normalize each batch by its own statistics. It
    works for Keras's layers and for tfbn's. Blocks can be nested.

    It affects eager calls, and functions that are traced inside of the block; in a custom ``train_step``,
    open it around the call. A function keeps the behavior that it was traced with. While the block is open,
    calls of the model in other threads are affected too.

    Args:
        model: A Keras model or layer. If it has no batch normalization layers, nothing happens.

    Raises:
        TypeError: If `model` is not a Keras model or layer.

    Example:
        >>> y = model(x, training=True)
        >>> with tfbn.pause_statistics(model):
        ...     y_adversarial = model(x + perturbation, training=True)
    """
    with intercept_calls(batch_norm_layers(model), _call_and_restore, all_threads=True):
        yield


def _call_and_restore(
    layer: BatchNormLayer,
    call: Callable[..., tf.Tensor],
    inputs: Any,
    training: Any = None,
    mask: Any = None,
) -> tf.Tensor:
    """Calls the layer and restores its statistics, however it updates them."""
    if training is None or training is False:
        return call(inputs, training=training, mask=mask)
    affine = {id(layer.gamma), id(layer.beta)}
    before = [(w, tf.identity(w.value)) for w in layer.weights if id(w) not in affine]
    with collect_moments.redirect(lambda layer, moments: None):
        outputs = call(inputs, training=training, mask=mask)
    for weight, value in before:
        weight.assign(value)
    return outputs
