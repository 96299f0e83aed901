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

from tfbn._moments import replicas
from tfbn._moments.moments import Moments, along, moments, reduced_axes, statistics_dtype


class Setting(NamedTuple):
    """Over which values a channel is normalized.

    Attributes:
        axes: The channel axes, ascending and non-negative.
        epsilon: Added to the variance.
        mask: ``None``, or a boolean tensor of the rank of ``x`` that broadcasts to it: the values that
            count.
        synchronized: Whether those of all replicas are one batch.
    """

    axes: Sequence[int]
    epsilon: float
    mask: tf.Tensor | None = None
    synchronized: bool = False


class Saved(NamedTuple):
    """What the backward pass needs beside ``x``: the mean in two parts that keep its digits."""

    shift: tf.Tensor
    moments: Moments


def forward(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: Setting,
) -> tuple[tf.Tensor, Moments, Saved]:
    """Normalizes ``x`` by its own moments. Returns the output, the moments and what to save."""
    axes, epsilon = setting.axes, setting.epsilon
    shift, relative = _moments(x, setting)
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
    setting: Setting,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta; of the latter two this replica's share."""
    axes, epsilon, mask, _ = setting
    shift, relative = saved
    reduced = reduced_axes(x.shape.rank, axes)
    dtype = statistics_dtype(x.dtype)
    dy = tf.cast(dy, dtype)
    centred = _centred(tf.cast(x, dtype), shift, relative.mean, axes)
    s = tf.math.rsqrt(relative.variance + epsilon)
    sum_dy = tf.reduce_sum(dy, reduced)
    sum_dy_centred = tf.reduce_sum(dy * centred, reduced)
    total_dy, total_dy_centred = _totals([sum_dy, sum_dy_centred], setting)
    through_mean = along(tf.math.divide_no_nan(total_dy, relative.count), x, axes)
    through_variance = along(
        tf.math.divide_no_nan(tf.square(s) * total_dy_centred, relative.count), x, axes
    )
    through_statistics = through_mean + centred * through_variance
    if mask is not None:
        through_statistics = tf.where(mask, through_statistics, tf.zeros([], dtype))
    dx = along(gamma * s, x, axes) * (dy - through_statistics)
    return tf.cast(dx, x.dtype), s * sum_dy_centred, sum_dy


def second_backward(
    upstream: Sequence[tf.Tensor | None],
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: Setting,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    r"""The gradients of :func:`backward`'s results, with respect to dy, x, gamma and beta.

    With :math:`\hat x_i = (x_i - \mu)\, s` and :math:`P(z)_i = \frac{m_i}{n} (\sum_j z_j + \hat x_i \sum_j
    z_j \hat x_j)`, the backward pass is :math:`dx = \gamma s (dy - P(dy))`, :math:`d\gamma = \sum \hat x\, dy`,
    :math:`d\beta = \sum dy`. Where u, v, w are the gradients by these three, and :math:`P^T` adjoins P:

    .. math:: \partial_{dy} &= \gamma s (u - P^T(u)) + v \hat x + w, \qquad
              \partial_\gamma = s Q, \quad Q = \sum u (dy - P(dy)) \\
              \partial_x &= s (G - P(G)) - \gamma s^2 Q \frac{m \hat x}{n}, \quad
              G = v\, dy - \frac{\gamma s}{n} \left( dy \sum m u \hat x + m u \sum dy\, \hat x \right)

    Everything here is computed anew from x, so that TensorFlow differentiates it to any further order.
    """
    axes, epsilon, mask, _ = setting
    dtype = gamma.dtype
    values, dy_wide = tf.cast(x, dtype), tf.cast(dy, dtype)
    u, v, w = (
        tf.zeros_like(like) if given is None else tf.cast(given, dtype)  # None: nobody asks
        for given, like in zip(upstream, (values, gamma, beta), strict=True)
    )
    shift, relative = _moments(values, setting)
    s = tf.math.rsqrt(relative.variance + epsilon)
    x_hat = _centred(values, shift, relative.mean, axes) * along(s, x, axes)
    reduced = reduced_axes(x.shape.rank, axes)

    def average(z: tf.Tensor) -> tf.Tensor:
        (total,) = _totals([tf.reduce_sum(z, reduced)], setting)
        return along(tf.math.divide_no_nan(total, relative.count), x, axes)

    def counting(z: tf.Tensor) -> tf.Tensor:
        return z if mask is None else tf.where(mask, z, tf.zeros([], dtype))

    def without_statistics(z: tf.Tensor) -> tf.Tensor:  # z - P(z)
        return z - counting(average(z) + x_hat * average(z * x_hat))

    gamma_s, v_wide = along(gamma * s, x, axes), along(v, x, axes)
    u_counting = counting(u)
    u_x_hat = average(u_counting * x_hat)
    q = tf.reduce_sum(u * without_statistics(dy_wide), reduced)
    by_dy = (
        gamma_s * (u - average(u_counting) - x_hat * u_x_hat) + v_wide * x_hat + along(w, x, axes)
    )
    g = v_wide * dy_wide - gamma_s * (dy_wide * u_x_hat + u_counting * average(dy_wide * x_hat))
    (total_q,) = _totals([q], setting)
    through_s = along(tf.math.divide_no_nan(gamma * s * s * total_q, relative.count), x, axes)
    by_x = along(s, x, axes) * without_statistics(g) - counting(x_hat) * through_s
    return tf.cast(by_dy, dy.dtype), tf.cast(by_x, x.dtype), s * q, tf.zeros_like(beta)


def plain(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: Setting,
) -> tuple[tf.Tensor, Moments]:
    r"""The same, in operations that TensorFlow differentiates rightly to any order.

    It computes :math:`(x - c) s\gamma + (\beta - (\mu - c) s\gamma)` with the shift :math:`c`: one
    multiply-add that does not cancel, since :math:`\mu - c` is small.
    """
    axes, epsilon, mask, _ = setting
    # Cast once, so that the gradient is rounded to half precision once.
    values = tf.cast(x, gamma.dtype)
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
    large. In half precision a large x has lost more digits than that, and it saves a pass.
    """
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    values = tf.cast(x, gamma.dtype)
    if values.dtype == x.dtype:
        values -= along(mean, x, axes)
    else:
        beta -= mean * scale
    return tf.cast(values * along(scale, x, axes) + along(beta, x, axes), x.dtype)


def second_inference_backward(
    upstream: Sequence[tf.Tensor | None],
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
) -> tuple[tf.Tensor, ...]:
    r"""The gradients of the gradients of :func:`inference`, by dy and by each of its arguments.

    The gradients are :math:`dx = \gamma s\, dy`, :math:`d\mu = -\gamma s A`,
    :math:`d\sigma^2 = -\frac12 \gamma s^3 B`, :math:`d\gamma = s B`, :math:`d\beta = A`, with
    :math:`A = \sum dy` and :math:`B = \sum dy (x - \mu)`.
    """
    dtype = gamma.dtype
    values, dy_wide = tf.cast(x, dtype), tf.cast(dy, dtype)
    u, of_mean, of_variance, v, w = (
        tf.zeros_like(like) if given is None else tf.cast(given, dtype)  # None: nobody asks
        for given, like in zip(upstream, (values, mean, variance, gamma, beta), strict=True)
    )
    s = tf.math.rsqrt(variance + epsilon)
    centred = values - along(mean, x, axes)
    reduced = reduced_axes(x.shape.rank, axes)
    a, b = tf.reduce_sum(dy_wide, reduced), tf.reduce_sum(dy_wide * centred, reduced)
    u_dy = tf.reduce_sum(u * dy_wide, reduced)
    by_a = w - gamma * s * of_mean
    by_b = s * v - 0.5 * gamma * s**3 * of_variance
    by_s = gamma * (u_dy - of_mean * a - 1.5 * s**2 * of_variance * b) + v * b
    by_dy = along(gamma * s, x, axes) * u + along(by_a, x, axes) + along(by_b, x, axes) * centred
    by_x = along(by_b, x, axes) * dy_wide
    by_gamma = s * (u_dy - of_mean * a - 0.5 * s**2 * of_variance * b)
    by_variance = -0.5 * s**3 * by_s
    return (
        tf.cast(by_dy, dy.dtype),
        tf.cast(by_x, x.dtype),
        -by_b * a,
        by_variance,
        by_gamma,
        tf.zeros_like(beta),
    )


def _moments(x: tf.Tensor, setting: Setting) -> tuple[tf.Tensor, Moments]:
    """The moments of the batch: of this replica, or of all of them."""
    shift, relative = moments(x, setting.axes, setting.mask)
    return replicas.all_reduce_merge(shift, relative) if setting.synchronized else (shift, relative)


def _totals(sums: Sequence[tf.Tensor], setting: Setting) -> Sequence[tf.Tensor]:
    """Sums over the positions of this replica, or of all of them."""
    return replicas.all_reduce_sum(sums) if setting.synchronized else sums


def _centred(x: tf.Tensor, shift: tf.Tensor, offset: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    return (x - along(shift, x, axes)) - along(offset, x, axes)
