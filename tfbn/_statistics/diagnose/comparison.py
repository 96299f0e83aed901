"""The moving statistics of a layer beside the statistics of its inputs, channel by channel."""

import dataclasses

import numpy as np

from tfbn._models.walk import BatchNormLayer


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arrays with one value per channel. Channels that are constant, or never seen, are left out.

    Attributes:
        layer: The layer.
        mean: The moving mean.
        variance: The moving variance.
        true_mean: The mean of the inputs.
        true_variance: The variance of the inputs.
        between: The variance of the examples' means.
        live: Which channels of the layer these are.
    """

    layer: BatchNormLayer
    mean: np.ndarray
    variance: np.ndarray
    true_mean: np.ndarray
    true_variance: np.ndarray
    between: np.ndarray
    live: np.ndarray

    def explained(self, mean: np.ndarray, variance: np.ndarray) -> float:
        """Returns how much nearer the moving statistics are to these than to the true ones.

        1 means that they are these; 0, that these are no nearer; less than 0, that they are further.
        """
        rest = self._distance(mean, variance)
        whole = self._distance(self.true_mean, self.true_variance)
        return 1 - float(rest @ rest / max(whole @ whole, 1e-30))

    def _distance(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Differences of means in standard deviations, and logarithms of ratios of standard deviations."""
        epsilon = self.layer.epsilon
        scale = np.sqrt(np.maximum(self.variance, self.true_variance) + epsilon)
        ratio = (self.variance + epsilon) / (np.maximum(variance, 0) + epsilon)
        return np.concatenate([(self.mean - mean) / scale, np.log(ratio) / 2])
