r"""Batch normalization over replicas by TensorFlow's fused kernel, where `_fused` serves and replicas are many.

The kernel knows of no replicas. It gives the moments of this replica's share; then it normalizes, as in
inference, by those of all. So is the gradient: with :math:`\hat x = (x - \mu) s` and the sums
:math:`A = \sum dy`, :math:`\Gamma = \sum dy\, \hat x` over all replicas,

.. math:: dx_i = \gamma s \left( dy_i - \frac{A}{n} \right) - \frac{\gamma s\, \Gamma}{n} \hat x_i

of which both terms are again what the kernel does in inference, to dy and to x, with other
parameters. Half-precision activations are not copied to float32.
"""

from typing import NamedTuple

import tensorflow as tf

from tfbn._moments import replicas
from tfbn._moments.moments import Moments, median_of_three
from tfbn._normalize import fused


class Saved(NamedTuple):
    """What the backward pass needs beside ``x``: the input as the kernel saw it, and its moments."""

    x: tf.Tensor
    moments: Moments


def forward(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: fused.Setting,
) -> tuple[tf.Tensor, Moments, Saved]:
    """Normalizes ``x`` by the moments of all replicas. Returns the output, the moments and what to save."""
    seen, shift = x, tf.zeros_like(gamma)
    if x.dtype == gamma.dtype:
        # The moments are to be those of values near 0. In half precision, x has lost those digits.
        shift = median_of_three(x, setting.axes)
        seen = x - shift
    _, own, _ = fused.forward(seen, gamma, beta, setting=setting)
    common, relative = replicas.all_reduce_merge(shift, own)
    moments = relative._replace(mean=(common - shift) + relative.mean)
    y = fused.inference(seen, *moments[1:], gamma, beta, setting=setting)
    return y, relative._replace(mean=common + relative.mean), Saved(seen, moments)


def backward(
    saved: Saved,
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: fused.Setting,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta; of the latter two this replica's share."""
    seen, (n, mean, variance) = saved
    _, dgamma, dbeta = fused.inference_backward(dy, seen, mean, variance, gamma, setting=setting)
    total_dgamma, total_dbeta = replicas.all_reduce_sum([dgamma, dbeta])
    nothing = tf.zeros_like(gamma)
    # The mean of dy is subtracted before anything is rounded: in half precision two large terms would cancel.
    mean_dy = tf.math.divide_no_nan(total_dbeta, n)
    centred = fused.inference(dy, mean_dy, variance, gamma, nothing, setting=setting)
    weight = -tf.math.divide_no_nan(gamma * tf.math.rsqrt(variance + setting.epsilon), n)
    through_variance = fused.inference(
        seen, mean, variance, weight * total_dgamma, nothing, setting=setting
    )
    return centred + through_variance, dgamma, dbeta
