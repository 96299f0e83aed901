"""The shard of a batch that a replica processes."""

from typing import Any

import tensorflow as tf

from tfbn._moments.replicas import num_replicas


def local_shard(batch: Any) -> Any:
    """Returns this replica's examples of a batch. The sizes of the shards differ by at most one."""
    if num_replicas() == 1:
        return batch
    context = tf.distribute.get_replica_context()
    index, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
    with tf.device("CPU:0"):  # Where the batch is: only the shard moves to the replica's device.
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
    """Returns the number of examples in a batch. A batch of scalars is one example."""
    parts = [part for part in tf.nest.flatten(batch) if part is not None and part.shape.rank != 0]
    return tf.cast(tf.shape(parts[0])[0], tf.int32) if parts else tf.constant(1)
