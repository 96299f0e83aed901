"""An exported model serves without tfbn, gives the model's outputs, and never replaces anything by half."""

import json
import logging
import resource
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn._shipping import export


def trained(norm=tfbn.BatchNormalization, **arguments):
    """A model whose moving statistics are not the initial ones."""
    inputs = keras.Input((6, 6, 2), name="image")
    x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = norm(momentum=0.5, **arguments)(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Flatten()(x)
    x = norm(momentum=0.5)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="scores")(x), name="small")
    for _ in range(3):
        model(images(16) * 2 + 1, training=True)
    return model


def images(count):
    return tf.random.stateless_normal((count, 6, 6, 2), seed=(count, 0))


def serve(path):
    return tf.saved_model.load(str(path)).signatures["serving_default"]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("norm", [tfbn.BatchNormalization, keras.layers.BatchNormalization])
def test_the_signature_gives_the_outputs_of_the_model_for_any_batch_size(tmp_path, norm, fold):
    model = trained(norm)
    before = [w.numpy() for w in model.weights]
    assert tfbn.export(model, tmp_path / "served", fold=fold) == tmp_path / "served"
    for count in (1, 5):
        served = serve(tmp_path / "served")(image=images(count))
        expected = model(images(count), training=False)
        np.testing.assert_allclose(served["scores"], expected, rtol=1e-4, atol=1e-4)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_a_process_with_tensorflow_alone_can_serve_it(serve_alone, tmp_path):
    model = trained()
    tfbn.export(model, tmp_path / "served", fold=False)
    expected = model(images(4), training=False)
    np.savez(tmp_path / "served_examples.npz", inputs=images(4), outputs=expected)
    done = serve_alone("--json", tmp_path / "served")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout).values()
    assert report["largest_difference"] < 1e-5


def test_no_warning_about_gradients_is_logged(tmp_path, monkeypatch):
    """An exported model is for inference: TensorFlow warned that gradients were not saved."""
    logged = []
    monkeypatch.setattr(logging.getLogger("absl"), "handle", logged.append)
    path = tfbn.export(trained(), tmp_path / "served", fold=False)
    serve(path)
    assert [record.getMessage() for record in logged] == []


def test_the_model_card_describes_the_signature(tmp_path):
    tfbn.export(trained(), tmp_path / "served")
    card = (tmp_path / "served" / "MODEL_CARD.md").read_text()
    for part in ("# small", "`image`", "any × 6 × 6 × 2", "`scores`", "any × 3", tf.__version__):
        assert part in card
    assert "batch_normalization" in card


def test_inputs_and_outputs_keep_their_names_and_keys(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b", dtype="int32")
    joined = keras.layers.Concatenate()([a, keras.layers.Embedding(4, 1)(b)[..., 0]])
    y = tfbn.BatchNormalization()(keras.layers.Dense(4)(joined))
    model = keras.Model({"a": a, "b": b}, {"out": y, "raw": joined})
    tfbn.export(model, tmp_path / "served")
    given = {"a": tf.ones((2, 3)), "b": tf.ones((2, 2), tf.int32)}
    served, expected = serve(tmp_path / "served")(**given), model(given)
    assert set(served) == {"out", "raw"}
    for name, value in expected.items():
        np.testing.assert_allclose(served[name], value, rtol=1e-5, atol=1e-5)


def test_nested_outputs_are_named_after_the_path_to_them(tmp_path):
    x = keras.Input((3,), name="x")
    ones, twos = keras.layers.Dense(1)(x), tfbn.BatchNormalization()(keras.layers.Dense(2)(x))
    model = keras.Model(x, {"heads": {"b": ones, "a": twos}, "all": [x, ones]})
    tfbn.export(model, tmp_path / "served")
    served = serve(tmp_path / "served")(x=tf.ones((1, 3)))
    shapes = {name: output.shape[1] for name, output in served.items()}
    assert shapes == {"heads_b": 1, "heads_a": 2, "all_0": 3, "all_1": 1}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)
        self.norm = tfbn.BatchNormalization()

    def call(self, x, training=False):
        return self.norm(self.dense(x), training=training)


def test_a_subclassed_model_is_exported(tmp_path):
    model = Subclassed()
    model(tf.random.normal((8, 3)), training=True)
    tfbn.export(model, tmp_path / "served", fold=False)
    x = tf.random.normal((2, 3), seed=3)
    served = serve(tmp_path / "served")
    (name,) = served.structured_input_signature[1]
    (output,) = served(**{name: x}).values()
    np.testing.assert_allclose(output, model(x), rtol=1e-5, atol=1e-5)


class Opaque(Subclassed):
    def call(self, x, training=False):
        return tf.nn.relu(super().call(x, training=training))


def test_a_model_with_a_vocabulary_is_served(tmp_path):
    text = keras.Input((), dtype="string")
    words = keras.layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=3)(text)
    hidden = keras.layers.Embedding(4, 2)(words)
    model = keras.Model(text, keras.layers.BatchNormalization()(hidden))
    x = tf.constant(["a b", "b c a"])
    loaded = tf.saved_model.load(str(tfbn.export(model, tmp_path / "model", inputs=x)))
    (served,) = loaded.serve(x).values()
    np.testing.assert_allclose(served, model(x), rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_run_in_a_graph_is_refused(tmp_path):
    class Asking(keras.Layer):
        def call(self, x):
            return x if tf.reduce_sum(x) > 0 else -x

        def compute_output_shape(self, shape):
            return shape

    image = keras.Input((3,))
    model = keras.Model(image, keras.layers.BatchNormalization()(Asking()(image)))
    with pytest.raises(ValueError, match=r"it must run in a `tf.function`.*Received: "):
        tfbn.export(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_is_exported_unfolded_with_a_warning(tmp_path):
    model = Opaque()
    x = tf.random.stateless_normal((8, 3), (1, 2))
    model(x, training=True)
    with pytest.warns(UserWarning, match=r"exported unfolded. Cannot trace .* class Opaque"):
        tfbn.export(model, tmp_path / "served")
    served = serve(tmp_path / "served")
    (name,) = served.structured_input_signature[1]
    np.testing.assert_allclose(*served(**{name: x}).values(), model(x), rtol=1e-5, atol=1e-5)
    assert "unfolded" in (tmp_path / "served" / "MODEL_CARD.md").read_text()


class OfDict(Subclassed):
    def call(self, inputs, training=False):
        return {"sum": super().call(inputs["a"] + inputs["dense"], training=training)}


@pytest.mark.parametrize("fold", [True, False])
def test_a_subclassed_model_of_a_dict_is_served_under_its_keys(tmp_path, fold):
    model = OfDict()
    given = {"a": tf.random.normal((8, 3)), "dense": tf.ones((8, 3))}
    model(given, training=True)
    tfbn.export(model, tmp_path / "served", fold=fold)
    served = serve(tmp_path / "served")(**given)
    np.testing.assert_allclose(served["sum"], model(given)["sum"], rtol=1e-5, atol=1e-5)


class Joined(keras.Model):
    def call(self, a, b):
        return a + b


def test_a_model_with_several_arguments_is_refused(tmp_path):
    model = Joined(name="joined")
    model(tf.ones((2, 3)), tf.ones((2, 3)))
    with pytest.raises(ValueError, match=r"one argument for all inputs. Received: model 'joined'"):
        tfbn.export(model, tmp_path / "served", fold=False)
    assert list(tmp_path.iterdir()) == []


def test_large_models_keep_their_weights_in_variables(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_CONSTANTS", 0)
    model = trained()
    tfbn.export(model, tmp_path / "served", fold=False)
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    serving = loaded.signatures["serving_default"]
    assert len(serving.graph.variables) == len(model.weights)
    served = serving(image=images(2))["scores"]
    np.testing.assert_allclose(served, model(images(2)), rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: "model.keras", TypeError, r"must be a Keras model. Received: model='model.keras'"),
        (Subclassed, ValueError, r"Call it on an example first.*Received: model"),
    ],
)
def test_what_is_not_a_built_keras_model_is_refused(tmp_path, make, error, text):
    with pytest.raises(error, match=text):
        tfbn.export(make(), tmp_path / "served", fold=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["gs://bucket/model", Path("gs://bucket/model")])
def test_a_url_is_refused(path):
    with pytest.raises(ValueError, match=r"must be a local path.*Received: path=.*gs:"):
        tfbn.export(trained(), path)


def test_an_existing_export_is_replaced_only_with_overwrite(tmp_path):
    old, new = trained(), trained()
    path = tfbn.export(old, tmp_path / "served")
    with pytest.raises(FileExistsError, match=r"overwrite=False.*pass overwrite=True"):
        tfbn.export(new, path)
    expect(path, old)
    tfbn.export(new, path, overwrite=True)
    expect(path, new)
    assert list(tmp_path.iterdir()) == [path]


def test_anything_but_a_saved_model_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match="exists and is not a SavedModel; it was not modified"
    ):
        tfbn.export(trained(), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(
        FileExistsError, match="exists and is not a SavedModel; it was not modified"
    ):
        tfbn.export(trained(), tmp_path / "link", overwrite=True)


# Faults: the old SavedModel stays whole, and nothing half-written remains


def expect(path, model):
    served = serve(path)(image=images(2))["scores"]
    np.testing.assert_allclose(served, model(images(2)), rtol=1e-4, atol=1e-4)


@pytest.fixture
def exported(tmp_path):
    model = trained()
    return tfbn.export(model, tmp_path / "served"), model


def wide():
    """A model of a megabyte."""
    inputs = keras.Input((6, 6, 2), name="image")
    x = keras.layers.Dense(3500)(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="scores")(x))


@pytest.fixture(params=["a full file system", "a limit on the size of files"])
def little_room(request, tmp_path):
    """A folder, and a function after whose call a megabyte can no longer be written."""
    if request.param == "a limit on the size of files":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system of limited size")
    try:
        yield tmp_path, lambda: None
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("weights", ["constants", "variables"])
def test_a_full_disk_leaves_the_old_export(little_room, monkeypatch, weights):
    folder, begin = little_room
    old = trained()
    path = tfbn.export(old, folder / "served")
    if weights == "variables":
        monkeypatch.setattr(export, "LARGEST_CONSTANTS", 0)
    begin()
    with pytest.raises(
        OSError, match=r"cannot write the SavedModel. Received: .*(No space left|File too large)"
    ):
        tfbn.export(wide(), path, overwrite=True)
    expect(path, old)
    assert list(folder.iterdir()) == [path]


def test_other_outputs_leave_the_old_export(exported, monkeypatch):
    path, old = exported
    monkeypatch.setattr(export, "_difference", lambda *_: 0.5)
    with pytest.raises(export.ExportError, match=r"difference of 0.5.*tolerance=0.0001"):
        tfbn.export(trained(), path, overwrite=True)
    expect(path, old)
    assert list(path.parent.iterdir()) == [path]


def test_outputs_that_are_not_finite_leave_the_old_export(exported):
    path, old = exported
    broken = trained()
    broken.layers[-1].bias.assign([np.nan, 0, 0])
    with pytest.raises(ValueError, match="not finite"):
        tfbn.export(broken, path, overwrite=True, fold=False)
    expect(path, old)


# Newer TensorFlow deprecates its interpreter, in words that depend on the version.
@pytest.mark.filterwarnings(
    r"ignore:(?s).*(tf\.lite\.Interpreter is deprecated|LiteRT interpreter):UserWarning"
)
@pytest.mark.parametrize("folded", [True, False])
def test_tensorflow_lite_converts_it(tmp_path, folded):
    model = trained()
    path = tfbn.export(model, tmp_path / "served", fold=folded)
    lite = tf.lite.TFLiteConverter.from_saved_model(str(path)).convert()
    interpreter = tf.lite.Interpreter(model_content=lite)
    run = interpreter.get_signature_runner("serving_default")
    served = run(image=images(1).numpy())["scores"]
    np.testing.assert_allclose(served, model(images(1)), rtol=1e-4, atol=1e-4)


def test_derivatives_of_any_order_pass_through_what_export_wrote(tmp_path):
    """Keras's own export keeps gradients written by hand to the first order only."""
    model = trained()
    tfbn.export(model, tmp_path / "served", fold=False)
    served = serve(tmp_path / "served")

    def second(run):
        x = images(4)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(run(x) ** 2)
            slope = tf.reduce_sum(inner.gradient(y, x) ** 2)
        return outer.gradient(slope, x)

    expected = second(lambda x: model(x, training=False))
    np.testing.assert_allclose(
        second(lambda x: served(image=x)["scores"]), expected, rtol=1e-4, atol=1e-4
    )
