"""Gradient accumulation: what several batches contribute to one update."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfbn._models.walk import BatchNormLayer
from tfbn._moments.moments import Moments, merge
from tfbn._training.gradients import Gradient, sum_over_replicas


class Accumulator:
    """The gradients and batch moments accumulated since the last update.

    They are kept in variables, so that they outlive a step and can be backed up. Each replica has its own
    and accumulates its own share.

    Args:
        trainable: The variables whose gradients to accumulate.
    """

    def __init__(self, trainable: Sequence[keras.Variable]):
        self._weight = _variable(tf.zeros([]))
        self._gradients = [_variable(tf.zeros(v.shape, _sum_dtype(v))) for v in trainable]
        self._connected = [False] * len(trainable)
        self._merged: list[tuple[BatchNormLayer, Moments]] = []

    @property
    def variables(self) -> list[tf.Variable]:
        """All variables that are kept between two batches."""
        merged = [variable for _, moments in self._merged for variable in moments]
        return [self._weight, *self._gradients, *merged]

    def add(
        self,
        weight: tf.Tensor,
        gradients: Sequence[Gradient],
        moments: Sequence[tuple[BatchNormLayer, Moments]],
    ) -> None:
        """Adds one batch.

        Args:
            weight: The number of values that this batch's loss averages, over all replicas. A batch of 0
                adds nothing.
            gradients: This replica's share of the gradient of that mean, for each trainable variable.
            moments: What each batch normalization layer saw, in the order of the calls. A layer that the
                model calls twice has two entries and makes two updates, as without accumulation.
        """
        self._weight.assign_add(weight)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self._connected[index] = True
                total = self._gradients[index]
                value = tf.cast(tf.convert_to_tensor(gradient), total.dtype)
                # The mean over no examples may be NaN.
                total.assign_add(tf.math.multiply_no_nan(value, tf.cast(weight, total.dtype)))
        for index, (layer, batch) in enumerate(moments):
            if index == len(self._merged):
                with tf.init_scope():
                    variables = Moments(*(_variable(tf.zeros(m.shape, m.dtype)) for m in batch))
                self._merged.append((layer, variables))
            merged = self._merged[index][1]
            for variable, value in zip(merged, merge(Moments(*merged), batch), strict=True):
                variable.assign(value)

    def gradients(self, trainable: Sequence[keras.Variable]) -> list[tf.Tensor | None]:
        """Returns the gradient of the mean loss over all batches; `None` for a variable it does not depend on."""
        weight = tf.convert_to_tensor(self._weight)
        sums = sum_over_replicas(
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
        """Returns the merged moments of all batches for each call of a layer."""
        return [
            (layer, Moments(*(tf.convert_to_tensor(m) for m in merged)))
            for layer, merged in self._merged
        ]

    def clear(self) -> None:
        """Starts the next update from nothing."""
        for variable in self.variables:
            # Not zeros_like: outside of a step, reading a variable sums it over the replicas.
            variable.assign(tf.zeros(variable.shape, variable.dtype))


def _variable(value: tf.Tensor) -> tf.Variable:
    """Creates a variable of which each replica has its own value."""
    return tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.SUM,
    )


def _sum_dtype(variable: keras.Variable) -> tf.DType:
    """Returns at least float32: sums of half-precision gradients overflow, and lose small ones."""
    dtype = tf.as_dtype(variable.dtype)
    return dtype if dtype.size >= 4 else tf.float32
