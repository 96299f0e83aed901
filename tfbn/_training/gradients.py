"""Gradients that several parts of the examples have a share in: batches of a group, replicas of a strategy."""

from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbn._models.walk import BatchNormLayer
from tfbn._moments import replicas
from tfbn._moments.moments import Moments
from tfbn._support.keras_internals import sums_gradients_over_replicas
from tfbn._support.optimizers import unwrap_optimizer

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None


def over_replicas(gradients: Sequence[Gradient]) -> list[Gradient]:
    """The sum over all replicas, in one all-reduce; `None` stays where nothing depends on a variable."""
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
    """A step of the optimizer with the gradients over all replicas; traced inside of `gradients_summed`."""
    if not sums_gradients_over_replicas(unwrap_optimizer(optimizer)):
        # Then it will sum them again.
        share = 1 / replicas.num_replicas()
        gradients = [None if g is None else g * tf.cast(share, g.dtype) for g in gradients]
    optimizer.apply(gradients, variables)


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
    return value if replicas.num_replicas() == 1 else replicas.all_reduce_sum([value])[0]


def update_statistics(seen: Sequence[tuple[BatchNormLayer, Moments]]) -> None:
    """One step of the moving statistics of all layers, with one all-reduce for all of them.

    The moments of a synchronized layer are those of all replicas already.
    """
    own = [moments for layer, moments in seen if not layer.synchronized]
    pooled = iter(replicas.all_reduce_mean(own) if own else ())
    for layer, moments in seen:
        layer.update_statistics(moments if layer.synchronized else next(pooled))
