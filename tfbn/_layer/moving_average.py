"""Moving averages that nothing poisons: which moments may move them, and how they follow."""

import keras
import tensorflow as tf

from tfbn._moments.moments import Moments


def can_update(moments: Moments) -> tf.Tensor:
    """Where these moments may move the averages: a boolean, or one per channel if counts differ.

    Not where nothing was counted, and nowhere if a channel that was counted is not finite.
    """
    count, mean, variance = moments
    finite = tf.math.is_finite(mean + variance)  # Neither can take back what the other has lost.
    known = tf.get_static_value(count)
    if known is not None and (known > 0).all():
        return tf.reduce_all(finite)
    counted = count > 0
    return counted & tf.reduce_all(finite | ~counted)


def update_moving_average(variable: keras.Variable, value: tf.Tensor, rate: tf.Tensor) -> None:
    """``variable * (1 - rate) + value * rate``: with rate 0 ``value`` may be NaN, it is not heard.

    In this form, unlike in ``variable - rate * (variable - value)``, rate 1 gives ``value`` to the bit.
    """
    old = tf.convert_to_tensor(variable)
    variable.assign(old * (1 - rate) + tf.math.multiply_no_nan(value, rate))
