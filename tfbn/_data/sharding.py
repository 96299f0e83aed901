"""Each replica's shard of a batch."""

from typing import Any

import tensorflow as tf

from tfbn._moments.replicas import num_replicas


def local_shard(batch: Any) -> Any:
    """This replica's examples of a batch: as many as the others have, or one more or less, or none."""
    if num_replicas() == 1:
        return batch
    context = tf.distribute.get_replica_context()
    index, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
    with tf.device("CPU:0"):  # where the batch is: the replica's device gets its share and no more
        size = batch_size(batch)
        begin, end = index * size // replicas, (index + 1) * size // replicas

        def cut(part: Any) -> Any:
            if isinstance(part, tf.SparseTensor):
                start = tf.one_hot(0, tf.rank(part), tf.cast(begin, tf.int64), dtype=tf.int64)
                shape = tf.concat([[tf.cast(end - begin, tf.int64)], part.dense_shape[1:]], 0)
                return tf.sparse.slice(part, start, shape)
            return part if part is None or part.shape.rank == 0 else part[begin:end]

        return tf.nest.map_structure(cut, batch)


def batch_size(batch: Any) -> tf.Tensor:
    """The number of examples in a batch, or in the inputs of one."""
    parts = tf.nest.flatten(batch)
    part = next(part for part in parts if part is not None and part.shape.rank != 0)
    return tf.cast(tf.shape(part)[0], tf.int32)
