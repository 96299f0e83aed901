"""Count, mean and variance of a tensor over its non-channel axes, and how to merge them exactly.

The mean may be relative to a *shift*: a value near the mean, which is subtracted before anything is squared
or summed, so that a large common offset (mean 1e6, standard deviation 1) costs no digits. Sums of squares
around zero are never subtracted from each other.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfbn._support.keras_internals import compiling_with_xla


class Moments(NamedTuple):
    """The number of values, their mean, and their biased variance (divided by the count).

    All three have the dtype of the statistics: float32, or float64 for a float64 input. Inside of tfbn the mean
    may be relative to a shift; `BatchNormalization.update_statistics` takes the plain mean.

    Attributes:
        count: The number of values of each channel: a scalar, or one number per channel where a mask gives
            channels different counts.
        mean: Their mean, per channel.
        variance: Their biased variance, per channel.

    Example:
        >>> layer = tfbn.BatchNormalization()
        >>> layer.build((None, 2))
        >>> moments = tfbn.Moments(count=32.0, mean=[0.5, 2.0], variance=[1.0, 4.0])
        >>> layer.update_statistics(moments)  # as for one batch of 32 values per channel
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype in which statistics of a ``dtype`` tensor are kept: at least float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def sum_over(x: tf.Tensor, reduced: Sequence[int]) -> tf.Tensor:
    """The sum of x over some axes, which must be ascending.

    It sums one axis after another, so that partial sums stay short. Rounding then does not grow with the
    number of values, as it does on a CPU in one reduction over all axes; and this is not slower there. (XLA and a
    small tensor in a view of few axes get one reduction.)
    """
    for axis in reversed(reduced):
        x = tf.reduce_sum(x, axis)
    return x


def sum_of_products(a: tf.Tensor, b: tf.Tensor, reduced: Sequence[int]) -> tf.Tensor:
    """The sum of a·b over some axes, which must be ascending."""
    products = a * b
    if compiling_with_xla() and products.shape.rank - 1 in reduced:
        # On a CPU, XLA sums products along the last axis in windows, several times slower than what its library
        # sums. It hands a selection to the library. This one changes no value.
        products = tf.where(tf.equal(products, 0), tf.zeros([], products.dtype), products)
    return sum_over(products, reduced)


def reduced_axes(rank: int, axes: Sequence[int]) -> list[int]:
    """The axes to reduce: all but the channel ``axes``."""
    return [axis for axis in range(rank) if axis not in axes]


def along(values: tf.Tensor, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Reshapes per-channel ``values`` so that they broadcast against ``x``."""
    if values.shape.rank == 0 or list(axes) == list(range(x.shape.rank - len(axes), x.shape.rank)):
        return values
    shape = [1] * x.shape.rank
    for axis, size in zip(axes, values.shape, strict=True):
        shape[axis] = size
    if None in shape:  # Virtual batches: their number is known only when the graph runs.
        sizes = tf.shape(values)
        shape = [sizes[axes.index(axis)] if axis in axes else 1 for axis in range(x.shape.rank)]
    return tf.reshape(values, shape)


def count(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None = None) -> tf.Tensor:
    """The number of values of each channel of ``x``: a scalar, or one per channel under a mask."""
    dtype = statistics_dtype(x.dtype)
    reduced = reduced_axes(x.shape.rank, axes)
    if mask is not None:
        # Counted at the mask's own size, times the axes that it broadcasts over.
        kept = tf.cast(mask, dtype)
        repeats = [1 if mask.shape[axis] != 1 else tf.shape(x)[axis] for axis in reduced]
        factor = tf.cast(tf.reduce_prod(tf.stack(repeats)), dtype)
        total = tf.reduce_sum(kept, reduced) * factor
        counts = tf.broadcast_to(total, tf.gather(tf.shape(x), list(axes)))
        return tf.ensure_shape(counts, [x.shape[axis] for axis in axes])
    sizes = [x.shape[axis] for axis in reduced]
    if None not in sizes:
        return tf.constant(float(math.prod(sizes)), dtype)
    return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), reduced)), dtype)


def moments(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None = None, *, any_shift: bool = False
) -> tuple[tf.Tensor, Moments]:
    r"""Two-pass moments of ``x`` per channel, relative to a shift.

    Around a shift :math:`c`, the median of three values (with a mask, the plain mean): first
    :math:`\mu - c = \sum (x - c) / n`, then :math:`\sigma^2 = \sum (x - \mu)^2 / n`.

    Args:
        x: Floating-point tensor of known rank.
        axes: The channel axes, ascending and non-negative.
        mask: ``None``, or a boolean tensor of the rank of ``x`` that broadcasts to it: the values
            that count.
        any_shift: Whether the shift may be the first value of a channel. If that is an outlier, of :math:`n`
            values, it is up to :math:`\sqrt n` standard deviations away, which costs as many digits.

    Returns:
        The shift ``c`` and the moments, whose mean is relative to ``c``; each has the shape of the
        channel axes. Without a value the count, the mean and the variance are 0.
    """
    dtype = statistics_dtype(x.dtype)
    reduced = reduced_axes(x.shape.rank, axes)
    x = tf.cast(x, dtype)
    n = count(x, axes, mask)

    if mask is None:
        shift = first_value(x, axes) if any_shift else median_of_three(x, axes)
    else:
        shift = divided_by_count(sum_over(zero_where_masked(x, mask), reduced), n)
    # A constant: another shift changes the offset by as much, so it has no gradient.
    shift = tf.stop_gradient(shift)
    deviation = zero_where_masked(x - along(shift, x, axes), mask)
    offset = divided_by_count(sum_over(deviation, reduced), n)
    centred = zero_where_masked(deviation - along(offset, x, axes), mask)
    variance = divided_by_count(sum_of_products(centred, centred, reduced), n)
    return shift, Moments(n, offset, variance)


def merge(a: Moments, b: Moments) -> Moments:
    r"""Merges the moments of two disjoint sets of values exactly.

    .. math:: \mu = \mu_a + w_b \delta, \quad
              \sigma^2 = w_a \sigma_a^2 + w_b \sigma_b^2 + w_a w_b \delta^2, \quad
              \delta = \mu_b - \mu_a, \; w_i = n_i / (n_a + n_b)

    (Chan, Golub and LeVeque, 1983, written with weights so that nothing is multiplied by a large count.) An
    empty side has no influence, whatever its mean and variance are.
    """
    n = a.count + b.count
    weight_a = tf.math.divide_no_nan(a.count, n)
    weight_b = tf.math.divide_no_nan(b.count, n)
    # The mean of an empty batch may be NaN.
    mean_a, mean_b = zero_where_empty(a.mean, a.count), zero_where_empty(b.mean, b.count)
    delta = mean_b - mean_a
    # Starting from the heavier side: with a weight of 0 or 1, its mean is the result, to the bit.
    mean = tf.where(weight_a >= weight_b, mean_a + weight_b * delta, mean_b - weight_a * delta)
    variance = (
        weight_a * zero_where_empty(a.variance, a.count)
        + weight_b * zero_where_empty(b.variance, b.count)
        + weight_a * weight_b * tf.square(tf.where((a.count > 0) & (b.count > 0), delta, 0))
    )
    return Moments(n, mean, variance)


def merge_all(shifts: tf.Tensor, parts: Moments) -> tuple[tf.Tensor, Moments]:
    r"""Merges the moments of many disjoint sets of values exactly, all of them at once.

    .. math:: \mu = \sum_r w_r \mu_r, \quad \sigma^2 = \sum_r w_r (\sigma_r^2 + (\mu_r - \mu)^2), \quad
              w_r = n_r / \sum_s n_s

    Args:
        shifts: The shift of each set, in rows.
        parts: The moments of each set, in rows, with means relative to its own shift.

    Returns:
        A shift near the common mean, and the moments of all values, whose mean is relative to it.
    """
    counts = parts.count
    if counts.shape.rank == 1:  # One for all channels of a row.
        counts = tf.reshape(counts, [-1, *[1] * (shifts.shape.rank - 1)])
    weights = tf.math.divide_no_nan(counts, tf.reduce_sum(counts, 0))
    shifts, offsets = zero_where_empty(shifts, counts), zero_where_empty(parts.mean, counts)
    shift = tf.stop_gradient(tf.reduce_sum(weights * (shifts + offsets), 0))
    means = tf.where(counts > 0, (shifts - shift) + offsets, 0)
    mean = tf.reduce_sum(weights * means, 0)
    spread = zero_where_empty(parts.variance, counts) + tf.square(
        tf.where(counts > 0, means - mean, 0)
    )
    variance = tf.reduce_sum(weights * spread, 0)
    return shift, Moments(tf.reduce_sum(parts.count, 0), mean, variance)


def divided_by_count(values: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
    """Divides by a count; 0 where it is 0."""
    known = tf.get_static_value(n)
    if known is not None and (known > 0).all():
        return values / n
    return tf.math.divide_no_nan(values, n)


def first_value(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """The first value of each channel; 0 without values."""
    reduced = reduced_axes(x.shape.rank, axes)
    first = x[tuple(slice(1 if axis in reduced else None) for axis in range(x.shape.rank))]
    return tf.reduce_sum(first, reduced)


def median_of_three(x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """The median of three values of each channel, so that one outlier does not matter; 0 without values.

    A shift far from the values would cost the digits that it should save.
    """
    reduced = reduced_axes(x.shape.rank, axes)
    is_reduced = np.array([axis in reduced for axis in range(x.shape.rank)], np.int32)
    known = x.shape.is_fully_defined()
    shape, library = (np.array(x.shape, np.int32), np) if known else (tf.shape(x), tf)
    # One value of each channel; none if there are none.
    size = library.minimum(shape, np.where(is_reduced, 1, np.iinfo(np.int32).max).astype(np.int32))

    def at(place: Any) -> tf.Tensor:
        values = tf.reduce_sum(tf.slice(x, place * is_reduced, size), reduced)
        values.set_shape([x.shape[axis] for axis in axes])
        return values

    a, b, c = at(0 * is_reduced), at(shape // 2), at(library.maximum(shape - 1, 0))
    return tf.maximum(tf.minimum(a, b), tf.minimum(tf.maximum(a, b), c))


def zero_where_empty(values: tf.Tensor, counted: tf.Tensor) -> tf.Tensor:
    """Replaces the values of channels without a count by 0: they may be NaN."""
    return tf.where(counted > 0, values, tf.zeros_like(values))


def zero_where_masked(values: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Replaces the values at masked positions by 0."""
    return values if mask is None else tf.where(mask, values, tf.zeros([], values.dtype))
