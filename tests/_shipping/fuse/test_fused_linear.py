"""A fused layer computes what Keras's two layers compute with frozen statistics, and so do its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from graphs import randomize

layers = keras.layers
Stock = keras.layers.BatchNormalization

LINEAR: dict[str, tuple[tuple[int, ...], Callable[..., keras.layers.Layer]]] = {
    "Dense": ((5,), lambda **k: layers.Dense(4, **k)),
    "Dense of images": ((3, 3, 5), lambda **k: layers.Dense(4, use_bias=False, **k)),
    "Conv1D causal": ((9, 4), lambda **k: layers.Conv1D(6, 3, padding="causal", **k)),
    "Conv2D": ((7, 7, 4), lambda **k: layers.Conv2D(6, 3, use_bias=False, **k)),
    "Conv2D strides": ((7, 7, 4), lambda **k: layers.Conv2D(6, 3, 2, padding="same", **k)),
    "Conv2D dilation": ((7, 7, 4), lambda **k: layers.Conv2D(6, 3, dilation_rate=2, **k)),
    "Conv2D groups": ((7, 7, 4), lambda **k: layers.Conv2D(6, 3, groups=2, use_bias=False, **k)),
    "Conv3D": ((4, 4, 4, 2), lambda **k: layers.Conv3D(3, 2, **k)),
    "Conv1DTranspose": ((5, 4), lambda **k: layers.Conv1DTranspose(3, 3, 2, **k)),
    "Conv2DTranspose": ((4, 4, 3), lambda **k: layers.Conv2DTranspose(5, 3, 2, **k)),
    "Conv3DTranspose": ((3, 3, 3, 2), lambda **k: layers.Conv3DTranspose(3, 2, **k)),
    "DepthwiseConv1D": ((6, 4), lambda **k: layers.DepthwiseConv1D(3, depth_multiplier=2, **k)),
    "DepthwiseConv2D": ((6, 6, 4), lambda **k: layers.DepthwiseConv2D(3, use_bias=False, **k)),
    "SeparableConv1D": ((6, 4), lambda **k: layers.SeparableConv1D(5, 3, **k)),
    "SeparableConv2D": ((6, 6, 4), lambda **k: layers.SeparableConv2D(5, 3, **k)),
}


def chain(kind: str, dtype: str = "float64", norm: Any = Stock, **arguments: Any) -> keras.Model:
    """The linear layer and batch normalization, between two others that make gradients matter."""
    shape, make = LINEAR[kind]
    x = keras.Input(shape, dtype="float32" if "mixed" in dtype else dtype)
    h = layers.Activation("tanh", dtype=dtype)(x)
    h = make(name="linear", dtype=dtype)(h)
    h = norm(name="norm", dtype=dtype, **arguments)(h)
    return randomize(keras.Model(x, layers.Activation("tanh", dtype=dtype)(h)))


def inputs_of(model: keras.Model, seed: int = 1) -> tf.Tensor:
    shape = (4, *model.inputs[0].shape[1:])
    return tf.cast(tf.random.stateless_normal(shape, (seed, 0)), model.inputs[0].dtype)


def derivatives(model: keras.Model, x: tf.Tensor, training: bool) -> dict[str, np.ndarray]:
    """The output, and the gradients with respect to each weight and the input, by their paths."""
    weights = {weight.path: weight.value for weight in model.trainable_weights}
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=training)
        loss = tf.reduce_sum(tf.square(tf.cast(y, tf.float64) + 0.5))
    found = tape.gradient(loss, {**weights, "x": x})
    return {name: np.asarray(value) for name, value in {**found, "y": y}.items()}


def assert_alike(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        scale = max(1e-3, np.abs(value).max())
        np.testing.assert_allclose(
            actual[name], value, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("kind", LINEAR)
def test_outputs_and_every_gradient_are_those_of_keras_with_frozen_statistics(kind):
    model = chain(kind)
    fused = tfbn.fuse(model)
    assert [row.into for row in fused.report.rows] == ["linear"]
    x = inputs_of(model)
    expected = derivatives(model, x, training=False)
    assert len(expected) >= 5  # kernel, gamma, beta, x and y
    assert_alike(derivatives(fused, x, training=True), expected, 1e-10)


@pytest.mark.parametrize("norm", [Stock, tfbn.BatchNormalization])
@pytest.mark.parametrize("center", [False, True])
def test_a_layer_without_gamma_or_beta_is_fused(norm, center):
    model = chain("Conv2D", norm=norm, center=center, scale=not center)
    x = inputs_of(model)
    expected = derivatives(model, x, training=False)
    assert_alike(derivatives(tfbn.fuse(model), x, training=True), expected, 1e-10)


@pytest.mark.parametrize("frozen", ["linear", "norm"])
def test_weights_that_are_not_trainable_stay_so(frozen):
    model = chain("Dense")
    model.get_layer(frozen).trainable = False
    fused = tfbn.fuse(model)
    paths = [weight.path for weight in model.trainable_weights]
    assert [weight.path for weight in fused.trainable_weights] == paths


def test_fifty_training_steps_are_those_of_keras_with_frozen_statistics():
    model = chain("Conv2D")
    fused = tfbn.fuse(model)
    statistics = [weight.numpy() for weight in fused.non_trainable_weights]
    for m, training in ((model, False), (fused, True)):
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        optimizer.build(m.trainable_variables)

        @tf.function(autograph=False)
        def step(x, m=m, training=training, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(m(x, training=training) - 0.3))
            gradients = tape.gradient(loss, m.trainable_variables)
            optimizer.apply(gradients, m.trainable_variables)

        for number in range(50):
            step(inputs_of(model, seed=number))
    for old, new in zip(model.weights, tfbn.unfuse(fused).weights, strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-10)
    for before, weight in zip(statistics, fused.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(weight, before)


def test_the_second_derivative_is_that_of_keras():
    model = chain("Conv2D")
    found = []
    for m in (model, tfbn.fuse(model)):
        x = inputs_of(model)
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(m(x, training=False) ** 2)
            penalty = tf.reduce_sum(inner.gradient(y, x) ** 2)
        weights = {weight.path: weight.value for weight in m.trainable_weights}
        found.append(outer.gradient(penalty, weights))
    assert_alike(found[1], {name: value.numpy() for name, value in found[0].items()}, 1e-10)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_graphs_and_xla_compute_what_eager_calls_do(jit_compile):
    fused = tfbn.fuse(chain("DepthwiseConv2D", dtype="float32"))
    x = inputs_of(fused)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def run(x):
        weights = [weight.value for weight in fused.trainable_weights]
        with tf.GradientTape() as tape:
            y = fused(x, training=True)
        return [y, *tape.gradient(y, weights)]

    with tf.GradientTape() as tape:
        y = fused(x, training=True)
    weights = [weight.value for weight in fused.trainable_weights]
    for a, b in zip(run(x), [y, *tape.gradient(y, weights)], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "Conv2D strides"])
def test_mixed_precision_scales_the_kernel_in_float32_and_computes_in_half(policy, kind):
    """The oracle makes the kernel by hand, and rounds it once."""
    fused = tfbn.fuse(chain(kind, dtype=policy))
    layer = fused.get_layer("linear")
    gamma, beta, mean, variance = (w.numpy().astype("float64") for w in layer.norm.weights)
    scale = gamma / np.sqrt(variance + layer.norm.epsilon)
    kernel = layer.linear.kernel.numpy() * scale
    bias = beta - mean * scale
    if layer.linear.use_bias:
        bias += layer.linear.bias.numpy() * scale
    plain = type(layer.linear).from_config({**layer.linear.get_config(), "use_bias": True})
    h = fused.layers[1](inputs_of(fused))
    plain.build(h.shape)
    plain.set_weights([kernel, bias])
    y = layer(h)
    assert y.dtype == policy.removeprefix("mixed_") == fused.get_layer("norm").output.dtype
    same = tf.reduce_mean(tf.cast(plain(h) == y, tf.float32))
    np.testing.assert_allclose(*(tf.cast(v, tf.float32) for v in (y, plain(h))), rtol=2e-2)
    assert same > 0.9  # A kernel that was scaled in half precision gives 0.5 and less.


def test_a_mask_reaches_the_layers_behind():
    x = keras.Input((5, 3))
    h = layers.Masking()(x)
    h = Stock()(layers.Dense(4)(h))
    model = randomize(keras.Model(x, layers.LSTM(2)(h)))
    values = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    values[:, 3:] = 0
    fused = tfbn.fuse(model)
    assert type(fused.layers[2]).__name__ == "FusedLinear"
    np.testing.assert_allclose(fused(values), model(values), rtol=1e-5, atol=1e-6)


def test_regularizers_of_the_weights_and_of_the_output_count():
    x = keras.Input((5,))
    h = layers.Dense(4, kernel_regularizer="l2", bias_regularizer="l1")(x)
    h = Stock(gamma_regularizer="l2", beta_regularizer="l1", activity_regularizer="l2")(h)
    model = randomize(keras.Model(x, h))
    losses = []
    for m in (model, tfbn.fuse(model)):
        m(tf.ones((2, 5)))
        losses.append(sorted(map(float, m.losses)))
    assert len(losses[0]) == 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
