"""Virtual batches: a batch as groups of consecutive examples, each with statistics of its own."""

import tensorflow as tf

from tfbn._moments.moments import Moments
from tfbn._normalize.dispatch import normalize_batch
from tfbn._normalize.kernel import Normalization
from tfbn._normalize.reshape import like, with_shape


def normalize_groups(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, over: Normalization, size: int
) -> tuple[tf.Tensor, Moments]:
    """Like `normalize_batch`, but each group of ``size`` examples is a batch of its own.

    The groups become channels of a view (groups, size, ...). The moments are the averages over the groups.
    """
    groups = _split(x, size)
    mask = over.mask
    if mask is not None:
        everywhere = tf.broadcast_to(mask, tf.shape(x))
        mask = _split(tf.ensure_shape(everywhere, x.shape), size)
    number = tf.shape(groups)[0]
    axes = (0, *(axis + 1 for axis in over.axes))
    y, moments = normalize_batch(
        groups, _repeat(gamma, number), _repeat(beta, number), over._replace(axes=axes, mask=mask)
    )
    return like(y, x), _average(moments)


def _split(x: tf.Tensor, size: int) -> tf.Tensor:
    """Views ``x``, (batch, ...), as (groups, size, ...).

    Raises:
        ValueError: If the batch size is known and not a multiple of ``size``.
        tf.errors.InvalidArgumentError: If that shows only when the graph runs.
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
        else [tf.debugging.Assert(tf.shape(x)[0] % size == 0, [message, tf.shape(x)[0]])]
    ):
        grouped = tf.reshape(x, tf.concat([[tf.shape(x)[0] // size, size], rest], 0))
    groups = None if batch is None else batch // size
    return with_shape(grouped, [groups, size, *x.shape[1:]])


def _repeat(values: tf.Tensor, groups: tf.Tensor) -> tf.Tensor:
    """Per-channel ``values`` once for each group, (groups, *channels)."""
    grouped = tf.broadcast_to(values, tf.concat([[groups], tf.shape(values)], 0))
    return with_shape(grouped, [tf.get_static_value(groups), *values.shape])


def _average(moments: Moments) -> Moments:
    """The average over groups of their means and of their variances.

    Groups are weighted by their counts. The variance is the one *within* groups, because examples are
    normalized by it. The spread of the groups' means is not part of it.
    """
    count, mean, variance = moments
    if count.shape.rank == 0:  # All groups count the same.
        groups = tf.cast(tf.shape(mean)[0], count.dtype)
        return Moments(count * groups, tf.reduce_mean(mean, 0), tf.reduce_mean(variance, 0))
    total = tf.reduce_sum(count, 0)
    weights = tf.math.divide_no_nan(count, total)
    return Moments(total, tf.reduce_sum(weights * mean, 0), tf.reduce_sum(weights * variance, 0))
