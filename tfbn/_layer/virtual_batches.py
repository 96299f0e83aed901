"""Virtual batches: one batch seen as groups of consecutive examples, each with statistics of its own."""

from collections.abc import Sequence

import tensorflow as tf

from tfbn._moments.moments import Moments
from tfbn._normalize.reshape import like, with_shape


def split(x: tf.Tensor, size: int) -> tf.Tensor:
    """Views ``x``, (batch, ...), as (groups, size, ...).

    Raises:
        ValueError: If the batch size is known and no multiple of ``size``.
        tf.errors.InvalidArgumentError: The same, found when the graph runs.
    """
    batch = x.shape[0]
    message = (
        "The batch size must be a multiple of `virtual_batch_size`; change either, or drop the "
        "last incomplete batch with `dataset.batch(..., drop_remainder=True)`. "
        f"Received: virtual_batch_size={size}, batch size"
    )
    if batch is not None and batch % size:
        raise ValueError(f"{message} {batch}")
    rest = tf.shape(x)[1:]
    with tf.control_dependencies(
        []
        if batch is not None
        else [tf.debugging.assert_equal(tf.shape(x)[0] % size, 0, f"{message} as below")]
    ):
        grouped = tf.reshape(x, tf.concat([[tf.shape(x)[0] // size, size], rest], 0))
    groups = None if batch is None else batch // size
    return with_shape(grouped, [groups, size, *x.shape[1:]])


def ungroup(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """The inverse of :func:`split`: ``y`` in the shape of ``x``."""
    return like(y, x)


def repeat(values: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
    """Per-channel ``values`` once for each group, (groups, *channels)."""
    grouped = tf.broadcast_to(values, tf.concat([[groups], tf.shape(values)], 0))
    return with_shape(grouped, [tf.get_static_value(groups), *values.shape])


def average(moments: Moments) -> Moments:
    """What the moving statistics follow: the average over groups of their means and of their variances.

    Each group weighs as much as it counts. The variance is the one *within* groups, since that is
    what examples are normalized by; the spread of the groups' means is not part of it.
    """
    count, mean, variance = moments
    if count.shape.rank == 0:  # All groups count the same.
        groups = tf.cast(tf.shape(mean)[0], count.dtype)
        return Moments(count * groups, tf.reduce_mean(mean, 0), tf.reduce_mean(variance, 0))
    total = tf.reduce_sum(count, 0)
    weights = tf.math.divide_no_nan(count, total)
    return Moments(total, tf.reduce_sum(weights * mean, 0), tf.reduce_sum(weights * variance, 0))


def shifted_axes(axes: Sequence[int]) -> tuple[int, ...]:
    """The channel axes of the view: the groups, and the channel axes of ``x`` moved by one."""
    return (0, *(axis + 1 for axis in axes))
