"""Each command does on files what its function does on models."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from command_line import assert_same_outputs, run, small_model
from tfbn._command_line import commands
from tfbn._models.walk import batch_norm_layers

layers = keras.layers


@pytest.fixture
def model() -> keras.Model:
    return small_model()


@pytest.fixture
def path(model, tmp_path) -> Path:
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


@pytest.fixture
def data(tmp_path) -> Path:
    """Inputs and labels whose statistics are not those of the model."""
    x = np.random.default_rng(0).normal(5, 3, (64, 4)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=np.zeros((64, 5), "float32"))
    return tmp_path / "data.npz"


# inspect


def test_inspect_lists_the_layers(path, capsys):
    status, out, _ = run(capsys, "inspect", path)
    assert status == 0
    assert "small: 2 batch normalization layers" in out
    for word in ("first", "keras", "second", "tfbn", "updated"):
        assert word in out
    _, out, _ = run(capsys, "inspect", path, "--json")
    first, second = json.loads(out)["layers"]
    assert (first["layer"], first["channels"]) == ("first", 5)
    assert first["kind"] == "keras.BatchNormalization"
    assert (second["momentum"], second["state"]) == (0.9, "updated")


@pytest.mark.parametrize(
    ("command", "title"),
    [
        (["inspect", "model"], "small: 2 batch normalization layers"),
        (["diagnose", "model", "data"], "Batch normalization: "),
        (["recalibrate", "model", "data", "--output", "output"], "Recalibration"),
        (["fold", "model", "output"], "Folded batch normalization"),
    ],
)
def test_a_command_can_write_its_report_as_a_page(command, title, path, data, tmp_path, capsys):
    files = {"model": path, "data": data, "output": tmp_path / "output.keras"}
    page = tmp_path / "report.html"
    _, out, err = run(capsys, *(files.get(word, word) for word in command), "--html", page)
    assert not err
    assert out.endswith(f"written: {page}\n")
    assert f"<h1>{title}" in page.read_text(encoding="utf-8")


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


def test_inspect_of_a_model_without_batch_normalization(tmp_path, capsys):
    keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="bare").save(tmp_path / "m.keras")
    status, out, _ = run(capsys, "inspect", tmp_path / "m.keras")
    assert (status, out) == (0, "bare: 0 batch normalization layers\n")


# diagnose and recalibrate


def test_diagnose_exits_with_1_if_it_finds_something(path, data, capsys):
    status, out, _ = run(capsys, "diagnose", path, data, "--json")
    assert status == 1
    assert json.loads(out)["findings"]


def test_the_command_has_the_options_of_the_cure_and_of_the_diagnosis(
    path, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = ["--upstream", "batch", "--import", "json", "--no-safe-mode"]
    _, out, _ = run(capsys, "diagnose", path.name, data.name, *options)
    recalibrate = f"tfbn recalibrate {path.name} {data.name}"
    assert f"    {recalibrate} {' '.join(options)} --output recalibrated.keras\n" in out
    frozen = commands._as_command(
        Namespace(prog="tfbn", model="a b.keras", data="x.npy", imports=[], safe_mode=True),
        "tfbn.recalibrate(model, data, include_frozen=True)",
    )
    assert (
        frozen == "tfbn recalibrate 'a b.keras' x.npy --include-frozen --output recalibrated.keras"
    )


def test_recalibrate_cures_what_diagnose_finds(path, data, tmp_path, capsys):
    _, out, _ = run(capsys, "diagnose", path, data)
    hint = f"recalibrate {path} {data} --output recalibrated.keras"
    assert hint in out
    run(capsys, "diagnose", path, data, "--html", tmp_path / "report.html")
    assert f"{hint}</code>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    output = tmp_path / "recalibrated.keras"
    status, out, _ = run(capsys, *hint.split()[:-1], output)
    assert status == 0
    assert f"written: {output}" in out
    expected = keras.models.load_model(path)
    tfbn.recalibrate(expected, np.load(data)["x"])
    found = keras.models.load_model(output)
    for a, b in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert run(capsys, "diagnose", output, data)[0] == 0


def test_recalibrate_takes_a_prior(path, data, tmp_path, capsys):
    output = tmp_path / "out.keras"
    assert run(capsys, "recalibrate", path, data, "--prior", 64, "--output", output)[0] == 0
    expected = keras.models.load_model(path)
    tfbn.recalibrate(expected, np.load(data)["x"], prior=64)
    for a, b in zip(keras.models.load_model(output).weights, expected.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    options = ["--prior", 64, "--upstream", "batch", "--overwrite", "--output", output]
    status, _, err = run(capsys, "recalibrate", path, data, *options)
    assert status == 2
    assert "--prior" in err


def test_recalibrate_keeps_the_optimizer(model, data, tmp_path, capsys):
    model.compile("adam", "mse")
    arrays = np.load(data)
    model.fit(arrays["x"], arrays["y"], verbose=0)
    path, output = tmp_path / "trained.keras", tmp_path / "deep" / "out.keras"
    model.save(path)
    assert run(capsys, "recalibrate", path, data, "--output", output, "--upstream", "batch")[0] == 0
    loaded = keras.models.load_model(output)
    for a, b in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("frozen", [True, False])
def test_recalibrate_sets_frozen_layers_if_asked(model, data, tmp_path, capsys, frozen):
    model.get_layer("first").trainable = False
    model.save(tmp_path / "model.keras")
    options = ["--include-frozen"] if frozen else []
    output = tmp_path / "out.keras"
    run(capsys, "recalibrate", tmp_path / "model.keras", data, "--output", output, *options)
    moved = keras.models.load_model(output).get_layer("first").moving_mean
    assert np.array_equal(moved, model.get_layer("first").moving_mean) != frozen


def test_diagnose_compares_losses_of_a_compiled_model(model, data, tmp_path, capsys):
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    _, out, _ = run(capsys, "diagnose", tmp_path / "model.keras", data, "--json", "--steps", "1")
    assert json.loads(out)["modes"]["inference"]["loss"] > 0


# convert


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
    assert_same_outputs(back, model)


def test_convert_keeps_the_optimizer(model, data, tmp_path, capsys):
    model.compile("adam", "mse")
    arrays = np.load(data)
    model.fit(arrays["x"], arrays["y"], verbose=0)
    model.save(tmp_path / "trained.keras")
    run(capsys, "convert", tmp_path / "trained.keras", tmp_path / "out.keras")
    loaded = keras.models.load_model(tmp_path / "out.keras")
    for a, b in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


# fuse and unfuse


def test_fuse_and_unfuse_there_and_back(path, model, tmp_path, capsys):
    fused, back = tmp_path / "fused.keras", tmp_path / "back.keras"
    status, out, _ = run(capsys, "fuse", path, fused)
    assert status == 0
    assert "1 fused with the preceding layer, 1 frozen" in out
    loaded = keras.models.load_model(fused)
    assert_same_outputs(loaded, model)
    assert run(capsys, "unfuse", fused, back, "--json")[0] == 0
    for a, b in zip(keras.models.load_model(back).weights, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    status, _, err = run(capsys, "unfuse", back, tmp_path / "again.keras")
    assert status == 2
    assert "The model is not fused" in err


# fold and export


def test_fold_writes_a_folded_model(path, model, tmp_path, capsys):
    np.savez(tmp_path / "xy.npz", x=np.ones((2, 4), "float32"), y=np.zeros(2))
    arguments = ["fold", path, tmp_path / "folded.keras", "--inputs", tmp_path / "xy.npz"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "1 folded into the preceding layer, 1 multiply-add" in out
    folded = keras.models.load_model(tmp_path / "folded.keras")
    assert batch_norm_layers(folded) == []
    assert_same_outputs(folded, model)


@pytest.mark.parametrize("extra", [[], ["--no-fold"]])
def test_export_writes_a_saved_model(path, model, tmp_path, capsys, extra):
    np.save(tmp_path / "x.npy", np.ones((2, 4), "float32"))
    arguments = ["export", path, tmp_path / "served", "--inputs", tmp_path / "x.npy", *extra]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert f"written: {tmp_path / 'served'}" in out
    served = tf.saved_model.load(str(tmp_path / "served")).signatures["serving_default"]
    assert_same_outputs(lambda x: served(x=tf.constant(x))["out"], model)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "Add --overwrite to replace it" in err
    status, out, _ = run(capsys, *arguments, "--overwrite", "--json")
    assert status == 0
    report = json.loads(out)
    assert Path(report["card"]).read_text().startswith("# small")
    assert (report["folded"] is None) == bool(extra)
    assert report["difference"] < 1e-4
