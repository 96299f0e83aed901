"""The moments of many channels of many calls as one tensor of three rows: counts, means, variances."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfbn._moments.moments import Moments, merge

SPEC = tf.TensorSpec([3, None], tf.float64)


def pack(moments: Sequence[Moments]) -> tf.Tensor:
    """Packs moments of channels of any shapes."""
    columns = []
    for count, mean, variance in moments:
        count = tf.broadcast_to(count, tf.shape(mean))  # One count may hold for all channels.
        rows = [tf.reshape(tf.cast(row, tf.float64), [-1]) for row in (count, mean, variance)]
        columns.append(tf.stack(rows))
    return tf.concat(columns, 1)


def merge_packed(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Merges the moments of two sets of values."""
    return tf.stack(merge(Moments(*tf.unstack(one)), Moments(*tf.unstack(other))))


def unpack(packed: tf.Tensor, shapes: Sequence[Sequence[int]]) -> list[Moments]:
    """Returns the moments as arrays of these shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(packed.numpy(), ends[:-1], axis=1)
    return [
        Moments(*(row.reshape(shape) for row in part))
        for part, shape in zip(parts, shapes, strict=True)
    ]
