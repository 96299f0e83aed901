"""Files are read with errors that say what is wrong with them, and written whole, checked, or not at all."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import tfbn
from command_line import run, small_model
from tfbn._models.walk import batch_norm_layers

layers = keras.layers


@pytest.fixture
def path(tmp_path) -> Path:
    small_model().save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


# Files that are not models


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    path.write_text("not a model")


def other_archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), x=np.ones(2))
    path.with_suffix(".npz").rename(path)


def nonsense(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "The file does not exist"),
        (cut_short, "is not a Keras model, or it is incomplete"),
        (text, "is not a Keras model, or it is incomplete"),
        (other_archive, "a zip archive without a Keras model"),
        (nonsense, "Keras cannot load the model"),
        (directory, "The path is a directory"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "fold"])
def test_an_error_says_what_is_wrong_with_the_file(path, capsys, spoil, message, command):
    spoil(path)
    output = [path.parent / "out.keras"] if command == "fold" else []
    status, out, err = run(capsys, command, path, *output)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert str(path) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npy", None, "The file does not exist"),
        ("bad.npy", b"zzz", "NumPy cannot load"),
        ("other.npz", {"a": np.ones(2)}, "must contain an array x"),
    ],
)
def test_an_error_says_what_is_wrong_with_the_data(path, tmp_path, capsys, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        np.savez(tmp_path / name, **content)
    status, _, err = run(capsys, "diagnose", path, tmp_path / name)
    assert status == 2
    assert message in err
    assert name in err


# Custom code


def test_a_module_registers_custom_classes(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_layers.py").write_text("""
import keras

@keras.saving.register_keras_serializable("own")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import own_layers

    x = keras.Input((4,))
    keras.Model(x, own_layers.Twice()(layers.BatchNormalization()(x))).save("own.keras")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "own>Twice")
    status, _, err = run(capsys, "inspect", "own.keras", "--import", "missing_module")
    assert status == 2
    assert "missing_module" in err
    monkeypatch.delitem(sys.modules, "own_layers")
    assert run(capsys, "inspect", "own.keras", "--import", "own_layers")[0] == 0


def test_lambda_layers_are_loaded_if_asked(tmp_path, capsys):
    x = keras.Input((4,))
    h = layers.Lambda(lambda t: t + 1, output_shape=(4,))(layers.BatchNormalization()(x))
    keras.Model(x, h).save(tmp_path / "model.keras")
    status, _, err = run(capsys, "inspect", tmp_path / "model.keras")
    assert status == 2
    assert "--no-safe-mode" in err
    arguments = ["convert", tmp_path / "model.keras", tmp_path / "out.keras", "--no-safe-mode"]
    assert run(capsys, *arguments)[0] == 0


def save_with_unregistered_loss(path: Path) -> None:
    def own_loss(y, prediction):
        return keras.ops.mean((y - prediction) ** 2)

    model = small_model()
    model.compile("sgd", own_loss)
    model.save(path)


@pytest.mark.parametrize("command", ["inspect", "fold", "export"])
def test_a_loss_that_keras_cannot_load_does_not_matter(tmp_path, capsys, command):
    save_with_unregistered_loss(tmp_path / "model.keras")
    output = {"inspect": [], "fold": [tmp_path / "f.keras"], "export": [tmp_path / "e"]}[command]
    status, _, err = run(capsys, command, tmp_path / "model.keras", *output)
    assert (status, err) == (0, "")


@pytest.mark.filterwarnings("default:Keras cannot compile")
@pytest.mark.parametrize("command", ["convert", "recalibrate", "diagnose"])
def test_a_model_that_keras_cannot_compile_is_used_uncompiled_with_a_warning(
    tmp_path, capsys, command
):
    save_with_unregistered_loss(tmp_path / "model.keras")
    np.savez(tmp_path / "d.npz", x=np.ones((8, 4), "float32"), y=np.ones((8, 5), "float32"))
    rest = {
        "convert": [tmp_path / "out.keras"],
        "recalibrate": [tmp_path / "d.npz", "--output", tmp_path / "out.keras"],
        "diagnose": [tmp_path / "d.npz"],
    }[command]
    status, _, err = run(capsys, command, tmp_path / "model.keras", *rest)
    assert status == (1 if command == "diagnose" else 0)
    assert err.startswith("warning: Keras cannot compile the model")
    assert "own_loss" in err


def test_an_optimizer_that_has_not_trained_is_nothing_to_warn_of(path, tmp_path, capsys):
    model = keras.models.load_model(path)
    model.compile("adam", "mse")
    model.save(path)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        keras.models.load_model(path)  # Keras warns.
    status, _, err = run(capsys, "convert", path, tmp_path / "out.keras")
    assert (status, err) == (0, "")


# Writing


def test_an_existing_file_is_replaced_only_with_overwrite(path, capsys):
    before = path.read_bytes()
    status, _, err = run(capsys, "fold", path, path)
    assert status == 2
    assert "Add --overwrite to replace it" in err
    assert path.read_bytes() == before
    assert run(capsys, "fold", path, path, "--overwrite")[0] == 0
    assert path.read_bytes() != before


def test_the_output_must_be_a_keras_file(path, tmp_path, capsys):
    status, _, err = run(capsys, "convert", path, tmp_path / "out.h5")
    assert status == 2
    assert "must end in .keras" in err


def test_a_command_that_fails_writes_nothing(path, tmp_path, capsys):
    model = keras.models.load_model(path)
    model.get_layer("second").virtual_batch_size = 2
    model.save(path)
    status, _, err = run(capsys, "convert", path, tmp_path / "stock.keras", "--to", "keras")
    assert status == 2
    assert "virtual_batch_size=2" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]


@keras.saving.register_keras_serializable("test_files")
class Forgetful(layers.Layer):
    """Creates Keras's layer in its constructor, whatever it held when it was saved."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, training=None):
        return self.norm(x, training=training)


def refuse_to_write(capsys, monkeypatch, path, model) -> str:
    """Lets `convert` return a model that does not survive saving, and returns the error."""
    monkeypatch.setattr("tfbn._command_line.commands.convert_model", lambda *_, **__: model)
    status, out, err = run(capsys, "convert", path, path.parent / "out.keras")
    assert (status, out) == (2, "")
    assert [p.name for p in path.parent.iterdir()] == ["model.keras"]
    return err


def test_a_conversion_that_is_lost_on_reload_is_not_written(path, capsys, monkeypatch):
    layer = Forgetful(name="forgetful")
    layer.norm = tfbn.BatchNormalization(name="norm")
    model = keras.Model(x := keras.Input((4,)), layer(x))
    err = refuse_to_write(capsys, monkeypatch, path, model)
    assert "The model changes when it is loaded again" in err
    assert "forgetful/norm" in err


def test_weights_that_change_on_reload_are_not_written(path, capsys, monkeypatch):
    class Resetting(layers.Dense):
        def load_own_variables(self, store):
            self.kernel.assign(keras.ops.zeros_like(self.kernel))

    keras.saving.register_keras_serializable("test_files")(Resetting)
    model = keras.Model(x := keras.Input((4,)), Resetting(3)(x))
    assert "The weights change" in refuse_to_write(capsys, monkeypatch, path, model)


def test_outputs_that_change_on_reload_are_not_written(path, capsys, monkeypatch):
    @keras.saving.register_keras_serializable("test_files")
    class Scaled(layers.Layer):
        factor = 1.0

        def call(self, x):
            return self.factor * x

    layer = Scaled()
    layer.factor = 2.0
    model = keras.Model(x := keras.Input((4,)), layer(x))
    assert "The outputs change" in refuse_to_write(capsys, monkeypatch, path, model)


def test_a_model_with_random_outputs_is_written(tmp_path, capsys):
    @keras.saving.register_keras_serializable("test_files")
    class Noise(layers.Layer):
        def call(self, x):
            return x + keras.random.normal((4,))

    model = keras.Model(x := keras.Input((4,)), Noise()(layers.BatchNormalization()(x)))
    model.save(tmp_path / "model.keras")
    assert run(capsys, "convert", tmp_path / "model.keras", tmp_path / "out.keras")[0] == 0
    converted = keras.models.load_model(tmp_path / "out.keras")
    assert type(batch_norm_layers(converted)[0]) is tfbn.BatchNormalization
