"""What the tests of the command line share: a saved model, and a run of a command."""

from __future__ import annotations

import keras
import numpy as np

import tfbn
from graphs import randomize
from tfbn._command_line.main import main

layers = keras.layers


def small_model() -> keras.Model:
    """Two batch normalization layers, one of each class; the first can be folded."""
    x = keras.Input((4,), name="x")
    h = layers.BatchNormalization(name="first")(layers.Dense(5, name="dense")(x))
    h = tfbn.BatchNormalization(name="second", momentum=0.9)(layers.ReLU(name="relu")(h))
    return randomize(keras.Model(x, layers.ReLU(name="out")(h), name="small"))


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Runs a command. Returns its exit status, its output, and its errors."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_same_outputs(a, b) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    np.testing.assert_allclose(a(x), b(x), rtol=1e-4, atol=1e-5)
