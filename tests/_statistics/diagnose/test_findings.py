"""Broken trainings get the right finding first, and a cure that works; healthy ones get none."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import tfbn
from broken_trainings import CASES, Lab, apply_cure, loss_on
from tfbn._statistics.diagnose import causes
from tfbn._statistics.diagnose.finding import SEVERITIES

RNG = np.random.default_rng(0)

# `python -m benchmarks.diagnosis` runs all cases. These are the ones that were misjudged once, and that
# no other test shows.
QUICK = (
    "healthy_on_16_images",
    "healthy_on_two_classes",
    "augmenting_layers",
    "momentum_0999",
    "preprocessing_forgotten",
    "other_data_soon_after_recalibration",
    "surgery",
    "loop_without_training_true",
    "call_that_says_training_false",
    "call_that_takes_no_training",
    "training_true_at_test_time",
    "one_batch_with_a_nan",
    "overflow_in_half_precision",
    "sorted_classes",
    "dropout_before_normalization",
    "frozen_base_on_another_domain",
    "frozen_by_mistake",
    "another_epsilon_at_load",
    "masks_ignored",
    "inputs_with_rare_large_values",
    "labels_in_another_order",
)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab("small", "keras", seed=0)


def kinds(diagnosis) -> list[str]:
    return [finding.kind for finding in diagnosis.findings]


def check_complete(diagnosis) -> None:
    """Every finding says what it has to, everywhere."""
    for finding in diagnosis.findings:
        assert finding.severity in SEVERITIES
        assert finding.explanation
        assert "{" not in finding.explanation + finding.advice
        assert finding.cure or finding.advice or finding.experiment
        assert finding.kind in str(diagnosis)
        assert finding.kind in diagnosis.to_markdown()
    json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))


@pytest.mark.parametrize("name", QUICK)
def test_the_first_finding_is_the_right_one_and_its_cure_works(lab, name):
    case = CASES[name]
    trained = case.train(lab)
    before = [v.numpy() for v in trained.model.variables]
    diagnosis = tfbn.diagnose(trained.model, trained.data, **trained.options)
    for variable, value in zip(trained.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    check_complete(diagnosis)
    if not case.expected:
        assert not diagnosis, str(diagnosis)
        return
    assert kinds(diagnosis)[0] in case.expected, str(diagnosis)
    finding = diagnosis.findings[0]
    assert case.cured == bool(finding.cure), str(diagnosis)
    if case.cured:
        loss = loss_on(trained.model, trained.test)["loss"]
        apply_cure(trained, finding.cure)
        assert loss_on(trained.model, trained.test)["loss"] < loss or np.isnan(loss)


def test_after_the_cure_there_is_no_finding(lab):
    model = lab.lagging()
    (finding,) = tfbn.diagnose(model, lab.train).findings
    assert (
        finding.kind == "lagging_statistics"
    )  # told by the statistics alone: no steps were counted
    assert finding.evidence["initial_weight"] == pytest.approx(0.999**360, abs=0.02)
    tfbn.recalibrate(model, lab.train)
    assert not tfbn.diagnose(model, lab.train)


def test_one_percent_of_the_initial_variance_is_much_where_the_true_one_is_small():
    """As in the depthwise convolutions of MobileNetV2. Only layers of small inputs show it."""
    image = keras.Input((6,))
    x = layers.BatchNormalization(name="large")(image)
    scales = (0.05, 0.02, 0.1)
    for number, scale in enumerate(scales):
        x = layers.BatchNormalization(name=f"small{number}")(layers.Rescaling(scale)(x))
    model = keras.Model(image, x)
    data = RNG.normal(1, 1, size=(512, 6)).astype("float32")
    tfbn.recalibrate(model, data)

    def pull_variances(weights: tuple[float, ...]) -> None:
        for layer, weight in zip(model.layers[1::2], weights, strict=True):
            layer.moving_variance.assign(weight + (1 - weight) * layer.moving_variance)

    right = model.get_weights()
    pull_variances((0.011,) * 4)
    (finding,) = tfbn.diagnose(model, data).findings
    assert finding.kind == "lagging_statistics"
    assert finding.layers == ("small0", "small1", "small2")
    assert finding.evidence["initial_weight"] == pytest.approx(0.011, rel=0.15)
    assert "1.1%" in finding.explanation
    model.set_weights(right)
    pull_variances((0, 0.011, 0.002, 0.02))  # No number of steps leaves different weights.
    assert "lagging_statistics" not in kinds(tfbn.diagnose(model, data))


def test_a_model_that_was_never_trained_was_not_trained_in_inference_mode():
    for seed in range(4):
        keras.utils.set_random_seed(seed)
        lab = Lab("small", "keras", seed)
        (finding,) = tfbn.diagnose(lab.compile(lab.build()), lab.train).findings
        assert finding.kind == "never_updated"
        assert finding.cure or "No cure is printed" in finding.explanation


def test_steps_of_a_new_optimizer_do_not_prove_that_statistics_lag(lab):
    """Other data looks the same then, so the finding says how to tell them apart."""
    model = lab.healthy()
    model = lab.fit(model, epochs=0.1)
    noisy = lab.train[0] + RNG.normal(0, 0.4, lab.train[0].shape).astype("float32")
    (finding,) = tfbn.diagnose(model, noisy, lab.train[1]).findings
    assert finding.kind == "lagging_statistics"
    assert "training data" in finding.experiment


def test_batches_count_if_their_gradients_are_accumulated(lab):
    model = lab.build()
    model.compile(keras.optimizers.SGD(0.0, gradient_accumulation_steps=4), model.loss or "mse")
    model.fit(lab.train[0], np.zeros((len(lab.train[0]), 10)), batch_size=64, verbose=0)
    finding = tfbn.diagnose(model, lab.train[0]).findings[0]
    assert finding.kind == "lagging_statistics"
    assert finding.evidence["initial_weight"] == pytest.approx(0.95**20, abs=0.05)


def test_a_momentum_of_one_is_why_nothing_was_updated():
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(momentum=1.0)])
    (finding,) = tfbn.diagnose(model, RNG.normal(3, 2, (64, 6)).astype("float32")).findings
    assert finding.kind == "never_updated"
    assert "momentum=1" in finding.explanation
    assert "training=True" not in finding.advice


def test_the_cure_includes_the_frozen_layers_that_it_was_tried_with(lab):
    model = lab.healthy()
    first, *rest = lab.norms(model)
    first.trainable = False
    first.moving_mean.assign(first.moving_mean + 1e30 * np.inf)
    for layer in rest:
        layer.trainable = False
    (finding,) = tfbn.diagnose(model, lab.train[0]).findings
    assert finding.kind == "not_finite_statistics"
    exec(finding.cure, {"tfbn": tfbn, "model": model, "data": lab.train[0]})
    assert "not_finite_statistics" not in kinds(tfbn.diagnose(model, lab.train[0]))


def test_labels_are_not_asked_for_if_they_were_passed(lab):
    model = lab.healthy()
    for layer in lab.norms(model):
        layer.trainable = False
    others = RNG.normal(5, 3, lab.train[0].shape).astype("float32")
    for data in ((others, lab.train[1]), others):
        finding = next(f for f in tfbn.diagnose(model, data).findings if "frozen" in f.kind)
        assert ("Pass labels" in finding.experiment) == (data is others)


def test_one_example_has_no_variance_to_compare(lab):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)])
    diagnosis = tfbn.diagnose(model, np.ones((1, 4), "float32"))
    assert not diagnosis.findings
    assert diagnosis.layers[0].examples == 0


def test_every_cause_but_the_ambiguous_ones_has_a_case():
    found = {kind for case in CASES.values() for kind in case.expected}
    elsewhere = {"shared_domains", "dead_gammas", "replicas_diverged", "loss_gap"}
    assert {cause.kind for cause in causes.CAUSES} == found | elsewhere


# What the small network of the cases cannot show


def test_a_cure_that_needs_include_frozen_says_so(lab):
    trained = CASES["frozen_by_mistake"].train(lab)
    (finding,) = tfbn.diagnose(trained.model, trained.data, upstream="batch").findings
    assert finding.cure == "tfbn.recalibrate(model, data, upstream='batch', include_frozen=True)"


def test_advice_about_dead_units_depends_on_what_is_before_them(lab):
    texts = {}
    for name in ("dead_units", "dead_first_convolution"):
        trained = CASES[name].train(lab)
        texts[name] = tfbn.diagnose(trained.model, trained.data).findings[0].advice
    assert "LeakyReLU" in texts["dead_units"]
    assert "LeakyReLU" not in texts["dead_first_convolution"]


def test_the_cure_repeats_the_arguments_of_the_diagnosis(lab):
    def forward(model, batch):
        return model(batch[0], training=False)

    (finding,) = tfbn.diagnose(lab.lagging(), lab.train, upstream="batch", forward=forward).findings
    assert finding.cure == "tfbn.recalibrate(model, data, upstream='batch', forward=forward)"


def test_a_shared_layer_that_sees_two_domains():
    first, second = keras.Input((3,), name="first"), keras.Input((3,), name="second")
    shared = layers.BatchNormalization(name="shared", momentum=0.5)
    outputs = layers.Dense(1)(layers.Add()([shared(first), shared(second)]))
    model = keras.Model([first, second], outputs)
    x = RNG.normal(size=(64, 3)).astype("float32")
    data = ((x, 5 + 2 * x),)
    for _ in range(20):
        model(data[0], training=True)
    diagnosis = tfbn.diagnose(model, data)
    check_complete(diagnosis)
    assert kinds(diagnosis) == ["shared_domains"]
    assert diagnosis.findings[0].layers == ("shared",)
    assert diagnosis.findings[0].evidence["calls_apart"] == pytest.approx(2.5, rel=0.2)
    near = ((x, x[::-1] * 1.1),)
    tfbn.recalibrate(model, near)
    assert not tfbn.diagnose(model, near)


def test_dead_gammas_are_noted(lab):
    model = lab.healthy()
    gamma = lab.norms(model)[1].gamma
    gamma.assign(np.where(np.arange(32) < 3, 0, gamma.numpy()))
    diagnosis = tfbn.diagnose(model, lab.train, steps=4)
    check_complete(diagnosis)
    (finding,) = (one for one in diagnosis.findings if one.kind == "dead_gammas")
    assert (finding.severity, finding.evidence) == ("note", {"channels": 3})


def test_negative_variances_are_counted(lab):
    model = lab.healthy()
    variance = lab.norms(model)[2].moving_variance
    variance.assign(-variance.numpy())
    (finding,) = tfbn.diagnose(model, lab.train[0], steps=4).findings
    assert (finding.kind, finding.evidence) == ("negative_variance", {"values": 64})
    assert finding.layers == ("n2",)


@pytest.mark.parametrize("example", [7, 40])  # It is measured, or set aside for the losses.
def test_data_that_is_not_finite_is_a_finding(lab, example):
    images = lab.train[0][:64].copy()
    images[example] = np.inf
    diagnosis = tfbn.diagnose(lab.healthy(), (images, lab.train[1][:64]))
    check_complete(diagnosis)
    (finding,) = diagnosis.findings
    assert finding.kind == "not_finite_inputs"
    assert "'n0'" in finding.explanation
    assert "The data does, too." in finding.explanation
    assert diagnosis.modes == {}


def test_a_model_that_preprocesses_in_predict_alone_is_refused_by_name(lab):
    class Task(keras.Model):
        """As KerasHub's tasks do."""

        preprocessor = layers.Rescaling(1 / 255)

        def predict(self, x, **options):
            return super().predict(self.preprocessor(x), **options)

    model = lab.healthy()
    task = Task(model.inputs, model.outputs, name="task")
    with pytest.raises(ValueError, match="preprocess"):
        tfbn.diagnose(task, lab.train)
    data = (task.preprocessor(255 * lab.train[0]), lab.train[1])
    assert not tfbn.diagnose(
        task, data, forward=lambda model, batch: model(batch[0], training=False), steps=16
    )


def test_diagnose_raises_where_recalibrate_raises(lab):
    with pytest.raises(ValueError, match="no batch normalization layers"):
        tfbn.diagnose(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"`upstream` must be one of"):
        tfbn.diagnose(lab.healthy(), lab.train, upstream="both")


def test_data_that_can_be_read_once_is_enough(lab):
    model = lab.healthy()
    once, again = (tfbn.diagnose(model, data) for data in (iter([lab.train]), lambda: [lab.train]))
    assert once.findings == again.findings
    assert once.modes == again.modes


@pytest.mark.parametrize(
    ("kind", "mean", "variance"),
    [
        ("rescaled_inputs", lambda mu: mu / 1.5, lambda var: var / 1.5**2),
        ("empty_batches", lambda mu: 0.8 * mu, lambda var: 0.8 * var),
        ("lagging_statistics", lambda mu: 0.8 * mu, lambda var: 0.2 + 0.8 * var),
    ],
)
@pytest.mark.parametrize("center", [1, 10, 100])
def test_large_means_do_not_hide_what_pulls_them_to_zero(kind, mean, variance, center):
    x = RNG.normal(center, np.linspace(0.2, 1.2, 6), (64, 6))
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((6,)), norm])
    norm.moving_mean.assign(mean(x.mean(0)))
    norm.moving_variance.assign(variance(x.var(0)))
    assert kinds(tfbn.diagnose(model, x.astype("float32"), verbose=0)) == [kind]
