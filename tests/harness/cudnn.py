"""What `FusedBatchNormV3` and its gradient do on a GPU, played by formulas where there is none.

As TensorFlow's fused_batch_norm_op.cc has it: cuDNN gives the unbiased variance, which is not a number
for one value, and keeps 1/√(σ² + ε) for the gradient; an empty batch has NaN for its moments; in NCHW
there is no gradient of inference, and cuDNN refuses many examples.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

MOST_EXAMPLES = {True: 880_801, False: 65_535}  # in training, and in inference


def forward(
    *,
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
    is_training: bool,
    exponential_avg_factor: float = 1.0,
    data_format: str = "NHWC",
) -> tuple[tf.Tensor, ...]:
    assert exponential_avg_factor == 1  # The mean and variance are those of the batch.
    assert x.shape.rank == 4
    assert x.shape[0] is None or x.shape[0] <= MOST_EXAMPLES[is_training]
    values, over = tf.cast(x, tf.float32), _reduced(data_format)
    n = tf.cast(tf.size(x) // tf.size(scale), tf.float32)
    unbiased = variance
    if is_training:
        mean, variance = tf.nn.moments(values, over)  # of nothing: NaN
        unbiased = variance * (n / (n - 1))
    s = tf.math.rsqrt(variance + epsilon)
    y = (values - _along(mean, data_format)) * _along(s * scale, data_format)
    y = tf.cast(y + _along(offset, data_format), x.dtype)
    return y, mean, unbiased, mean, s, tf.zeros([])


def backward(
    *,
    y_backprop: tf.Tensor,
    x: tf.Tensor,
    scale: tf.Tensor,
    reserve_space_1: tf.Tensor,
    reserve_space_2: tf.Tensor,
    reserve_space_3: tf.Tensor,
    epsilon: float,
    is_training: bool,
    data_format: str = "NHWC",
) -> tuple[tf.Tensor, ...]:
    del reserve_space_3
    assert is_training or data_format == "NHWC"
    dy, values, over = (
        tf.cast(y_backprop, tf.float32),
        tf.cast(x, tf.float32),
        _reduced(data_format),
    )
    s = reserve_space_2 if is_training else tf.math.rsqrt(reserve_space_2 + epsilon)
    x_hat = (values - _along(reserve_space_1, data_format)) * _along(s, data_format)
    dgamma, dbeta = tf.reduce_sum(dy * x_hat, over), tf.reduce_sum(dy, over)
    if is_training:
        n = tf.cast(tf.size(x) // tf.size(scale), tf.float32)
        dy -= _along(dbeta / n, data_format) + x_hat * _along(dgamma / n, data_format)
    dx = tf.cast(_along(scale * s, data_format) * dy, x.dtype)
    return dx, dgamma, dbeta, tf.zeros([0]), tf.zeros([0])


def _reduced(data_format: str) -> list[int]:
    return [axis for axis in range(4) if data_format[axis] != "C"]


def _along(values: tf.Tensor, data_format: str) -> Any:
    return values if data_format == "NHWC" else values[:, tf.newaxis, tf.newaxis]
