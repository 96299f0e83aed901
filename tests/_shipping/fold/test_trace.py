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
from tfbn._shipping.fold.trace import trace

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
    assert kept.reason.startswith(
        "it is inside 'closed' (Closed), which is kept whole: ValueError: "
    )
    assert gone.outcome == "folded into the preceding layer"
    assert len(batch_norm_layers(new)) == 1


@pytest.mark.parametrize("loop", [False, True])
def test_a_custom_layer_with_a_branch_or_a_loop_is_kept_whole(loop):
    class Choosing(layers.Layer):
        def build(self, shape):
            self.norm = Norm(name="norm")
            self.norm.build(shape)

        def call(self, x, training=None):
            if loop:
                return keras.ops.fori_loop(0, 2, lambda _, y: self.norm(y + x), x)
            enough = keras.ops.sum(x) > -1e9
            return keras.ops.cond(enough, lambda: self.norm(x, training=training), lambda: x)

    x = image()
    model = randomize(keras.Model(x, Norm()(layers.Dense(4)(Choosing(name="choosing")(x)))))
    new = folded(model)
    kept, gone = new.report.rows
    assert kept.reason.startswith(
        "it is inside 'choosing' (Choosing), which is kept whole: ValueError"
    )
    assert gone.outcome == "folded into the preceding layer"


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


# Classes that cannot be created from their config


class Scale(layers.Layer):
    """A layer whose config does not tell how to create it."""

    def __init__(self, transform: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.transform = transform

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(1,), name="factor", initializer="ones")

    def call(self, x: Any) -> Any:
        return self.transform(x) * self.factor


class ScaledResidual(Residual):
    """A block with such a constructor, and nothing else that stands in the way."""

    def __init__(self, transform: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.transform = transform

    def call(self, x: Any, training: Any = None) -> Any:
        return self.transform(super().call(x, training=training))


def test_fold_goes_on_around_a_layer_that_cannot_be_copied():
    x = image()
    scale = Scale(keras.ops.tanh, name="scale")
    h = scale(Norm(name="a")(layers.Conv2D(4, 1, name="conv")(x)))
    h = Norm(name="b")(layers.Conv2D(4, 1, name="scale_1")(h))
    model = keras.Model(x, layers.Add()([h, scale(x)]))
    new = folded(model)
    assert into(new) == ["conv", "scale_1"]
    assert new.report.shared == ("scale",)
    assert "Shared with the original model: scale." in str(new.report)
    assert new.get_layer("scale") is scale
    assert new.get_layer("conv") is not model.get_layer("conv")
    assert scale.output is model.layers[3].output


def test_a_layer_that_cannot_be_copied_is_opened_if_it_contains_batch_normalization():
    x = image()
    new = folded(keras.Model(x, ScaledResidual(keras.ops.tanh)(x)))
    assert into(new) == ["conv"]
    assert new.report.shared == ()


def test_a_subclassed_model_that_cannot_be_copied_is_folded():
    class Net(keras.Model):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.block, self.activation = Residual(name="block"), activation

        def call(self, x: Any) -> Any:
            return self.activation(self.block(x))

    net = Net(keras.ops.sigmoid)
    net(np.zeros((1, 8, 8, 4), "float32"))
    assert into(folded(net)) == ["conv"]


def test_lambdas_do_not_stand_in_the_way():
    x = image()
    h = layers.Activation(lambda t: t + 1)(Norm()(layers.Dense(3, name="dense")(x)))
    own = layers.Dense(2, kernel_initializer=lambda shape, dtype: keras.ops.ones(shape), name="own")
    assert into(folded(keras.Model(x, Norm()(own(h))))) == ["dense", "own"]


# What the class of a model computes


class Doubled(keras.Model):
    """A Functional model whose class overrides `call`."""

    def call(self, x: Any) -> Any:
        return 2.0 * super().call(x)


class Skipping(keras.Sequential):
    """A Sequential model whose class overrides `call`."""

    def call(self, x: Any, training: Any = None) -> Any:
        return x + super().call(x, training=training)


@pytest.mark.parametrize("nested", [True, False])
def test_a_model_whose_class_overrides_call_computes_what_it_says(nested):
    x = image()
    double = Doubled(x, Norm()(layers.Conv2D(4, 1, name="a")(x)))
    y = image()
    skip = Skipping([y, layers.Conv2D(4, 1, name="b"), Norm()])
    for model, name in ((double, "a"), (skip, "b")):
        if nested:
            z = image()
            model = keras.Model(z, layers.ReLU()(model(z)))
        assert into(folded(model)) == [name]


# The model is not modified


def test_tracing_leaves_no_trace_in_the_objects_of_the_user():
    class Counting(Residual):
        def build(self, shape: Any) -> None:
            self.conv.build(shape)
            self.norm.build(shape)

        def call(self, x: Any, training: Any = None) -> Any:
            self.seen = x
            return super().call(x, training=training)

    x = image()
    block = Counting(name="block")
    model = keras.Model(x, block(x))
    before = {name: id(value) for name, value in vars(block).items()}
    assert [call.within for call in trace(model).calls] == [("block",)] * 4
    assert {name: id(value) for name, value in vars(block).items()} == before
    with pytest.raises(AttributeError, match="no defined output"):
        _ = block.conv.output


def test_an_error_without_a_message_is_reported_by_its_type():
    class Unfinished(Residual):
        def call(self, x: Any, training: Any = None) -> Any:
            if isinstance(x, keras.KerasTensor):
                raise NotImplementedError
            return super().call(x, training=training)

        def compute_output_spec(self, x: Any) -> Any:
            return keras.KerasTensor(x.shape, x.dtype)

    x = image()
    block = Unfinished(name="block")
    block.conv.build((None, 8, 8, 4))
    block.norm.build((None, 8, 8, 4))
    (row,) = folded(keras.Model(x, block(x))).report.rows
    assert row.reason.endswith("is kept whole: NotImplementedError")


def test_a_training_argument_that_a_layer_does_not_take_is_dropped():
    class Passing(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.identity = layers.Identity()

        def call(self, x: Any, training: Any = None) -> Any:
            return self.identity(super().call(x, training=training), training=training)

    x = image()
    assert into(folded(keras.Model(x, Passing()(x)))) == ["conv"]


def test_a_functional_model_whose_constructor_takes_something_else_is_folded():
    class Net(keras.Model):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if args:
                raise TypeError("takes keyword arguments only")
            x = image()
            super().__init__(x, Norm()(layers.Dense(kwargs["units"], name="dense")(x)))

    assert into(folded(Net(units=3))) == ["dense"]


def test_a_custom_layer_of_a_dict_is_opened_without_a_warning():
    class Pyramid(Residual):
        def call(self, x: Any, training: Any = None) -> Any:
            return super().call(x["low"] + x["high"], training=training)

    x = image()
    pyramid = Pyramid()
    pyramid.conv.build((None, 8, 8, 4))
    pyramid.norm.build((None, 8, 8, 4))
    pyramid.built = True
    low, high = layers.ReLU()(x), layers.Dense(4)(x)
    assert into(folded(keras.Model(x, pyramid({"high": high, "low": low})))) == ["conv"]
