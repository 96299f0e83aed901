"""Running something once on each replica."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn._support.eager_run import run_once


@pytest.fixture
def warned(monkeypatch):
    """What TensorFlow logs, past its filters."""
    records = []
    monkeypatch.setattr(tf.get_logger(), "callHandlers", records.append)
    return records


def test_recalibration_under_a_mirrored_strategy_is_quiet(warned):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), tfbn.BatchNormalization()])
    warned.clear()
    tfbn.recalibrate(model, np.random.default_rng(0).normal(size=(8, 2)).astype("float32"))
    assert warned == []


def test_other_warnings_pass(warned):
    strategy = tf.distribute.get_strategy()
    assert run_once(strategy, lambda: tf.get_logger().warning("seen") or 7) == 7
    assert [record.getMessage() for record in warned] == ["seen"]
    assert not tf.get_logger().filters
