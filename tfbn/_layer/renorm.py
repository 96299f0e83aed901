r"""Batch renormalization: corrections that bring training outputs near those of inference.

With the batch's :math:`\mu, \sigma` and the slowly moving :math:`\mu_r, \sigma_r` (:math:`\sigma =
\sqrt{\mathrm{variance} + \epsilon}`), and no gradient through r and d:

.. math:: r = \mathrm{clip}(\sigma / \sigma_r, r_{min}, r_{max}), \quad
          d = \mathrm{clip}((\mu - \mu_r) / \sigma_r, -d_{max}, d_{max}), \quad
          y = \left(\frac{x - \mu}{\sigma} r + d\right) \gamma + \beta

(Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017; variables and limits as in Keras.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn._layer.moving_average import update_moving_average
from tfbn._moments.moments import Moments
from tfbn._normalize.dispatch import normalize_batch
from tfbn._normalize.formula import batch_moments
from tfbn._normalize.kernel import Normalization


def renormalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    over: Normalization,
    *,
    renorm_mean: tf.Tensor,
    renorm_stddev: tf.Tensor,
    clipping: Mapping[str, float],
) -> tuple[tf.Tensor, Moments]:
    """Like `normalize_batch`, with the corrections r and d."""
    # The moments come first, because gamma and beta absorb r and d: half precision then rounds once.
    shift, relative = batch_moments(tf.stop_gradient(x), over)
    moments = relative._replace(mean=shift + relative.mean)
    r, d = _corrections(moments, renorm_mean, renorm_stddev, clipping, over.epsilon)
    y, _ = normalize_batch(x, r * gamma, d * gamma + beta, over)
    return y, moments


def _corrections(
    moments: Moments,
    renorm_mean: tf.Tensor,
    renorm_stddev: tf.Tensor,
    clipping: Mapping[str, float],
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    # Early in training the moving value may be smaller than any batch's can be.
    reference = tf.maximum(renorm_stddev, epsilon**0.5)
    r = tf.sqrt(moments.variance + epsilon) / reference
    d = (moments.mean - renorm_mean) / reference
    if clipping.get("rmin") is not None:
        r = tf.maximum(r, clipping["rmin"])
    if clipping.get("rmax") is not None:
        r = tf.minimum(r, clipping["rmax"])
    if clipping.get("dmax") is not None:
        d = tf.clip_by_value(d, -clipping["dmax"], clipping["dmax"])
    return tf.stop_gradient(r), tf.stop_gradient(d)


def update_statistics(layer: Any, moments: Moments, can_update: tf.Tensor, rate: tf.Tensor) -> None:
    """Updates the statistics of a layer with renorm, but for its moving mean."""
    stddev = tf.sqrt(moments.variance + layer.epsilon)
    renorm_rate = tf.where(can_update, tf.constant(1 - layer.renorm_momentum, rate.dtype), 0)
    update_moving_average(layer.renorm_mean, moments.mean, renorm_rate)
    update_moving_average(layer.renorm_stddev, stddev, renorm_rate)
    update_moving_average(layer.moving_stddev, stddev, rate)
    # As in Keras: the standard deviation is averaged, and the variance derived from it.
    derived = tf.nn.relu(tf.square(layer.moving_stddev) - layer.epsilon)
    layer.moving_variance.assign(tf.where(can_update, derived, layer.moving_variance))


def stddev_initializer(variance_initializer: Any) -> Callable[..., tf.Tensor]:
    """Initializes a moving standard deviation by the root of the moving variance's initial value."""

    def initialize(shape: Any, dtype: Any = None) -> tf.Tensor:
        return keras.ops.sqrt(cloned(variance_initializer)(shape, dtype=dtype))

    return initialize


def cloned(initializer: Any) -> Any:
    """A copy of an initializer. Keras wants a random initializer to be used for one weight only."""
    if isinstance(initializer, keras.initializers.Initializer):
        return type(initializer).from_config(initializer.get_config())
    return initializer
