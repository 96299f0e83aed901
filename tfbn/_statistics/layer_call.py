"""One call of a batch normalization layer, and the moments of what it sees over many batches."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfbn._models.walk import BatchNormLayer
from tfbn._moments import replicas
from tfbn._moments.moments import Moments, along, merge, moments, statistics_dtype
from tfbn._normalize.dispatch import normalize, normalize_batch
from tfbn._normalize.kernel import Normalization


class NotFiniteError(ValueError):
    """Some input of a layer is NaN or infinite, and so are its statistics."""


class MomentAccumulator:
    """The moments of everything that was added, for many channels of many kinds at once, in float64.

    Each replica adds to a part of its own.

    Args:
        shapes: Of the channels of each kind.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]):
        self._shapes = [tuple(shape) for shape in shapes]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._parts = [
            tf.Variable(
                tf.zeros([sum(self._sizes)], tf.float64),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.NONE,
            )
            for _ in Moments._fields
        ]

    def add(self, new: Sequence[Moments]) -> None:
        """Merges moments of each kind into the part of this replica."""
        packed = []
        for field in zip(*new, strict=True):
            flat = [
                tf.reshape(tf.broadcast_to(tf.cast(value, tf.float64), shape), [-1])
                for value, shape in zip(field, self._shapes, strict=True)
            ]
            packed.append(tf.concat(flat, 0))
        old = Moments(*(tf.convert_to_tensor(part) for part in self._parts))
        for part, value in zip(self._parts, merge(old, Moments(*packed)), strict=True):
            part.assign(value)

    def read(self) -> list[Moments]:
        """The moments of each kind, of all replicas together, as arrays. The strategy is in scope."""
        here = tf.distribute.get_strategy().run(lambda: tf.stack(self._parts)[tf.newaxis])
        first, *others = tf.unstack(tf.distribute.get_strategy().gather(here, axis=0))
        total = Moments(*tf.unstack(first))
        for other in others:
            total = merge(total, Moments(*tf.unstack(other)))
        ends = np.cumsum(self._sizes)
        fields = [np.split(value.numpy(), ends[:-1]) for value in total]
        return [
            Moments(*(value.reshape(shape) for value in kind))
            for *kind, shape in zip(*fields, self._shapes, strict=True)
        ]


class LayerCall:
    """One call of a layer in a model.

    Attributes:
        layer: The layer that is called.
        level: The number of the pass that measures it.
        nested: Whether it runs in a graph inside the traced one.
        found: Once measured: what each summary says of its inputs over all data. The first one is
            of the inputs themselves.
    """

    def __init__(self, layer: BatchNormLayer, level: int, nested: bool):
        self.layer = layer
        self.level = level
        self.nested = nested
        self.found: Sequence[Moments] = ()
        # Before its pass: the layer's own, so that what runs behind it sees numbers of its kind.
        self._mean = tf.Variable(tf.cast(layer.moving_mean, tf.float64), trainable=False)
        self._variance = tf.Variable(tf.cast(layer.moving_variance, tf.float64), trainable=False)

    def conclude(self, found: Sequence[Moments]) -> None:
        """Ends its pass, with what was found. From now on it can `normalize`.

        Raises:
            NotFiniteError: If the moments of its inputs are not finite.
        """
        self.found = found
        count, mean, variance = found[0]
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise NotFiniteError(
                "The inputs of a batch normalization layer are not all finite: there are NaN or "
                "infinite values in the data, in the weights, or in a frozen layer before it. "
                "Look for them there (`tf.debugging.enable_check_numerics` names the first). "
                f"Received: layer {self.layer.path!r}."
            )
        # A channel without a single value under the mask keeps what the layer has.
        here = count > 0
        self._mean.assign(np.where(here, mean, self.layer.moving_mean.numpy()))
        self._variance.assign(np.where(here, variance, self.layer.moving_variance.numpy()))

    def normalize(
        self, x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Normalizes by what was found, as one training step on all data at once would."""
        # The mean in two parts: a single number of the dtype of x has too few digits if it is large.
        mean = tf.convert_to_tensor(self._mean)
        coarse = tf.cast(mean, x.dtype)
        dtype = statistics_dtype(x.dtype)
        y = normalize(
            x - along(coarse, x, axes),
            tf.cast(mean - tf.cast(coarse, tf.float64), dtype),
            tf.cast(tf.convert_to_tensor(self._variance), dtype),
            *_affine(self.layer, dtype),
            Normalization(axes, self.layer.epsilon),
        )
        return tf.cast(y, self.layer.compute_dtype)


def normalize_by_batch(
    layer: BatchNormLayer, x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None
) -> tuple[tf.Tensor, Moments]:
    """What a layer without renorm or virtual batches gives for a batch in training, and its moments.

    Of those that a synchronized layer shares with other replicas, a part goes to each.
    """
    scale, offset = _affine(layer, statistics_dtype(x.dtype))
    synchronized = getattr(layer, "synchronized", False)
    over = Normalization(axes, layer.epsilon, mask, synchronized)
    y, (count, mean, variance) = normalize_batch(x, scale, offset, over)
    share = 1 / replicas.num_replicas() if synchronized else 1.0
    return tf.cast(y, layer.compute_dtype), Moments(share * count, mean, variance)


def merge_calls(sites: Sequence[LayerCall], summary: int = 0) -> Moments:
    """What a summary says of the inputs of several calls together."""
    first, *others = (Moments(*map(tf.constant, site.found[summary])) for site in sites)
    for other in others:
        first = merge(first, other)
    return Moments(*(value.numpy() for value in first))


def values(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> Moments:
    """The moments of a batch, in float64: its values less a shift are summed in their own precision."""
    shift, relative = moments(x, axes, mask)
    count, mean, variance = (tf.cast(value, tf.float64) for value in relative)
    return Moments(count, tf.cast(shift, tf.float64) + mean, variance)


def _affine(layer: BatchNormLayer, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    shape = layer.moving_mean.shape
    gamma = tf.ones(shape, dtype) if layer.gamma is None else tf.cast(layer.gamma, dtype)
    beta = tf.zeros(shape, dtype) if layer.beta is None else tf.cast(layer.beta, dtype)
    return gamma, beta
