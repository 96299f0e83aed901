r"""What the moving statistics before and after a training step say of the batch in between.

The moving average takes :math:`m' = k m + (1 - k) b`, where :math:`k` is the momentum, so the batch had
:math:`b = m + (m' - m) / (1 - k)`. This needs no change to the compiled step. It is exact up to the rounding of
the moving statistics, which :math:`1 / (1 - k)` amplifies: about 1e-5 of them at a momentum of 0.99. If
:math:`n` batches came in between, :math:`k` is the momentum to the power of :math:`n`, and :math:`b` their
weighted average.
"""

import dataclasses
import math

import numpy as np

from tfbn._statistics.diagnose.evidence import DEAD_GAMMA
from tfbn._statistics.monitor.snapshot import Snapshot, WatchedLayers

WORTHLESS = 0.01
"""If rounding can move an estimate by more than this fraction of the moving statistics, there is none."""
CONSTANT = 1e-3
"""A channel counts as constant if its variance is less than this part of epsilon."""
SATURATED = 4.0
"""So many times gamma, beta lets practically all outputs of a channel have the same sign."""
CAUGHT_UP = 0.01
"""The weight of the old statistics at which the moving average has caught up."""


@dataclasses.dataclass(frozen=True)
class BatchEstimate:
    """The statistics of the batches between two snapshots, one value for each channel.

    Attributes:
        mean: Their means, or a weighted average of them.
        variance: Their variances.
        kept: The weight of the first snapshot in the second.
        moved: Whether the statistics changed.
        known: Whether they changed, are finite, and precise enough for the estimate.
        noise: How far rounding can move the estimate of the variance.
    """

    mean: np.ndarray
    variance: np.ndarray
    kept: np.ndarray
    moved: np.ndarray
    known: np.ndarray
    noise: np.ndarray

    @classmethod
    def between(
        cls, layers: WatchedLayers, before: Snapshot, after: Snapshot, updates: np.ndarray
    ) -> "BatchEstimate":
        """Compares two snapshots.

        Args:
            layers: The layers.
            before: The first snapshot.
            after: The second one.
            updates: How many updates came in between, for each layer.
        """
        moved = (before.mean != after.mean) | (before.spread != after.spread)
        kept = layers.to_channels(
            [
                1.0 if layer.momentum is None else layer.momentum**number
                for layer, number in zip(layers.layers, updates, strict=True)
            ]
        )
        counts = after.counts > 0
        kept = np.where(counts, before.counts / np.maximum(after.counts, 1), kept)
        finite = np.isfinite(after.mean + after.spread + before.mean + before.spread)
        amplified = 1 / np.maximum(1 - kept, 1e-30)
        steps = np.sqrt(np.maximum(layers.to_channels(updates), 1))
        noise = 4 * layers.resolution * steps * amplified
        known = moved & finite & (noise < WORTHLESS)
        factor = np.where(known, amplified, 0.0)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = before.mean + np.where(known, after.mean - before.mean, 0) * factor
            spread = before.spread + np.where(known, after.spread - before.spread, 0) * factor
            return cls(
                mean=mean,
                variance=layers.variance(spread),
                kept=kept,
                moved=moved,
                known=known,
                noise=noise * np.abs(before.spread),
            )

    def constant(self, layers: WatchedLayers) -> np.ndarray:
        """Which channels certainly had a constant input in all the batches in between."""
        limit = CONSTANT * layers.epsilon
        with np.errstate(invalid="ignore"):
            small = np.abs(self.variance) <= self.noise + 1e-12 * np.square(self.mean)
        return self.known & ~layers.renorm & small & (self.noise < limit)


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    r"""What was recorded of one layer at one step.

    Here :math:`m, v` are the moving mean and variance before the step, and :math:`\mu, \sigma^2` those of the
    batch. Numbers that could not be found out are NaN.

    Attributes:
        layer: The path of the layer.
        state: "learns", "frozen", or "refused" if the step did not update the statistics.
        mean_shift: :math:`|m - \mu| / \sqrt{\sigma^2 + \epsilon}`, the root mean square over the channels.
        variance_ratio: :math:`(v + \epsilon) / (\sigma^2 + \epsilon)`, the geometric mean over the channels.
        gamma_mean: The mean of gamma.
        gamma_spread: The standard deviation of gamma over the channels.
        beta_mean: The mean of beta.
        beta_spread: The standard deviation of beta over the channels.
        dead_channels: How many channels had a constant input since the last record, or have a gamma of 0.
        saturated_channels: In how many channels beta is so large beside gamma (4 times) that practically all
            outputs have the same sign: a ReLU behind them is always off, or always on.
        refused_updates: In how many of the recorded steps so far the statistics did not change.
        initial_weight: The weight that the statistics from before the training still have.
        steps_to_catch_up: After how many more steps this weight is 1 %; 0 if it is less already.
    """

    layer: str
    state: str
    mean_shift: float
    variance_ratio: float
    gamma_mean: float
    gamma_spread: float
    beta_mean: float
    beta_spread: float
    dead_channels: int
    saturated_channels: int
    refused_updates: int
    initial_weight: float
    steps_to_catch_up: int


def records(
    layers: WatchedLayers,
    before: Snapshot,
    batch: BatchEstimate,
    constant: np.ndarray,
    refused: np.ndarray,
    initial: np.ndarray,
    per_update: np.ndarray,
) -> tuple[LayerRecord, ...]:
    """Describes the layers at one step.

    Args:
        layers: The layers.
        before: The moving statistics before the step.
        batch: What the step did to them.
        constant: Which channels have a constant input.
        refused: The number of recorded steps that updated nothing, for each layer.
        initial: The weight of the statistics from before the training, for each layer.
        per_update: How many steps an update takes, for each layer.
    """
    gamma, beta = layers.affine()
    live = batch.known & ~constant
    variance = np.maximum(batch.variance, 0) + layers.epsilon
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = np.sqrt(layers.means(np.square(before.mean - batch.mean) / variance, live))
        old = np.maximum(layers.variance(before.spread), 0) + layers.epsilon
        ratio = np.exp(layers.means(np.log(old / variance), live))
    every = np.ones(len(gamma), bool)
    gamma_mean, beta_mean = layers.means(gamma, every), layers.means(beta, every)
    gamma_off = np.square(gamma - layers.to_channels(gamma_mean))
    beta_off = np.square(beta - layers.to_channels(beta_mean))
    saturated = (np.abs(beta) > SATURATED * np.abs(gamma)) & (beta != 0)
    moved = layers.sums(batch.moved) > 0
    columns = {
        "state": np.where(layers.learns, np.where(moved, "learns", "refused"), "frozen"),
        "mean_shift": shift,
        "variance_ratio": ratio,
        "gamma_mean": gamma_mean,
        "gamma_spread": np.sqrt(layers.means(gamma_off, every)),
        "beta_mean": beta_mean,
        "beta_spread": np.sqrt(layers.means(beta_off, every)),
        "dead_channels": layers.sums(constant | (np.abs(gamma) < DEAD_GAMMA)).astype(int),
        "saturated_channels": layers.sums(saturated).astype(int),
        "refused_updates": refused,
        "initial_weight": initial,
        "steps_to_catch_up": _steps_left(layers, initial, per_update),
    }
    return tuple(
        LayerRecord(layer=name, **{key: column[i].item() for key, column in columns.items()})
        for i, name in enumerate(layers.names)
    )


def _steps_left(layers: WatchedLayers, weight: np.ndarray, per_update: np.ndarray) -> np.ndarray:
    steps = np.zeros(len(weight), int)
    for index, layer in enumerate(layers.layers):
        if layer.momentum and layer.momentum < 1 and weight[index] > CAUGHT_UP:
            updates = math.log(CAUGHT_UP / weight[index]) / math.log(layer.momentum)
            steps[index] = math.ceil(updates * per_update[index])
    return steps
