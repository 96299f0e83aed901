"""Moving averages that no batch can poison: which moments may update them, and how."""

import keras
import tensorflow as tf

from tfbn._moments.moments import Moments


def can_update(moments: Moments) -> tf.Tensor:
    """Where these moments may update the averages: a boolean, or one per channel if counts differ.

    A channel without values is not updated. If the mean or variance of any channel with values is not
    finite, no channel is updated.
    """
    count, mean, variance = moments
    finite = tf.math.is_finite(mean + variance)  # Neither can make up for the other.
    known = tf.get_static_value(count)
    if known is not None and (known > 0).all():
        return tf.reduce_all(finite)
    counted = count > 0
    return counted & tf.reduce_all(finite | ~counted)


def update_moving_average(variable: keras.Variable, value: tf.Tensor, rate: tf.Tensor) -> None:
    """Assigns ``variable * (1 - rate) + value * rate``.

    With rate 0, ``value`` may be NaN; with rate 1, the old value may be, and the result equals ``value`` to
    the bit.
    """
    old = tf.convert_to_tensor(variable)
    # The raw operation takes half of the time eagerly.
    kept = tf.raw_ops.MulNoNan(x=old, y=1 - rate)
    variable.assign(kept + tf.raw_ops.MulNoNan(x=value, y=rate))
