"""Models that change variables in inference are compared, folded and served with what they change."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from custom_models import Noise

X = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")


def network(last: keras.Layer) -> keras.Model:
    image = keras.Input(batch_shape=(4, 5, 3))
    hidden = layers.BatchNormalization()(layers.Dense(3)(image))
    return keras.Model(image, last(hidden))


@pytest.mark.parametrize("tool", [tfbn.fold, tfbn.fuse])
def test_random_numbers_go_on_from_those_of_the_model(tool):
    model = network(Noise(name="noise"))
    model(X)
    new = tool(model, X)
    state = model.get_layer("noise").generator.state
    np.testing.assert_array_equal(state, [1, 1])  # One call, not one more.
    np.testing.assert_array_equal(new.get_layer("noise").generator.state, state)
    np.testing.assert_allclose(new(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [Noise, lambda: layers.GRU(2, stateful=True)])
def test_what_is_served_changes_its_variables_too(last, tmp_path):
    model = network(last())
    loaded = tf.saved_model.load(str(tfbn.export(model, tmp_path / "1", inputs=X)))
    served = [loaded.serve(tf.constant(X)) for _ in range(2)]
    for outputs in served:
        (output,) = outputs.values()
        np.testing.assert_allclose(output, model(X), rtol=1e-4, atol=1e-5)
    first, second = (next(iter(outputs.values())).numpy() for outputs in served)
    assert np.abs(first - second).max() > 1e-3
