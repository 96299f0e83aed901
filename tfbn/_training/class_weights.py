"""Class weights as sample weights."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf


def class_weights(y: Any, sample_weight: Any, class_weight: Mapping[int, float]) -> tf.Tensor:
    """Returns the weight of each example's class, 1 for a class that is not listed."""
    if sample_weight is not None or not isinstance(y, tf.Tensor) or y.shape.rank not in (1, 2):
        raise ValueError(
            "`class_weight` needs one output with one class per example, as integers or one-hot, and no "
            f"sample weights. Received: y={y}, sample_weight={sample_weight}."
        )
    if y.shape.rank == 2:
        y = tf.squeeze(y, -1) if y.shape[-1] == 1 else tf.argmax(y, -1)
    classes, weights = zip(*class_weight.items(), strict=True)
    here = tf.cast(tf.round(tf.cast(y, tf.float32)), tf.int64)[:, tf.newaxis] == tf.constant(
        classes, tf.int64
    )
    listed = tf.reduce_sum(tf.where(here, tf.constant(weights, tf.float32), 0.0), axis=-1)
    return tf.where(tf.reduce_any(here, axis=-1), listed, 1.0)
