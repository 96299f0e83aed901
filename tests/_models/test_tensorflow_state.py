"""Layers that keep state in variables of TensorFlow, which Keras neither saves nor copies."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from custom_models import TensorFlowState

X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")


def network(what: str) -> tuple[keras.Model, TensorFlowState]:
    layer = TensorFlowState(what, name="state")
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4), layer, layers.BatchNormalization()]
    )
    model(X, training=True)
    layer.variables_of_mine["scale"][0].assign(7.0)
    return model, layer


@pytest.mark.parametrize("what", ["scale", "norm"])
@pytest.mark.parametrize("tool", [tfbn.convert, tfbn.fold])
def test_the_copy_has_the_values_of_the_model(tool, what):
    model, layer = network(what)
    new = tool(model)
    if tool is tfbn.convert:
        assert new.get_layer("state") is not layer
    np.testing.assert_allclose(new(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["counter", "generator"])
def test_the_copy_goes_on_from_the_state_of_the_model(what):
    model, layer = network(what)
    state = layer.state()
    folded = tfbn.fold(model)
    for kept, before, copied in zip(
        layer.state(), state, folded.get_layer("state").state(), strict=True
    ):
        np.testing.assert_array_equal(kept, before)
        np.testing.assert_array_equal(copied, before)
    np.testing.assert_allclose(folded(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["norm", "counter", "generator"])
def test_what_is_served_goes_on_from_the_state_of_the_model(what, tmp_path):
    model, layer = network(what)
    state = layer.state()
    loaded = tf.saved_model.load(str(tfbn.export(model, tmp_path / "1", inputs=X)))
    for kept, before in zip(layer.state(), state, strict=True):
        np.testing.assert_array_equal(kept, before)
    for _ in range(2):
        (output,) = loaded.serve(X).values()
        np.testing.assert_allclose(output, model(X), rtol=1e-4, atol=1e-4)


def test_a_layer_whose_variables_its_class_does_not_create_is_shared():
    model, layer = network("scale")
    layer.late = tf.Variable(2.0)
    with pytest.warns(UserWarning, match="shares layers with the model"):
        new = tfbn.convert(model)
    assert new.get_layer("state") is layer
