"""Broken models, each diagnosed rightly; healthy ones without a finding."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn._statistics.diagnose.finding import SEVERITIES

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 512)
# Four kinds of 4×4 images: a pattern each, brightness that varies, and noise.
PATTERNS = RNG.normal(size=(4, 4, 4, 1))
IMAGES = (
    PATTERNS[LABELS] * RNG.uniform(0.7, 1.3, (512, 1, 1, 1))
    + 0.4 * RNG.normal(size=(512, 4, 4, 1))
    + 1
).astype("float32")
DATA = (IMAGES, LABELS)


def network(norm=layers.BatchNormalization, **arguments) -> keras.Model:
    image = keras.Input((4, 4, 1))
    a = norm(name="n0", **arguments)(layers.Conv2D(6, 3, name="conv")(image))
    a = layers.Flatten()(layers.ReLU()(a))
    for number in (1, 2):
        a = norm(name=f"n{number}", **arguments)(layers.Dense(16)(a))
        a = layers.ReLU()(a)
    return keras.Model(image, layers.Dense(4)(a))


def compiled(model: keras.Model, rate: float = 0.01, **options) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, **options), loss, metrics=["accuracy"])
    return model


def trained(
    norm=layers.BatchNormalization, momentum=0.9, epochs=6, batch_size=32, rate=0.01, **options
):
    keras.utils.set_random_seed(3)
    model = compiled(network(norm, momentum=momentum), rate, **options)
    # The last steps are small, as at the end of a training: the moving average can follow.
    slow = keras.callbacks.LearningRateScheduler(lambda epoch: rate * 0.5**epoch)
    model.fit(*DATA, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[slow])
    return model


@pytest.fixture(scope="module")
def healthy_weights():
    return trained().get_weights()


@pytest.fixture
def healthy(healthy_weights):
    model = compiled(network())
    model.set_weights(healthy_weights)
    return model


def only(diagnosis, kind: str):
    """The one finding, of this kind, that a diagnosis has; it is complete."""
    assert [finding.kind for finding in diagnosis.findings] == [kind], str(diagnosis)
    (finding,) = diagnosis.findings
    assert finding.severity in SEVERITIES
    assert finding.explanation
    assert finding.cure
    assert kind in str(diagnosis)
    assert kind in diagnosis.to_markdown()
    json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    return finding


ALL = ("n0", "n1", "n2")


# The healthy


@pytest.mark.no_cover
@pytest.mark.parametrize("batch_size", [4, 32, 512])
def test_a_healthy_model_has_no_finding(healthy, batch_size):
    diagnosis = tfbn.diagnose(healthy, DATA, batch_size=batch_size)
    assert not diagnosis, str(diagnosis)
    assert "No findings" in str(diagnosis)


@pytest.mark.no_cover
def test_a_healthy_model_of_ours_has_no_finding_before_and_after_recalibration():
    model = trained(tfbn.BatchNormalization, momentum=0.9)
    assert not tfbn.diagnose(model, DATA)
    tfbn.recalibrate(model, IMAGES)
    assert not tfbn.diagnose(model, DATA)


@pytest.mark.no_cover
def test_a_frozen_healthy_model_has_no_finding(healthy):
    healthy.get_layer("n1").trainable = False
    diagnosis = tfbn.diagnose(healthy, DATA)
    assert not diagnosis
    assert [layer.state for layer in diagnosis.layers] == ["learns", "trainable=False", "learns"]
    assert not tfbn.diagnose(healthy, DATA, include_frozen=True)


# The broken


def test_a_momentum_too_slow_for_twenty_steps():
    keras.utils.set_random_seed(3)
    model = compiled(network())  # Keras's default: 0.99
    model.fit(*DATA, batch_size=128, epochs=5, verbose=0)
    diagnosis = tfbn.diagnose(model, DATA)
    finding = only(diagnosis, "lagging_statistics")
    assert finding.layers == ALL
    assert finding.severity == "error"
    assert finding.evidence["initial_weight"] == pytest.approx(0.99**20, abs=0.05)
    assert "tfbn.recalibrate(model, data)" in finding.cure
    # The modes tell it too, and what the cure is worth.
    losses = {mode: values["loss"] for mode, values in diagnosis.modes.items()}
    assert losses["inference"] > 1.5 * losses["training"]
    tfbn.recalibrate(model, IMAGES)
    assert model.evaluate(*DATA, verbose=0)[0] == pytest.approx(losses["recalibrated"], rel=1e-4)
    assert not tfbn.diagnose(model, DATA)


@pytest.mark.no_cover
def test_a_custom_loop_without_training_true():
    model = compiled(network())
    for _ in range(20):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=LABELS, y_pred=model(IMAGES))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
    finding = only(tfbn.diagnose(model, DATA), "never_updated")
    assert finding.layers == ALL
    assert "training=True" in finding.explanation
    assert "model(x, training=True)" in finding.cure


class Fixed(keras.Model):
    """Passes a flag of its own to its normalization."""

    def __init__(self, flag):
        super().__init__()
        self.flag = flag
        self.norm = layers.BatchNormalization(name="norm")
        self.head = layers.Dense(4)
        self.flatten = layers.Flatten()

    def call(self, x, training=None):
        return self.head(self.norm(self.flatten(x), training=self.flag))


def test_a_model_that_calls_its_layer_with_training_true_in_inference():
    model = compiled(Fixed(True))
    model.fit(*DATA, epochs=20, verbose=0)
    finding = only(tfbn.diagnose(model, DATA), "training_forced")
    assert finding.layers == (model.norm.path,)
    assert "training=training" in finding.cure


def test_a_model_that_does_not_pass_training_on():
    model = compiled(Fixed(False))
    model.fit(*DATA, epochs=2, verbose=0)
    finding = only(tfbn.diagnose(model, DATA), "never_updated")
    assert "not pass `training` on" in finding.explanation


@pytest.mark.no_cover
def test_data_of_another_domain(healthy):
    inverted = (2 - IMAGES, LABELS)
    finding = only(tfbn.diagnose(healthy, inverted), "other_data_or_weights")
    assert "n0" in finding.layers
    assert finding.cure == "tfbn.recalibrate(model, data)"


def test_averaged_weights():
    model = trained(use_ema=True, ema_momentum=0.97, epochs=3, rate=0.03)
    finding = only(tfbn.diagnose(model, DATA), "averaged_weights")
    assert "tfbn.RecalibrateAfterTraining(data)" in finding.cure
    tfbn.recalibrate(model, IMAGES)
    assert not tfbn.diagnose(model, DATA)


def test_a_batch_with_a_nan(healthy):
    poisoned = IMAGES[:4].copy()
    poisoned[0, 0, 0] = np.nan
    healthy(poisoned, training=True)
    finding = only(tfbn.diagnose(healthy, DATA), "not_finite_statistics")
    assert finding.layers == ALL
    assert "tfbn.convert(model)" in finding.cure
    tfbn.recalibrate(healthy, IMAGES)
    assert not tfbn.diagnose(healthy, DATA)


def test_batches_of_one_example():
    model = trained(batch_size=1, epochs=1)
    finding = only(tfbn.diagnose(model, DATA), "small_batches")
    assert {"n1", "n2"} <= set(finding.layers)
    assert finding.evidence["batch_size"] == pytest.approx(1, abs=0.3)
    assert "GroupNormalization" in finding.cure


def test_a_base_called_with_training_false_that_trains_all_the_same(healthy):
    base = keras.Model(healthy.inputs, healthy.get_layer("n2").output, name="base")
    image = keras.Input((4, 4, 1))
    model = compiled(keras.Model(image, layers.Dense(4)(base(image, training=False))), rate=1e-4)
    before = base.get_layer("n0").moving_mean.numpy()
    model.fit(*DATA, batch_size=128, verbose=0)
    assert np.any(before != base.get_layer("n0").moving_mean.numpy())  # keras#20285
    finding = only(tfbn.diagnose(model, DATA), "training_false_overridden")
    assert finding.layers == ALL
    assert "tfbn.freeze(model, within=base)" in finding.cure
    tfbn.freeze(model, within=base)
    assert not tfbn.diagnose(model, DATA, include_frozen=True)


def test_a_shared_layer_that_sees_two_domains():
    first, second = keras.Input((3,), name="first"), keras.Input((3,), name="second")
    shared = layers.BatchNormalization(name="shared", momentum=0.5)
    outputs = layers.Dense(1)(layers.Add()([shared(first), shared(second)]))
    model = keras.Model([first, second], outputs)
    x = RNG.normal(size=(64, 3)).astype("float32")
    data = ((x, 5 + 2 * x),)
    for _ in range(20):
        model(data[0], training=True)
    finding = only(tfbn.diagnose(model, data), "shared_domains")
    assert finding.layers == ("shared",)
    assert finding.evidence["calls_apart"] == pytest.approx(2.5, rel=0.2)
    near = ((x, x[::-1] * 1.1),)
    tfbn.recalibrate(model, near)
    assert not tfbn.diagnose(model, near)


def test_a_dead_channel(healthy):
    conv = healthy.get_layer("conv")
    kernel, bias = (w.numpy() for w in conv.weights)
    kernel[..., 2] = 0
    conv.set_weights([kernel, bias])
    mean, variance = healthy.get_layer("n0").moving_mean, healthy.get_layer("n0").moving_variance
    tfbn.recalibrate(healthy, IMAGES)
    assert variance.numpy()[2] < 1e-10
    assert mean.numpy()[2] == pytest.approx(bias[2], abs=1e-5)
    finding = only(tfbn.diagnose(healthy, DATA), "constant_channels")
    assert finding.layers == ("n0",)
    assert finding.evidence == {"channels": 1}


# Other findings


def test_negative_variances(healthy):
    variance = healthy.get_layer("n1").moving_variance
    variance.assign(-variance.numpy())
    finding = only(tfbn.diagnose(healthy, DATA), "negative_variance")
    assert (finding.layers, finding.evidence) == (("n1",), {"values": 16})


def test_dead_gammas(healthy):
    gamma = healthy.get_layer("n1").gamma.numpy()
    gamma[:3] = 0
    healthy.get_layer("n1").gamma.assign(gamma)
    tfbn.recalibrate(healthy, IMAGES)
    kinds = {finding.kind: finding for finding in tfbn.diagnose(healthy, DATA).findings}
    assert kinds["dead_gammas"].evidence == {"channels": 3}
    assert kinds["dead_gammas"].severity == "note"


def test_data_that_is_not_finite_is_a_finding(healthy):
    images = IMAGES.copy()
    images[7] = np.inf
    diagnosis = tfbn.diagnose(healthy, (images, LABELS))
    finding = only(diagnosis, "not_finite_inputs")
    assert "layer 'n0'" in finding.explanation
    assert diagnosis.modes == {}


# What it tells, and leaves alone


def test_the_measures_of_a_layer_are_those_of_their_definitions(healthy):
    layer = healthy.get_layer("n0")
    layer.moving_mean.assign(layer.moving_mean.numpy() + 0.3)
    before = [w.numpy() for w in healthy.weights]
    diagnosis = tfbn.diagnose(healthy, IMAGES, batch_size=100)
    measured = diagnosis.layers[0]
    seen = healthy.get_layer("conv")(IMAGES).numpy().astype("float64")
    sigma = np.sqrt(seen.var((0, 1, 2)) + layer.epsilon)
    shift = (layer.moving_mean.numpy() - seen.mean((0, 1, 2))) / sigma
    assert measured.mean_shift == pytest.approx(np.sqrt(np.mean(shift**2)), rel=1e-4)
    ratio = np.log((layer.moving_variance.numpy() + layer.epsilon) / sigma**2)
    assert measured.log_variance_ratio == pytest.approx(np.mean(ratio), rel=1e-3)
    means = np.stack([seen[i : i + 100].mean((0, 1, 2)) for i in range(0, 512, 100)])
    assert measured.batch_noise == pytest.approx(
        np.sqrt(np.mean(means.var(0) / sigma**2)), rel=1e-3
    )
    assert measured.values_per_batch == pytest.approx(512 * 4 / 6)
    assert (diagnosis.modes, diagnosis.passes, diagnosis.examples) == ({}, 1, 512)  # without labels
    for weight, value in zip(healthy.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_modes_are_the_losses_and_metrics_of_each_mode(healthy):
    healthy.evaluate(*DATA, verbose=0)
    metrics = [v.numpy() for v in healthy.metrics_variables]
    diagnosis = tfbn.diagnose(healthy, DATA, batch_size=100)
    for variable, value in zip(healthy.metrics_variables, metrics, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    loss, accuracy = healthy.evaluate(*DATA, verbose=0)
    assert diagnosis.modes["inference"] == pytest.approx(
        {"loss": loss, "accuracy": accuracy}, rel=1e-5
    )
    with tfbn.pause_statistics(healthy):
        losses = [
            float(
                healthy.compute_loss(
                    y=LABELS[i : i + 100], y_pred=healthy(IMAGES[i : i + 100], training=True)
                )
            )
            for i in range(0, 512, 100)
        ]
    expected = np.average(losses, weights=[100] * 5 + [12])
    assert diagnosis.modes["training"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_metrics_that_the_diagnosis_builds_hold_no_counts():
    model = compiled(network())
    tfbn.diagnose(model, DATA, steps=2, upstream="batch")
    assert model.metrics_variables
    for variable in model.metrics_variables:
        assert not np.any(variable.numpy()), variable.path


def test_labels_that_the_loss_cannot_take_are_named(healthy):
    words = np.array(["one", "two", "three", "four"])[LABELS]
    data = tf.data.Dataset.from_tensor_slices((IMAGES, words)).batch(32)
    with pytest.raises(ValueError, match=r"cannot be computed on these labels.*tf\.string"):
        tfbn.diagnose(healthy, data, steps=1, upstream="batch")
    assert not any("call" in vars(layer) for layer in healthy.layers)
    healthy.loss = None  # What needs no labels works with any.
    healthy.compiled = False
    assert tfbn.diagnose(healthy, data, steps=16, upstream="batch").modes == {}


def test_notebooks_show_markdown_and_one_is_singular(healthy):
    healthy.get_layer("n1").moving_variance.assign(-np.ones(16))
    diagnosis = tfbn.diagnose(healthy, IMAGES[:1], upstream="batch")
    assert diagnosis._repr_markdown_() == diagnosis.to_markdown()
    assert "1 example in 1 batch, 1 pass." in diagnosis.to_markdown()


def test_plot_writes_a_picture(healthy, tmp_path):
    tfbn.diagnose(healthy, IMAGES).plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_names_the_extra(healthy, tmp_path, monkeypatch):
    diagnosis = tfbn.diagnose(healthy, IMAGES, steps=1)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tfbn\[plots\]'"):
        diagnosis.plot(tmp_path / "diagnosis.png")


def test_verbose_prints_the_diagnosis(healthy, capsys):
    diagnosis = tfbn.diagnose(healthy, IMAGES, steps=2, verbose=True)
    assert str(diagnosis) in capsys.readouterr().out


def test_two_inputs_without_labels_are_no_labels():
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model(
        [a, b], layers.Dense(1)(layers.BatchNormalization()(layers.Concatenate()([a, b])))
    )
    model.compile("sgd", "mse")
    x = RNG.normal(size=(20, 2)).astype("float32")
    assert tfbn.diagnose(model, (x, x)).modes == {}


def test_diagnose_raises_where_recalibrate_raises(healthy):
    with pytest.raises(ValueError, match="no batch normalization layers"):
        tfbn.diagnose(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), IMAGES[:, 0, :2, 0])
    with pytest.raises(ValueError, match=r"`upstream` must be one of"):
        tfbn.diagnose(healthy, DATA, upstream="both")
    with pytest.raises(ValueError, match=r"only once.*an iterator"):
        tfbn.diagnose(healthy, iter([DATA]))
    assert not any("call" in vars(layer) for layer in healthy.layers)
