"""What the lectures say of batch normalization as a layer, L1 to L5, L7 and L8, as running claims."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn._moments.moments import Moments, merge

EPSILON = 1e-3


@pytest.fixture
def z() -> np.ndarray:
    """The pre-activations of 4 units for a mini-batch of 32 examples."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(32, 4)) * [1, 2, 5, 0.1] + [0, 3, -10, 0.5]).astype("float32")


def test_L1_each_unit_is_normalized_by_its_own_mini_batch_then_scaled_and_shifted(z):
    layer = tfbn.BatchNormalization(epsilon=EPSILON)
    layer.build(z.shape)
    gamma, beta = [1.0, 2.0, -0.5, 3.0], [0.0, 1.0, -1.0, 0.5]
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    result = layer(z, training=True).numpy()
    assert layer.gamma.shape == layer.beta.shape == (4,)  # one value per unit
    m = len(z)
    for unit in range(4):
        values = [float(value) for value in z[:, unit]]
        mu = sum(values) / m
        variance = sum((value - mu) ** 2 for value in values) / m  # by m, not m − 1
        for i, value in enumerate(values):
            z_hat = (value - mu) / math.sqrt(variance + EPSILON)
            assert result[i, unit] == pytest.approx(
                gamma[unit] * z_hat + beta[unit], rel=1e-4, abs=1e-5
            )


def test_L2_with_gamma_the_spread_and_beta_the_mean_the_layer_undoes_itself(z):
    layer = tfbn.BatchNormalization(epsilon=EPSILON)
    layer.build(z.shape)
    layer.gamma.assign(np.sqrt(z.var(0) + EPSILON))
    layer.beta.assign(z.mean(0))
    np.testing.assert_allclose(layer(z, training=True), z, rtol=1e-5, atol=1e-5)


def test_L3_gamma_and_beta_give_each_unit_any_mean_and_spread(z):
    layer = tfbn.BatchNormalization(epsilon=1e-12)
    layer.build(z.shape)
    layer.gamma.assign([0.1, 1.0, 4.0, 9.0])
    layer.beta.assign([-2.0, 0.0, 7.0, 1.0])
    result = layer(z, training=True).numpy()
    np.testing.assert_allclose(result.std(0), [0.1, 1.0, 4.0, 9.0], rtol=1e-4)
    np.testing.assert_allclose(result.mean(0), [-2.0, 0.0, 7.0, 1.0], atol=1e-5)


def two_moons() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, np.pi, 128)
    label = rng.integers(0, 2, 128)
    x = np.stack([np.cos(angle), np.sin(angle)], -1) * np.where(label, -1, 1)[:, None]
    x += np.where(label, 1, 0)[:, None] * [1.0, 0.5] + 0.1 * rng.normal(size=x.shape)
    return x.astype("float32"), label.astype("float32")[:, None]


def trained(*hidden: keras.layers.Layer, epochs: int = 30) -> tuple[keras.Model, list[float]]:
    model = keras.Sequential(
        [keras.Input((2,)), *hidden, keras.layers.Dense(1, activation="sigmoid")]
    )
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy")
    history = model.fit(*two_moons(), batch_size=32, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history["loss"]


def test_L3_training_moves_gamma_and_beta_away_from_one_and_zero():
    norm = tfbn.BatchNormalization()
    trained(keras.layers.Dense(8, use_bias=False), norm, keras.layers.Activation("sigmoid"))
    gamma, beta = norm.gamma.numpy(), norm.beta.numpy()
    assert np.abs(gamma - 1).min() > 0.01
    assert np.abs(beta).min() > 0.01
    assert gamma.std() > 0.05  # and not alike: each unit takes what suits it
    assert beta.std() > 0.05


@pytest.mark.parametrize("placement", ["before", "after"])
def test_L4_before_or_after_the_activation(placement):
    norm, activation = tfbn.BatchNormalization(), keras.layers.Activation("sigmoid")
    pair = [norm, activation] if placement == "before" else [activation, norm]
    model, losses = trained(keras.layers.Dense(8), *pair)
    assert losses[-1] < 0.5 * losses[0]
    x = two_moons()[0]
    dense, first, second, _ = model.layers
    if placement == "before":
        expected = 1 / (1 + np.exp(-norm(dense(x)).numpy()))
    else:
        expected = norm(1 / (1 + np.exp(-dense(x).numpy()))).numpy()
    np.testing.assert_allclose(second(first(dense(x))), expected, rtol=1e-5, atol=1e-6)


def test_L5_a_bias_before_it_cancels_out_and_has_no_gradient(z):
    layer = tfbn.BatchNormalization()
    layer.build(z.shape)
    upstream = tf.random.normal(z.shape, seed=1)

    def run(bias):
        bias = tf.constant(bias, "float32")
        with tf.GradientTape() as tape:
            tape.watch(bias)
            y = layer(z + bias, training=True)
        return y, tape.gradient(y, [bias, layer.beta.value], output_gradients=upstream)

    without, (gradient, beta_gradient) = run([0.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(gradient, np.zeros(4), atol=1e-4)  # of a sum of terms as large as 50
    assert np.abs(beta_gradient).max() > 1  # while beta, which does the bias's work, has one
    biased, (gradient, _) = run([1.0, -2.0, 30.0, 0.01])
    np.testing.assert_allclose(biased, without, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, np.zeros(4), atol=1e-4)


def test_L7_at_test_time_a_prediction_depends_on_the_example_alone(z):
    layer = tfbn.BatchNormalization()
    for _ in range(3):
        layer(z, training=True)
    together = layer(z).numpy()
    alone = np.concatenate([layer(z[i : i + 1]).numpy() for i in range(len(z))])
    elsewhere = layer(np.concatenate([z[:1], 100 * z[1:]])).numpy()
    np.testing.assert_allclose(alone, together, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(elsewhere[0], together[0], rtol=1e-6, atol=1e-6)
    # By a batch's own statistics it would not.
    batch, other = (
        layer(z, training=True),
        layer(np.concatenate([z[:1], 100 * z[1:]]), training=True),
    )
    assert np.abs(batch[0] - other[0]).max() > 0.1


def test_L7_by_an_exponentially_weighted_average_kept_during_training():
    momentum, epsilon = 0.9, EPSILON
    layer = tfbn.BatchNormalization(momentum=momentum, epsilon=epsilon)
    batches = np.random.default_rng(0).normal(3.0, 2.0, (10, 16, 4)).astype("float32")
    mean, variance = np.zeros(4), np.ones(4)
    for batch in batches:
        layer(batch, training=True)
        mean = momentum * mean + (1 - momentum) * batch.mean(0)
        variance = momentum * variance + (1 - momentum) * batch.var(0)
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-5)
    example = batches[0, :1]
    expected = (example - mean) / np.sqrt(variance + epsilon)
    np.testing.assert_allclose(layer(example), expected, rtol=1e-5, atol=1e-6)


def test_L7_or_by_the_mean_and_variance_over_the_entire_training_set():
    layer = tfbn.BatchNormalization(momentum=0.0)
    layer.build((None, 4))
    data = np.random.default_rng(0).normal(3.0, 2.0, (100, 4)).astype("float32")
    whole = Moments(*(tf.zeros(4) for _ in range(3)))
    for part in (data[:64], data[64:96], data[96:]):  # of unequal sizes
        n, mean, variance = len(part), part.mean(0), part.var(0)
        whole = merge(
            whole, Moments(tf.fill([4], float(n)), tf.constant(mean), tf.constant(variance))
        )
    layer.update_statistics(whole)
    expected = (data - data.mean(0)) / np.sqrt(data.var(0) + EPSILON)
    np.testing.assert_allclose(layer(data), expected, rtol=1e-4, atol=1e-5)


def test_L8_it_is_one_line_of_a_model():
    model = keras.Sequential(
        [
            keras.layers.Dense(8),
            tfbn.BatchNormalization(),
            keras.layers.Activation("relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy")
    x, label = two_moons()
    model.fit(x, label, verbose=0)
    assert model.predict(x, verbose=0).shape == (128, 1)
