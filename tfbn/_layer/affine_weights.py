"""Gamma and beta of a batch normalization layer, Keras's or ours."""

from typing import Any

import tensorflow as tf


def affine_weights(layer: Any, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """Gamma and beta of a built layer in this dtype; 1 and 0 where the layer has none."""
    shape = layer.moving_mean.shape
    gamma = tf.ones(shape, dtype) if layer.gamma is None else tf.cast(layer.gamma, dtype)
    beta = tf.zeros(shape, dtype) if layer.beta is None else tf.cast(layer.beta, dtype)
    return gamma, beta
