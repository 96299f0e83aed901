"""The benchmark of serving keeps what it measured, and says it."""

import json

import keras
import numpy as np

from benchmarks import serving
from graphs import randomize


def measurement(network, scale=1.0):
    times = dict.fromkeys(serving.KINDS, 10.0 * scale) | {"folded": 5.0 * scale}
    return {
        "network": network,
        "batch": 4,
        "milliseconds": {
            kind: {"q1": ms - 1, "median": ms, "q3": ms + 1} for kind, ms in times.items()
        },
        "stock / folded": 2.0,
        "stock / tfbn": 1.0,
        "folded / bare": 0.5,
        "tfbn / bare tfbn": 1.0,
    }


def test_a_network_is_measured_anew_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "export", lambda name, folder: folder.mkdir())
    output = ["--output", str(tmp_path / "serving.json"), "--models", str(tmp_path)]
    for networks, scale in ((["ResNet50", "MobileNetV2"], 1.0), (["ResNet50"], 3.0)):
        monkeypatch.setattr(serving, "measured", lambda name, *_, s=scale: measurement(name, s))
        assert serving.main([*networks, *output]) == 0
    run = json.loads((tmp_path / "serving.json").read_text())
    medians = {r["network"]: r["milliseconds"]["folded"]["median"] for r in run["results"]}
    assert medians == {"MobileNetV2": 5.0, "ResNet50": 15.0}
    page = (tmp_path / "serving.md").read_text()
    assert serving.section(run) in page
    assert "| ResNet50, 4 images | 30.0 | 15.0 | 30.0 | 2.00 (≥ 1.15) | 0.500 (≤ 1.03) |" in page


def test_the_network_without_batch_normalization_is_the_same_with_biases():
    x = keras.Input((8, 8, 3))
    h = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, use_bias=False)(x))
    model = randomize(keras.Model(x, keras.layers.ReLU()(h)))
    bare = serving.without_batch_normalization(model)
    assert [weight.name for weight in bare.weights] == ["kernel", "bias"]
    bare.layers[1].set_weights([model.layers[1].kernel.numpy(), np.zeros(4)])
    convolved = keras.Model(x, keras.layers.ReLU()(model.layers[1].output))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(bare(images), convolved(images), rtol=1e-5, atol=1e-6)
