"""`python -m tfbn` does on files what the functions do, and says what is wrong with a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from graphs import randomize
from tfbn._command_line.main import main
from tfbn._models.walk import batch_norm_layers

layers = keras.layers


@pytest.fixture
def model() -> keras.Model:
    x = keras.Input((4,), name="x")
    h = layers.BatchNormalization(name="first")(layers.Dense(5, name="dense")(x))
    h = tfbn.BatchNormalization(name="second", momentum=0.9)(layers.ReLU(name="relu")(h))
    return randomize(keras.Model(x, layers.ReLU(name="out")(h), name="small"))


@pytest.fixture
def path(model, tmp_path) -> Path:
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def same_outputs(a, b) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    np.testing.assert_allclose(a(x), b(x), rtol=1e-4, atol=1e-5)


def test_inspect_lists_the_layers(path, capsys):
    status, out, _ = run(capsys, "inspect", path)
    assert status == 0
    assert "small: 2 batch normalization layers" in out
    for word in ("first", "keras", "second", "tfbn", "updated"):
        assert word in out
    status, out, _ = run(capsys, "inspect", path, "--json")
    first, second = json.loads(out)["layers"]
    assert (first["layer"], first["kind"], first["channels"]) == (
        "first",
        "keras.BatchNormalization",
        5,
    )
    assert (second["momentum"], second["state"]) == (0.9, "updated")


def test_inspect_tells_states_apart(tmp_path, capsys):
    x = keras.Input((4,))
    names = ["fresh", "frozen", "broken"]
    norms = {name: tfbn.BatchNormalization(name=name, scale=False) for name in names}
    h = x
    for norm in norms.values():
        h = norm(h)
    norms["frozen"].freeze_statistics = True
    norms["broken"].moving_mean.assign([np.nan, 0, 0, 0])
    keras.Model(x, h).save(tmp_path / "states.keras")
    _, out, _ = run(capsys, "inspect", tmp_path / "states.keras", "--json")
    found = {layer["layer"]: layer for layer in json.loads(out)["layers"]}
    assert [found[name]["state"] for name in names] == ["initial", "initial, frozen", "not finite"]
    assert found["broken"]["mean"] == [None, None]
    assert found["fresh"]["gamma"] is None


def test_inspect_of_a_model_without_them(tmp_path, capsys):
    keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="bare").save(tmp_path / "m.keras")
    assert run(capsys, "inspect", tmp_path / "m.keras")[:2] == (
        0,
        "bare: 0 batch normalization layers\n",
    )


def test_diagnose_exits_with_1_if_it_finds_something(path, tmp_path, capsys):
    x = np.random.default_rng(0).normal(5, 3, (64, 4)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "xy.npz", x=x, y=np.zeros(64))
    status, out, _ = run(capsys, "diagnose", path, tmp_path / "x.npy", "--json")
    assert status == 1
    assert json.loads(out)["findings"]
    model = keras.models.load_model(path)
    tfbn.recalibrate(model, x)
    model.save(tmp_path / "cured.keras")
    status, out, _ = run(
        capsys, "diagnose", tmp_path / "cured.keras", tmp_path / "xy.npz", "--steps", 2
    )
    assert (status == 1) == bool(tfbn.diagnose(model, x, steps=2))
    assert "first" in out


def test_convert_there_and_back(path, model, tmp_path, capsys):
    ours, stock = tmp_path / "ours.keras", tmp_path / "deep" / "stock.keras"
    assert run(capsys, "convert", path, ours, "--synchronized")[0] == 0
    loaded = batch_norm_layers(keras.models.load_model(ours))
    assert [(type(layer), layer.synchronized) for layer in loaded] == [
        (tfbn.BatchNormalization, True)
    ] * 2
    status, out, _ = run(capsys, "convert", ours, stock, "--to", "keras", "--no-synchronized")
    assert status == 0
    assert f"written: {stock}" in out
    back = keras.models.load_model(stock)
    assert {type(layer) for layer in batch_norm_layers(back)} == {layers.BatchNormalization}
    same_outputs(back, model)


def test_fold_writes_a_folded_model(path, model, tmp_path, capsys):
    np.savez(tmp_path / "xy.npz", x=np.ones((2, 4), "float32"), y=np.zeros(2))
    arguments = ["fold", path, tmp_path / "folded.keras", "--inputs", tmp_path / "xy.npz"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "1 folded into the preceding layer, 1 multiply-add" in out
    folded = keras.models.load_model(tmp_path / "folded.keras")
    assert batch_norm_layers(folded) == []
    same_outputs(folded, model)


@pytest.mark.parametrize("extra", [[], ["--no-fold"]])
def test_export_writes_a_saved_model(path, model, tmp_path, capsys, extra):
    np.save(tmp_path / "x.npy", np.ones((2, 4), "float32"))
    arguments = ["export", path, tmp_path / "served", "--inputs", tmp_path / "x.npy", *extra]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "# small" in out
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    same_outputs(lambda x: served(x=tf.constant(x))["out"], model)
    assert run(capsys, *arguments)[0] == 1
    assert run(capsys, *arguments, "--overwrite", "--json")[0] == 0


# Files that are no models


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    path.write_text("not a model")


def other_archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), x=np.ones(2))
    path.with_suffix(".npz").rename(path)


def nonsense(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "There is no such file"),
        (cut_short, "is no Keras model, or was cut short"),
        (text, "is no Keras model, or was cut short"),
        (other_archive, "a zip archive without a Keras model"),
        (nonsense, "Keras cannot load the model"),
        (directory, "This is a directory"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "fold"])
def test_a_file_that_is_no_model_is_named_with_what_is_wrong(path, capsys, spoil, message, command):
    spoil(path)
    output = [path.parent / "out.keras"] if command == "fold" else []
    status, out, err = run(capsys, command, path, *output)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert str(path) in err
    assert "Traceback" not in err


def test_classes_of_the_users_own_are_imported(tmp_path, capsys, monkeypatch):
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
    assert status == 1
    assert "missing_module" in err
    monkeypatch.delitem(sys.modules, "own_layers")
    assert run(capsys, "inspect", "own.keras", "--import", "own_layers")[0] == 0


def test_nothing_is_written_where_something_is(path, tmp_path, capsys):
    before = path.read_bytes()
    status, _, err = run(capsys, "fold", path, path)
    assert status == 1
    assert "add --overwrite" in err
    assert path.read_bytes() == before
    assert run(capsys, "fold", path, path, "--overwrite")[0] == 0
    assert path.read_bytes() != before


def test_the_output_must_be_a_keras_file(path, tmp_path, capsys):
    status, _, err = run(capsys, "convert", path, tmp_path / "out.h5")
    assert status == 1
    assert "must end in .keras" in err


def test_what_fails_leaves_nothing_behind(path, tmp_path, capsys):
    model = keras.models.load_model(path)
    model.get_layer("second").virtual_batch_size = 2
    model.save(path)
    status, _, err = run(capsys, "convert", path, tmp_path / "stock.keras", "--to", "keras")
    assert status == 1
    assert "virtual_batch_size=2" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npy", None, "There is no such file"),
        ("bad.npy", b"zzz", "NumPy cannot load"),
        ("other.npz", {"a": np.ones(2)}, "must have an array x"),
    ],
)
def test_data_that_is_no_data_is_named(path, tmp_path, capsys, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        np.savez(tmp_path / name, **content)
    status, _, err = run(capsys, "diagnose", path, tmp_path / name)
    assert status == 1
    assert message in err
    assert name in err


@pytest.mark.parametrize(
    "arguments", [[], ["dinner"], ["fold"], ["convert", "a", "b", "--to", "c"]]
)
def test_a_command_line_that_is_not_understood_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m tfbn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["inspect"], ["diagnose"], ["convert"], ["fold"], ["export"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "usage: python -m tfbn" in out
    assert command or "examples:" in out


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tfbn {tfbn.__version__}\n"


def test_it_is_a_module_to_run(path):
    done = subprocess.run(
        [sys.executable, "-m", "tfbn", "inspect", str(path), "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 2
