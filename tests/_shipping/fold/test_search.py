"""Which layers absorb a batch normalization, and which must not."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfbn
from folding import count, folded, image, into, reasons
from graphs import randomize

layers = keras.layers
Norm = keras.layers.BatchNormalization


def test_it_is_folded_into_all_following_branches_or_into_none():
    x = image()
    h = Norm()(x)
    model = keras.Model(x, [layers.Dense(3, name="a")(h), layers.Conv2D(3, 2, name="b")(h)])
    assert into(folded(model)) in (["a, b"], ["b, a"])
    x = image()
    h = Norm()(x)
    model = folded(keras.Model(x, [layers.Dense(3)(h), layers.ReLU(name="relu")(h)]))
    assert reasons(model) == ["its input is an input of the model; 'relu' (ReLU) is not linear"]


def test_a_tensor_that_something_else_uses_does_not_change():
    x = image()
    h = layers.Conv2D(4, 1, name="conv")(x)
    model = keras.Model(x, layers.ReLU()(Norm()(h)) + h)
    assert "'conv' (Conv2D) feeds 2 layers" in reasons(folded(model))[0]
    x = image()
    h = layers.Conv2D(4, 1, name="conv")(x)
    model = keras.Model(x, [layers.ReLU()(Norm()(h)), h])
    assert "the model also outputs 'conv' (Conv2D)" in reasons(folded(model))[0]


def test_a_shared_layer_stays_shared_if_the_same_is_folded_into_each_call():
    x, y = image(), keras.Input((8, 8, 4), name="other")
    conv, norm = layers.Conv2D(4, 1, name="conv"), Norm()
    model = folded(keras.Model([x, y], [norm(conv(x)), norm(conv(y))]))
    assert into(model) == ["conv", "conv"]
    assert count(model, layers.Conv2D) == 1


def test_a_shared_layer_is_copied_where_its_calls_must_differ():
    x, y = image(), keras.Input((8, 8, 4), name="other")
    conv = layers.Conv2D(4, 1, name="conv")
    outputs = [Norm()(conv(x)), Norm()(conv(y)), layers.ReLU()(conv(x))]
    model = folded(keras.Model([x, y], outputs))
    assert into(model) == ["conv", "conv"]
    assert count(model, layers.Conv2D) == 3


# What must not change


def test_a_call_with_training_true_keeps_its_batch_statistics():
    x = image()
    model = randomize(keras.Model(x, Norm()(layers.Dense(4)(x), training=True)))
    new = tfbn.fold(model)
    assert reasons(new) == ["it is called with training=True"]
    data = tf.random.stateless_normal((3, 8, 8, 4), (1, 2))
    np.testing.assert_array_equal(new(data), model(data))


def test_it_does_not_move_through_dropout_that_is_active():
    x = image()
    h = layers.Dropout(0.5)(Norm()(x), training=True)
    assert "called with training=True" in reasons(folded(keras.Model(x, layers.Dense(3)(h))))[0]


def test_what_is_computed_in_float32_does_not_move_into_a_float16_layer():
    x, large = keras.Input((4,)), keras.Input((4,))
    behind = Norm(dtype="float32")(layers.Dense(3, dtype="mixed_float16", name="half")(x))
    norm = Norm(dtype="float32")
    before = layers.Dense(3, dtype="mixed_float16", name="after")(norm(large))
    model = randomize(keras.Model([x, large], [behind, before]))
    norm.moving_variance.assign([1e12] * 4)
    values = tf.random.stateless_normal((3, 4), (7, 7))
    new = tfbn.fold(model, [values, 1e6 * values])  # Beyond float16.
    assert [output.dtype for output in new.output] == ["float32", "float16"]
    assert new.report.difference < 2e-3
    why = " ".join(reason for reason in reasons(new) if reason)
    for name in ("half", "after"):
        assert f"'{name}' (Dense) computes float16, not float32" in why


def test_subclasses_of_linear_and_batch_normalization_layers_are_left_alone():
    @keras.saving.register_keras_serializable("test_fold")
    class Standardized(layers.Dense):
        def call(self, x: Any) -> Any:
            return 2.0 * super().call(x)

    @keras.saving.register_keras_serializable("test_fold")
    class Own(Norm):
        def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
            return 3.0 * super().call(x, training, mask)

    x = image()
    model = folded(keras.Model(x, Own()(Norm()(Standardized(4, name="odd")(x)))))
    assert reasons(model) == [
        "'odd' (Standardized) is not linear; 'own' (Own) is not linear",
        "its class Own overrides call",
    ]


def test_a_layer_with_lora_weights_is_left_alone():
    x = image()
    dense = layers.Dense(4, name="dense")
    model = keras.Model(x, Norm()(dense(x)))
    dense.enable_lora(2)
    assert "has unusual weights" in reasons(folded(model))[0]


def test_the_model_is_not_modified():
    x = image()
    model = randomize(keras.Model(x, layers.ReLU()(Norm()(layers.Conv2D(4, 3)(x)))))
    model.compile("sgd", "mse")
    before = [weight.numpy() for weight in model.weights]
    tfbn.fold(model)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert model.compiled
    assert keras.Model(model.input, model.layers[1].output).output_shape == (None, 6, 6, 4)
