"""TensorFlow's fused kernel on a GPU, where it is cuDNN's.

cuDNN refuses many examples (pytorch#19911), but not many positions. So the kernel gets images as they are,
unless there are known to be too many, so that TensorFlow may join an activation that follows. It gets all else
as (1, positions, 1, channels) or, with channels on axis 1, as (examples, channels, positions, 1) in NCHW. NCHW
is for training alone: a SavedModel that contains it would not run on a CPU, the kernel has no gradient of
inference there, and more than 65,535 examples fail.
"""

from typing import Any

import tensorflow as tf

from tfbn._moments.moments import Moments, count, zero_where_empty
from tfbn._normalize.fused import Fused, gradient, kernel
from tfbn._normalize.kernel import Gradients, Normalization

MOST_EXAMPLES = 880_801  # cuDNN cannot train on more in NCHW.
MOST_IMAGES = 65_535  # cuDNN cannot infer on more.


class CuDNN(Fused):
    """The fused kernel on a GPU, for a tensor of four axes, the channels last or second."""

    def __init__(self, over: Normalization):
        super().__init__(over)
        self._format = "NHWC" if over.axes[0] == 3 else "NCHW"

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Any]:
        y, mean, unbiased, *reserve = kernel(x, gamma, beta, self._epsilon, self._format)
        # One value has no unbiased variance (0/0), and an empty batch has no mean. cuDNN is accurate, so
        # nothing is checked: a decision by value would stop the GPU's queue.
        n = count(x, [self._format.index("C")])
        variance = tf.math.multiply_no_nan(unbiased, tf.math.divide_no_nan(n - 1, n))
        mean = zero_where_empty(mean, n)
        return y, Moments(n, mean, variance), (x, *reserve)

    def backward(self, saved: Any, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor) -> Gradients:
        seen, *reserve = saved
        return gradient(
            dy, seen, gamma, reserve, self._epsilon, is_training=True, data_format=self._format
        )

    def moments(self, x: tf.Tensor) -> Moments:
        ones = tf.ones([x.shape[3]])
        return self.forward(x, ones, tf.zeros_like(ones))[1]


def takes_images(x: tf.Tensor, over: Normalization) -> bool:
    """Whether x goes to the kernel as it is, channels last."""
    return x.shape.rank == 4 and len(over.axes) == 1 and (x.shape[0] or 0) <= MOST_IMAGES


def takes_second(x: tf.Tensor, over: Normalization) -> bool:
    """Whether x, with its channels in a row before other axes, can train in NCHW."""
    examples = x.shape[: over.axes[0]].num_elements()
    return examples is None or examples <= MOST_EXAMPLES
