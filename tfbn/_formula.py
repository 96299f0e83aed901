r"""Batch normalization as a formula of ordinary TensorFlow operations, with its gradient written by hand.

It serves every case: any rank and channel axes, a mask, float64, XLA (which compiles it into few
passes) and statistics over replicas. For channels :math:`c` and the positions :math:`i` that count:

.. math:: y_i = (x_i - \mu)\, s\, \gamma + \beta, \qquad s = 1 / \sqrt{\sigma^2 + \epsilon}

and with :math:`A = \sum_i dy_i` and :math:`B = \sum_i dy_i (x_i - \mu)` over all positions,

.. math:: d\beta = A, \quad d\gamma = s B, \quad
          dx_i = \gamma s \left( dy_i - \frac{m_i}{n} (A + (x_i - \mu)\, s^2 B) \right)

where :math:`m_i` is 1 where position :math:`i` counts in the statistics, else 0. (Ioffe and
Szegedy, 2015, section 3.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from tfbn._moments import Moments, along, moments, reduced_axes, statistics_dtype


class Saved(NamedTuple):
    """What the backward pass needs beside ``x``: the mean in two parts that keep its digits."""

    shift: tf.Tensor
    moments: Moments


def forward(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, Moments, Saved]:
    """Normalizes ``x`` by its own moments. Returns the output, the moments and what to save."""
    shift, relative = moments(x, axes, mask)
    centred = _centred(tf.cast(x, gamma.dtype), shift, relative.mean, axes)
    scale = gamma * tf.math.rsqrt(relative.variance + epsilon)
    y = tf.cast(centred * along(scale, x, axes) + along(beta, x, axes), x.dtype)
    return y, relative._replace(mean=shift + relative.mean), Saved(shift, relative)


def backward(
    saved: Saved,
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta."""
    shift, relative = saved
    reduced = reduced_axes(x.shape.rank, axes)
    dtype = statistics_dtype(x.dtype)
    dy = tf.cast(dy, dtype)
    centred = _centred(tf.cast(x, dtype), shift, relative.mean, axes)
    s = tf.math.rsqrt(relative.variance + epsilon)
    sum_dy = tf.reduce_sum(dy, reduced)
    sum_dy_centred = tf.reduce_sum(dy * centred, reduced)
    through_mean = along(tf.math.divide_no_nan(sum_dy, relative.count), x, axes)
    through_variance = along(
        tf.math.divide_no_nan(tf.square(s) * sum_dy_centred, relative.count), x, axes
    )
    through_statistics = through_mean + centred * through_variance
    if mask is not None:
        through_statistics = tf.where(mask, through_statistics, tf.zeros([], dtype))
    dx = along(gamma * s, x, axes) * (dy - through_statistics)
    return tf.cast(dx, x.dtype), s * sum_dy_centred, sum_dy


def plain(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, Moments]:
    r"""The same, in operations that TensorFlow differentiates rightly to any order.

    It computes :math:`(x - c) s\gamma + (\beta - (\mu - c) s\gamma)` with the shift :math:`c`: one
    multiply-add that does not cancel, since :math:`\mu - c` is small.
    """
    values = tf.cast(
        x, gamma.dtype
    )  # Once, so that the gradient is rounded to half precision once.
    shift, relative = moments(values, axes, mask)
    scale = gamma * tf.math.rsqrt(relative.variance + epsilon)
    offset = beta - relative.mean * scale
    deviation = values - along(shift, x, axes)
    y = tf.cast(deviation * along(scale, x, axes) + along(offset, x, axes), x.dtype)
    return y, relative._replace(mean=shift + relative.mean)


def inference(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    r""":math:`(x - \mu) \, s \gamma + \beta` with given statistics; differentiable in every argument.

    The mean is subtracted first: :math:`x s\gamma + (\beta - \mu s\gamma)` would cancel where it is
    large.
    """
    dtype = statistics_dtype(x.dtype)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    centred = tf.cast(x, dtype) - along(mean, x, axes)
    return tf.cast(centred * along(scale, x, axes) + along(beta, x, axes), x.dtype)


def _centred(x: tf.Tensor, shift: tf.Tensor, offset: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    return (x - along(shift, x, axes)) - along(offset, x, axes)
