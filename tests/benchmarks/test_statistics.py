"""The benchmark of what care for the moving statistics costs, on a small model."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from benchmarks import environment

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


def test_a_row_for_each_network():
    model = network()
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((IMAGES, tf.zeros([8, 4]))).batch(4)
    seconds = statistics.recalibration(model, data, 1)
    passes = {"evaluate, a pass": 2.0, "batch, a pass": 3.0, "population, a pass": 5.0}
    assert all(value > 0 for name, value in seconds.items() if name not in passes)
    assert set(passes) < set(seconds)
    seconds |= passes
    result = {"network": "Tiny", "size": 3, "layers": 2, "turns": 1, "seconds": seconds}
    result["peaks"] = {
        way: statistics.PEAKS[way](model, data) and 7654.0 for way in statistics.PEAKS
    }
    run = {"environment": environment.described(1), "date": "today", "results": [result]}
    text = statistics.section(run | {"images": 8, "batch": 4})
    row = next(line for line in text.splitlines() if "Tiny" in line)
    assert f"{seconds['diagnose'] / seconds['batch']:.2f} (≤ 3)" in row
    assert "| 1.50 (≤ 1.5) | 2.50 |" in row
    assert text.count("7,654") == len(statistics.PEAKS)


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
