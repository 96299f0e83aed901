"""What a replica of a strategy does in a step that one device does not.

On one device, or with one replica, nothing here does anything.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfbn import _replicas
from tfbn._models import BatchNormLayer
from tfbn._moments import Moments


def share(batch: Any) -> Any:
    """This replica's examples of a batch: as many as the others have, or one more or less, or none."""
    if _replicas.number() == 1:
        return batch
    context = tf.distribute.get_replica_context()
    index, number = context.replica_id_in_sync_group, context.num_replicas_in_sync
    with tf.device("CPU:0"):  # where the batch is: the replica's device gets its share and no more
        size = examples(batch)
        begin, end = index * size // number, (index + 1) * size // number

        def cut(part: Any) -> Any:
            if isinstance(part, tf.SparseTensor):
                start = tf.one_hot(0, tf.rank(part), tf.cast(begin, tf.int64), dtype=tf.int64)
                shape = tf.concat([[tf.cast(end - begin, tf.int64)], part.dense_shape[1:]], 0)
                return tf.sparse.slice(part, start, shape)
            return part if part is None or part.shape.rank == 0 else part[begin:end]

        return tf.nest.map_structure(cut, batch)


def examples(batch: Any) -> tf.Tensor:
    """The number of examples in a batch, or in the inputs of one."""
    part = next(part for part in tf.nest.flatten(batch) if part is not None)
    return tf.cast(tf.shape(part)[0], tf.int32)


def share_of(mean: tf.Tensor, own: tf.Tensor, everywhere: tf.Tensor) -> tf.Tensor:
    r"""What a mean over the values of this replica adds to the mean over those of all replicas.

    .. math:: \ell = \sum_r \frac{n_r}{n} \ell_r

    The weights sum up to 1: what is the same on each replica, as the regularization is, counts once. The
    mean over no value may be NaN, and is not heard.

    Args:
        mean: :math:`\ell_r`.
        own: The number of values on this replica, :math:`n_r`.
        everywhere: The number of values on all replicas, :math:`n`.
    """
    weight = tf.math.divide_no_nan(own, everywhere)
    return tf.math.multiply_no_nan(mean, tf.cast(weight, mean.dtype))


def total(value: tf.Tensor) -> tf.Tensor:
    """The sum over all replicas."""
    return value if _replicas.number() == 1 else _replicas.summed([value])[0]


def update_statistics(seen: Sequence[tuple[BatchNormLayer, Moments]]) -> None:
    """One step of the moving statistics of all layers, with one all-reduce for all of them.

    The moments of a synchronized layer are those of all replicas already.
    """
    own = [moments for layer, moments in seen if not layer.synchronized]
    pooled = iter(_replicas.pooled(own) if own else ())
    for layer, moments in seen:
        layer.update_statistics(moments if layer.synchronized else next(pooled))
