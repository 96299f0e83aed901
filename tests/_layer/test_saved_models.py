"""Models with the layer outlive the process that made them, and the version of tfbn that saved them."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from make_golden import SAVED_MODELS, build, draw

ROOT = Path(__file__).parents[2]
GOLDEN = sorted(path.stem for path in SAVED_MODELS.glob("golden*.keras"))


@pytest.fixture(scope="module")
def model():
    return build()


def exported(model, folder):
    model.export(folder, verbose=False)
    return tf.saved_model.load(folder).signatures["serving_default"]


def saved_by_tensorflow(model, folder):
    tf.saved_model.save(model, folder)
    return tf.saved_model.load(folder).signatures["serving_default"]


def saved_by_keras(model, folder):
    file = folder.with_suffix(".keras")
    model.save(file)
    return keras.models.load_model(file)


def saved_weights(model, folder):
    file = folder.with_suffix(".weights.h5")
    model.save_weights(file)
    other = build(seed=1)
    other.load_weights(file)
    return other


def outputs(served, x):
    """Of a model, or of a SavedModel's signature, whose argument and result have names."""
    if isinstance(served, keras.Model):
        return served(x, training=False).numpy()
    (name,) = served.structured_input_signature[1]
    (result,) = served(**{name: tf.constant(x)}).values()
    return result.numpy()


@pytest.mark.parametrize(
    "save", [exported, saved_by_tensorflow, saved_by_keras, saved_weights], ids=lambda f: f.__name__
)
def test_what_is_loaded_predicts_as_what_was_saved_for_any_batch_size(model, save, tmp_path):
    served = save(model, tmp_path / "model")
    # 7 and 1 are no multiples of the virtual batch size, which is for training alone.
    for size in (7, 1, 8):
        x = draw(size)
        np.testing.assert_allclose(
            outputs(served, x), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
        )


def test_the_comparison_sees_each_weight_of_the_layer(model):
    # Else the tests here would pass on a file that had lost one.
    x, copy = draw(8), keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    expected = outputs(copy, x)
    for layer in copy.layers:
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            weight = getattr(layer, name, None)
            if weight is not None:
                before = weight.numpy()
                weight.assign(before + 0.1)
                assert not np.allclose(outputs(copy, x), expected, rtol=1e-5, atol=1e-5), (
                    weight.path
                )
                weight.assign(before)


def test_a_loaded_model_has_every_weight_and_trains_on(model, tmp_path):
    loaded = saved_by_keras(model, tmp_path / "model")
    x = draw(8)
    for _ in range(2):
        for mine, theirs in zip(model.weights, loaded.weights, strict=True):
            assert mine.name == theirs.name
            np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-7)
        # A call in training mode moves all averages, those of renorm and the count too.
        np.testing.assert_allclose(
            model(x, training=True), loaded(x, training=True), rtol=1e-5, atol=1e-5
        )


def test_a_layer_set_to_inference_is_exported_as_such(tmp_path):
    inputs = keras.Input((3,))
    layer = tfbn.BatchNormalization(momentum=0.5)
    model = keras.Model(inputs, layer(inputs))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    layer.moving_variance.assign([4.0, 4.0, 4.0])
    layer.trainable = False
    served = exported(model, tmp_path / "model")
    x = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], "float32")
    expected = (x - [1.0, 2.0, 3.0]) / np.sqrt(4.0 + 1e-3)
    np.testing.assert_allclose(outputs(served, x), expected, rtol=1e-5, atol=1e-6)


# The golden pairs: saved_models/README.md has the policy.


def test_there_is_a_golden_pair():
    assert "golden" in GOLDEN


# Keras 3.8 wrote that the model takes a list of one input, which Keras 3.15 takes at its word.
@pytest.mark.filterwarnings("ignore:(?s).*The structure of `inputs` doesn't match:UserWarning")
@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_keras_file_predicts_as_when_it_was_saved(name):
    with np.load(SAVED_MODELS / f"{name}.npz") as file:
        examples = dict(file)
    model = keras.models.load_model(SAVED_MODELS / f"{name}.keras")
    np.testing.assert_allclose(
        outputs(model, examples["inputs"]), examples["outputs"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_saved_model_serves_as_when_it_was_saved_without_tfbn_and_keras(
    serve_alone, name
):
    examples = SAVED_MODELS / f"{name}.npz"
    done = serve_alone("--json", SAVED_MODELS / name, "--examples", examples)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout).values()
    assert report["largest_difference"] < 1e-5


def test_golden_files_are_not_written_over(monkeypatch, tmp_path):
    import make_golden

    monkeypatch.setattr(make_golden, "SAVED_MODELS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_golden.py", "golden"])
    make_golden.main()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == {"golden", "golden.keras", "golden.npz"}
    with pytest.raises(
        SystemExit, match=r"golden files are not written over\. Received: \['golden'"
    ):
        make_golden.main()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
