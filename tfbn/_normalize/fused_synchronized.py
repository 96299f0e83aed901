r"""Batch normalization over replicas by TensorFlow's fused kernel.

The kernel knows nothing of replicas. It computes the moments of this replica's share of the batch; then it
normalizes, as in inference, by the moments of all shares. So does the gradient: with :math:`\hat x = (x -
\mu) s` and the sums :math:`A = \sum dy`, :math:`\Gamma = \sum dy\, \hat x` over all replicas,

.. math:: dx_i = \gamma s \left( dy_i - \frac{A}{n} \right) - \frac{\gamma s\, \Gamma}{n} \hat x_i

Both terms are again what the kernel computes in inference, from dy and from x, with other parameters.
Half-precision activations are not copied to float32.
"""

from typing import NamedTuple

import tensorflow as tf

from tfbn._moments import replicas
from tfbn._moments.moments import Moments, median_of_three
from tfbn._normalize.fused import Fused
from tfbn._normalize.kernel import Gradients, Normalization


class Saved(NamedTuple):
    """What the backward pass needs: the input as the kernel saw it, and its moments."""

    x: tf.Tensor
    moments: Moments


class FusedSynchronized:
    """The fused kernel over replicas, for a tensor of four axes, the channels last.

    Args:
        over: What is normalized over what.
        kernel: The kernel of each replica: `Fused`, or `CuDNN` on a GPU.
    """

    def __init__(self, over: Normalization, kernel: type[Fused]):
        self._epsilon = over.epsilon
        self._kernel = kernel(over)

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Saved]:
        seen, shift = x, tf.zeros_like(gamma)
        if x.dtype == gamma.dtype:
            # The moments must be those of values near 0. In half precision x has lost these digits.
            shift = median_of_three(x, [3])
            seen = x - shift
        common, relative = replicas.all_reduce_merge(shift, self._kernel.moments(seen))
        moments = relative._replace(mean=(common - shift) + relative.mean)
        y = self._kernel.inference(seen, *moments[1:], gamma, beta)
        return y, relative._replace(mean=common + relative.mean), Saved(seen, moments)

    def backward(self, saved: Saved, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor) -> Gradients:
        seen, (n, mean, variance) = saved
        infer = self._kernel.inference
        _, dgamma, dbeta = self._kernel.inference_backward(dy, seen, mean, variance, gamma)
        total_dgamma, total_dbeta = replicas.all_reduce_sum([dgamma, dbeta])
        nothing = tf.zeros_like(gamma)
        # The mean of dy is subtracted before anything is rounded: in half precision two large terms would
        # cancel.
        mean_dy = tf.math.divide_no_nan(total_dbeta, n)
        centred = infer(dy, mean_dy, variance, gamma, nothing)
        weight = -tf.math.divide_no_nan(gamma * tf.math.rsqrt(variance + self._epsilon), n)
        through_variance = infer(seen, mean, variance, weight * total_dgamma, nothing)
        return centred + through_variance, dgamma, dbeta
