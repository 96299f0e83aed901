"""What `tfbn.fold` returns and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from folding import folded, image
from graphs import randomize
from tfbn._shipping.fold.check import FoldError

HARNESS = Path(__file__).parents[2] / "harness"
layers = keras.layers
Norm = keras.layers.BatchNormalization


def test_the_folded_model_has_the_same_inputs_and_outputs():
    x = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    y = Norm()(layers.Dense(3)(x["a"]))
    model = keras.Model(x, {"y": y, "z": [Norm()(x["b"]), x["a"]]}, name="two")
    new = folded(model)
    assert new.name == "two"
    assert not new.compiled
    assert {name: tensor.name for name, tensor in new.input.items()} == {"a": "a", "b": "b"}
    assert list(new.output) == ["y", "z"]


def test_a_saved_folded_model_loads_without_tfbn(tmp_path):
    x = image()
    h = tfbn.BatchNormalization(axis=[1, 3])(x)
    model = keras.Model(x, tfbn.BatchNormalization()(layers.Dense(3)(layers.ReLU()(h))))
    new = folded(model)
    new.save(tmp_path / "folded.keras")
    np.save(tmp_path / "x.npy", np.ones((2, 8, 8, 4), "float32"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import sys
sys.modules["tfbn"] = None
sys.path.insert(0, {str(HARNESS)!r})
import quick_start, keras, numpy as np
model = keras.models.load_model(r"{tmp_path}/folded.keras")
np.save(r"{tmp_path}/y.npy", model(np.load(r"{tmp_path}/x.npy")))
""",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        np.load(tmp_path / "y.npy"), new(np.ones((2, 8, 8, 4), "float32"))
    )


def test_a_model_without_batch_normalization_is_copied():
    x = image()
    report = folded(keras.Model(x, layers.Dense(3)(x))).report
    assert report.rows == ()
    assert "no batch normalization layers" in report.summary()


def mixed() -> keras.Model:
    x = image()
    h = Norm(name="first")(layers.Conv2D(4, 3, name="conv")(x))
    h = Norm(name="second")(layers.ReLU(name="relu")(h))
    return randomize(keras.Model(x, layers.Dense(2)(layers.ReLU(name="again")(h))))


# Errors


def test_a_folded_model_with_other_outputs_is_not_returned():
    with pytest.raises(
        FoldError, match=r"gives other outputs .* Received: a difference of .*tolerance=1e-12"
    ):
        tfbn.fold(randomize(mixed()), tolerance=1e-12)


def test_random_outputs_are_named_as_the_cause():
    x = image()
    noisy = layers.Lambda(lambda t: t + tf.random.normal((8, 8, 4)))(Norm()(x))
    with pytest.raises(
        ValueError, match=r"are random: two calls .* differ by .*SeedGenerator.*'inf'"
    ):
        tfbn.fold(keras.Model(x, noisy))
    assert tfbn.fold(keras.Model(x, noisy), tolerance=float("inf")).report.rows


def test_outputs_that_are_not_finite_are_refused():
    model = mixed()
    with pytest.raises(ValueError, match="not finite"):
        tfbn.fold(model, inputs=np.full((1, 8, 8, 4), np.inf, "float32"))


@pytest.mark.parametrize("tolerance", [-1, float("nan"), "1e-4"])
def test_a_tolerance_must_be_a_number_of_at_least_zero(tolerance):
    model = keras.Model(x := keras.Input((4,)), Norm()(x))
    with pytest.raises(ValueError, match=rf"at least 0. Received: tolerance={tolerance!r}"):
        tfbn.fold(model, tolerance=tolerance)


def test_empty_inputs_are_refused():
    model = keras.Model(x := keras.Input((4,)), Norm()(x))
    with pytest.raises(ValueError, match=r"outputs are empty.*Received: .*\(0, 4\)"):
        tfbn.fold(model, np.zeros((0, 4), "float32"))


def test_outputs_are_compared_on_the_given_inputs():
    model = mixed()
    report = tfbn.fold(model, inputs=np.zeros((1, 8, 8, 4), "float32")).report
    assert report.difference <= 1e-6


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(
        ValueError,
        match=r"not built, so its shapes are unknown.* Received: model 'plain' of class Sequential",
    ):
        tfbn.fold(keras.Sequential([layers.Dense(2), Norm()], name="plain"))


def test_only_a_keras_model_is_folded():
    with pytest.raises(TypeError, match=r"`model` must be a Keras model. Received: model='x'"):
        tfbn.fold("x")
