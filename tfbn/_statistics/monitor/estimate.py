r"""What the moving statistics before and after a training step say of the batch in between.

The moving average takes :math:`m' = k m + (1 - k) b`, where :math:`k` is the momentum, so the batch had
:math:`b = m + (m' - m) / (1 - k)`. This needs no change to the compiled step. It is exact up to the rounding of
the moving statistics, which :math:`1 / (1 - k)` amplifies: about 1e-5 of them at a momentum of 0.99. If
:math:`n` batches came in between, :math:`k` is the momentum to the power of :math:`n`, and :math:`b` their
weighted average.
"""

import dataclasses

import numpy as np

from tfbn._statistics.monitor.snapshot import Snapshot, WatchedLayers

WORTHLESS = 0.01
"""If rounding can move an estimate by more than this fraction of the moving statistics, there is none."""
CONSTANT = 1e-3
"""A channel counts as constant if its variance is less than this part of epsilon."""


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
