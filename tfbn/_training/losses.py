"""The loss of a batch, and each replica's share of it."""

from typing import Any

import keras
import tensorflow as tf

from tfbn._data import sharding
from tfbn._models.compiled_loss import compute_loss
from tfbn._moments import replicas
from tfbn._support.keras_internals import losses_unscaled, mask_of


def batch_loss(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, batch: Any, training: bool
) -> tf.Tensor:
    """Returns the mean loss of the batch or, on several replicas, this replica's share of it.

    Each replica computes its loss as if it were alone: all of it (losses that Keras averages, scalar losses,
    what layers add, penalties on weights) counts as a mean over the shard.

    Args:
        model: The model, compiled.
        x: The inputs of this replica.
        y: Their targets.
        y_pred: The model's outputs for them.
        sample_weight: Their weights.
        batch: The batch of all replicas.
        training: Whether the loss is for training.
    """
    if replicas.num_replicas() == 1:
        return compute_loss(model, x, y, y_pred, sample_weight, training)
    before = [(v, tf.convert_to_tensor(v)) for v in model.metrics_variables]
    with losses_unscaled() as unscaled:
        loss = compute_loss(model, x, y, y_pred, sample_weight, training)
    if not unscaled:
        loss *= replicas.num_replicas()
    weight = shard_weight(y_pred, x, batch)
    # Keras tracks the loss of each output, once per batch: a replica adds its share there too.
    for variable, value in before:
        if value.dtype.is_floating:
            added = tf.convert_to_tensor(variable) - value
            variable.assign(value + weighted(added, weight))
    return weighted(loss, weight)


def track_loss(tracker: keras.metrics.Metric | None, loss: tf.Tensor, x: Any, batch: Any) -> None:
    """Updates the metric that Keras's `compile` creates for the loss, its mean over all examples."""
    if tracker is None:
        return
    size = sharding.batch_size(x)
    if replicas.num_replicas() > 1:
        # The metric multiplies by the size of the shard. The shares are to add up to the loss of the batch
        # times the size of the batch.
        repeats = tf.math.divide_no_nan(
            tf.cast(sharding.batch_size(batch), loss.dtype), tf.cast(size, loss.dtype)
        )
        loss *= repeats
    tracker.update_state(loss, sample_weight=size)


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


def shard_weight(y_pred: Any, x: Any, batch: Any) -> tf.Tensor:
    r"""Returns this replica's weight in the mean over all values.

    .. math:: \ell = \sum_r \frac{n_r}{n} \ell_r

    The weights sum to 1, so a term that is the same on each replica, such as a weight penalty, counts once.
    Where the whole batch is masked, :math:`n_r` counts examples.
    """
    local, everywhere = count_values(y_pred, x, batch)
    size, total = (tf.cast(sharding.batch_size(part), tf.float32) for part in (x, batch))
    return tf.where(everywhere > 0, local / everywhere, tf.math.divide_no_nan(size, total))


def weighted(mean: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Returns this replica's part of a mean. The mean over an empty shard may be NaN, and adds 0."""
    return tf.math.multiply_no_nan(mean, tf.cast(weight, mean.dtype))
