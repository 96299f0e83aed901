"""What a diagnosis measures of each layer: its own statistics beside those of its inputs."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfbn._models.walk import BatchNormLayer, name_of, statistics_are_frozen
from tfbn._moments.moments import Moments, reduced_axes, statistics_dtype
from tfbn._statistics.layer_call import LayerCall, merge_calls, values

DEAD_GAMMA = 1e-6
CONSTANT = 1e-12  # of the square of the mean: what float32 leaves of a constant


def per_batch_mean(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None, batch: Moments
) -> Moments:
    """The mean of a batch, as one value: merge_calls, the spread of the means of the batches."""
    return Moments(tf.cast(batch.count > 0, tf.float64), batch.mean, tf.zeros_like(batch.mean))


def per_batch_variance(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None, batch: Moments
) -> Moments:
    """The biased variance in a batch, as one value: merge_calls, the average that a layer keeps in training."""
    variance = batch.variance
    return Moments(tf.cast(batch.count > 0, tf.float64), variance, tf.zeros_like(variance))


def per_example_mean(
    x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None, batch: Moments
) -> Moments:
    """The mean of each example, as one value: merge_calls, what makes the means of batches differ."""
    x = tf.cast(x, statistics_dtype(x.dtype))
    within = [axis for axis in reduced_axes(x.shape.rank, axes) if axis]
    if mask is None:
        means, some = tf.reduce_mean(x, within, keepdims=True), None
    else:
        kept = tf.cast(tf.broadcast_to(mask, tf.shape(x)), x.dtype)
        counts = tf.reduce_sum(kept, within, keepdims=True)
        means = tf.math.divide_no_nan(tf.reduce_sum(x * kept, within, keepdims=True), counts)
        some = counts > 0
    return values(means, axes, some)


SUMMARIES = (per_batch_mean, per_batch_variance, per_example_mean)


@dataclasses.dataclass(frozen=True)
class LayerEvidence:
    r"""What was measured of one layer. Channels whose input is constant count in no distance.

    Attributes:
        layer: Its name, after those of the models it is in.
        state: "learns", "not called", or why its statistics stand still: "trainable=False",
            "freeze_statistics=True", "momentum=1".
        calls: How often the model calls it.
        level: How many other measured calls feed it, one after the other, at most.
        values_per_batch: How many values of a channel a batch has, on average.
        mean_shift: :math:`|m - \mu| / \sqrt{\sigma^2 + \epsilon}` of the moving mean and the true one:
            the root mean square over the channels.
        log_variance_ratio: :math:`\log((v + \epsilon) / (\sigma^2 + \epsilon))` of the moving variance
            and the true one: the mean over the channels.
        log_variance_ratio_rms: The same, as a root mean square.
        batch_noise: The standard deviation of the means of the batches (with several replicas, of their
            shares), in units of sigma.
        constant: Channels whose input never changes.
        dead_gammas: Channels whose gamma is (nearly) 0.
        not_finite: Moving statistics that are NaN or infinite.
        negative: Moving variances below 0.
        never_updated: Whether the moving statistics are the initial ones, to the bit.
        initial_weight: How much of the moving statistics are initial values still (0 to 1), and how much
            of their distance from the truth this explains (0 to 1).
        batch_size: The number of examples in a batch whose variance the moving one would be, and how far
            off that explanation is (relative to the true variance). Infinity: more than can be told.
        calls_apart: The largest distance of the means of two calls, in units of the larger sigma.
        within_batch: :math:`\log` of the moving variance over the average variance in a batch of this
            data, when upstream layers see each batch's statistics; 0 if not measured.
    """

    layer: str
    state: str
    calls: int = 0
    level: int = 0
    values_per_batch: float = 0.0
    mean_shift: float = 0.0
    log_variance_ratio: float = 0.0
    log_variance_ratio_rms: float = 0.0
    batch_noise: float = 0.0
    constant: int = 0
    dead_gammas: int = 0
    not_finite: int = 0
    negative: int = 0
    never_updated: bool = False
    initial_weight: tuple[float, float] = (0.0, 0.0)
    batch_size: tuple[float, float] = (math.inf, math.inf)
    calls_apart: float = 0.0
    within_batch: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether its inputs were."""
        return self.values_per_batch > 0


def stored(layer: BatchNormLayer, calls: int) -> LayerEvidence:
    """What the weights alone tell."""
    state = _state(layer)
    if not layer.built or not calls:
        state = "not called" if state == "learns" else state
    if not layer.built:
        return LayerEvidence(name_of(layer), state)
    mean, variance = _moving(layer)
    gamma = np.ones(1) if layer.gamma is None else np.abs(layer.gamma.numpy())
    return LayerEvidence(
        layer=name_of(layer),
        state=state,
        calls=calls,
        dead_gammas=int(np.sum(gamma < DEAD_GAMMA)),
        not_finite=int(np.sum(~np.isfinite(mean)) + np.sum(~np.isfinite(variance))),
        negative=int(np.sum(variance < 0)),
        never_updated=bool(np.all(mean == 0) and np.all(variance == 1)),
    )


def compared(layer: BatchNormLayer, sites: Sequence[LayerCall], batches: int) -> LayerEvidence:
    """What the weights tell beside the measured inputs of the layer's calls, each of so many batches."""
    own = stored(layer, len(sites))
    seen, by_batch, _, by_example = (merge_calls(sites, number) for number in range(4))
    count, true_mean, true_variance = seen
    constant = true_variance <= CONSTANT * (1e-6 + np.square(true_mean))
    live = (count > 0) & ~constant
    mean, variance = _moving(layer)
    own = dataclasses.replace(
        own,
        level=max(site.level for site in sites),
        values_per_batch=float(np.mean(count)) / batches / len(sites),
        constant=int(np.sum(constant & (count > 0))),
        calls_apart=_apart(sites),
    )
    if own.not_finite or own.negative or not live.any():
        return own
    mean, variance, true_mean, true_variance = (
        np.asarray(value)[live] for value in (mean, variance, true_mean, true_variance)
    )
    sigma = np.sqrt(true_variance + layer.epsilon)
    shift = (mean - true_mean) / sigma
    ratio = np.log((variance + layer.epsilon) / sigma**2)
    # m = (1 - w) mu and v = w + (1 - w) sigma^2, solved for w.
    distance = np.concatenate([shift, (variance - true_variance) / sigma**2])
    way = np.concatenate([-true_mean / sigma, (1 - true_variance) / sigma**2])
    weight = float(distance @ way / max(way @ way, 1e-30))
    left = distance - weight * way
    explained = 1 - float(left @ left / max(distance @ distance, 1e-30))
    # v = sigma^2 - (variance of the mean of one example) / b, solved for b.
    missing, of_means = np.sum(true_variance - variance), by_example.variance[live]
    size = float(np.sum(of_means) / missing) if missing > 0 else math.inf
    off = np.abs(variance - true_variance + of_means / size) / sigma**2
    return dataclasses.replace(
        own,
        mean_shift=_rms(shift),
        log_variance_ratio=float(np.mean(ratio)),
        log_variance_ratio_rms=_rms(ratio),
        batch_noise=_rms(np.sqrt(by_batch.variance[live]) / sigma),
        initial_weight=(weight, explained),
        batch_size=(size, float(np.median(off))),
    )


def within_batches(layer: BatchNormLayer, sites: Sequence[LayerCall]) -> float:
    """See `LayerEvidence.within_batch`, from sites measured with ``upstream="batch"``."""
    _, variance = _moving(layer)
    own = merge_calls(sites, 2).mean
    return float(np.mean(np.log((variance + layer.epsilon) / (own + layer.epsilon))))


def _state(layer: BatchNormLayer) -> str:
    if not layer.trainable:
        return "trainable=False"
    if statistics_are_frozen(layer):
        return "freeze_statistics=True"
    return "momentum=1" if layer.momentum == 1 else "learns"


def _moving(layer: BatchNormLayer) -> tuple[np.ndarray, np.ndarray]:
    return layer.moving_mean.numpy().astype("float64"), layer.moving_variance.numpy().astype(
        "float64"
    )


def _apart(sites: Sequence[LayerCall]) -> float:
    largest = 0.0
    for one, other in itertools.combinations(sites, 2):
        (_, mean_a, variance_a), (_, mean_b, variance_b) = one.found[0], other.found[0]
        sigma = np.sqrt(np.maximum(variance_a, variance_b) + one.layer.epsilon)
        largest = max(largest, _rms((mean_a - mean_b) / sigma))
    return largest


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
