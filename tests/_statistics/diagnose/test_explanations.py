"""Each explanation finds the number that the statistics were made with, and no other explanation does."""

from types import SimpleNamespace

import numpy as np
import pytest

from tfbn._statistics.diagnose import explanations
from tfbn._statistics.diagnose.comparison import Comparison

RNG = np.random.default_rng(0)
CHANNELS = 48
MEAN = RNG.normal(1, 2, CHANNELS)
VARIANCE = RNG.gamma(2, 0.2, CHANNELS) + 0.05
BETWEEN = VARIANCE * RNG.uniform(0.1, 0.9, CHANNELS)  # of the examples' means
CLASSES = BETWEEN * RNG.uniform(0.1, 0.9, CHANNELS)


def comparison(mean, variance) -> Comparison:
    layer = SimpleNamespace(epsilon=1e-3)
    live = np.ones(CHANNELS, bool)
    return Comparison(layer, mean, variance, MEAN, VARIANCE, BETWEEN, live)


@pytest.mark.parametrize("weight", [0.02, 0.3, 0.7])
def test_the_weight_of_the_initial_values_is_found(weight):
    c = comparison((1 - weight) * MEAN, weight + (1 - weight) * VARIANCE)
    found = explanations.best_initial_weight(c)
    assert found.value == pytest.approx(weight, rel=0.1)
    assert found.explained > 0.99
    assert explanations.initial_values(c, weight) == pytest.approx(1)
    assert explanations.best_pull_to_zero(c).explained < 0.95


@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_a_common_factor_of_mean_and_variance_is_found(kept):
    found = explanations.best_pull_to_zero(comparison(kept * MEAN, kept * VARIANCE))
    assert found.value == pytest.approx(kept, abs=0.01)
    assert found.explained > 0.99


@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_size_of_the_batches_is_found(size):
    c = comparison(MEAN, VARIANCE - BETWEEN / size)
    found = explanations.best_batch_size(c)
    assert found.value == pytest.approx(size)
    assert found.explained == pytest.approx(1)
    assert explanations.best_class_fraction(c, CLASSES).explained < 0.98


def test_a_variance_that_is_too_large_is_of_no_batch_size():
    assert explanations.best_batch_size(comparison(MEAN, 2 * VARIANCE)) == (np.inf, 0)


def test_the_missing_part_between_classes_is_found():
    c = comparison(MEAN, VARIANCE - 0.8 * CLASSES)
    found = explanations.best_class_fraction(c, CLASSES)
    assert found.value == pytest.approx(0.8)
    assert found.explained > explanations.best_batch_size(c).explained + 0.02


@pytest.mark.parametrize("scale", [1 / 255, 0.5, 16])
@pytest.mark.parametrize("weight", [0, 0.01])
def test_the_scale_of_the_inputs_is_found_beside_an_offset_and_some_lag(scale, weight):
    variance = weight + (1 - weight) * scale**2 * VARIANCE
    found = explanations.input_scale(comparison(scale * MEAN - 3, variance))
    assert found.explained > 0.9
    if scale**2 > weight:
        assert found.value == pytest.approx(scale, rel=0.1)


def test_variances_of_another_model_are_of_no_scale():
    found = explanations.input_scale(comparison(MEAN, RNG.permutation(VARIANCE)))
    assert found.explained < 0.7


def test_nothing_is_explained_where_nothing_is_off():
    c = comparison(MEAN, VARIANCE)
    assert explanations.best_initial_weight(c).value == 0
    assert c.explained(MEAN, VARIANCE) == 1
