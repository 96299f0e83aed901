"""Collectives over the replicas of a ``tf.distribute`` strategy.

`all_reduce_merge` merges the moments of all replicas exactly, for synchronized layers. `all_reduce_mean`
averages them, for layers whose replicas normalize on their own.

Every result is the same on each replica, to the bit. Values are packed into one vector for each all-reduce, and
only `all_reduce_merge` may take two. An all-reduce is the only collective that TensorFlow offers with every
strategy, eagerly, in graphs and under XLA on GPUs. (Its ``all_gather`` costs two between workers, and does not
work under XLA.) With one replica, or outside of ``strategy.run``, nothing is exchanged.
"""

from collections.abc import Sequence

import tensorflow as tf

from tfbn._moments.moments import Moments, merge_all

# Up to this many replicas, moments are merged in one all-reduce, with a row for each replica. Beyond, the rows
# would cost more than the latency of a second all-reduce (`benchmarks/scaling.py` has the model).
FEW = 16


def num_replicas() -> int:
    """How many replicas run the current code together: 1 outside of ``strategy.run``."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def all_reduce_sum(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The sum of each tensor over the replicas, in one all-reduce for all tensors.

    Raises:
        RuntimeError: In a graph of its own (a branch, a loop, a nested `tf.function`), which TensorFlow
            cannot leave to communicate.
    """
    if num_replicas() == 1:
        return list(values)
    dtype = tf.float64 if any(value.dtype == tf.float64 for value in values) else tf.float32
    packed = tf.concat([tf.reshape(tf.cast(value, dtype), [-1]) for value in values], 0)
    try:
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packed)
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        raise RuntimeError(
            "Batch normalization in training mode communicates with the other replicas of the "
            "tf.distribute strategy. TensorFlow cannot do that in a tf.cond, a loop or a tf.function inside "
            "of strategy.run. Call the layer outside of them (a branch can choose between two results), "
            "decorate the function that calls strategy.run, or freeze the statistics with tfbn.freeze. "
            "Received: a call in training mode in the graph "
            f"'{tf.compat.v1.get_default_graph().name}'."
        ) from error
    sizes = [_size(value) for value in values]
    return [
        tf.cast(tf.reshape(part, tf.shape(value)), value.dtype)
        for part, value in zip(tf.split(total, sizes), values, strict=True)
    ]


def all_reduce_mean(batches: Sequence[Moments]) -> list[Moments]:
    r"""The averages over replicas of the moments of several layers, in one all-reduce.

    .. math:: n = \sum_r n_r, \quad \mu = \frac1n \sum_r n_r \mu_r, \quad
              \sigma^2 = \frac1n \sum_r n_r \sigma_r^2

    The variance is the one *within* replicas, because each replica normalizes by its own. The spread of the
    replicas' means is not part of it. A replica without values has no influence, whatever its mean is. One
    that is not finite makes the result so on every replica.

    Args:
        batches: The moments of each layer on this replica; the same layers on every replica.

    Returns:
        The same moments on every replica, to the bit.
    """
    if num_replicas() == 1:
        return list(batches)
    weighted = [
        Moments(n, *(tf.math.multiply_no_nan(value, n) for value in values))
        for n, *values in batches
    ]
    sums = all_reduce_sum([part for moments in weighted for part in moments])
    return [
        Moments(n, tf.math.divide_no_nan(mean, n), tf.math.divide_no_nan(variance, n))
        for n, mean, variance in zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    ]


def all_reduce_merge(shift: tf.Tensor, relative: Moments) -> tuple[tf.Tensor, Moments]:
    """The moments of the values of all replicas together, in one all-reduce (two above `FEW` replicas).

    Args:
        shift: The mean on this replica is relative to it.
        relative: The moments on this replica.

    Returns:
        Another shift and the moments relative to it, the same on every replica, to the bit.
    """
    replicas = num_replicas()
    if replicas == 1:
        return shift, relative
    if replicas > FEW:
        return _merge_in_two(shift, relative)
    here = tf.range(replicas) == tf.distribute.get_replica_context().replica_id_in_sync_group

    def row(value: tf.Tensor) -> tf.Tensor:
        """A row for each replica, of which this one fills its own. Their sum has all rows."""
        return tf.where(tf.reshape(here, [-1, *[1] * value.shape.rank]), value, 0)

    count, mean, variance = relative
    count, shifts, mean, variance = all_reduce_sum([row(v) for v in (count, shift, mean, variance)])
    return merge_all(shifts, Moments(count, mean, variance))


def _merge_in_two(shift: tf.Tensor, relative: Moments) -> tuple[tf.Tensor, Moments]:
    """First a common shift, then the moments around it: the cost does not grow with the replicas."""
    n, offset, variance = relative
    count, total = all_reduce_sum([n, tf.math.multiply_no_nan(shift + offset, n)])
    # Rounded, but near the mean and the same everywhere. A shift need not be more.
    common = tf.stop_gradient(tf.math.divide_no_nan(total, count))
    mean = (shift - common) + offset
    square = variance + tf.square(mean)
    sums = all_reduce_sum([tf.math.multiply_no_nan(value, n) for value in (mean, square)])
    mean, square = (tf.math.divide_no_nan(value, count) for value in sums)
    return common, Moments(count, mean, tf.maximum(square - tf.square(mean), 0))


def _size(value: tf.Tensor) -> int | tf.Tensor:
    known = value.shape.num_elements()
    return tf.size(value) if known is None else known
