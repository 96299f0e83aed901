"""The loss of a batch, of which each replica computes its share."""

from typing import Any

import keras
import tensorflow as tf

from tfbn._data import sharding
from tfbn._moments import replicas
from tfbn._support.keras_internals import mask_of


def batch_loss(
    model: keras.Model,
    x: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any,
    batch: Any,
    training: bool,
) -> tf.Tensor:
    """Returns the mean loss of the batch or, on several replicas, this replica's share of it.

    Args:
        model: The model, compiled.
        x: The inputs of this replica.
        y: Their targets.
        y_pred: The model's outputs for them.
        sample_weight: Their weights.
        batch: The batch of all replicas.
        training: Whether the loss is for training.
    """
    shared = replicas.num_replicas() > 1
    before = [(v, tf.convert_to_tensor(v)) for v in model.metrics_variables if shared]
    loss = model.compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )
    if not shared:
        return loss
    local, everywhere = count_values(y_pred, x, batch)
    # Keras tracks the loss of each output, once per batch: a replica adds its share there too.
    for variable, value in before:
        if value.dtype.is_floating:
            added = tf.convert_to_tensor(variable) - value
            variable.assign(value + _share(added, local, everywhere))
    return _share(loss * replicas.num_replicas(), local, everywhere)


def track_loss(model: keras.Model, loss: tf.Tensor, x: Any, batch: Any) -> None:
    """Updates the metric that Keras's `compile` makes for the loss: its mean over all examples."""
    size = sharding.batch_size(x)
    if replicas.num_replicas() > 1:
        # The metric multiplies by the size of the shard. The shares are to add up to the loss of the batch
        # times the size of the batch.
        repeats = tf.math.divide_no_nan(
            tf.cast(sharding.batch_size(batch), loss.dtype), tf.cast(size, loss.dtype)
        )
        loss *= repeats
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss, sample_weight=size)


def count_values(y_pred: Any, x: Any, batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Counts the values that the loss averages: on this replica, and on all replicas.

    They are the examples, or the unmasked steps where the output has a Keras mask.
    """
    masks = [mask_of(part) for part in tf.nest.flatten(y_pred)]
    if all(mask is None for mask in masks):
        local, everywhere = sharding.batch_size(x), sharding.batch_size(batch)
        return tf.cast(local, tf.float32), tf.cast(everywhere, tf.float32)
    if len(masks) > 1:
        raise ValueError(
            "Accumulation and replicas need one count of values per batch, but the outputs of this model "
            "have different masks. Train with accumulation_steps=1 on one device, or use sample weights "
            f"instead of masks. Received: {len(masks)} outputs, masks {masks}."
        )
    kept = tf.reduce_sum(tf.cast(masks[0], tf.float32))
    if replicas.num_replicas() == 1:
        return kept, kept
    return kept, replicas.all_reduce_sum([kept])[0]


def _share(mean: tf.Tensor, local: tf.Tensor, everywhere: tf.Tensor) -> tf.Tensor:
    r"""Weights a mean over this replica's values, so that the sum over replicas is the mean over all values.

    .. math:: \ell = \sum_r \frac{n_r}{n} \ell_r

    The weights sum to 1, so a term that is the same on each replica, such as a weight penalty, counts once.
    The mean over no values may be NaN and counts as 0.

    Args:
        mean: :math:`\ell_r`.
        local: The number of values on this replica, :math:`n_r`.
        everywhere: The number of values on all replicas, :math:`n`.
    """
    weight = tf.math.divide_no_nan(local, everywhere)
    return tf.math.multiply_no_nan(mean, tf.cast(weight, mean.dtype))
