"""The benchmark of fine-tuning with frozen statistics."""

import keras
import pytest
import tensorflow as tf

fused = pytest.importorskip("benchmarks.fused")


def tiny(weights, input_shape, classes, classifier_activation):
    """A network of the kind that `keras.applications` has."""
    layers = keras.layers
    x = keras.Input(input_shape)
    h = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    h = layers.Dense(classes, classifier_activation)(layers.GlobalAveragePooling2D()(h))
    return keras.Model(x, h)


def test_it_times_all_contenders_and_prints_their_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(keras.applications, "Tiny", tiny, raising=False)
    # TensorFlow runs already.
    monkeypatch.setattr(tf.config.threading, "set_intra_op_parallelism_threads", lambda n: None)
    peaks = {"keras": 200.0, "frozen": 150.0, "fused": 120.0, "none": 100.0}
    monkeypatch.setattr(fused, "_peak", lambda network, contender, options: peaks[contender])
    arguments = ["Tiny", "--batch", "2", "--size", "8", "--turns", "1"]
    assert fused.main([*arguments, "--output", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "| keras | 200 | 0.600 |" in printed
    assert "| fused | 120 | 1.000 |" in printed
    found = fused.json.loads((tmp_path / "found.json").read_text())["results"]["Tiny"]
    assert set(found["ms"]) == set(found["time_ratios"]) == set(fused.CONTENDERS)
    assert found["time_ratios"]["fused"] == 1


def test_the_network_without_batch_normalization_has_none():
    model = tiny(None, (8, 8, 3), 2, None)
    bare = keras.models.clone_model(model, clone_function=fused._without_batch_norm)
    assert [weight.name for weight in bare.weights] == ["kernel", "bias"] * 2
