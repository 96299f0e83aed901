"""The moments of many channels of many calls as one tensor of three rows: counts, means, variances."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfbn._moments.moments import Moments, merge_all

MANY = 64
"""How many are merged at once."""


def pack(moments: Sequence[Moments]) -> tf.Tensor:
    """Packs moments of channels of any shapes."""
    # One count may hold for all channels.
    counts = [tf.broadcast_to(count, tf.shape(mean)) for count, mean, _ in moments]
    rows = counts, [m.mean for m in moments], [m.variance for m in moments]
    return tf.stack([_joined(row) for row in rows])


def _joined(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """The values of tensors in float64, one after the other. Few operations: there may be many parts."""
    parts = [part if part.shape.rank == 1 else tf.reshape(part, [-1]) for part in parts]
    if len({part.dtype for part in parts}) > 1:
        parts = [tf.cast(part, tf.float64) for part in parts]
    return tf.cast(tf.concat(parts, 0), tf.float64)


class Merger:
    """Merges the packed moments of many sets of values.

    They are kept as they are, and merged many at a time: that takes less time, and on a GPU it does not
    wait for each of them.
    """

    def __init__(self) -> None:
        self._kept: list[tf.Tensor] = []

    def add(self, moments: tf.Tensor) -> None:
        self._kept.append(moments)
        if len(self._kept) >= MANY:
            self._kept = [self.total()]

    def total(self) -> tf.Tensor:
        """The moments of all values."""
        counts, means, variances = tf.unstack(tf.stack(self._kept), axis=1)
        shift, (count, mean, variance) = merge_all(
            means, Moments(counts, tf.zeros_like(means), variances)
        )
        return tf.stack([count, shift + mean, variance])


def unpack(packed: tf.Tensor, shapes: Sequence[Sequence[int]]) -> list[Moments]:
    """Returns the moments as arrays of these shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(packed.numpy(), ends[:-1], axis=1)
    return [
        Moments(*(row.reshape(shape) for row in part))
        for part, shape in zip(parts, shapes, strict=True)
    ]
