"""One call of a batch normalization layer, and what was measured of its inputs."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfbn._layer.affine_weights import affine_weights
from tfbn._models.walk import BatchNormLayer, name_of
from tfbn._moments import replicas
from tfbn._moments.moments import Moments, along, merge, moments, statistics_dtype
from tfbn._normalize.dispatch import normalize, normalize_batch
from tfbn._normalize.kernel import Normalization


class NotFiniteError(ValueError):
    """Raised by `tfbn.recalibrate` when the inputs of a layer contain NaN or infinity. The model does not change.

    Attributes:
        layer: The path of the layer.

    Example:
        >>> tfbn.recalibrate(model, images * float("nan"))
        Traceback (most recent call last):
        tfbn.NotFiniteError: ...
    """

    def __init__(self, message: str, layer: str = ""):
        super().__init__(message)
        self.layer = layer


class LayerCall:
    """One call of a layer in a model.

    Attributes:
        layer: The layer.
        level: How many other calls feed it, one after the other, at most.
        moments: After it was measured, the moments of its inputs over all data, followed by those of each
            summary, as arrays.
    """

    def __init__(self, layer: BatchNormLayer, level: int):
        self.layer = layer
        self.level = level
        self.moments: Sequence[Moments] = ()

    def set_moments(self, measured: Sequence[Moments], weight: float = 1.0) -> None:
        """Stores what was measured. After that, the call can `normalize`.

        Args:
            measured: The moments of its inputs, and of each summary.
            weight: That of the moments against the layer's moving statistics when it normalizes.

        Raises:
            NotFiniteError: If the moments of its inputs are not finite.
        """
        count, mean, variance = measured[0]
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise NotFiniteError(
                "The inputs of a batch normalization layer contain NaN or infinite values. They come from "
                "the data, the weights, or a frozen layer before it. To find the operation, call "
                f"`tf.debugging.enable_check_numerics()`. Received: layer {name_of(self.layer)!r}.",
                name_of(self.layer),
            )
        self.moments = measured
        # A channel that masks hide everywhere keeps the statistics of the layer.
        weights = np.where(count > 0, weight, 0)
        self._mean = average(self.layer.moving_mean.numpy(), mean, weights)
        self._variance = average(self.layer.moving_variance.numpy(), variance, weights)

    def normalize(self, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
        """Normalizes by the measured statistics, as one training step on all data at once would."""
        dtype = statistics_dtype(x.dtype)
        # The mean in two parts: if it is large, one number of the dtype of x has too few digits.
        coarse = tf.cast(self._mean, x.dtype)
        y = normalize(
            x - along(coarse, x, axes),
            tf.cast(self._mean - tf.cast(coarse, tf.float64), dtype),
            tf.cast(self._variance, dtype),
            *affine_weights(self.layer, dtype),
            Normalization(axes, self.layer.epsilon),
        )
        return tf.cast(y, self.layer.compute_dtype)


def normalize_by_batch(
    layer: BatchNormLayer, x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None
) -> tuple[tf.Tensor, Moments]:
    """Returns the output of a layer in training, without renorm or virtual batches, and the batch moments.

    If the layer is synchronized, the replicas share the moments of the global batch: each returns them
    with its part of the count.
    """
    scale, offset = affine_weights(layer, statistics_dtype(x.dtype))
    synchronized = getattr(layer, "synchronized", False)
    over = Normalization(axes, layer.epsilon, mask, synchronized)
    y, (count, mean, variance) = normalize_batch(x, scale, offset, over)
    share = 1 / replicas.num_replicas() if synchronized else 1.0
    return tf.cast(y, layer.compute_dtype), Moments(share * count, mean, variance)


def merge_calls(calls: Sequence[LayerCall], summary: int = 0) -> Moments:
    """Merges the moments of several calls. Summary 0 is that of their inputs."""
    first, *others = (Moments(*map(tf.constant, call.moments[summary])) for call in calls)
    for other in others:
        first = merge(first, other)
    return Moments(*(value.numpy() for value in first))


def values(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> Moments:
    """Returns the moments of a batch in float64. Values are summed in their own precision, less a shift."""
    shift, relative = moments(x, axes, mask)
    count, mean, variance = (tf.cast(value, tf.float64) for value in relative)
    return Moments(count, tf.cast(shift, tf.float64) + mean, variance)


def average(old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Averages statistics. A weight of 0 or 1 gives one of them to the bit, whatever the other is."""
    old = np.asarray(old, np.float64)
    return (1 - weight) * np.where(weight < 1, old, 0) + weight * np.where(weight > 0, new, 0)
