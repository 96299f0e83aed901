"""Recalibration under a tf.distribute strategy pools over its replicas."""

import subprocess
import sys
from pathlib import Path

import pytest

# Virtual devices have to be there before TensorFlow starts: a process of its own.
PROGRAM = """
import numpy as np
import tensorflow as tf

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import tfbn

x = np.random.default_rng(0).normal(4.0, 2.0, (23, 2)).astype("float32")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
for norm in (keras.layers.BatchNormalization, tfbn.BatchNormalization):
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((2,)),
                norm(synchronized=True),
                keras.layers.Dense(3, activation="relu", kernel_initializer="ones"),
                norm(),
            ]
        )
    for upstream in ("population", "batch"):
        # The last batch has one example: none for one of the replicas.
        result = tfbn.recalibrate(model, x, batch_size=11, upstream=upstream)
        assert (result.batches, result.examples) == (3, 23), result
        first, second = model.layers[0], model.layers[2]
        for variable in first.moving_mean.value.values:
            np.testing.assert_allclose(variable.numpy(), x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(first.moving_variance, x.var(0), rtol=1e-5)
        if upstream == "population":
            inside = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) @ np.ones((2, 3))
            seen = np.maximum(inside, 0)
            np.testing.assert_allclose(second.moving_mean, seen.mean(0), rtol=1e-5)
            np.testing.assert_allclose(second.moving_variance, seen.var(0), rtol=1e-5)
print("pooled")
"""


@pytest.mark.timeout(250)
def test_two_replicas_give_the_statistics_of_all_data():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.strip().endswith("pooled"), done.stderr
