"""Several batches, one update: the sums that are kept in between."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfbn._models.walk import BatchNormLayer
from tfbn._moments.moments import Moments, merge
from tfbn._training.gradients import Gradient, over_replicas


class Accumulator:
    """Sums of gradients and pooled batch moments of the batches since the last update.

    All of it is held in variables, which outlive a step, and which a backup can save. On each replica of
    a strategy they hold what that replica has seen.
    """

    def __init__(self, trainable: Sequence[keras.Variable]):
        self._weight = _variable(tf.zeros([]))
        self._gradients = [_variable(tf.zeros(v.shape, _sum_dtype(v))) for v in trainable]
        self._connected = [False] * len(trainable)
        self._pools: list[tuple[BatchNormLayer, Moments]] = []

    @property
    def variables(self) -> list[tf.Variable]:
        """All that is kept between two batches."""
        pooled = [variable for _, pool in self._pools for variable in pool]
        return [self._weight, *self._gradients, *pooled]

    def add(
        self,
        weight: tf.Tensor,
        gradients: Sequence[Gradient],
        moments: Sequence[tuple[BatchNormLayer, Moments]],
    ) -> None:
        """Takes in one batch.

        Args:
            weight: Over how many values the loss of this batch is a mean, on all replicas. A batch of 0
                adds nothing.
            gradients: The gradient of that mean for each trainable variable: this replica's share of it.
            moments: What each batch normalization layer saw, in the order of the calls: a layer that
                the model calls twice keeps two pools, as it makes two updates without accumulation.
        """
        self._weight.assign_add(weight)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self._connected[index] = True
                total = self._gradients[index]
                value = tf.cast(tf.convert_to_tensor(gradient), total.dtype)
                # The mean over no example may be NaN.
                total.assign_add(tf.math.multiply_no_nan(value, tf.cast(weight, total.dtype)))
        for index, (layer, seen) in enumerate(moments):
            if index == len(self._pools):
                with tf.init_scope():
                    pool = Moments(*(_variable(tf.zeros(m.shape, m.dtype)) for m in seen))
                self._pools.append((layer, pool))
            _assign(self._pools[index][1], merge(Moments(*self._pools[index][1]), seen))

    def gradients(self, trainable: Sequence[keras.Variable]) -> list[tf.Tensor | None]:
        """The gradient of the mean loss over all batches taken in, `None` where nothing depends on it."""
        weight = tf.convert_to_tensor(self._weight)
        sums = over_replicas(
            [
                tf.convert_to_tensor(total) if connected else None
                for total, connected in zip(self._gradients, self._connected, strict=True)
            ]
        )
        return [
            None
            if total is None
            else tf.cast(tf.math.divide_no_nan(total, tf.cast(weight, total.dtype)), variable.dtype)
            for variable, total in zip(trainable, sums, strict=True)
        ]

    def moments(self) -> list[tuple[BatchNormLayer, Moments]]:
        """The moments of all batches together that each layer saw, one of its calls after the other."""
        return [
            (layer, Moments(*(tf.convert_to_tensor(m) for m in pool)))
            for layer, pool in self._pools
        ]

    def clear(self) -> None:
        """Begins the next group."""
        for variable in self.variables:
            # Not zeros_like: outside of a step, to read a variable is to sum it over the replicas.
            variable.assign(tf.zeros(variable.shape, variable.dtype))


def _variable(value: tf.Tensor) -> tf.Variable:
    """A variable of which each replica of a strategy has its own."""
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _assign(pool: Moments, values: Moments) -> None:
    for variable, value in zip(pool, values, strict=True):
        variable.assign(value)


def _sum_dtype(variable: keras.Variable) -> tf.DType:
    """Sums of half-precision gradients would overflow and lose small ones."""
    dtype = tf.as_dtype(variable.dtype)
    return dtype if dtype.size >= 4 else tf.float32
