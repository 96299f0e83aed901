"""Nested models, custom layers, and subclassed models are folded across their borders."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from folding import count, folded, image, into
from graphs import randomize
from tfbn._models.walk import batch_norm_layers

layers = keras.layers
Norm = keras.layers.BatchNormalization


@keras.saving.register_keras_serializable("test_fold")
class Residual(layers.Layer):
    """A block as users write it, with layers and operations of Keras."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(4, 3, padding="same", name="conv")
        self.norm = Norm(name="norm")

    def call(self, x: Any, training: Any = None) -> Any:
        return keras.ops.relu(self.norm(self.conv(x), training=training)) + x


@keras.saving.register_keras_serializable("test_fold")
class Closed(Residual):
    """A block that calls TensorFlow, which does not accept symbolic tensors."""

    def call(self, x: Any, training: Any = None) -> Any:
        return tf.nn.relu(super().call(x, training=training))


def test_nested_models_are_flattened_and_folded_across_their_borders():
    inner = keras.Sequential(
        [image(), layers.Conv2D(4, 1, name="conv"), Norm(), layers.ReLU(), Norm()], name="inner"
    )
    x = image()
    outer = keras.Model(
        x, layers.Dense(2, name="dense")(inner(layers.Conv2D(4, 1, name="between")(inner(x))))
    )
    model = folded(outer)
    assert into(model) == ["conv", "between", "conv", "dense"]
    assert all(not isinstance(layer, keras.Model) for layer in model.layers)
    assert [row.within for row in model.report.rows] == [("inner",)] * 4


def test_equal_names_are_told_apart_by_the_models_that_contain_them():
    def inner(name: str) -> keras.Model:
        return keras.Sequential([image(), layers.Conv2D(4, 1, name="conv"), Norm()], name=name)

    x = image()
    model = folded(keras.Model(x, inner("second")(inner("first")(x))))
    assert [layer.name for layer in model.layers if "conv" in layer.name] == ["conv", "second_conv"]


def test_a_custom_layer_is_opened():
    x = image()
    block = Residual(name="block")
    model = folded(keras.Model(x, block(block(x))))
    assert into(model) == ["conv", "conv"]
    assert [row.path for row in model.report.rows] == ["block/norm"] * 2
    assert count(model, layers.Conv2D) == 1


def test_a_custom_layer_that_cannot_be_opened_is_kept_whole_and_reported():
    x = image()
    model = randomize(keras.Model(x, Norm()(layers.Dense(4)(Closed(name="closed")(x)))))
    new = tfbn.fold(model)
    kept, gone = new.report.rows
    assert (kept.outcome, kept.path) == ("unchanged", "closed/norm")
    assert kept.reason == "it is inside 'closed' (Closed), which is kept whole"
    assert gone.outcome == "folded into the preceding layer"
    assert len(batch_norm_layers(new)) == 1


def test_a_subclassed_model_is_folded_if_its_call_can_be_traced():
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.dense, self.norm = Residual(), layers.Dense(3), Norm()

        def call(self, x: Any) -> Any:
            return self.norm(self.dense(self.block(x)))

    net = Net()
    net(np.zeros((1, 8, 8, 4), "float32"))
    assert folded(net).report.left == ()

    class Opaque(Net):
        def call(self, x: Any) -> Any:
            return tf.nn.relu(super().call(x))

    opaque = Opaque()
    opaque(np.zeros((1, 8, 8, 4), "float32"))
    with pytest.raises(ValueError, match=r"Cannot trace the model .* of class Opaque"):
        tfbn.fold(opaque)


def test_time_distributed_layers_are_folded_like_the_layers_inside():
    x = keras.Input((5, 8, 8, 4))
    timed = layers.TimeDistributed
    h = timed(Norm())(timed(layers.Conv2D(4, 3, name="conv"), name="timed")(x))
    h = timed(Norm())(layers.ReLU()(h))
    h = timed(layers.Dense(3), name="last")(timed(layers.GlobalAveragePooling2D())(h))
    model = folded(keras.Model(x, h))
    assert into(model) == ["timed", "last"]


def test_masks_pass_what_is_folded():
    x = keras.Input((6,), dtype="int32")
    h = Norm()(layers.Dense(4)(layers.Embedding(9, 4, mask_zero=True)(x)))
    model = randomize(keras.Model(x, layers.LSTM(3)(h)))
    new = tfbn.fold(model)
    words = tf.constant([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 1]])
    np.testing.assert_allclose(new(words), model(words), rtol=1e-5, atol=1e-6)
    assert new.report.left == ()
