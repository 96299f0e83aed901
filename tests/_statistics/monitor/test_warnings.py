"""A monitor warns of trainings that are broken on purpose, once and with the cure, and of no healthy one."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import tfbn

KINDS = {"keras": layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}
_random = np.random.default_rng(0)
X = (_random.normal(size=(64, 8)) * 2 + 3).astype("float32")
Y = X[:, :1] - X[:, 1:2]


def network(norm, first=()) -> keras.Model:
    keras.utils.set_random_seed(0)
    parts = [*first, layers.Dense(6, use_bias=False), norm, layers.ReLU(), layers.Dense(1)]
    return keras.Sequential([keras.Input((8,)), *parts])


def warned(model, epochs=10, x=X, monitor=None, loop="fit") -> list[str]:
    """The warnings of a training of 4 steps an epoch, each on one line: names move where lines break."""
    monitor = monitor or tfbn.StatisticsMonitor(20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if loop == "fit":
            model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
            model.fit(x, Y, 16, epochs, verbose=0, callbacks=[monitor])
        else:
            trainer = tfbn.TrainingLoop(model, keras.optimizers.SGD(1e-3), "mse")
            trainer.fit((x, Y), batch_size=16, epochs=epochs, verbose=0, callbacks=[monitor])
    texts = [" ".join(str(warning.message).split()) for warning in caught]
    texts = [text for text in texts if text.startswith(("error: ", "warning: "))]
    kinds = [text.split(" (")[0].split(": ")[1] for text in texts]
    assert kinds == [finding.kind for finding in monitor.findings]
    return texts


class Fixed(keras.Model):
    """Calls its layer in inference mode, whatever it is asked for."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.out = norm, layers.Dense(1)

    def call(self, x, training=None):
        return self.out(self.norm(x, training=False))


# Each of them broken


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_stand_still_because_training_is_not_passed_on(kind):
    (text,) = warned(Fixed(KINDS[kind]()))
    assert text.startswith("error: training_not_passed_on (fixed")
    assert "does not pass `training` on" in text
    assert "cure: tfbn.recalibrate(model, data)" in text
    assert "self.bn(x, training=training)" in text


def test_a_model_that_cannot_be_traced_in_training_gets_the_finding_that_needs_no_trace(
    monkeypatch,
):
    def refuse(model, batch, training=False):
        if training:
            raise RuntimeError("not now")
        return model(batch[0], training=False)

    monkeypatch.setattr("tfbn._statistics.diagnose.structure.run_model", refuse)
    (text,) = warned(Fixed(tfbn.BatchNormalization()))
    assert text.startswith("error: never_updated (fixed")


def test_the_same_in_a_model_whose_call_takes_no_training():
    class Deaf(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.out = tfbn.BatchNormalization(), layers.Dense(1)

        def call(self, x):
            return self.out(self.norm(x))

    (text,) = warned(Deaf())
    assert text.startswith("error: training_not_passed_on (deaf")


def test_statistics_that_stand_still_because_every_batch_is_refused():
    x = np.full_like(X, np.nan)
    (text,) = warned(network(tfbn.BatchNormalization(momentum=0.9)), x=x)
    assert text.startswith("error: never_updated (")
    assert "each batch was empty, masked or not finite" in text


def test_statistics_that_stood_still_at_values_from_before():
    model = Fixed(tfbn.BatchNormalization())
    model(X)
    model.norm.moving_mean.assign(np.full(8, 2.0))
    (text,) = warned(model)
    assert text.startswith("warning: statistics_stand_still (")
    assert "tfbn.freeze(model)" in text


def test_a_layer_that_the_model_does_not_call_is_no_finding():
    class Spare(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.spare = tfbn.BatchNormalization(momentum=0.9), tfbn.BatchNormalization()
            self.out = layers.Dense(1)
            self.spare.build((None, 8))

        def call(self, x, training=None):
            return self.out(self.norm(x, training=training))

    assert warned(Spare()) == []


@pytest.mark.parametrize("loop", ["fit", "TrainingLoop"])
def test_a_momentum_too_slow_for_the_length_of_the_training(loop):
    monitor = tfbn.StatisticsMonitor(20)
    (text,) = warned(network(tfbn.BatchNormalization(momentum=0.999)), monitor=monitor, loop=loop)
    assert text.startswith("warning: lagging_statistics (")
    assert "96% of them will still be the initial values when this training ends." in text
    assert "40 training steps are too few for a momentum of 0.999." in text
    assert "cure: tfbn.recalibrate(model, data)" in text
    (finding,) = monitor.findings
    assert finding.evidence["old_weight"] == pytest.approx(0.999**40)


def test_the_same_momentum_is_no_finding_where_the_statistics_are_right_already():
    model = network(tfbn.BatchNormalization(momentum=0.999))
    tfbn.recalibrate(model, X)
    model.layers[0].trainable = False  # What reaches the layer stays what it was.
    assert warned(model) == []


def test_a_short_training_lags_too():
    (text,) = warned(network(tfbn.BatchNormalization()), epochs=1)
    assert "lagging_statistics" in text


def test_one_percent_of_the_initial_variance_is_much_beside_a_small_one():
    layer = tfbn.BatchNormalization(momentum=0.9)
    (text,) = warned(network(layer, first=(layers.Rescaling(0.02),)))
    assert text.startswith("warning: lagging_statistics (")
    assert "1.5% of them will still be the initial values" in text
    assert warned(network(tfbn.BatchNormalization(momentum=0.9))) == []


def test_a_few_dead_channels_are_counted_without_a_warning():
    x = X.copy()
    x[:, 3:5] = 7.0
    norm = layers.BatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((8,)), norm, layers.Dense(1)])
    monitor = tfbn.StatisticsMonitor(20)
    assert warned(model, 20, x, monitor) == []
    assert monitor.layers[0].dead_channels == 2


def test_a_layer_that_is_fed_a_constant():
    dead = layers.Dense(4, "relu", bias_initializer=keras.initializers.Constant(-1e4))
    model = keras.Sequential(
        [keras.Input((8,)), dead, tfbn.BatchNormalization(momentum=0.9), layers.Dense(1)]
    )
    (text,) = warned(model, epochs=20)
    assert text.startswith("error: constant_channels (sequential")
    assert "the ReLU units before it are dead" in text
    assert "LeakyReLU" in text


def test_some_channels_that_are_fed_a_constant():
    x = X.copy()
    x[:, 3:6] = 7.0
    norm = layers.BatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((8,)), norm, layers.Dense(1)])
    monitor = tfbn.StatisticsMonitor(20)
    (text,) = warned(model, 20, x, monitor)
    assert text.startswith("warning: constant_channels (")
    assert monitor.findings[0].evidence == {"channels": 3}
    assert monitor.layers[0].dead_channels == 3


def test_batches_of_a_single_value_are_not_constant_but_too_small():
    model = network(tfbn.BatchNormalization(momentum=0.9))
    model.compile("adam", "mse", run_eagerly=True)
    monitor = tfbn.StatisticsMonitor(20)
    with pytest.warns(UserWarning, match="small_batches"):
        model.fit(X, Y, 1, 1, verbose=0, callbacks=[monitor])
    assert [finding.kind for finding in monitor.findings] == ["small_batches"]


def test_a_layer_behind_normalized_single_values_is_not_blamed():
    """Its input is beta of the layer before: larger batches cure both."""
    first = [layers.BatchNormalization(momentum=0.9)]
    model = network(layers.BatchNormalization(momentum=0.9), first)
    model.compile("adam", "mse", run_eagerly=True)
    monitor = tfbn.StatisticsMonitor(20)
    with pytest.warns(UserWarning, match="small_batches"):
        model.fit(X, Y, 1, 1, verbose=0, callbacks=[monitor])
    assert "constant_channels" not in {finding.kind for finding in monitor.findings}


def test_a_batch_that_poisons_keras_layers():
    x = X.copy()
    x[5, 2] = np.nan
    (text,) = warned(network(layers.BatchNormalization(momentum=0.9)), x=x)
    assert text.startswith("error: not_finite_statistics (")
    assert "tfbn.convert(model)" in text


def test_validation_that_is_fed_differently():
    model = network(tfbn.BatchNormalization(momentum=0.9))
    monitor = tfbn.StatisticsMonitor(20, validation_data=(X / 255, Y))
    (text,) = warned(model, monitor=monitor)
    assert text.startswith("warning: validation_fed_differently (")
    assert "inputs are 0.00" in text or "another mean" in text
    assert "prepare the inputs as in training" in text


# Healthy ones


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loop", ["fit", "TrainingLoop"])
def test_a_healthy_training_is_quiet(kind, loop):
    monitor = tfbn.StatisticsMonitor(10, validation_data=(X, Y))
    assert warned(network(KINDS[kind](momentum=0.9)), monitor=monitor, loop=loop) == []
    assert monitor.findings == []


def test_a_training_that_stops_early_lags_no_more_than_its_steps_say():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.stop_training = batch == 14  # of 16

    norm = tfbn.BatchNormalization(momentum=0.75)
    model = keras.Sequential([keras.Input((8,)), norm, layers.Dense(1)])
    monitor = tfbn.StatisticsMonitor()  # Its last record is of step 9: 0.75**9 would be much.
    trainer = tfbn.TrainingLoop(model, "sgd", "mse")
    trainer.fit((X + 40, Y), batch_size=4, verbose=0, callbacks=[Stop(), monitor])
    assert monitor.findings == []


def test_small_inputs_are_not_constant():
    model = keras.Sequential(
        [keras.Input((8,)), tfbn.BatchNormalization(momentum=0.9), layers.Dense(1)]
    )
    assert warned(model, 20, X * 1e-2) == []


def test_a_frozen_layer_may_stand_still():
    model = network(tfbn.BatchNormalization())
    tfbn.freeze(model)
    assert warned(model) == []


def test_a_layer_that_is_unfrozen_later_is_watched_from_then_on():
    model = network(tfbn.BatchNormalization(momentum=0.9))
    tfbn.freeze(model, affine=False)

    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 5:
                tfbn.unfreeze(self.model)

    monitor = tfbn.StatisticsMonitor(5)
    trainer = tfbn.TrainingLoop(model, keras.optimizers.SGD(1e-3), "mse")
    trainer.fit((X, Y), batch_size=16, epochs=10, verbose=0, callbacks=[Unfreeze(), monitor])
    assert monitor.findings == []
    assert monitor.layers[0].state == "learns"
    assert monitor.layers[0].initial_weight == pytest.approx(0.9**20, rel=0.01)


def test_each_kind_warns_once():
    monitor = tfbn.StatisticsMonitor(1)
    texts = warned(network(tfbn.BatchNormalization(momentum=0.999)), monitor=monitor)
    assert len(texts) == 1
    assert len(warned(network(tfbn.BatchNormalization(momentum=0.999)), monitor=monitor)) == 1
