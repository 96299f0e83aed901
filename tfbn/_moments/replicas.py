"""The replicas of a ``tf.distribute`` strategy: their shares of a batch, and what they know together.

What is pooled over them is the same on each, to the bit, by one all-reduce of one vector. That is the only
collective that TensorFlow offers with every strategy, eagerly, in graphs and under XLA on GPUs; its
``all_gather`` costs two between workers (the shapes go first) and does not work under XLA. With one replica,
or outside of ``strategy.run``, nothing is exchanged and nothing changes.
"""

from collections.abc import Sequence

import tensorflow as tf

from tfbn._moments.moments import Moments, merge_all

# Up to this many replicas, moments are joined in one all-reduce, of a row for each of them. Beyond, the rows
# would weigh more than the latency of a second one (`benchmarks/scaling.py` has the model).
FEW = 16


def num_replicas() -> int:
    """How many replicas run the current code together: 1 where it does not run in ``strategy.run``."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def all_reduce_mean(batches: Sequence[Moments]) -> list[Moments]:
    r"""What the moving statistics of each layer follow: the averages over replicas, in one all-reduce.

    .. math:: n = \sum_r n_r, \quad \mu = \frac1n \sum_r n_r \mu_r, \quad
              \sigma^2 = \frac1n \sum_r n_r \sigma_r^2

    The variance is the one *within* replicas, since that is what each of them normalizes by; the
    spread of their means is no part of it. A replica without values is not heard, whatever its mean
    is; one that is not finite makes the result so on every replica.

    Args:
        batches: The moments of each layer on this replica; the same layers on every replica.

    Returns:
        The same moments on every replica, to the bit.
    """
    if num_replicas() == 1:
        return list(batches)
    parts = [part for n, *means in batches for part in (n, *(_total(n, mean) for mean in means))]
    sums = iter(all_reduce_sum(parts))
    return [
        Moments(n, tf.math.divide_no_nan(next(sums), n), tf.math.divide_no_nan(next(sums), n))
        for n in sums
    ]


def all_reduce_merge(shift: tf.Tensor, relative: Moments) -> tuple[tf.Tensor, Moments]:
    """The moments of the values of all replicas together, in one all-reduce (two of more than `FEW`).

    Args:
        shift: What the mean on this replica is relative to.
        relative: The moments on this replica.

    Returns:
        Another shift and the moments relative to it, the same on every replica, to the bit.
    """
    if num_replicas() > FEW:
        return _merge_in_two(shift, relative)
    context = tf.distribute.get_replica_context()
    here = tf.range(num_replicas()) == context.replica_id_in_sync_group

    def row(value: tf.Tensor) -> tf.Tensor:
        """A row for each replica, of which this one fills its own: their sum has all of them."""
        return tf.where(tf.reshape(here, [-1, *[1] * value.shape.rank]), value, 0)

    count, shifts, mean, variance = all_reduce_sum(
        [row(v) for v in (relative.count, shift, *relative[1:])]
    )
    return merge_all(shifts, Moments(count, mean, variance))


def _merge_in_two(shift: tf.Tensor, relative: Moments) -> tuple[tf.Tensor, Moments]:
    """First a common shift, then the moments around it: as many numbers for any number of replicas."""
    n, offset, variance = relative
    count, total = all_reduce_sum([n, _total(n, shift + offset)])
    # Rounded, but near the mean and the same everywhere: all that a shift has to be.
    common = tf.stop_gradient(tf.math.divide_no_nan(total, count))
    mean = (shift - common) + offset
    sums = all_reduce_sum([_total(n, mean), _total(n, variance + tf.square(mean))])
    mean, square = (tf.math.divide_no_nan(value, count) for value in sums)
    return common, Moments(count, mean, tf.maximum(square - tf.square(mean), 0))


def all_reduce_sum(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The sum of each tensor over the replicas, all of them in one all-reduce.

    Raises:
        RuntimeError: In a graph of its own (a branch, a loop, a nested ``tf.function``): TensorFlow cannot
            leave it to meet the other replicas.
    """
    dtype = tf.float64 if any(value.dtype == tf.float64 for value in values) else tf.float32
    packed = tf.concat([tf.reshape(tf.cast(value, dtype), [-1]) for value in values], 0)
    try:
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packed)
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        raise RuntimeError(
            "Batch normalization shares its statistics with the other replicas of the tf.distribute "
            "strategy, which TensorFlow cannot do in a tf.cond, a loop or a tf.function inside of "
            f"strategy.run. Received: a call in training mode in the graph "
            f"'{tf.compat.v1.get_default_graph().name}'. Call the layer outside of them (a branch can "
            "choose between two results), decorate what calls strategy.run, or freeze the statistics with "
            "tfbn.freeze."
        ) from error
    sizes = [_size(value) for value in values]
    return [
        tf.cast(tf.reshape(part, tf.shape(value)), value.dtype)
        for part, value in zip(tf.split(total, sizes), values, strict=True)
    ]


def _total(n: tf.Tensor, mean: tf.Tensor) -> tf.Tensor:
    return tf.math.multiply_no_nan(mean, n)


def _size(value: tf.Tensor) -> int | tf.Tensor:
    known = value.shape.num_elements()
    return tf.size(value) if known is None else known
