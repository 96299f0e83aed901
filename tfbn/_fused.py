"""Batch normalization by TensorFlow's fused kernel, ``FusedBatchNormV3`` and its gradient.

The kernel takes float32, float16 and bfloat16 activations with float32 parameters, channels last,
no mask. It reads half-precision activations as they are, without a float32 copy.

Every input is handed over as (examples, 1, 1, channels): on the CPU the kernel is up to twice as
fast in this shape as in (N, H, W, C) or (1, N, 1, C), and the view costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from tfbn._moments import Moments, count

DTYPES = (tf.float32, tf.float16, tf.bfloat16)

# On the CPU the kernel (oneDNN's) adds float32 numbers one after the other. Its mean of n values
# was measured to be off by about (1e-7 + 1.1e-10 n) of its own size: 1e-5 for a 32×56×56 image
# batch, so that a channel with mean 1e4 and spread 1 came out 0.1 wrong. Where the mean is that
# much larger than the spread, the kernel runs again on x - mean. The check is on a few numbers per
# channel; outputs are right to about this tolerance.
_TOLERANCE = 1e-4
_MEAN_ERROR = 1e-7
_MEAN_ERROR_PER_EXAMPLE = 1.1e-10


class Saved(NamedTuple):
    """What the backward pass needs: the input as the kernel saw it, and the kernel's own reserve."""

    x: tf.Tensor
    reserve: tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def serves(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether the kernel can take ``x``: its dtype, and channels that are the last axes."""
    rank = x.shape.rank
    return x.dtype in DTYPES and list(axes) == list(range(rank - len(axes), rank))


def forward(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    on_gpu: bool,
) -> tuple[tf.Tensor, Moments, Saved]:
    """Normalizes ``x`` by its own moments. Returns the output, the moments and what to save."""
    flat = _flat(x, gamma)
    gamma_flat, beta_flat = tf.reshape(gamma, [-1]), tf.reshape(beta, [-1])
    n = count(x, axes)

    def run(values: tf.Tensor) -> tuple[tf.Tensor, ...]:
        y, mean, unbiased, *reserve = tf.raw_ops.FusedBatchNormV3(
            x=values,
            scale=gamma_flat,
            offset=beta_flat,
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=epsilon,
            is_training=True,
        )
        # The kernel returns the unbiased variance. One value has none (0/0 on some devices): its
        # biased one is 0.
        biased = tf.math.multiply_no_nan(unbiased, tf.math.divide_no_nan(n - 1, n))
        return y, mean, biased, *reserve

    y, mean, variance, *reserve = run(flat)
    if (
        not on_gpu
    ):  # cuDNN's kernel is accurate, and a decision by value would stop the GPU's queue.

        def again() -> tuple[tf.Tensor, ...]:
            shift = tf.cast(mean, x.dtype)
            centred = flat - shift
            y, offset, *rest = run(centred)
            return centred, y, tf.cast(shift, tf.float32) + offset, *rest

        flat, y, mean, variance, *reserve = _if(
            _mean_dominates(mean, variance, n, epsilon),
            again,
            lambda: (flat, y, mean, variance, *reserve),
        )
    y = _like(y, x)
    shape = gamma.shape
    moments = Moments(n, tf.reshape(mean, shape), tf.reshape(variance, shape))
    return y, moments, Saved(flat, tuple(reserve))


def backward(
    dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor, saved: Saved, *, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta."""
    return _gradient(dy, x, saved.x, gamma, saved.reserve, epsilon, is_training=True)


def inference(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    epsilon: float,
) -> tf.Tensor:
    """Normalizes ``x`` by the given statistics."""
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=_flat(x, gamma),
        scale=tf.reshape(gamma, [-1]),
        offset=tf.reshape(beta, [-1]),
        mean=tf.reshape(mean, [-1]),
        variance=tf.reshape(variance, [-1]),
        epsilon=epsilon,
        is_training=False,
    )
    return _like(y, x)


def inference_backward(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    *,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta, with the statistics held constant."""
    reserve = (tf.reshape(mean, [-1]), tf.reshape(variance, [-1]), tf.zeros([0]))
    return _gradient(dy, x, _flat(x, gamma), gamma, reserve, epsilon, is_training=False)


def _gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    seen: tf.Tensor,
    gamma: tf.Tensor,
    reserve: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
    epsilon: float,
    is_training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=_flat(dy, gamma),
        x=seen,
        scale=tf.reshape(gamma, [-1]),
        reserve_space_1=reserve[0],
        reserve_space_2=reserve[1],
        reserve_space_3=reserve[2],
        epsilon=epsilon,
        is_training=is_training,
    )
    return _like(dx, x), tf.reshape(dgamma, gamma.shape), tf.reshape(dbeta, gamma.shape)


def _mean_dominates(
    mean: tf.Tensor, variance: tf.Tensor, n: tf.Tensor, epsilon: float
) -> tf.Tensor:
    limit = tf.square(_TOLERANCE / (_MEAN_ERROR + _MEAN_ERROR_PER_EXAMPLE * n))
    return tf.reduce_any(tf.square(mean) > limit * (variance + epsilon))


def _if(
    condition: tf.Tensor, true: Callable[[], tuple[tf.Tensor, ...]], false: Callable[[], tuple]
) -> tuple[tf.Tensor, ...]:
    if tf.executing_eagerly():
        return true() if condition else false()
    return tf.cond(condition, true, false)


def _flat(x: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [-1, 1, 1, gamma.shape.num_elements()])


def _like(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    if x.shape.is_fully_defined():
        return tf.reshape(y, x.shape)
    return tf.ensure_shape(tf.reshape(y, tf.shape(x)), x.shape)
