"""What a replica of a strategy does in a step that one device does not.

On one device, or with one replica, nothing here does anything.
"""

from collections.abc import Sequence

import tensorflow as tf

from tfbn import _replicas
from tfbn._models import BatchNormLayer
from tfbn._moments import Moments


def share_of(mean: tf.Tensor, own: tf.Tensor, everywhere: tf.Tensor) -> tf.Tensor:
    r"""What a mean over the values of this replica adds to the mean over those of all replicas.

    .. math:: \ell = \sum_r \frac{n_r}{n} \ell_r

    The weights sum up to 1: what is the same on each replica, as the regularization is, counts once. The
    mean over no value may be NaN, and is not heard.

    Args:
        mean: :math:`\ell_r`.
        own: The number of values on this replica, :math:`n_r`.
        everywhere: The number of values on all replicas, :math:`n`.
    """
    weight = tf.math.divide_no_nan(own, everywhere)
    return tf.math.multiply_no_nan(mean, tf.cast(weight, mean.dtype))


def total(value: tf.Tensor) -> tf.Tensor:
    """The sum over all replicas."""
    return value if _replicas.number() == 1 else _replicas.summed([value])[0]


def update_statistics(seen: Sequence[tuple[BatchNormLayer, Moments]]) -> None:
    """One step of the moving statistics of all layers, with one all-reduce for all of them.

    The moments of a synchronized layer are those of all replicas already.
    """
    own = [moments for layer, moments in seen if not layer.synchronized]
    pooled = iter(_replicas.pooled(own) if own else ())
    for layer, moments in seen:
        layer.update_statistics(moments if layer.synchronized else next(pooled))
