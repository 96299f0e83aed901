"""What the code of a model shows."""

import keras
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from tfbn._statistics.diagnose.structure import Structure

SPEC = tf.TensorSpec([None, 4], tf.float32)


def test_dropout_does_not_hide_the_relu_before_it():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.BatchNormalization(name="first"),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Dense(4),
            layers.BatchNormalization(name="second"),
            layers.Dense(4),
            layers.BatchNormalization(name="third"),
        ],
        name="model",
    )
    found = Structure(
        model, [x for x in model.layers if "batch" in type(x).__name__.lower()], None, SPEC
    )
    assert found.behind_rectifier == {"model/second"}
    assert found.behind_noise == {"model/second", "model/third"}


@pytest.mark.parametrize("layer_sizes", [3, [64, 32]])
def test_a_config_of_a_subclassed_model_is_its_own_affair(layer_sizes):
    """Its key "layers" need not mean what it means in a Functional model."""

    class Perceptron(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = tfbn.BatchNormalization()

        def call(self, x, training=None):
            return self.norm(x, training=training)

        def get_config(self):
            return {"layers": layer_sizes}

    model = Perceptron()
    diagnosis = tfbn.diagnose(model, tf.random.normal([32, 4], seed=0))
    assert [finding.kind for finding in diagnosis.findings] in ([], ["never_updated"])
