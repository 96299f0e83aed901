"""Inference in two passes, (x − c)·k, where the channels are not last: right for every scale."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn._normalize.dispatch import normalize
from tfbn._normalize.kernel import Normalization

EPSILON = 1e-3
OVER = Normalization((1,), EPSILON)
GAMMA = np.array([1.5, -0.7, 0, 0, 1e-30, -1e-30, 1e-18, 1], np.float32)
BETA = np.array([0.3, 2, -1.7, 0, 0.9, -0.9, 1e3, 0], np.float32)
SHAPE = (4, 8, 5, 3)


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with tf.device("CPU:0"):
        yield


def statistics(mean: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = mean + random.normal(size=SHAPE)
    moving_mean = mean + random.normal(size=8)
    return x.astype("float32"), moving_mean.astype("float32"), random.uniform(0.5, 2, 8)


def along(values):
    return np.reshape(values, (8, 1, 1))


def formula(x, mean, variance, gamma, beta):
    """The definition, in float64."""
    x, mean, variance, gamma, beta = (
        tf.cast(t, tf.float64) for t in (x, mean, variance, gamma, beta)
    )
    mean, scale, beta = (
        tf.reshape(t, (8, 1, 1)) for t in (mean, gamma / tf.sqrt(variance + EPSILON), beta)
    )
    return (x - mean) * scale + beta


@pytest.mark.parametrize("in_graph", [False, True])
def test_every_scale_gives_the_formulas_output(in_graph):
    arrays = [tf.constant(a, tf.float32) for a in (*statistics(), GAMMA, BETA)]
    run = tf.function(normalize) if in_graph else normalize
    y = run(*arrays, OVER).numpy()
    expected = formula(*arrays).numpy()
    assert (np.abs(y - expected) <= 4e-7 * along(np.abs(BETA) + 3)).all()
    assert (
        y[:, 3] == 0
    ).all()  # Both weights are 0: to the bit, for residual branches that start at 0.


def test_a_large_mean_costs_no_more_than_rounding_it():
    x, mean, variance = statistics(1e4)
    gamma, beta = np.ones(8, np.float32), np.full(8, 0.37, np.float32)
    layer = keras.layers.BatchNormalization(axis=1, epsilon=EPSILON)
    layer.build(SHAPE)
    layer.set_weights([gamma, beta, mean, variance])
    arrays = [tf.constant(a, tf.float32) for a in (x, mean, variance, gamma, beta)]
    expected = formula(*arrays).numpy()
    y = normalize(*arrays, OVER).numpy()
    error = np.abs(y - expected)
    half_a_digit = np.spacing(np.float32(1e4)) / 2
    assert (error <= half_a_digit / np.sqrt(along(variance)) + 1e-6).all()
    assert error.max() < np.abs(layer(x).numpy() - expected).max()


@pytest.mark.parametrize("in_graph", [False, True])
def test_gradients_of_every_scale_are_the_formulas_to_the_second_order(in_graph):
    arrays = [tf.constant(a, tf.float32) for a in (*statistics(), GAMMA, BETA)]
    dy = tf.constant(np.random.default_rng(1).normal(size=SHAPE), tf.float32)

    def gradients(function, *arrays):
        with tf.GradientTape() as outer:
            outer.watch(arrays)
            with tf.GradientTape() as inner:
                inner.watch(arrays)
                y = function(*arrays)
            first = inner.gradient(y, arrays, output_gradients=tf.cast(dy, y.dtype))
            total = tf.add_n([tf.reduce_sum(tf.sin(g)) for g in first])
        return [*first, *outer.gradient(total, arrays, unconnected_gradients="zero")]

    def ours(*arrays):
        return gradients(lambda *a: normalize(*a, OVER), *arrays)

    wide = [tf.cast(a, tf.float64) for a in arrays]
    found = (tf.function(ours) if in_graph else ours)(*arrays)
    for got, expected in zip(found, gradients(formula, *wide), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
