"""Recalibration within training; averaged weights: swap, recalibrate, evaluate."""

import keras
import numpy as np
import pytest
from keras import layers

import tfbn

X = np.random.default_rng(0).normal(4.0, 2.0, (64, 3)).astype("float32")
Y = X.sum(1, keepdims=True)


def network() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(8, activation="relu"),
            tfbn.BatchNormalization(),
            layers.Dense(1),
        ]
    )


def compiled(**options) -> keras.Model:
    model = network()
    model.compile(keras.optimizers.SGD(0.05, **options), "mse")
    return model


def inside(model: keras.Model) -> np.ndarray:
    return model.layers[0](X).numpy().astype("float64")


def assert_recalibrated(model: keras.Model) -> None:
    seen = inside(model)
    np.testing.assert_allclose(model.layers[1].moving_mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.layers[1].moving_variance, seen.var(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loop", ["fit", "TrainingLoop"])
def test_it_recalibrates_when_training_ends(loop):
    model = compiled()
    callback = tfbn.RecalibrateAfterTraining(X, batch_size=10)
    assert callback.result is None
    if loop == "fit":
        model.fit(X, Y, verbose=0, callbacks=[callback])
    else:
        trainer = tfbn.TrainingLoop(model, keras.optimizers.SGD(0.05), "mse")
        trainer.fit((X, Y), verbose=0, callbacks=[callback])
    assert_recalibrated(model)
    assert callback.result.batches == 7


@pytest.mark.parametrize("asked", [True, False])
def test_before_each_validation_if_asked(asked):
    model = compiled()
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            mean = self.model.layers[1].moving_mean.numpy()
            seen.append(np.allclose(mean, inside(self.model).mean(0), rtol=1e-4, atol=1e-5))

    recalibrate = tfbn.RecalibrateAfterTraining(X, before_validation=asked)
    model.fit(
        X,
        Y,
        epochs=2,
        verbose=0,
        validation_data=(X, Y),
        validation_batch_size=64,
        callbacks=[recalibrate, Look()],
    )
    assert seen == [asked, asked]
    assert_recalibrated(model)


def test_an_evaluation_outside_of_training_changes_nothing():
    model = compiled()
    before = model.layers[1].moving_mean.numpy()
    model.evaluate(
        X, Y, verbose=0, callbacks=[tfbn.RecalibrateAfterTraining(X, before_validation=True)]
    )
    np.testing.assert_array_equal(model.layers[1].moving_mean, before)


def averages(model: keras.Model) -> list[np.ndarray]:
    """The averaged weights that the optimizer keeps."""
    return [v.numpy() for v in model.optimizer.variables if "average" in v.path]


def test_averaged_weights_get_statistics_of_their_own():
    model = compiled(use_ema=True, ema_momentum=0.9)
    model.fit(X, Y, epochs=3, batch_size=8, verbose=0)
    # Keras has put the averages into the model, and left the statistics of the last weights.
    for weight, average in zip(model.trainable_variables, averages(model), strict=True):
        np.testing.assert_allclose(weight.numpy(), average, rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_recalibrated(model)
    stale = model.evaluate(X, Y, verbose=0)
    tfbn.recalibrate(model, X)
    assert_recalibrated(model)
    assert model.evaluate(X, Y, verbose=0) < stale


def test_swapped_weights_are_validated_with_statistics_of_their_own():
    model = compiled(use_ema=True, ema_momentum=0.9)
    losses = []

    class Oracle(keras.callbacks.Callback):
        """The loss that the averaged weights have with the statistics of the whole data set."""

        def on_test_end(self, logs=None):
            kernel, bias, gamma, beta, head, offset = averages(self.model)
            z = np.maximum(X @ kernel + bias, 0)
            z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-3) * gamma + beta
            losses.append(np.mean((z @ head + offset - Y) ** 2))

    history = model.fit(
        X,
        Y,
        epochs=2,
        batch_size=8,
        verbose=0,
        validation_data=(X, Y),
        callbacks=[
            keras.callbacks.SwapEMAWeights(),
            tfbn.RecalibrateAfterTraining(X, before_validation=True),
            Oracle(),
        ],
    )
    np.testing.assert_allclose(history.history["val_loss"], losses, rtol=1e-3)
    assert_recalibrated(model)


def test_an_option_that_does_not_exist_is_refused_at_once():
    with pytest.raises(TypeError, match="upstrem"):
        tfbn.RecalibrateAfterTraining(X, upstrem="batch")
