"""Derivatives of the gradient of batch normalization, as formulas of ordinary TensorFlow operations.

They compute everything anew from x, so that TensorFlow differentiates them to any further order.
"""

from collections.abc import Sequence

import tensorflow as tf

from tfbn._moments.moments import along, reduced_axes
from tfbn._normalize.formula import batch_moments, centre, sum_over_replicas
from tfbn._normalize.kernel import Normalization


def training(
    upstream: Sequence[tf.Tensor | None],
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    over: Normalization,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    r"""The gradients of a training step's gradients, with respect to dy, x, gamma and beta.

    With :math:`\hat x_i = (x_i - \mu)\, s` and :math:`P(z)_i = \frac{m_i}{n} (\sum_j z_j + \hat x_i \sum_j z_j
    \hat x_j)`, the backward pass is :math:`dx = \gamma s (dy - P(dy))`, :math:`d\gamma = \sum \hat x\, dy`,
    :math:`d\beta = \sum dy`. Where u, v, w are the gradients with respect to these three, and :math:`P^T` is
    the adjoint of P:

    .. math:: \partial_{dy} &= \gamma s (u - P^T(u)) + v \hat x + w, \qquad
              \partial_\gamma = s Q, \quad Q = \sum u (dy - P(dy)) \\
              \partial_x &= s (G - P(G)) - \gamma s^2 Q \frac{m \hat x}{n}, \quad
              G = v\, dy - \frac{\gamma s}{n} \left( dy \sum m u \hat x + m u \sum dy\, \hat x \right)
    """
    axes, epsilon, mask, _ = over
    dtype = gamma.dtype
    values, dy_wide = tf.cast(x, dtype), tf.cast(dy, dtype)
    u, v, w = _zeros_for_none(upstream, (values, gamma, beta), dtype)
    shift, relative = batch_moments(values, over)
    s = tf.math.rsqrt(relative.variance + epsilon)
    x_hat = centre(values, shift, relative.mean, axes) * along(s, x, axes)
    reduced = reduced_axes(x.shape.rank, axes)

    def average(z: tf.Tensor) -> tf.Tensor:
        (total,) = sum_over_replicas([tf.reduce_sum(z, reduced)], over)
        return along(tf.math.divide_no_nan(total, relative.count), x, axes)

    def counted(z: tf.Tensor) -> tf.Tensor:
        return z if mask is None else tf.where(mask, z, tf.zeros([], dtype))

    def without_statistics(z: tf.Tensor) -> tf.Tensor:  # z - P(z)
        return z - counted(average(z) + x_hat * average(z * x_hat))

    gamma_s, v_wide = along(gamma * s, x, axes), along(v, x, axes)
    u_counted = counted(u)
    u_x_hat = average(u_counted * x_hat)
    q = tf.reduce_sum(u * without_statistics(dy_wide), reduced)
    by_dy = (
        gamma_s * (u - average(u_counted) - x_hat * u_x_hat) + v_wide * x_hat + along(w, x, axes)
    )
    g = v_wide * dy_wide - gamma_s * (dy_wide * u_x_hat + u_counted * average(dy_wide * x_hat))
    (total_q,) = sum_over_replicas([q], over)
    through_s = along(tf.math.divide_no_nan(gamma * s * s * total_q, relative.count), x, axes)
    by_x = along(s, x, axes) * without_statistics(g) - counted(x_hat) * through_s
    return tf.cast(by_dy, dy.dtype), tf.cast(by_x, x.dtype), s * q, tf.zeros_like(beta)


def inference(
    upstream: Sequence[tf.Tensor | None],
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    over: Normalization,
) -> tuple[tf.Tensor, ...]:
    r"""The gradients of inference's gradients, with respect to dy and to each of its arguments.

    The gradients are :math:`dx = \gamma s\, dy`, :math:`d\mu = -\gamma s A`,
    :math:`d\sigma^2 = -\frac12 \gamma s^3 B`, :math:`d\gamma = s B`, :math:`d\beta = A`, with
    :math:`A = \sum dy` and :math:`B = \sum dy (x - \mu)`.
    """
    axes = over.axes
    dtype = gamma.dtype
    values, dy_wide = tf.cast(x, dtype), tf.cast(dy, dtype)
    u, of_mean, of_variance, v, w = _zeros_for_none(
        upstream, (values, mean, variance, gamma, beta), dtype
    )
    s = tf.math.rsqrt(variance + over.epsilon)
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


def _zeros_for_none(
    upstream: Sequence[tf.Tensor | None], likes: Sequence[tf.Tensor], dtype: tf.DType
) -> list[tf.Tensor]:
    return [
        tf.zeros_like(like) if given is None else tf.cast(given, dtype)
        for given, like in zip(upstream, likes, strict=True)
    ]
