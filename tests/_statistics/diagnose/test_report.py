"""What a diagnosis measures and shows."""

import keras
import numpy as np
import pytest
from keras import layers

import tfbn

RNG = np.random.default_rng(0)
IMAGES = (3 + 2 * RNG.normal(size=(512, 4, 4, 1))).astype("float32")


@pytest.fixture
def model() -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((4, 4, 1))
    x = layers.BatchNormalization(name="n0")(layers.Conv2D(6, 3, name="conv")(image))
    x = layers.BatchNormalization(name="n1")(layers.Dense(8)(layers.Flatten()(x)))
    return keras.Model(image, x)


def test_the_measures_of_a_layer_are_those_of_their_definitions(model):
    layer = model.get_layer("n0")
    layer.moving_mean.assign(RNG.normal(size=6))
    layer.moving_variance.assign(RNG.uniform(0.5, 2, 6))
    diagnosis = tfbn.diagnose(model, IMAGES, batch_size=100)
    measured = diagnosis.layers[0]
    seen = model.get_layer("conv")(IMAGES).numpy().astype("float64")
    sigma = np.sqrt(seen.var((0, 1, 2)) + layer.epsilon)
    shift = (layer.moving_mean.numpy() - seen.mean((0, 1, 2))) / sigma
    assert measured.mean_shift == pytest.approx(np.sqrt(np.mean(shift**2)), rel=1e-4)
    ratio = np.log((layer.moving_variance.numpy() + layer.epsilon) / sigma**2)
    assert measured.log_variance_ratio == pytest.approx(np.mean(ratio), rel=1e-3)
    means = np.stack([seen[i : i + 100].mean((0, 1, 2)) for i in range(0, 512, 100)])
    noise = np.sqrt(np.mean(means.var(0) / sigma**2))
    assert measured.batch_noise == pytest.approx(noise, rel=1e-3)
    error = np.sqrt(np.mean(seen.mean((1, 2)).var(0) / 512 / sigma**2))
    assert measured.sampling_error == pytest.approx(error, rel=1e-3)
    assert measured.values_per_batch == pytest.approx(512 * 4 / 6)
    assert (measured.channels, measured.examples, measured.momentum) == (6, 512, 0.99)
    assert (diagnosis.modes, diagnosis.passes, diagnosis.examples) == ({}, 1, 512)


def test_notebooks_show_markdown_and_one_is_singular(model):
    diagnosis = tfbn.diagnose(model, IMAGES[:1], upstream="batch")
    assert diagnosis._repr_markdown_() == diagnosis.to_markdown()
    assert "1 example in 1 batch, 1 pass." in diagnosis.to_markdown()


def test_frozen_layers_show_why_they_are_frozen(model):
    model.get_layer("n1").trainable = False
    diagnosis = tfbn.diagnose(model, IMAGES, steps=2)
    assert [layer.state for layer in diagnosis.layers] == ["learns", "trainable=False"]
    assert all(layer.measured for layer in diagnosis.layers)


def test_plot_writes_a_picture(model, tmp_path):
    tfbn.diagnose(model, IMAGES).plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_names_the_extra(model, tmp_path, monkeypatch):
    diagnosis = tfbn.diagnose(model, IMAGES, steps=1)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tfbn\[plots\]'"):
        diagnosis.plot(tmp_path / "diagnosis.png")


def test_verbose_prints_the_diagnosis(model, capsys):
    diagnosis = tfbn.diagnose(model, IMAGES, steps=2, verbose=True)
    assert str(diagnosis) in capsys.readouterr().out


def test_without_findings_it_says_so(model):
    tfbn.recalibrate(model, IMAGES)
    diagnosis = tfbn.diagnose(model, IMAGES)
    assert not diagnosis
    assert str(diagnosis).startswith("No findings: the moving statistics match the data.")


def test_a_page_shows_findings_pictures_and_the_cure_as_code(model, tmp_path):
    path = tmp_path / "diagnosis.html"
    diagnosis = tfbn.diagnose(model, IMAGES)
    diagnosis.to_html(path)
    text = path.read_text(encoding="utf-8")
    (finding,) = diagnosis.findings
    assert "<h1>Batch normalization: 1 finding</h1>" in text
    assert f"<pre><code>{finding.cure}</code></pre>" in text
    assert text.count("<svg") == 2 * len(finding.layers) == 4
    assert text.count("<circle") == 2 * (6 + 8)  # mean and variance of each channel


def test_the_page_of_a_healthy_model_says_so(model, tmp_path):
    path = tmp_path / "diagnosis.html"
    tfbn.recalibrate(model, IMAGES)
    tfbn.diagnose(model, IMAGES).to_html(path)
    text = path.read_text(encoding="utf-8")
    assert "<h1>Batch normalization: no findings</h1>" in text
    assert "<svg" not in text
