"""Copies of models: what they keep, what they share, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from custom_models import Backbone, Block, Task, functional
from graphs import randomize
from keras_versions import HAS_3_15
from tfbn._models.rebuild import rebuild
from tfbn._models.walk import batch_norm_layers

layers = keras.layers
Stock = layers.BatchNormalization


class Opaque(layers.Layer):
    """Has an argument that no config tells."""

    def __init__(self, array: Any, norm: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.array, self.norm = array, norm

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1],), name="kernel")

    def call(self, x: Any) -> Any:
        return x * self.kernel * self.array


def test_a_layer_that_cannot_be_copied_is_shared_and_named():
    model = functional(layers.Dense(4), Opaque(np.ones(4), name="opaque"), Stock())
    with pytest.warns(UserWarning, match=r"shares layers .* layer 'opaque' of class Opaque"):
        ours = tfbn.convert(model)
    assert ours.get_layer("opaque") is model.get_layer("opaque")
    assert ours.layers[1] is not model.layers[1]
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(ours(x), model(x), rtol=1e-6)


def test_what_is_shared_and_has_no_weights_is_not_worth_a_warning():
    scale = np.array([1.0, 2.0, 3.0, 4.0], "float32")

    class Scale(layers.Layer):
        def __init__(self, factor: Any) -> None:
            super().__init__()
            self.factor = factor

        def call(self, x: Any) -> Any:
            return x * self.factor

    model = functional(Scale(scale), Stock())
    np.testing.assert_allclose(tfbn.convert(model)(scale[None]), model(scale[None]), rtol=1e-6)


def test_a_layer_that_cannot_be_copied_is_refused_if_a_layer_inside_it_is_to_be_replaced():
    opaque = Opaque(np.ones(4), norm=Stock(name="inner"), name="opaque")
    with pytest.raises(ValueError, match=r"'opaque' of class Opaque .* because the layer 'inner'"):
        tfbn.convert(functional(opaque))


def test_a_model_that_cannot_be_copied_is_refused():
    with pytest.raises(ValueError, match="Cannot copy the layer 'opaque' of class Opaque"):
        rebuild(Opaque(np.ones(4), name="opaque"), {})


def test_folding_goes_on_around_what_cannot_be_copied():
    opaque = Opaque(np.ones(4), name="opaque")
    model = randomize(functional(layers.Dense(4), Stock(), opaque))
    folded = tfbn.fold(model)
    assert folded.report.shared == ("opaque",)
    assert not batch_norm_layers(folded)
    assert folded.get_layer("opaque") is opaque


from_3_15 = pytest.mark.skipif(not HAS_3_15, reason="Keras does so from 3.15 on")


@pytest.mark.parametrize(
    "option",
    [
        "activation",
        "kernel_initializer",
        pytest.param("kernel_regularizer", marks=from_3_15),
    ],
)
def test_functions_that_keras_cannot_save_are_copied(option):
    offset = 3.0
    made = {
        "activation": lambda x: x + offset,
        "kernel_initializer": lambda shape, dtype=None: keras.ops.ones(shape, dtype),
        "kernel_regularizer": lambda w: offset * keras.ops.sum(w),
    }
    model = functional(layers.Dense(4, **{option: made[option]}), Stock())
    ours = tfbn.convert(model)
    assert getattr(ours.layers[1], option) is made[option]
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(ours(x), model(x), rtol=1e-6)


def test_an_activation_of_a_lambda_is_copied():
    model = functional(layers.Activation(lambda x: 2.0 * x), Stock())
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(tfbn.convert(model)(x), model(x), rtol=1e-6)


@from_3_15
def test_a_functional_class_keeps_its_class_attributes_and_weights():
    model = randomize(Backbone(name="mine"))
    ours = tfbn.convert(model)
    assert isinstance(ours, Backbone)
    assert ours.last is ours.layers[-1]
    assert type(ours.last) is type(ours.auxiliary.norm) is tfbn.BatchNormalization
    assert [w.path for w in ours.weights] == [w.path for w in model.weights]
    for old, new in zip(model.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    x = np.ones((2, 4), "float32")
    taps = [keras.Model(m.input, m.levels["P1"]) for m in (model, ours)]
    np.testing.assert_allclose(taps[1](x), taps[0](x), rtol=1e-5, atol=1e-6)


def test_a_task_predicts_and_is_compiled_as_before():
    model = randomize(Task(Backbone(), layers.Rescaling(0.5)))
    model.compile(optimizer=keras.optimizers.Adam(0.25), loss="mae")
    ours = tfbn.convert(model)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    np.testing.assert_allclose(ours.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4)
    assert float(ours.optimizer.learning_rate) == 0.25
    y = np.zeros((8, 2))
    losses = [m.evaluate(x, y, verbose=0) for m in (model, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert isinstance(ours, Task)
    assert ours.backbone in ours.layers


def test_tf_checkpoints_hold_the_new_layers(tmp_path):
    ours, other = tfbn.convert(Backbone()), tfbn.convert(Backbone())
    randomize(ours)
    path = tf.train.Checkpoint(model=ours).write(str(tmp_path / "state"))
    tf.train.Checkpoint(model=other).read(path)
    for layer, restored in zip(ours.layers, other.layers, strict=True):
        if isinstance(layer, tfbn.BatchNormalization):
            np.testing.assert_array_equal(layer.moving_mean, restored.moving_mean)


def test_layers_changed_after_construction_are_copied_as_they_are():
    block = Block()
    block.dense.activation = keras.activations.relu
    model = randomize(functional(block))
    x = -np.ones((2, 4), "float32")
    np.testing.assert_allclose(tfbn.convert(model)(x), model(x), rtol=1e-5, atol=1e-6)


@from_3_15
def test_layers_that_a_plain_model_holds_outside_of_its_graph_are_converted():
    model = functional(layers.Dense(4))
    model.extra = {"head": [Stock()]}
    model.extra["head"][0].build((None, 4))
    ours = tfbn.convert(model)
    assert type(ours.extra["head"][0]) is tfbn.BatchNormalization


class Chain(keras.Sequential):
    """Adds a method, and no constructor."""

    def double(self, x: Any) -> Any:
        return 2 * self(x)


def test_a_sequential_class_without_a_constructor_is_kept():
    model = Chain([keras.Input((4,)), layers.Dense(4), Stock()])
    ours = tfbn.convert(model)
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(ours.double(x), model.double(x), rtol=1e-6)


class Forgetful(keras.Model):
    """Its config does not tell where the branch ends."""

    def __init__(self, skip: bool = False, **kwargs: Any) -> None:
        inputs = keras.Input((4,))
        x = Stock()(layers.Dense(4)(inputs))
        y = layers.Dense(4)(x)
        super().__init__(inputs, layers.Add()([inputs if skip else x, y]), **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


def test_a_class_that_would_build_another_graph_becomes_a_plain_model():
    assert isinstance(tfbn.convert(Forgetful()), Forgetful)
    model = randomize(Forgetful(skip=True))
    with pytest.warns(UserWarning, match="is a Functional, not a Forgetful"):
        ours = tfbn.convert(model)
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(ours(x), model(x), rtol=1e-5, atol=1e-6)


def test_without_keras_private_graph_the_copy_is_a_plain_model(monkeypatch):
    def gone(model: Any, swaps: Any) -> None:
        raise ValueError

    monkeypatch.setattr("tfbn._models.replace_layers.replace_in_graph", gone)
    with pytest.warns(UserWarning, match="is a Functional, not a Backbone"):
        ours = tfbn.convert(Backbone())
    assert {type(layer) for layer in batch_norm_layers(ours)} == {tfbn.BatchNormalization}


class Preset(Backbone):
    """Passes its arguments on, and creates itself from a config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def test_a_class_that_passes_arguments_on_is_created_from_its_own_config():
    assert type(rebuild(Preset(), {})) is Preset
    assert isinstance(tfbn.convert(Preset()), Preset)


def test_a_class_whose_constructor_takes_something_else_than_its_graph_is_refused():
    class Odd(keras.Model):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            (width,) = args if len(args) == 1 else self.refuse()
            inputs = keras.Input((4,))
            super().__init__(inputs, layers.Dense(width)(inputs))

        def refuse(self) -> Any:
            raise TypeError("one argument, please")

    with pytest.raises(
        ValueError, match=r"of class Odd\. Received: TypeError: one .* `get_config`"
    ):
        tfbn.convert(Odd(4))


HOLDERS = {
    "an alias beside a dict of tuples": lambda layer, norm: setattr(
        layer, "blocks", {"a": [(norm, "a")]}
    ),
    "a method": lambda layer, norm: setattr(layer, "run", norm.__call__),
    "a partial of the layer": lambda layer, norm: setattr(layer, "run", functools.partial(norm)),
    "a partial with a keyword": lambda layer, norm: setattr(
        layer,
        "run",
        functools.partial(lambda x, training, norm: norm(x, training=training), norm=norm),
    ),
    "a lambda": lambda layer, norm: setattr(layer, "run", lambda x, **how: norm(x, **how)),
}


@keras.saving.register_keras_serializable("test_rebuild")
class Held(layers.Layer):
    """Calls its layer through whatever else holds it."""

    def __init__(self, holder: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.holder = holder
        self.norm = Stock()
        HOLDERS[holder](self, self.norm)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"holder": self.holder}

    def build(self, shape: Any) -> None:
        self.norm.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        run = self.run if hasattr(self, "run") else self.blocks["a"][0][0]
        return run(x, training=training)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_layer_is_replaced_wherever_its_parent_holds_it(holder, tmp_path):
    model = randomize(functional(layers.Dense(4), Held(holder)))
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    expected = model(x, training=False)
    ours = tfbn.convert(model)
    ours.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for copy in (ours, loaded, tfbn.convert(ours, to=Stock)):
        np.testing.assert_allclose(copy(x, training=False), expected, rtol=1e-5, atol=1e-5)
        (norm,) = batch_norm_layers(copy)
        before = norm.moving_mean.numpy()
        copy(x, training=True)
        assert not np.array_equal(norm.moving_mean, before)
