"""After `fold`, TensorFlow Lite's 8-bit integers have no arithmetic of batch normalization left."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from graphs import randomize

layers = keras.layers
ARITHMETIC = {"ADD", "SUB", "MUL", "DIV", "RSQRT"}


def network() -> keras.Model:
    """Batch normalization before a convolution, after one, after pooling, and before the head."""
    norm = layers.BatchNormalization
    return randomize(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                norm(),
                layers.Conv2D(8, 3),
                norm(),
                layers.ReLU(),
                layers.Conv2D(8, 3),
                layers.AveragePooling2D(2),
                norm(),
                layers.ReLU(),
                norm(),
                layers.Flatten(),
                layers.Dense(4),
            ]
        )
    )


@pytest.mark.parametrize("folded", [True, False])
def test_no_arithmetic_of_batch_normalization_is_left_if_the_model_was_folded(
    folded, tmp_path, capfd
):
    model = network()
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    path = tfbn.export(model, tmp_path / "served", fold=folded, inputs=x)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(path))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in x)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    content = converter.convert()
    capfd.readouterr()
    tf.lite.experimental.Analyzer.analyze(model_content=content)
    operations = set(re.findall(r"Op#\d+ (\w+)\(", capfd.readouterr().out))
    assert {"CONV_2D", "FULLY_CONNECTED"} <= operations
    assert bool(operations & ARITHMETIC) != folded
