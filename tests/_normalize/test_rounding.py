"""The fused kernel of a CPU adds float32 numbers one by one: what that would cost, and that it does not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn._normalize import fused
from tfbn._normalize.dispatch import normalize_batch
from tfbn._normalize.kernel import Normalization


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with tf.device("CPU:0"):
        yield


def modes(function, *inputs):
    """What a function gives eagerly, in a graph, and in a graph of unknown batch size."""
    specs = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in inputs]
    yield function(*inputs)
    yield tf.function(function)(*inputs)
    yield tf.function(function, input_signature=specs)(*inputs)


def oracle(x: np.ndarray, epsilon: float = 1e-3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, mean and variance over all axes but the last, in float64."""
    x = x.astype(np.float64)
    mean = x.mean(tuple(range(x.ndim - 1)))
    variance = ((x - mean) ** 2).mean(tuple(range(x.ndim - 1)))
    return (x - mean) / np.sqrt(variance + epsilon), mean, variance


@pytest.mark.parametrize(("offset", "again"), [(0.0, 0), (1e4, 1)])
def test_moments_are_computed_again_only_where_the_mean_dominates(offset, again, monkeypatch):
    """At mean 1e4 the kernel alone is off by far more than at mean 0."""
    runs, in_pieces = [], fused.in_pieces
    monkeypatch.setattr(fused, "in_pieces", lambda *args: runs.append(1) or in_pieces(*args))
    x = tf.random.normal((4096, 3), seed=1) + offset
    layer = tfbn.BatchNormalization(epsilon=1e-6)
    y = layer(x, training=True)
    assert len(runs) == again
    expected, *_ = oracle(x.numpy(), 1e-6)
    in_graph = tf.function(lambda x: layer(x, training=True))(x)
    for result in (y, in_graph):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_equal_values_of_a_channel_do_not_drift():
    """Every addition of equal numbers rounds the same way: the kernel's mean of 0.3 is off by 6e-5 of itself."""
    constants = np.random.default_rng(0).uniform(0.1, 1, 16).astype("float32")
    x = tf.constant(np.broadcast_to(constants, (32, 16, 16, 16)))
    over = Normalization((3,), 1e-3)
    for y, moments in modes(lambda x: normalize_batch(x, tf.ones(16), tf.zeros(16), over), x):
        np.testing.assert_allclose(y, 0, atol=1e-5)
        np.testing.assert_allclose(moments.mean, constants, rtol=2e-7)
        np.testing.assert_allclose(moments.variance, 0, atol=1e-12)


def rectified(shape: tuple[int, ...]) -> np.ndarray:
    """The worst case for sums: half of the deviations from the mean are the same number."""
    return np.maximum(np.random.default_rng(0).normal(size=shape), 0).astype("float32")


# Just above the line; pieces that leave a rest; no axis that tells pieces apart.
@pytest.mark.parametrize("shape", [(11, 113, 107, 2), (16, 256, 256, 2), (1_000_003, 2)], ids=str)
def test_the_variance_of_many_values_does_not_drift(shape):
    assert np.prod(shape[:-1]) > fused.MANY
    x = rectified(shape)
    expected, mean, variance = oracle(x)
    over = Normalization((len(shape) - 1,), 1e-3)
    for y, moments in modes(
        lambda x: normalize_batch(x, tf.ones(2), tf.zeros(2), over), tf.constant(x)
    ):
        np.testing.assert_allclose(moments.variance, variance, rtol=1e-5)
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * expected.max())


def test_the_kernel_alone_would_drift():
    x = rectified((1_000_000, 1, 1, 2))
    _, _, variance = oracle(x)
    drifted = fused.kernel(tf.constant(x), tf.ones(2), tf.zeros(2), 1e-3)[4]
    assert np.max(np.abs(drifted / variance - 1)) > 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_variance_of_many_values_does_not_drift_in_half_precision(dtype):
    x = tf.cast(rectified((16, 128, 128, 2)), dtype)
    _, mean, variance = oracle(tf.cast(x, tf.float64).numpy())
    over = Normalization((3,), 1e-3)
    for y, moments in modes(lambda x: normalize_batch(x, tf.ones(2), tf.zeros(2), over), x):
        assert y.dtype == dtype
        np.testing.assert_allclose(moments.variance, variance, rtol=1e-5)
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)


def test_gradients_of_many_values_are_the_formulas():
    x = rectified((16, 128, 128, 2))
    dy = np.random.default_rng(1).normal(0.3, 1, x.shape)
    x_hat, _, variance = oracle(x)
    over = (0, 1, 2)
    expected = (dy - dy.mean(over) - x_hat * (dy * x_hat).mean(over)) / np.sqrt(variance + 1e-3)

    def gradient(x, dy):
        layer_over = Normalization((3,), 1e-3)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = normalize_batch(x, tf.ones(2), tf.zeros(2), layer_over)
        return tape.gradient(y, x, output_gradients=dy)

    for dx in modes(gradient, tf.constant(x), tf.constant(dy, tf.float32)):
        np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_constant_channel_beside_large_float16_values_is_not_nan(mode):
    x = tf.constant([[50, 6e4], [50, -6e4], [50, -6e4], [50, -6e4]], tf.float16)

    def train(layer):
        run = lambda x: layer(x, training=True)  # noqa: E731
        return (run if mode == "eager" else tf.function(run, jit_compile=mode == "xla"))(x)

    ours, stock = (
        train(kind(dtype="float16"))
        for kind in (tfbn.BatchNormalization, keras.layers.BatchNormalization)
    )
    np.testing.assert_allclose(ours, [[0, 1.732], [0, -0.577], [0, -0.577], [0, -0.577]], atol=1e-3)
    np.testing.assert_allclose(ours, stock, atol=1e-3)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_constant_channel_costs_the_others_no_digits_in_bfloat16(mode):
    rng = np.random.default_rng(0)
    skewed = rng.exponential(30, (64, 1)) ** 1.1
    x = tf.cast(np.concatenate([skewed, np.full((64, 1), 1000.0)], 1), tf.bfloat16)
    _, mean, variance = oracle(tf.cast(x, tf.float64).numpy())
    layer = tfbn.BatchNormalization(momentum=0.0, dtype="mixed_bfloat16")
    run = lambda x: layer(x, training=True)  # noqa: E731
    (run if mode == "eager" else tf.function(run))(x)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5, atol=1e-2)
