"""Losses by mode: on examples set aside, in units that no scale, constant or sign of the loss changes."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn._data.multi_pass import MultiPassReader
from tfbn._data.sources import spec_of
from tfbn._statistics.diagnose.experiments import Experiments
from tfbn._statistics.diagnose.held_out import MOST_BATCHES, SplitReader
from tfbn._statistics.diagnose.losses import Losses

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 4)).astype("float32")
Y = (X @ RNG.normal(size=(4, 1)) > 0).astype("int32")[:, 0]
DATA = (X, Y)


def model(loss=None, **options) -> keras.Model:
    keras.utils.set_random_seed(0)
    norm = layers.BatchNormalization(name="norm", momentum=0.5)
    net = keras.Sequential([keras.Input((4,)), norm, layers.Dense(2)])
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"], **options)
    net.fit(X, Y, batch_size=32, epochs=4, verbose=0)
    return net


def test_labels_may_be_an_argument_as_in_keras():
    net = model()
    one, two = tfbn.diagnose(net, X, Y, batch_size=32), tfbn.diagnose(net, DATA, batch_size=32)
    assert one.modes == two.modes
    assert one.modes["inference"]["loss"] > 0
    with pytest.raises(ValueError, match="`y` can be passed with arrays only"):
        tfbn.diagnose(net, tf.data.Dataset.from_tensor_slices(DATA).batch(32), Y)


def test_a_list_of_arrays_is_the_inputs_of_a_model():
    a, b = keras.Input((4,)), keras.Input((4,))
    y = layers.Dense(1)(layers.BatchNormalization()(a + b))
    net = keras.Model([a, b], y)
    net.compile(loss="mse")
    assert tfbn.diagnose(net, [X, X], Y).modes == tfbn.diagnose(net, ((X, X), Y)).modes


class OwnLoss(keras.Sequential):
    """Overrides `compute_loss` without a `training` argument, which Keras accepts."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_mean(tf.square(tf.cast(y, "float32")[:, None] - y_pred))


class SumAndDouble(keras.metrics.Metric):
    """A metric whose result is a dict, which Keras accepts."""

    def __init__(self):
        super().__init__(name="both")
        self.total = self.add_weight(name="total", initializer="zeros")

    def update_state(self, y, y_pred, sample_weight=None):
        self.total.assign_add(tf.reduce_sum(y_pred))

    def result(self):
        return {"sum": self.total + 0.0, "double": 2 * self.total}


def test_an_own_loss_need_not_take_the_mode():
    net = OwnLoss(model().layers)
    net.compile("adam")
    loss = tfbn.diagnose(net, X, Y, batch_size=96).modes["inference"]["loss"]
    outputs = net.predict(X[1::2], verbose=0)
    assert loss == pytest.approx(np.mean(np.square(Y[1::2, None] - outputs)), rel=1e-5)


def test_a_loss_with_a_value_for_each_example_is_averaged():
    net = model()
    mean = tfbn.diagnose(net, X, Y).modes
    each = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    net.compile("adam", each, metrics=["accuracy"])
    found = tfbn.diagnose(net, X, Y).modes
    for mode in mean:
        assert found[mode] == pytest.approx(mean[mode], rel=1e-5)


def test_a_metric_may_have_several_results():
    net = model()
    net.compile("adam", net.loss, metrics=[SumAndDouble()])
    modes = tfbn.diagnose(net, X, Y).modes
    for values in modes.values():
        assert set(values) == {"loss", "sum", "double"}
        assert values["double"] == pytest.approx(2 * values["sum"])


@pytest.mark.parametrize(
    ("compiled", "why"),
    [
        (False, "the model is not compiled"),
        (True, "compiled without a loss.*No loss to compute"),
    ],
)
def test_it_says_why_labels_were_not_used(compiled, why):
    net = keras.Sequential(model().layers)
    if compiled:
        net.compile("adam")
    diagnosis = tfbn.diagnose(net, X, Y)
    assert diagnosis.modes == {}
    for text in (str(diagnosis), diagnosis.to_markdown(), diagnosis.no_losses):
        assert re.search(why, text)
    assert tfbn.diagnose(net, X).no_losses == tfbn.diagnose(net, (X, None)).no_losses == ""


def test_labels_that_are_nan_leave_the_statistics_to_judge_by():
    net = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)])
    net.compile("sgd", "mse")
    x = 5 * X + 3
    net.fit(x, Y, batch_size=32, epochs=2, verbose=0)
    labels = Y.astype("float32")
    labels[20] = np.nan  # in a batch that is set aside
    (lag,) = tfbn.diagnose(net, x, labels, batch_size=16).findings
    assert (lag.kind, lag.cure) == ("lagging_statistics", "tfbn.recalibrate(model, data)")
    assert "look for that in the labels" in str(tfbn.diagnose(net, x, np.full(96, np.nan)))


def test_labels_that_are_out_of_range_are_explained():
    with pytest.raises(ValueError, match=r"cannot be computed on these labels.* label value of 2 "):
        tfbn.diagnose(model(), X, Y + 1)


# Batches set aside


def inputs(batch):
    return batch[0]


def read(batches: list[int], hold_out: bool = True) -> tuple[list[np.ndarray], SplitReader]:
    ends = np.cumsum(batches)[:-1]
    data = [(part,) for part in np.split(np.arange(sum(batches), dtype="float32"), ends)]
    split = SplitReader(MultiPassReader(lambda: iter(data), None, None, False), hold_out, inputs)
    passes = [[batch[0].numpy() for batch, _ in split.read(number)] for number in range(2)]
    for one, other in zip(*passes, strict=True):
        np.testing.assert_array_equal(one, other)  # every pass measures the same batches
    return passes[0], split


def aside(split: SplitReader) -> np.ndarray:
    return np.concatenate([batch[0].numpy() for batch, _ in split.aside])


@pytest.mark.parametrize("batches", [[8], [8, 8], [8, 3, 8, 8, 8, 1], [4] * 300])
def test_an_example_is_measured_or_set_aside_but_not_both(batches):
    measured, split = read(batches)
    kept = aside(split)
    assert len(kept)
    assert not set(kept) & set(np.concatenate(measured))
    assert len(np.concatenate(measured)) >= sum(batches) / 2
    if len(batches) < MOST_BATCHES:
        assert len(kept) + len(np.concatenate(measured)) == sum(batches)


def test_of_many_batches_some_are_set_aside_all_over_the_data():
    _, split = read([4] * 1000)
    assert MOST_BATCHES / 2 <= len(split.aside) <= MOST_BATCHES
    steps = np.diff([batch[0].numpy()[0] for batch, _ in split.aside])
    assert len(set(steps)) == 1
    assert aside(split)[-1] > 3500


def test_without_losses_everything_is_measured():
    measured, split = read([8, 8, 8], hold_out=False)
    assert len(np.concatenate(measured)) == 24
    assert len(aside(split)) == 8


def test_empty_batches_are_left_out():
    measured, split = read([8, 0, 8, 0])
    assert [len(part) for part in measured] == [8]
    assert len(aside(split)) == 8


def test_a_batch_that_cannot_be_split_is_left_whole():
    measured, split = read([3])
    np.testing.assert_array_equal(measured[0], aside(split))


@pytest.mark.parametrize(("bad", "finite"), [(None, True), (np.nan, False), (-np.inf, False)])
def test_values_that_are_not_finite_are_noticed(bad, finite):
    x = X.copy()
    if bad is not None:
        x[50, 2] = bad
    split = SplitReader(MultiPassReader((x, Y), None, 16, False), True, inputs)
    list(split.read(0))
    assert split.is_finite == finite


# Modes


def test_modes_are_the_losses_and_metrics_on_the_batches_set_aside():
    net = model()
    net.evaluate(X, Y, verbose=0)
    counts = [v.numpy() for v in net.metrics_variables]
    diagnosis = tfbn.diagnose(net, DATA, batch_size=16)
    for variable, value in zip(net.metrics_variables, counts, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    held = np.r_[16:32, 80:96]
    rest = np.setdiff1d(np.arange(96), held)
    loss, accuracy = net.evaluate(X[held], Y[held], verbose=0)
    assert diagnosis.modes["inference"] == pytest.approx(
        {"loss": loss, "accuracy": accuracy}, rel=1e-5
    )
    with tfbn.pause_statistics(net):
        losses = [
            float(net.compute_loss(y=Y[i : i + 16], y_pred=net(X[i : i + 16], training=True)))
            for i in (16, 80)
        ]
    assert diagnosis.modes["training"]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    tfbn.recalibrate(net, X[rest])
    loss = net.evaluate(X[held], Y[held], verbose=0)[0]
    assert diagnosis.modes["recalibrated"]["loss"] == pytest.approx(loss, rel=1e-4)


class Shifted(keras.losses.Loss):
    """Cross-entropy, times a factor, plus a constant."""

    def __init__(self, factor: float, constant: float):
        super().__init__()
        self.factor, self.constant = factor, constant

    def call(self, y_true, y_pred):
        loss = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        return self.factor * loss + self.constant


@pytest.mark.parametrize(("factor", "constant"), [(1, -50), (100, 0), (0.01, 3)])
def test_gains_depend_on_no_scale_and_no_constant(factor, constant):
    def gains(loss) -> list[float]:
        net = model()
        net.compile("sgd", loss)
        batch = tf.constant(X), tf.constant(Y)
        losses = Losses(net, [(batch, spec_of(batch))])
        net.get_layer("norm").moving_mean.assign(np.full(4, 0.5))
        losses.add("inference", lambda batch: net(batch[0], training=False))
        losses.add("recalibrated", lambda batch: net(batch[0] + 0.5, training=False))
        return [losses.gain("recalibrated", over="inference"), losses.skill("inference")]

    plain = gains(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert plain[0] > 0.01
    assert gains(Shifted(factor, constant)) == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("batches", [2, 4])
@pytest.mark.parametrize(
    ("worse", "better", "expected"),
    [
        (np.inf, 1.0, True),
        (np.nan, 1.0, True),
        (2.0, 1.0, True),
        (1.0, np.inf, False),
        (np.nan, np.nan, False),
        (1.0, 1.0, False),
    ],
)
def test_a_finite_loss_is_better_than_one_that_is_not(worse, better, expected, batches):
    net = model()
    data = [((tf.constant(X[:8]), tf.constant(Y[:8])), None)] * batches
    losses = Losses(net, data)
    losses._by_batch = {"one": np.ones(batches), "other": np.ones(batches)}
    losses._by_batch["one"][0] = better
    losses._by_batch["other"][0] = worse
    losses._by_batch["other"][1:] += worse > better
    assert losses.is_better("one", over="other") == expected


def test_labels_are_classes_only_if_each_example_has_one():
    def labels(*batches):
        pairs = [((tf.zeros([len(y), 4]), tf.constant(y)), None) for y in batches]
        return Experiments(model(), [], None, pairs)._labels()

    np.testing.assert_array_equal(labels([0, 1, 1, 0], [1, 0]), [0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(labels(np.eye(2)[[0, 1, 1, 0]]), [0, 1, 1, 0])
    assert labels([[0.3, 2.0, 1.0]] * 4) is None  # regression
    assert labels(np.ones((4, 5, 3)), np.ones((4, 7, 3))) is None  # a label for each step


def test_the_values_of_a_batch_do_not_depend_on_labels():
    net = model()
    with_labels, without = (tfbn.diagnose(net, data, batch_size=16) for data in (DATA, X))
    assert with_labels.layers[0].values_per_batch == without.layers[0].values_per_batch == 16


def test_nan_labels_are_not_taken_for_nan_data():
    split = SplitReader(MultiPassReader((X, np.full(96, np.nan)), None, 16, False), True, inputs)
    list(split.read(0))
    assert split.is_finite


def test_metrics_that_the_diagnosis_builds_hold_no_counts():
    net = model()
    net.compile("sgd", "mse", metrics=["mae"])
    tfbn.diagnose(net, (X, X[:, :2]), steps=2)
    assert net.metrics_variables
    for variable in net.metrics_variables:
        assert not np.any(variable.numpy()), variable.path


def test_labels_that_the_loss_cannot_take_are_named():
    net = model()
    data = tf.data.Dataset.from_tensor_slices((X, np.array(["no", "yes"])[Y])).batch(32)
    with pytest.raises(ValueError, match=r"cannot be computed on these labels.*tf\.string"):
        tfbn.diagnose(net, data)
    assert not any("call" in vars(layer) for layer in net.layers)
    net.compiled = False
    assert tfbn.diagnose(net, data).modes == {}


def test_two_inputs_without_labels_are_no_labels():
    a, b = keras.Input((2,)), keras.Input((2,))
    net = keras.Model(
        [a, b], layers.Dense(1)(layers.BatchNormalization()(layers.Concatenate()([a, b])))
    )
    net.compile("sgd", "mse")
    assert tfbn.diagnose(net, (X[:, :2], X[:, 2:])).modes == {}
