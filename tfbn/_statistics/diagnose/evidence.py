"""What a diagnosis measures of each layer: its moving statistics beside the statistics of its inputs."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfbn._models.walk import BatchNormLayer, has_initial_statistics, name_of, statistics_are_frozen
from tfbn._moments.moments import Moments, count, reduced_axes, statistics_dtype
from tfbn._statistics.diagnose.comparison import Comparison
from tfbn._statistics.diagnose.explanations import best_batch_size, best_initial_weight
from tfbn._statistics.layer_call import LayerCall, merge_calls, values

DEAD_GAMMA = 1e-6
CONSTANT = 1e-12
"""A variance of this times the squared mean is what rounding to float32 leaves of a constant."""


@dataclasses.dataclass(frozen=True)
class LayerEvidence:
    r"""What was measured of one batch normalization layer.

    In these formulas, :math:`m` and :math:`v` are the moving mean and variance, :math:`\mu` and
    :math:`\sigma^2` the mean and variance of the layer's inputs over all data. Channels with a constant
    input do not contribute to them.

    Attributes:
        layer: The path of the layer.
        state: "learns", "not called", or why the statistics do not change: "trainable=False",
            "freeze_statistics=True", "momentum=1".
        channels: The number of channels.
        momentum: The momentum of the moving average.
        calls: How many times the model calls the layer.
        level: The largest number of measured calls in a chain that leads to this layer.
        examples: The number of examples measured, of all calls; the average over the channels.
        values_per_batch: The average number of values per channel in a batch.
        mean_shift: :math:`|m - \mu| / \sqrt{\sigma^2 + \epsilon}`, the root mean square over the channels.
        log_variance_ratio: :math:`\log((v + \epsilon) / (\sigma^2 + \epsilon))`, the mean over the channels.
        log_variance_ratio_rms: The same, the root mean square over the channels.
        sampling_error: The standard error of the true mean, in units of :math:`\sigma`.
        batch_noise: The standard deviation of the batch means, in units of :math:`\sigma`. Under several
            replicas, each replica's share counts as a batch.
        constant: The number of channels whose input is constant.
        dead_gammas: The number of channels whose gamma is practically 0.
        not_finite: The number of moving means and variances that are NaN or infinite.
        negative: The number of negative moving variances.
        never_updated: Whether the moving statistics have exactly their initial values.
        initial_weight: The weight that the initial values still have in the moving statistics (0 to 1), and
            the fraction of the distance to the true statistics that this weight explains (at most 1).
        batch_size: The number of examples in a batch whose expected variance is the moving variance, and the
            fraction of the distance that this size explains. Infinity if no size does.
        calls_apart: The largest distance between the means of two calls, in units of the larger standard
            deviation.

    Example:
        >>> layers = tfbn.diagnose(model, images).layers
        >>> furthest = max(layers, key=lambda layer: layer.mean_shift)
        >>> print(furthest.layer, furthest.mean_shift)
    """

    layer: str
    state: str
    channels: int = 0
    momentum: float | None = None
    calls: int = 0
    level: int = 0
    examples: float = 0.0
    values_per_batch: float = 0.0
    mean_shift: float = 0.0
    log_variance_ratio: float = 0.0
    log_variance_ratio_rms: float = 0.0
    sampling_error: float = 0.0
    batch_noise: float = 0.0
    constant: int = 0
    dead_gammas: int = 0
    not_finite: int = 0
    negative: int = 0
    never_updated: bool = False
    initial_weight: tuple[float, float] = (0.0, 0.0)
    batch_size: tuple[float, float] = (math.inf, 0.0)
    calls_apart: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether the layer's inputs were measured."""
        return self.values_per_batch > 0


# Summaries of a batch: one value per batch or per example, whose moments the passes pool.


def per_batch_mean(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None, batch: Moments
) -> Moments:
    """Returns the mean of a batch as a single value. Pooled: the spread of the batch means."""
    return Moments(tf.cast(batch.count > 0, tf.float64), batch.mean, tf.zeros_like(batch.mean))


def per_example_mean(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None, batch: Moments
) -> Moments:
    """Returns the mean of each example as a single value. Pooled: the spread of the examples' means."""
    x = tf.cast(x, statistics_dtype(x.dtype))
    reduced = reduced_axes(x.shape.rank, axes)
    within = [axis for axis in reduced if axis]
    if mask is None:
        means = tf.cast(tf.reduce_mean(x, within, keepdims=True), tf.float64)
        return Moments(count(means, axes), *tf.nn.moments(means, reduced))
    kept = tf.cast(tf.broadcast_to(mask, tf.shape(x)), x.dtype)
    counts = tf.reduce_sum(kept, within, keepdims=True)
    means = tf.math.divide_no_nan(tf.reduce_sum(x * kept, within, keepdims=True), counts)
    return values(means, axes, counts > 0)


SUMMARIES = (per_batch_mean, per_example_mean)


def of_weights(layer: BatchNormLayer, calls: int) -> LayerEvidence:
    """Returns what the weights of a layer show without its inputs."""
    state = _state(layer)
    if not layer.built or not calls:
        state = "not called" if state == "learns" else state
    if not layer.built:
        return LayerEvidence(name_of(layer), state)
    mean, variance = _moving_statistics(layer)
    gamma = np.ones(1) if layer.gamma is None else np.abs(layer.gamma.numpy())
    return LayerEvidence(
        layer=name_of(layer),
        state=state,
        channels=math.prod(layer.moving_mean.shape),
        momentum=layer.momentum,
        calls=calls,
        dead_gammas=int(np.sum(gamma < DEAD_GAMMA)),
        not_finite=int(np.sum(~np.isfinite(mean)) + np.sum(~np.isfinite(variance))),
        negative=int(np.sum(variance < 0)),
        never_updated=has_initial_statistics(layer),
    )


def of_inputs(
    layer: BatchNormLayer, calls: Sequence[LayerCall], batches: int
) -> tuple[LayerEvidence, Comparison | None]:
    """Compares the weights of a layer with the measured inputs of its calls.

    Args:
        layer: The layer.
        calls: Its calls, measured with `SUMMARIES`.
        batches: How many batches each of them was measured on.

    Returns:
        The evidence, and the comparison that it rests on; None if there is nothing to compare.
    """
    evidence = of_weights(layer, len(calls))
    inputs, batch_means, example_means = (merge_calls(calls, number) for number in range(3))
    counts, true_mean, true_variance = inputs
    constant = true_variance <= CONSTANT * (1e-6 + np.square(true_mean))
    constant &= counts > 1  # A single value has no variance, and is not constant.
    live = (counts > 1) & ~constant
    evidence = dataclasses.replace(
        evidence,
        level=max(call.level for call in calls),
        values_per_batch=float(np.mean(counts)) / batches / len(calls),
        constant=int(np.sum(constant)),
        calls_apart=_calls_apart(calls),
    )
    if evidence.not_finite or evidence.negative or not live.any():
        return evidence, None
    mean, variance = (value[live] for value in _moving_statistics(layer))
    true_mean, true_variance = np.asarray(true_mean)[live], np.asarray(true_variance)[live]
    between = np.asarray(example_means.variance)[live]
    comparison = Comparison(layer, mean, variance, true_mean, true_variance, between, live)
    sigma = np.sqrt(true_variance + layer.epsilon)
    log_ratio = np.log((variance + layer.epsilon) / sigma**2)
    examples = np.maximum(example_means.count[live], 1)
    return dataclasses.replace(
        evidence,
        mean_shift=_rms((mean - true_mean) / sigma),
        log_variance_ratio=float(np.mean(log_ratio)),
        log_variance_ratio_rms=_rms(log_ratio),
        sampling_error=_rms(np.sqrt(between / examples) / sigma),
        examples=float(np.mean(examples)),
        batch_noise=_rms(np.sqrt(batch_means.variance[live]) / sigma),
        initial_weight=best_initial_weight(comparison),
        batch_size=best_batch_size(comparison),
    ), comparison


def _state(layer: BatchNormLayer) -> str:
    if not layer.trainable:
        return "trainable=False"
    if statistics_are_frozen(layer):
        return "freeze_statistics=True"
    return "momentum=1" if layer.momentum == 1 else "learns"


def _moving_statistics(layer: BatchNormLayer) -> tuple[np.ndarray, np.ndarray]:
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    return mean.astype("float64"), variance.astype("float64")


def _calls_apart(calls: Sequence[LayerCall]) -> float:
    largest = 0.0
    for one, other in itertools.combinations(calls, 2):
        (_, mean_a, variance_a), (_, mean_b, variance_b) = one.moments[0], other.moments[0]
        sigma = np.sqrt(np.maximum(variance_a, variance_b) + one.layer.epsilon)
        largest = max(largest, _rms((mean_a - mean_b) / sigma))
    return largest


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
