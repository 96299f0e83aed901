"""Gradients across replicas: summing them, and applying the sum."""

from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbn._moments import replicas
from tfbn._support.keras_internals import sums_gradients_over_replicas
from tfbn._support.optimizers import unwrap_optimizer

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None


def sum_over_replicas(gradients: Sequence[Gradient]) -> list[Gradient]:
    """Sums each gradient over all replicas, in one all-reduce. `None` stays `None`."""
    if replicas.num_replicas() == 1 or all(gradient is None for gradient in gradients):
        return list(gradients)
    known = [tf.convert_to_tensor(gradient) for gradient in gradients if gradient is not None]
    sums = iter(replicas.all_reduce_sum(known))
    return [None if gradient is None else next(sums) for gradient in gradients]


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Gradient],
    variables: Sequence[keras.Variable],
) -> None:
    """Applies gradients that are already summed over the replicas.

    Trace it inside of `keras_internals.gradients_summed`.
    """
    if not sums_gradients_over_replicas(unwrap_optimizer(optimizer)):
        # The optimizer will sum them again.
        share = 1 / replicas.num_replicas()
        gradients = [None if g is None else g * tf.cast(share, g.dtype) for g in gradients]
    optimizer.apply(gradients, variables)
