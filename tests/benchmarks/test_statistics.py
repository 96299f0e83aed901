"""The benchmark of what care for the moving statistics costs, on a small model."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

statistics = pytest.importorskip("benchmarks.statistics")


def network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3,)),
            tfbn.BatchNormalization(),
            layers.Dense(4, "relu"),
            tfbn.BatchNormalization(),
        ]
    )


IMAGES = tf.random.normal((8, 3), seed=0)


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_a_line_for_each_kind_of_recalibration():
    data = tf.data.Dataset.from_tensor_slices(IMAGES).batch(4)
    batch, population = statistics.recalibration(network(), data, 3)
    assert 'upstream="batch": a pass takes ' in batch
    assert 'upstream="population": a pass takes ' in population
    assert [len(numbers(line)) for line in (batch, population)] == [2, 2]
    assert "peak memory " in statistics.peaks(network(), data)


def test_the_check_is_measured_against_updates_without_it(monkeypatch):
    model = network()
    seen = {}

    def measured(runs, turns):
        """Runs each, with moments that are not finite, and says that it took a second for each."""
        for name, run in runs.items():
            if name != "step":
                model.layers[0].beta.assign([np.nan] * 3)
                run()
                seen[name] = np.isfinite(model.layers[0].moving_mean.numpy()).all()
        return {"checked": [60.0], "unchecked": [20.0], "step": [10.0]}  # 20 updates each

    monkeypatch.setattr(statistics, "measured", measured)
    line = statistics.check(model, IMAGES, 1)
    assert seen == {"checked": True, "unchecked": False}
    assert numbers(line) == [1e6, 20.0]


def test_ratios_are_medians_over_turns():
    assert statistics.ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0
