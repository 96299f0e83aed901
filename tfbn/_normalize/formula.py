r"""Batch normalization as a formula of ordinary TensorFlow operations.

It serves any rank, channel axes that TensorFlow can broadcast over (see `reshape.interleaved`), a mask,
float64, XLA (which fuses it into few passes) and statistics over replicas. For channels :math:`c` and the
positions :math:`i` that count:

.. math:: y_i = (x_i - \mu)\, s\, \gamma + \beta, \qquad s = 1 / \sqrt{\sigma^2 + \epsilon}

and with :math:`A = \sum_i dy_i` and :math:`B = \sum_i dy_i (x_i - \mu)` over all positions,

.. math:: d\beta = A, \quad d\gamma = s B, \quad
          dx_i = \gamma s \left( dy_i - \frac{m_i}{n} (A + (x_i - \mu)\, s^2 B) \right)

where :math:`m_i` is 1 where position :math:`i` counts in the statistics, else 0. (Ioffe and Szegedy, 2015,
section 3.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from tfbn._moments import replicas
from tfbn._moments.moments import (
    Moments,
    along,
    divided_by_count,
    moments,
    reduced_axes,
    sum_of_products,
    sum_over,
)
from tfbn._normalize.kernel import Gradients, Normalization


class Saved(NamedTuple):
    """What the backward pass needs beside x: the mean in two parts, which keep its digits, and 1 / σ."""

    shift: tf.Tensor
    moments: Moments
    s: tf.Tensor


class Formula:
    """The formula as a kernel: with its gradient written by hand."""

    def __init__(self, over: Normalization):
        self._over = over

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Saved]:
        axes = self._over.axes
        shift, relative = batch_moments(x, self._over)
        s = tf.math.rsqrt(relative.variance + self._over.epsilon)
        scale = gamma * s
        # It does not cancel: the mean relative to the shift is small.
        offset = beta - relative.mean * scale
        deviation = tf.cast(x, gamma.dtype) - along(shift, x, axes)
        y = tf.cast(deviation * along(scale, x, axes) + along(offset, x, axes), x.dtype)
        return y, relative._replace(mean=shift + relative.mean), Saved(shift, relative, s)

    def backward(self, saved: Saved, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor) -> Gradients:
        axes, _, mask, _ = self._over
        shift, (n, mean, _), s = saved
        dtype = gamma.dtype
        dy = tf.cast(dy, dtype)
        centred = centre(tf.cast(x, dtype), shift, mean, axes)
        reduced = reduced_axes(x.shape.rank, axes)
        sum_dy, sum_dy_centred = sum_over(dy, reduced), sum_of_products(dy, centred, reduced)
        total_dy, total_dy_centred = sum_over_replicas([sum_dy, sum_dy_centred], self._over)
        # Each term has its factor. As a product of one factor and a difference, dx took XLA twice as long, where it
        # joins this to the sums over dx of the layer before.
        scale = gamma * s
        through_mean = scale * divided_by_count(total_dy, n)
        slope = scale * divided_by_count(tf.square(s) * total_dy_centred, n)
        through_statistics = centred * along(slope, x, axes) + along(through_mean, x, axes)
        if mask is not None:
            through_statistics = tf.where(mask, through_statistics, tf.zeros([], dtype))
        dx = along(scale, x, axes) * dy - through_statistics
        return tf.cast(dx, x.dtype), s * sum_dy_centred, sum_dy

    def inference(
        self,
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
        beta: tf.Tensor,
    ) -> tf.Tensor:
        r"""Normalizes x as :math:`(x - c) k`, with :math:`k = s \gamma` and :math:`c = \mu - \beta / k`.

        That is one pass less than `infer` makes. It rounds as if the mean were rounded once more.
        """
        axes, epsilon, *_ = self._over
        scale = gamma * tf.math.rsqrt(variance + epsilon)
        # Where the scale is 0, or so small that beta / k would overflow, any as small gives beta, too.
        least = 1e-20 * tf.abs(beta)
        scale = tf.where(tf.abs(scale) < least, least, scale)
        shift = mean - tf.math.divide_no_nan(beta, scale)
        return (x - along(shift, x, axes)) * along(scale, x, axes)

    def inference_backward(
        self,
        dy: tf.Tensor,
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
    ) -> Gradients:
        axes, epsilon, *_ = self._over
        s = tf.math.rsqrt(variance + epsilon)
        reduced = reduced_axes(x.shape.rank, axes)
        dgamma = s * sum_over(dy * (x - along(mean, x, axes)), reduced)
        return along(gamma * s, x, axes) * dy, dgamma, sum_over(dy, reduced)


def infer(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    over: Normalization,
) -> tf.Tensor:
    r"""Normalizes x by given statistics: :math:`(x - \mu) \, s \gamma + \beta`.

    The mean is subtracted first: :math:`x s\gamma + (\beta - \mu s\gamma)` would cancel where it is large. A
    large x in half precision has lost more digits than that, and there the second form saves a pass.
    """
    axes = over.axes
    scale = gamma * tf.math.rsqrt(variance + over.epsilon)
    values = tf.cast(x, gamma.dtype)
    if values.dtype == x.dtype:
        values -= along(mean, x, axes)
    else:
        beta -= mean * scale
    return tf.cast(values * along(scale, x, axes) + along(beta, x, axes), x.dtype)


def batch_moments(x: tf.Tensor, over: Normalization) -> tuple[tf.Tensor, Moments]:
    """A shift, and the moments of the batch relative to it: of this replica's batch, or of all of them."""
    # XLA computes the shift again for each value. In half precision the cheaper one does.
    shift, relative = moments(x, over.axes, over.mask, any_shift=x.dtype.size < 4)
    return replicas.all_reduce_merge(shift, relative) if over.synchronized else (shift, relative)


def sum_over_replicas(sums: Sequence[tf.Tensor], over: Normalization) -> Sequence[tf.Tensor]:
    """Adds up sums over this replica's positions, where the replicas are synchronized."""
    return replicas.all_reduce_sum(sums) if over.synchronized else sums


def centre(x: tf.Tensor, shift: tf.Tensor, offset: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Subtracts a mean that is given in two parts."""
    return (x - along(shift, x, axes)) - along(offset, x, axes)
