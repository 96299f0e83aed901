"""What is fused, what is not and why; and the way back, which is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from custom_models import MODELS
from graphs import random_model, randomize
from keras_versions import HAS_3_15
from tfbn._models.fused_part import fused_parts
from tfbn._models.walk import walk

layers = keras.layers
Stock = keras.layers.BatchNormalization


def network(norm: Any = Stock) -> keras.Model:
    """Convolutions that can be fused, alone and in a nested model, and one normalization that cannot."""
    x = keras.Input((6, 6, 3), name="image")
    h = layers.ReLU()(norm(name="norm")(layers.Conv2D(4, 3, use_bias=False, name="conv")(x)))
    h = layers.Add()([h, norm(name="alone")(h)])
    block = keras.Sequential([keras.Input((4, 4, 4)), layers.DepthwiseConv2D(3), norm()])
    h = layers.GlobalAveragePooling2D()(block(h))
    return randomize(keras.Model(x, layers.Dense(3, name="head")(h)))


def images(number: int = 4) -> tf.Tensor:
    return tf.random.stateless_normal((number, 6, 6, 3), (3, 4))


def state_of(model: keras.Model) -> list[Any]:
    weights = [(w.path, w.trainable, w.dtype, w.numpy().tobytes()) for w in model.weights]
    flags = [(layer.name, type(layer).__name__, layer.trainable) for layer in walk(model)]
    return [weights, flags]


def assert_same(actual: keras.Model, expected: keras.Model) -> None:
    assert state_of(actual) == state_of(expected)
    assert actual.get_config() == expected.get_config()


def trained(model: keras.Model, steps: int = 3) -> keras.Model:
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(images(), np.zeros((4, 3)), epochs=steps, verbose=0)
    return model


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=15)
def test_a_random_graph_keeps_its_outputs_and_comes_back_bit_for_bit(data):
    inside = random_model(data.draw)
    outputs = keras.tree.flatten(inside.outputs)
    outputs.append(Stock()(layers.Dense(3)(outputs[0])))  # So that there is something to fuse.
    model = keras.Model(inside.inputs, outputs)
    before = state_of(model)
    fused = tfbn.fuse(model)
    assert fused.report.difference < 1e-5
    assert_same(tfbn.unfuse(fused), model)
    assert state_of(model) == before


NOTHING_TO_FUSE = {"given", "late", "recurrent"}


@pytest.mark.parametrize("name", sorted(set(MODELS) - NOTHING_TO_FUSE))
def test_custom_layers_and_models_survive_fusing_saving_and_unfusing(name, tmp_path):
    model = randomize(MODELS[name]())
    fused = tfbn.fuse(model)
    assert fused_parts(fused)
    assert_same(tfbn.unfuse(fused), model)
    if not HAS_3_15 and name in ("nest", "network"):
        pytest.skip("Before 3.15, Keras's files lack what is in containers of containers")
    fused.save(tmp_path / "fused.keras")
    loaded = keras.models.load_model(tmp_path / "fused.keras", compile=False)
    assert len(fused_parts(loaded)) == len(fused_parts(fused))
    for old, new in zip(model.weights, tfbn.unfuse(loaded).weights, strict=True):
        np.testing.assert_array_equal(new, old)


@keras.saving.register_keras_serializable("test_fuse")
class Called(keras.Model):
    """Built by its first call: it has no `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(4), Stock()

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)


def test_a_subclassed_model_that_was_called_is_built_and_so_are_its_copies():
    model = Called()
    with pytest.raises(ValueError, match=r"not built.* Call it on an example"):
        tfbn.fuse(model)
    model(tf.ones((2, 3)))
    randomize(model)
    converted = tfbn.convert(model)
    assert converted.built
    for m in (model, converted):
        fused = tfbn.fuse(m)
        assert len(fused_parts(fused)) == 2
        assert tfbn.fold(tfbn.unfuse(fused)).report.difference < 1e-5


@pytest.mark.parametrize("norm", [Stock, tfbn.BatchNormalization])
def test_fuse_train_save_load_unfuse_fold_export(norm, tmp_path):
    model = network(norm)
    fused = trained(tfbn.fuse(model))
    fused.save(tmp_path / "fused.keras")
    loaded = keras.models.load_model(tmp_path / "fused.keras")
    x, expected = images(), fused(images())
    np.testing.assert_array_equal(loaded(x, training=True), expected)
    np.testing.assert_array_equal(keras.models.clone_model(loaded)(x).shape, expected.shape)
    back = tfbn.unfuse(loaded)
    kinds = [type(layer) for layer in walk(back)]
    assert kinds == [type(layer) for layer in walk(model)]
    assert [w.name for w in back.weights] == [w.name for w in model.weights]
    assert not np.array_equal(back.weights[0], model.weights[0])
    for m in (back, tfbn.fold(back), tfbn.fold(loaded)):
        np.testing.assert_allclose(m(x, training=False), expected, rtol=1e-4, atol=1e-5)
    for number, m in enumerate((back, loaded)):
        path = tfbn.export(m, tmp_path / str(number))
        served = tf.saved_model.load(str(path)).signatures["serving_default"](image=x)["head"]
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)
    back.load_weights(_weights_of(model, tmp_path / "old.weights.h5"))
    assert state_of(back)[0][0][3] == state_of(model)[0][0][3]


def _weights_of(model: keras.Model, path: Path) -> Path:
    model.save_weights(path)
    return path


def test_statistics_of_layers_that_were_not_fused_are_frozen_too_until_they_are_unfused():
    fused = tfbn.fuse(network())
    before = {w.path: w.numpy() for w in fused.non_trainable_weights}
    assert len(before) == 6
    trained(fused)
    for weight in fused.non_trainable_weights:
        np.testing.assert_array_equal(weight, before[weight.path])
    back = trained(tfbn.unfuse(fused))
    for weight in back.non_trainable_weights:
        assert not np.array_equal(weight, before[weight.path])


def test_the_training_loop_trains_a_fused_model():
    fused = tfbn.fuse(network())
    before = [weight.numpy() for weight in fused.weights]
    loop = tfbn.TrainingLoop(fused, optimizer=keras.optimizers.SGD(0.1), loss="mse")
    loop.fit(tf.data.Dataset.from_tensors((images(), tf.zeros((4, 3)))), epochs=2)
    for old, weight in zip(before, fused.weights, strict=True):
        assert np.array_equal(old, weight) != weight.trainable


def test_rematerialization_gives_the_same_gradients():
    fused = tfbn.fuse(network())
    weights = [weight.value for weight in fused.trainable_weights]

    def gradients(function):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function(images()) ** 2)
        return tape.gradient(loss, weights)

    plain, again = gradients(fused), gradients(tf.recompute_grad(lambda x: fused(x)))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_convert_and_freeze_work_on_a_fused_model():
    model = network()
    ours = tfbn.convert(tfbn.fuse(model))
    assert_same(tfbn.convert(tfbn.unfuse(ours), to=Stock), model)
    tfbn.freeze(ours)
    names = {weight.name for weight in ours.trainable_weights}
    assert names == {"kernel", "bias"}


@pytest.mark.parametrize(
    ("act", "verb"),
    [
        (lambda m: tfbn.fuse(m), "fuse"),
        (lambda m: tfbn.recalibrate(m, images()), "measure the statistics of"),
        (lambda m: tfbn.diagnose(m, images()), "measure the statistics of"),
        (lambda m: tfbn.unfreeze(m), "unfreeze the statistics of"),
    ],
)
def test_what_needs_statistics_of_training_asks_to_unfuse_first(act, verb):
    fused = tfbn.fuse(network())
    with pytest.raises(ValueError, match=rf"Cannot {verb} a fused model.*tfbn\.unfuse\(model\)"):
        act(fused)


def test_the_report_says_what_was_not_fused_and_why(tmp_path):
    x = keras.Input((8, 4), name="x")
    shared, ends = layers.Dense(4, name="shared"), []

    def add(name: str, source: Any, **arguments: Any) -> Any:
        ends.append(Stock(name=name, **arguments)(source))
        return ends[-1]

    add("fused", layers.Conv1D(4, 3, name="conv")(x))
    add("at the input", x)
    add("after relu", layers.Dense(4, activation="relu", name="relu")(x))
    add("after pooling", layers.AveragePooling1D(2, name="pool")(x))
    add("one call", shared(x))
    add("another call", shared(ends[0]))
    twice = layers.Dense(4, name="twice")(x)
    ends.append(twice)
    add("also an output", twice)
    two = layers.Dense(4, name="two")(x)
    ends.append(layers.ReLU()(two))
    add("one of two", two)
    add("einsum", layers.EinsumDense("btc,cd->btd", (8, 4), name="einsum_dense")(x))
    add("other axis", layers.Dense(4, name="dense")(x), axis=1)
    add("float32", layers.Dense(4, dtype="mixed_float16", name="half")(x))
    add("regularized", layers.Dense(4, activity_regularizer="l2", name="active")(x))
    adapted = layers.Dense(4, name="adapted")
    h = adapted(x)
    add("low rank", h)
    timed = layers.TimeDistributed(Stock(name="inner"), name="timed")
    ends.append(timed(layers.Dense(4)(x)))
    ends.append(Stock(name="training")(layers.Dense(4)(x), training=True))
    model = randomize(keras.Model(x, ends))
    adapted.enable_lora(2)
    fused = tfbn.fuse(model, tolerance=1e-2)
    rows = {row.layer: (row.outcome.value, row.into or row.reason) for row in fused.report.rows}
    assert rows == {
        "fused": ("fused with the preceding layer", "conv"),
        "at the input": ("frozen", "its input is an input of the model"),
        "after relu": ("frozen", "'relu' has the activation relu"),
        "after pooling": ("frozen", "'pool' (AveragePooling1D) is not linear"),
        "one call": ("frozen", "'shared' (Dense) is called elsewhere, too"),
        "another call": ("frozen", "'shared' (Dense) is called elsewhere, too"),
        "also an output": ("frozen", "the model also outputs 'twice' (Dense)"),
        "one of two": ("frozen", "'two' (Dense) feeds 2 layers"),
        "einsum": ("frozen", "'einsum_dense' (EinsumDense) has no fixed axis of output channels"),
        "other axis": ("frozen", "it varies along the axes [1], not only along axis 2"),
        "float32": ("frozen", "'half' (Dense) computes float16, not float32"),
        "regularized": ("frozen", "'active' (Dense) has an activity regularizer"),
        "low rank": (
            "frozen",
            "'adapted' has unusual weights: bias, kernel, lora_kernel_a, lora_kernel_b",
        ),
        "inner": ("frozen", "it is inside 'timed' (TimeDistributed)"),
        "training": ("unchanged", "it is called with training=True"),
    }
    assert [row.layer for row in fused.report.left] == list(rows)[1:]
    assert fused.report.summary().startswith(
        "1 fused with the preceding layer, 13 frozen, 1 unchanged; outputs differ"
    )
    assert json.loads(json.dumps(fused.report.to_dict()))["layers"][0]["into"] == "conv"
    assert "| fused | fused with the preceding layer | conv |" in fused.report._repr_markdown_()
    assert isinstance(fused.report, tfbn.FuseReport)
    fused.report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Fused batch normalization" in page
    assert "fused with the preceding layer" in page
    assert state_of(tfbn.unfuse(fused)) == state_of(model)


def test_a_block_that_is_called_twice_is_fused_once():
    block = keras.Sequential([keras.Input((4,)), layers.Dense(4), Stock()])
    a, b = keras.Input((4,)), keras.Input((4,))
    model = randomize(keras.Model([a, b], layers.Add()([block(a), block(b)])))
    fused = tfbn.fuse(model)
    assert len(fused.report.rows) == 1
    assert not fused.report.left
    assert_same(tfbn.unfuse(fused), model)


def test_two_fused_models_in_one_come_back_each_with_its_own_weights():
    x = keras.Input((4,))
    towers = []
    for seed in range(2):
        inner = keras.Input((4,))
        h = Stock(name="norm")(layers.Dense(3, name="dense")(inner))
        towers.append(randomize(keras.Model(inner, h, name=f"tower{seed}"), seed))
    fused = keras.Model(x, [tfbn.fuse(tower)(x) for tower in towers])
    back = tfbn.unfuse(fused)
    for new, old in zip(back.layers[1:], towers, strict=True):
        assert [w.numpy().tolist() for w in new.weights] == [
            w.numpy().tolist() for w in old.weights
        ]
    values = tf.ones((2, 4))
    for new, old in zip(back(values), towers, strict=True):
        np.testing.assert_allclose(new, old(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: 3, TypeError, r"`model` must be a Keras model\. Received: model=3 of type int"),
        (
            lambda: keras.Sequential([layers.Dense(2), Stock()]),
            ValueError,
            "The model is not built.*Call it on an example",
        ),
        (
            lambda: keras.Sequential([keras.Input((2,)), layers.Dense(2)]),
            ValueError,
            "There is nothing to fuse: the model has no batch normalization layers",
        ),
        (MODELS["recurrent"], ValueError, "nothing to fuse.*it is inside .*which is kept whole"),
        (
            lambda: keras.Sequential([keras.Input((2,)), layers.ReLU(name="r"), Stock(name="n")]),
            ValueError,
            r"nothing to fuse.*tfbn\.freeze.*Received.*'n': 'r' \(ReLU\) is not linear",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused_with_advice(model, error, message):
    with pytest.raises(error, match=message):
        tfbn.fuse(model())


def test_unfuse_refuses_models_that_are_not_fused():
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        tfbn.unfuse("fused.keras")
    with pytest.raises(ValueError, match=r"The model is not fused.*what `tfbn\.fuse\(model\)`"):
        tfbn.unfuse(network())
    fused = tfbn.fuse(network())
    part = keras.Model(fused.get_layer("norm").input, fused.get_layer("norm").output)
    with pytest.raises(ValueError, match="contains 'norm', but not the linear layer"):
        tfbn.unfuse(part)


def test_a_model_whose_outputs_are_random_is_refused():
    x = keras.Input((4,))
    h = Stock()(layers.Dense(4)(x))
    model = randomize(keras.Model(x, layers.Lambda(lambda t: t + tf.random.normal(tf.shape(t)))(h)))
    with pytest.raises(tfbn.FoldError, match=r"The fused model gives other outputs.*random"):
        tfbn.fuse(model)
    assert tfbn.fuse(model, tolerance=float("inf")).report.rows
