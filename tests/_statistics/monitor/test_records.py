"""What a monitor records: the batch's statistics, recovered from the moving ones; the oracle computes them in NumPy."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn

BATCH, BATCHES, CHANNELS = 16, 6, 3
_random = np.random.default_rng(0)
X = (_random.normal(size=(BATCH * BATCHES, CHANNELS)) * [0.5, 2, 5] + [3, -1, 0.1]).astype(
    "float32"
)
Y = X[:, :1]
KINDS = {"keras": layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}


def network(norm) -> keras.Model:
    return keras.Sequential([keras.Input((CHANNELS,)), norm, layers.Dense(1)])


def train(model, monitor, loop="fit", epochs=1, data=(X, Y), **options):
    if loop == "fit":
        model.compile("sgd", "mse", **{"run_eagerly": True, **options})  # Sooner than to trace.
        return model.fit(
            *data, BATCH, epochs, shuffle=False, verbose=0, callbacks=[monitor]
        ).history
    trainer = tfbn.TrainingLoop(model, "sgd", "mse", **options)
    options = {"epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": [monitor]}
    return trainer.fit(data, batch_size=BATCH, **options).history


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(groups, momentum=0.99, epsilon=1e-3) -> list[tuple[float, float]]:
    """Distance and ratio at each update, where these are the mean and variance of each update's batch."""
    mean, variance = np.zeros(CHANNELS), np.ones(CHANNELS)
    found = []
    for number, (batch_mean, batch_variance) in enumerate(groups):
        shift = (mean - batch_mean) / np.sqrt(batch_variance + epsilon)
        ratio = (variance + epsilon) / (batch_variance + epsilon)
        found.append((np.sqrt(np.mean(shift**2)), np.exp(np.mean(np.log(ratio)))))
        kept = number / (number + 1) if momentum is None else momentum
        mean = kept * mean + (1 - kept) * batch_mean
        variance = kept * variance + (1 - kept) * batch_variance
    return found


def moments(x, size=BATCH) -> list[tuple[np.ndarray, np.ndarray]]:
    parts = x.astype("float64").reshape(-1, size, CHANNELS)
    return [(part.mean(0), part.var(0)) for part in parts]


def check(found, oracle, rtol=1e-3):
    values = [
        (line["layers"][0]["mean_shift"], line["layers"][0]["variance_ratio"]) for line in found
    ]
    np.testing.assert_allclose(values, oracle, rtol=rtol)


@pytest.fixture
def monitor(tmp_path):
    return tfbn.StatisticsMonitor(1, path=tmp_path / "records.jsonl")


@pytest.fixture(autouse=True)
def _short_trainings_lag(monkeypatch):
    """These trainings are too short for their momentum, and say so; that is tested elsewhere."""
    monkeypatch.setattr(tfbn.StatisticsMonitor, "_warn", lambda self: None)


@pytest.mark.parametrize("loop", ["fit", "TrainingLoop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_the_distance_of_the_batch_from_the_moving_statistics(
    kind, loop, monitor, tmp_path
):
    history = train(network(KINDS[kind]()), monitor, loop)
    found = lines(tmp_path / "records.jsonl")
    assert [line["step"] for line in found] == list(range(BATCHES))
    oracle = expected(moments(X))
    check(found, oracle)
    assert history["bn_mean_shift"] == pytest.approx([oracle[-1][0]], rel=1e-3)
    assert history["bn_variance_ratio"] == pytest.approx([oracle[-1][1]], rel=1e-3)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": False}])
def test_the_same_in_a_graph_and_under_xla(options, monitor, tmp_path):
    train(network(tfbn.BatchNormalization()), monitor, **{"run_eagerly": False, **options})
    check(lines(tmp_path / "records.jsonl"), expected(moments(X)))


def test_the_same_with_a_cumulative_average(monitor, tmp_path):
    train(network(tfbn.BatchNormalization(momentum=None)), monitor)
    check(lines(tmp_path / "records.jsonl"), expected(moments(X), momentum=None))


def test_with_renorm_the_variance_is_that_of_the_averaged_deviation(monitor, tmp_path):
    layer = tfbn.BatchNormalization(renorm=True)
    train(network(layer), monitor)
    (first, *_) = lines(tmp_path / "records.jsonl")
    (mean, variance), *_ = moments(X)
    # Keras begins with a standard deviation of 1, so with a variance of 1 - epsilon.
    ratio = np.exp(np.mean(np.log(1 / (variance + layer.epsilon))))
    assert first["layers"][0]["variance_ratio"] == pytest.approx(ratio, rel=1e-3)
    shift = np.sqrt(np.mean(mean**2 / (variance + layer.epsilon)))
    assert first["layers"][0]["mean_shift"] == pytest.approx(shift, rel=1e-3)


def test_with_accumulation_a_record_is_about_an_update(monitor, tmp_path):
    train(network(tfbn.BatchNormalization()), monitor, "TrainingLoop", accumulation_steps=2)
    found = lines(tmp_path / "records.jsonl")
    assert [line["step"] for line in found] == [0, 2, 4]
    check(found, expected(moments(X, 2 * BATCH)))
    assert all(line["layers"][0]["refused_updates"] == 0 for line in found)


def test_with_accumulation_keras_layers_update_with_every_batch(monitor, tmp_path):
    train(network(layers.BatchNormalization()), monitor, "TrainingLoop", accumulation_steps=2)
    (first, *_) = lines(tmp_path / "records.jsonl")
    k, (one, other, *_) = 0.99, moments(X)
    mean, variance = ((k * a + b) / (k + 1) for a, b in zip(one, other, strict=True))
    check([first], expected([(mean, variance)]))


def test_with_several_steps_per_execution_a_record_is_about_their_weighted_average(
    monitor, tmp_path
):
    train(network(layers.BatchNormalization()), monitor, run_eagerly=False, steps_per_execution=4)
    found = lines(tmp_path / "records.jsonl")
    assert [line["step"] for line in found] == [0, 4]
    weights = 0.99 ** np.arange(4)[::-1]
    parts = moments(X)[:4]
    mean, variance = (np.average([part[i] for part in parts], 0, weights) for i in range(2))
    check(found[:1], expected([(mean, variance)]))


def test_in_mixed_precision_the_statistics_are_float32(monitor, tmp_path):
    norm = tfbn.BatchNormalization(dtype="mixed_bfloat16")
    train(network(norm), monitor)
    rounded = tf.cast(X, tf.bfloat16).numpy().astype("float64")
    check(lines(tmp_path / "records.jsonl"), expected(moments(rounded)), rtol=2e-3)


def test_a_momentum_too_close_to_1_for_its_precision_gives_no_distance(monitor, tmp_path):
    train(network(layers.BatchNormalization(momentum=0.999999)), monitor)
    (first, *_) = lines(tmp_path / "records.jsonl")
    assert first["layers"][0]["mean_shift"] is None


def test_a_refused_update_is_counted_and_a_frozen_layer_is_not(tmp_path):
    x = X.copy()
    x[BATCH] = np.nan
    model = keras.Sequential(
        [
            keras.Input((CHANNELS,)),
            tfbn.BatchNormalization(name="learns"),
            tfbn.BatchNormalization(name="frozen", trainable=False),
        ]
    )
    path = tmp_path / "records.jsonl"
    train(model, tfbn.StatisticsMonitor(1, path=path), data=(x, x))
    found = lines(path)
    learns, frozen = ([line["layers"][i] for line in found] for i in range(2))
    assert [r["state"] for r in learns] == ["learns", "refused", *["learns"] * 4]
    assert [r["refused_updates"] for r in learns] == [0, 1, 1, 1, 1, 1]
    assert {r["state"] for r in frozen} == {"frozen"}
    assert {r["refused_updates"] for r in frozen} == {0}


def test_it_records_gamma_and_beta_and_what_is_left_to_catch_up(monitor):
    layer = layers.BatchNormalization(momentum=0.9)
    model = network(layer)
    layer.gamma.assign([1.0, 3.0, 0.0])
    layer.beta.assign([9.0, 0.0, 0.0])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(X, Y, BATCH, verbose=0, callbacks=[monitor])
    (record,) = monitor.layers
    assert isinstance(record, tfbn.LayerRecord)
    assert record.gamma_mean == pytest.approx(4 / 3)
    assert record.gamma_spread == pytest.approx(np.std([1, 3, 0]))
    assert record.beta_spread == pytest.approx(np.std([9, 0, 0]))
    assert (record.saturated_channels, record.dead_channels) == (1, 1)
    assert record.initial_weight == pytest.approx(0.9**BATCHES)
    assert record.steps_to_catch_up == math.ceil(math.log(0.01) / math.log(0.9)) - BATCHES


def test_records_come_often_at_first_and_then_at_the_interval(tmp_path):
    path = tmp_path / "records.jsonl"
    train(network(tfbn.BatchNormalization()), tfbn.StatisticsMonitor(10, path=path), epochs=5)
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 4, 8, 10, 17, 20, 29]


def test_it_traces_nothing_again():
    class Counting(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.traces = tfbn.BatchNormalization(), 0

        def call(self, x, training=None):
            self.traces += 1
            return self.norm(x, training=training)

    def traces(callbacks) -> int:
        model = Counting()
        model.compile("sgd", "mse")
        model.fit(X, X, BATCH, 2, verbose=0, callbacks=callbacks)
        return model.traces

    assert traces([tfbn.StatisticsMonitor(1)]) == traces([])


def test_tensorboard_gets_a_scalar_for_each_number_and_a_picture(tmp_path):
    monitor = tfbn.StatisticsMonitor(2, log_dir=tmp_path)
    train(network(tfbn.BatchNormalization(name="norm")), monitor, epochs=2)
    values = [value for event in events(tmp_path) for value in event.summary.value]
    (record,) = monitor.layers
    # Without the name of the model, which Keras makes up: two runs share a chart.
    shifts = [value.simple_value for value in values if value.tag == "bn_mean_shift/norm"]
    assert shifts[-1] == pytest.approx(record.mean_shift)
    assert "bn_refused_updates/norm" in {value.tag for value in values}
    pictures = [value for value in values if value.tag == "batch normalization"]
    assert len(pictures) == 2  # one for each epoch
    picture = tf.io.decode_png(pictures[-1].tensor.string_val[2])
    assert picture.shape[-1] == 3


def events(folder):
    for path in folder.glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            yield tf.compat.v1.Event.FromString(record.numpy())


def test_a_model_without_batch_normalization_trains_as_ever():
    model = keras.Sequential([keras.Input((CHANNELS,)), layers.Dense(1)])
    history = train(model, tfbn.StatisticsMonitor())
    assert "bn_mean_shift" not in history


@pytest.mark.parametrize("interval", [0, 1.5])
def test_the_interval_must_be_a_count(interval):
    with pytest.raises(ValueError, match="`interval` must be an integer of at least 1"):
        tfbn.StatisticsMonitor(interval)
