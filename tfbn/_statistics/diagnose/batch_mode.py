"""Runs a model with the statistics of each batch, as in training, without changing the model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from tfbn._layer import arguments
from tfbn._models.intercept import intercept_calls
from tfbn._models.walk import BatchNormLayer, statistics_are_frozen
from tfbn._statistics.layer_call import normalize_by_batch

Observer = Callable[[BatchNormLayer, tf.Tensor, Sequence[int], tf.Tensor | None], None]


def batch_statistics(
    layers: Sequence[BatchNormLayer], observe: Observer | None = None
) -> AbstractContextManager[None]:
    """While open, these layers normalize by the statistics of each batch, whatever `training` says.

    Args:
        layers: Built layers.
        observe: Called with each layer, its inputs, its axes and the mask.
    """

    def run(
        layer: BatchNormLayer, call: Any, inputs: Any, training: Any = None, mask: Any = None
    ) -> tf.Tensor:
        x = tf.convert_to_tensor(inputs)
        axes = arguments.resolved_axes(layer.axis, x.shape)
        mask = None if mask is None else arguments.fitted_mask(mask, x)
        if observe is not None:
            observe(layer, x, axes, mask)
        return normalize_by_batch(layer, x, axes, mask)[0]

    return intercept_calls(layers, run)


def no_updates(layers: Sequence[BatchNormLayer]) -> AbstractContextManager[None]:
    """While open, these layers run in the mode in which they are called, but do not update anything."""

    def run(
        layer: BatchNormLayer, call: Any, inputs: Any, training: Any = None, mask: Any = None
    ) -> tf.Tensor:
        if not is_true(training) or statistics_are_frozen(layer):
            return call(inputs, training=False, mask=mask)
        with batch_statistics([layer]):
            return layer.call(inputs, mask=mask)

    return intercept_calls(layers, run)


def is_true(training: Any) -> bool:
    """Whether a `training` flag is known to be true while the model is traced."""
    return bool(tf.get_static_value(training) if tf.is_tensor(training) else training)
