"""Forward passes in training mode that leave no trace in the moving statistics."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._layer import collect_moments
from tfbn._models.intercept import calls_replaced
from tfbn._models.walk import BatchNormLayer, batch_norm_layers


@contextlib.contextmanager
def pause_statistics(model: keras.layers.Layer) -> Iterator[None]:
    """While open, the batch normalization layers of a model normalize as in training, and learn nothing.

    For the extra forward passes of gradient penalties, adversarial examples or sharpness-aware
    minimization, whose inputs or weights are not those of inference: with ``training=True`` each batch
    is normalized by its own statistics, and the moving ones stand still. Keras's layers and ours are
    served alike; blocks nest, and end as they should when something raises.

    It holds for eager calls, and for functions that are traced inside the block: in a custom
    ``train_step``, open it around the call. A function that was traced before keeps what it does, and
    one that is first traced inside keeps the pause. It changes the layers while it is open: another thread
    that calls the model meanwhile sees the pause too.

    Args:
        model: A Keras model, or any layer. Without batch normalization in it, nothing happens.

    Raises:
        TypeError: If `model` is no Keras model or layer.

    Example:
        >>> y = model(x, training=True)
        >>> with tfbn.pause_statistics(model):
        ...     y_adversarial = model(x + perturbation, training=True)
    """
    layers = batch_norm_layers(model)
    with calls_replaced([(layer, _paused(layer)) for layer in layers]):
        yield


def _paused(layer: BatchNormLayer) -> Callable[..., tf.Tensor]:
    call = layer.call

    def paused(inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        if training is None or training is False:
            return call(inputs, training=training, mask=mask)
        # Whatever the layer does to its statistics is undone: this holds for every way of updating them.
        affine = {id(layer.gamma), id(layer.beta)}
        held = [(w, tf.identity(w.value)) for w in layer.weights if id(w) not in affine]
        with collect_moments.redirect(lambda layer, moments: None):
            outputs = call(inputs, training=training, mask=mask)
        for weight, value in held:
            weight.assign(value)
        return outputs

    return paused
