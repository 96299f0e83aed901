"""examples/serve.py: a prediction depends on its own example alone, with TensorFlow alone."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from graphs import randomize


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model as it is and folded, with examples of what it predicts."""
    folder = tmp_path_factory.mktemp("served")
    x = keras.Input((6, 6, 2))
    h = tfbn.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
    h = keras.layers.Flatten()(keras.layers.ReLU()(h))
    model = randomize(keras.Model(x, keras.layers.Dense(3)(h)))
    inputs = np.random.default_rng(0).normal(1, 2, (270, 6, 6, 2)).astype("float32")
    outputs = model.predict(inputs, verbose=0)
    np.savez(folder / "served_examples.npz", inputs=inputs, outputs=outputs)
    tfbn.export(model, folder / "folded")
    tfbn.export(model, folder / "unfolded", fold=False)
    return folder


def test_l7_a_prediction_is_the_same_alone_and_in_any_batch_as_is_and_folded(serve_alone, exported):
    paths = [exported / "unfolded", exported / "folded"]
    done = serve_alone("--json", *paths)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert list(reports) == [str(path) for path in paths]
    for report in reports.values():
        assert report["examples"] == 270
        assert report["largest_difference"] < 1e-4
        assert report["largest_difference_between_batches"] < 1e-4
        times = report["milliseconds"]
        assert 0 < times["q1"] <= times["median"] <= times["q3"]


def test_l7_statistics_of_the_batch_itself_are_found_out(serve_alone, exported, tmp_path):
    """What a network would answer at test time if it normalized as in training."""

    @tf.function(input_signature=[tf.TensorSpec((None, 6, 6, 2))])
    def by_its_own_batch(x):
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        pooled = tf.reduce_sum((x - mean) * tf.math.rsqrt(variance + 1e-3), [1, 2])
        return {"y": tf.matmul(pooled, tf.ones((2, 3)))}

    tf.saved_model.save(tf.Module(), str(tmp_path), {"serving_default": by_its_own_batch})
    done = serve_alone(tmp_path, "--examples", exported / "served_examples.npz")
    assert done.returncode == 1
    assert "A prediction DEPENDS on its batch" in done.stdout


def test_predictions_that_are_not_those_of_the_model_are_found_out(serve_alone, exported, tmp_path):
    with np.load(exported / "served_examples.npz") as file:
        examples = dict(file)
    inputs = examples["inputs"].astype("float64")  # The signature takes float32.
    np.savez(tmp_path / "other.npz", inputs=inputs, outputs=examples["outputs"] + 0.1)
    done = serve_alone(exported / "folded", "--examples", tmp_path / "other.npz")
    assert done.returncode == 1
    assert (
        "270 predictions DIFFER from those of the model: largest difference 1.0e-01" in done.stdout
    )
    assert "A prediction does not depend on its batch" in done.stdout


def test_a_place_without_a_saved_model_is_named(serve_alone):
    done = serve_alone("nowhere")
    assert done.returncode == 2
    assert "no SavedModel is there. Received: nowhere." in done.stderr


def test_examples_that_are_none_are_named(serve_alone, exported, tmp_path):
    np.savez(tmp_path / "other.npz", inputs=np.ones((2, 6, 6, 2)), outputs=np.ones((1, 3)))
    done = serve_alone(exported / "folded", "--examples", tmp_path / "other.npz")
    assert done.returncode == 1
    assert "must be as many, and one at least. Received" in done.stderr
    assert "2 and 1" in done.stderr
