"""The loop notices batch normalization that learned no statistics."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn import StatisticsNotUpdatedError, TrainingLoop
from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.walk import learns_statistics

KINDS = [keras.layers.BatchNormalization, BatchNormalization]
STRATEGIES = {"none": None, "one device": tf.distribute.OneDeviceStrategy("CPU:0")}


class Forgetful(keras.Model):
    """Two normalizations, of which the second is never told that it trains."""

    def __init__(self, kind: type, **arguments: object):
        super().__init__()
        self.good = kind(name="good")
        self.bad = kind(name="bad", **arguments)
        self.dense = keras.layers.Dense(1)

    def call(self, x, training=False):
        return self.dense(self.bad(self.good(x, training=training), training=False))


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (20, 4)), rng.normal(size=(20, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_do_not_change_in_the_first_epoch_raise(kind):
    epochs = []
    ended = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(epoch))
    loop = TrainingLoop(Forgetful(kind), "sgd", "mse")
    with pytest.raises(StatisticsNotUpdatedError) as raised:
        loop.fit(data(), batch_size=10, epochs=3, callbacks=ended, verbose=0)
    assert isinstance(raised.value, RuntimeError)
    text = str(raised.value)
    assert "statistics of 1 of 2 layers did not change" in text
    assert "Received: 'bad', after 2 steps." in text
    assert "self.bn(x, training=training)" in text
    assert "`tfbn.freeze(model)`" in text
    assert epochs == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("still", [{"trainable": False}, {"momentum": 1.0}])
def test_layers_that_are_meant_to_keep_their_statistics_do_not_raise(kind, still):
    loop = TrainingLoop(Forgetful(kind, **still), "sgd", "mse")
    assert not learns_statistics(loop.model.bad)
    loop.fit(data(), epochs=1, verbose=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_part_of_a_model_does_not_raise(kind):
    loop = TrainingLoop(Forgetful(kind), "sgd", "mse")
    loop.model.bad.trainable = False
    loop.fit(data(), epochs=1, verbose=0)


def test_frozen_statistics_do_not_raise_until_they_are_unfrozen():
    loop = TrainingLoop(Forgetful(BatchNormalization), "sgd", "mse")
    loop.model.bad.freeze_statistics = True
    loop.fit(data(), epochs=1, verbose=0)
    loop.model.bad.freeze_statistics = False
    with pytest.raises(StatisticsNotUpdatedError, match="'bad'"):
        loop.fit(data(), epochs=1, verbose=0)


def test_unusable_batches_are_named_as_a_cause():
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(name="starved")])
    x = np.full((8, 4), np.nan)
    with pytest.raises(StatisticsNotUpdatedError, match=r"'starved', after 1 step\.(.|\n)*NaN"):
        TrainingLoop(model, "sgd", "mse").fit((x, x), verbose=0)


def test_a_cumulative_average_does_not_raise():
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(momentum=None)])
    assert learns_statistics(model.layers[0])
    TrainingLoop(model, "sgd", "mse").fit((data()[0], data()[0]), epochs=2, verbose=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_the_model_never_calls_does_not_raise(kind):
    class Model(Forgetful):
        def build(self, shape):
            self.bad.build(shape)

        def call(self, x, training=False):
            return self.dense(self.good(x, training=training))

    TrainingLoop(Model(kind, center=False, scale=False), "sgd", "mse").fit(data(), verbose=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_the_model_calls_in_inference_only_raises(kind):
    class Model(Forgetful):
        def build(self, shape):
            self.bad.build(shape)

        def call(self, x, training=False):
            x = self.good(x, training=training)
            return self.dense(x if training else self.bad(x))

    loop = TrainingLoop(Model(kind, center=False, scale=False), "sgd", "mse")
    with pytest.raises(StatisticsNotUpdatedError, match="Received: 'bad'"):
        loop.fit(data(), verbose=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_that_are_right_already_do_not_raise(kind, strategy):
    """A step on the data that the model was recalibrated with moves nothing. The probe leaves no trace."""
    x = np.float32([[1, 2], [3, 6]] * 4)
    strategy = STRATEGIES[strategy]
    with strategy.scope() if strategy else contextlib.nullcontext():
        layer = kind(momentum=0.5)
        model = keras.Sequential([keras.Input((2,)), layer])
        loop = TrainingLoop(model, keras.optimizers.SGD(0.0), "mse", strategy=strategy)
    layer.moving_mean.assign([2, 4])
    layer.moving_variance.assign([1, 4])
    loop.fit(x, x, verbose=0)
    np.testing.assert_array_equal(layer.moving_mean, [2, 4])
    np.testing.assert_array_equal(layer.moving_variance, [1, 4])


def test_a_model_whose_call_has_no_training_argument_learns_or_raises():
    """Newer versions of Keras pass the flag on to the layers all the same, older ones drop it."""

    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn, self.dense = BatchNormalization(), keras.layers.Dense(1)

        def call(self, x):
            return self.dense(self.bn(x))

    model = Plain()
    try:
        TrainingLoop(model, "sgd", "mse").fit(data(), verbose=0)
    except StatisticsNotUpdatedError:
        assert np.all(model.bn.moving_mean.numpy() == 0)
    else:
        assert np.all(model.bn.moving_mean.numpy() != 0)
