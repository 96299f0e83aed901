r"""What the moving statistics would be, if a certain thing had gone wrong.

Each explanation predicts the moving mean and variance from the true ones, :math:`\mu` and
:math:`\sigma^2`, with one unknown at most. `Comparison.explained` says how well.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tfbn._statistics.diagnose.comparison import Comparison

WEIGHTS = np.concatenate([[0.0], np.geomspace(1e-3, 1, 61)])
KEPT = np.linspace(0.01, 1, 100)
FRACTIONS = np.linspace(0.05, 1, 20)


class Explanation(NamedTuple):
    """The value of the unknown that fits best, and the fraction of the distance that it explains."""

    value: float
    explained: float


def initial_values(comparison: Comparison, weight: float) -> float:
    r"""Returns what is explained if the initial values 0 and 1 still have this weight.

    Expected: :math:`m = (1 - w) \mu,\ v = w + (1 - w) \sigma^2`.
    """
    mean, variance = comparison.true_mean, comparison.true_variance
    return comparison.explained((1 - weight) * mean, weight + (1 - weight) * variance)


def best_initial_weight(comparison: Comparison) -> Explanation:
    """Returns the weight of the initial values that explains the most."""
    weights = [*WEIGHTS, 1 - _kept_of_mean(comparison)]
    return _best((w, initial_values(comparison, w)) for w in weights)


def best_pull_to_zero(comparison: Comparison) -> Explanation:
    r"""Returns the common factor of mean and variance, as batches without a value cause it.

    Expected: :math:`m = a \mu,\ v = a \sigma^2`.
    """
    mean, variance = comparison.true_mean, comparison.true_variance
    factors = [*KEPT, _kept_of_mean(comparison)]
    return _best((a, comparison.explained(a * mean, a * variance)) for a in factors)


def scaled_inputs(comparison: Comparison) -> Explanation:
    r"""Returns how many times as large the inputs were in training, if nothing else was different.

    Expected: :math:`m = s \mu,\ v = s^2 \sigma^2`.
    """
    mean, variance = comparison.true_mean, comparison.true_variance
    scale = float(np.sqrt(np.median(comparison.variance / variance)))
    return Explanation(scale, comparison.explained(scale * mean, scale**2 * variance))


def best_batch_size(comparison: Comparison) -> Explanation:
    r"""Returns the number of examples in a batch whose expected variance is the moving one.

    Expected: :math:`m = \mu,\ v = \sigma^2 - B / b` for batches of :math:`b` examples, where :math:`B` is the
    variance of the examples' means.
    """
    missing = np.sum(comparison.true_variance - comparison.variance)
    if missing <= 0 or not comparison.between.any():
        return Explanation(math.inf, 0.0)
    size = max(float(np.sum(comparison.between) / missing), 1.0)
    variance = comparison.true_variance - comparison.between / size
    return Explanation(size, comparison.explained(comparison.true_mean, variance))


def best_class_fraction(comparison: Comparison, between_classes: np.ndarray) -> Explanation:
    """Returns how much of the variance between classes is missing, as batches of few classes cause it."""
    mean, variance = comparison.true_mean, comparison.true_variance
    return _best(
        (part, comparison.explained(mean, variance - part * between_classes)) for part in FRACTIONS
    )


def input_scale(comparison: Comparison) -> Explanation:
    r"""Returns how many times as large the inputs were in training, shifted or not, if all channels agree on that.

    Expected: :math:`v = w + (1 - w) s^2 \sigma^2`, with a small weight :math:`w` of the initial values.
    The mean may be anything, because the inputs may have been shifted too. What is explained concerns the
    variances alone.
    """
    epsilon = comparison.layer.epsilon
    found = []
    for weight in WEIGHTS[WEIGHTS < 0.05]:
        rest = (comparison.variance - weight) / (1 - weight)
        if np.any(rest <= 0):
            continue
        scale = math.exp(np.median(np.log(rest / comparison.true_variance)) / 2)
        expected = weight + (1 - weight) * scale**2 * comparison.true_variance
        errors = np.log((comparison.variance + epsilon) / (expected + epsilon))
        found.append(Explanation(scale, 1 - float(np.sqrt(np.mean(np.square(errors))))))
    return max(found, key=lambda one: one.explained, default=Explanation(1.0, 0.0))


def _kept_of_mean(comparison: Comparison) -> float:
    """How much of the true mean is in the moving one. Where means are large, no grid is fine enough."""
    weights = comparison.true_mean / comparison.true_variance
    kept = weights @ comparison.mean / max(weights @ comparison.true_mean, 1e-30)
    return float(np.clip(kept, 0, 1))


def _best(found: Iterable[tuple[float, float]]) -> Explanation:
    return max(
        (Explanation(float(value), explained) for value, explained in found),
        key=lambda one: one.explained,
    )
