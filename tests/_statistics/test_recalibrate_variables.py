"""Models that change variables in inference: random layers, recurrent state, counters."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfbn
from custom_models import Noise

UPSTREAM = pytest.mark.parametrize("upstream", ["population", "batch"])


class GeneratorNoise(layers.Layer):
    """Adds the numbers of a `tf.random.Generator`, which one operation reads and advances."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = tf.random.Generator.from_seed(1)

    def call(self, x):
        return x + self.generator.normal(tf.shape(x))


class Counted(layers.Layer):
    """Multiplies by the number of batches so far."""

    def build(self, shape):
        self.batches = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.batches.assign(self.batches + 1.0)
        return x * self.batches


class CountedInBranch(Counted):
    """Counts in a branch of the graph that always runs."""

    def call(self, x):
        def count():
            self.batches.assign(self.batches + 1.0)
            return x * self.batches

        return tf.cond(tf.reduce_all(tf.math.is_finite(x)), count, lambda: x)


class CountedInLoop(Counted):
    """Counts in a branch in a loop of the graph, which runs once."""

    def call(self, x):
        def count():
            self.batches.assign(self.batches + 1.0)
            return x * self.batches

        def body(number, y):
            return number + 1, tf.cond(number < 1, count, lambda: y)

        return tf.while_loop(lambda number, _: number < 1, body, (tf.constant(0), x))[1]

    def compute_output_shape(self, shape):  # Keras reads the variable where the loop cannot.
        return shape


class Remembering(layers.Layer):
    """Adds the mean that a layer behind it stored for the batch before."""

    def build(self, shape):
        self.stored = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.norm = layers.BatchNormalization()
        self.norm.build(shape)

    def call(self, x):
        y = self.norm(x + self.stored)
        self.stored.assign(keras.ops.mean(y + 1.0))
        return y


def behind(layer: keras.Layer) -> keras.Model:
    image = keras.Input((2,))
    hidden = layers.BatchNormalization(name="norm")(layer(image))
    return keras.Model(image, layers.BatchNormalization()(hidden))


@UPSTREAM
@pytest.mark.parametrize("noise", [Noise, GeneratorNoise])
def test_each_batch_gets_its_own_random_numbers(noise, upstream):
    model = behind(noise())
    tfbn.recalibrate(model, np.ones((2000, 2), "float32"), batch_size=4, upstream=upstream)
    norm = model.get_layer("norm")
    # Noise of variance 1 on 2000 examples: the standard errors are 0.022 and 0.032.
    np.testing.assert_allclose(norm.moving_mean, 1.0, atol=0.1)
    np.testing.assert_allclose(norm.moving_variance, 1.0, atol=0.15)


def test_every_level_sees_the_same_random_numbers_wherever_it_starts():
    found = []
    for cache in ("memory", "none"):
        generator = Noise()
        image = keras.Input((2,))
        hidden = layers.BatchNormalization()(generator(image))
        model = keras.Model(image, layers.BatchNormalization()(generator(hidden)))
        tfbn.recalibrate(model, np.ones((40, 2), "float32"), batch_size=8, cache=cache)
        found.append(model.get_weights())
        np.testing.assert_array_equal(generator.generator.state, [1, 0])
    for here, there in zip(*found, strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-6, atol=1e-6)


@UPSTREAM
@pytest.mark.parametrize("behind_another", [False, True])
def test_the_state_of_a_recurrent_layer_goes_on_from_batch_to_batch(upstream, behind_another):
    gru = layers.GRU(3, stateful=True, return_sequences=True)
    image = keras.Input(batch_shape=(4, 5, 2))
    ones = layers.BatchNormalization(gamma_initializer="zeros", beta_initializer="ones")
    hidden = ones(image) if behind_another else image
    model = keras.Model(image, layers.BatchNormalization(name="norm")(gru(hidden)))
    x = np.random.default_rng(0).normal(size=(20, 5, 2)).astype("float32")
    alone = keras.Model(image, gru.output)
    seen = np.concatenate([alone(x[i : i + 4]) for i in range(0, 20, 4)])
    gru.reset_state()
    tfbn.recalibrate(model, x, batch_size=4, upstream=upstream)
    norm = model.get_layer("norm")
    np.testing.assert_allclose(norm.moving_mean, seen.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, seen.var((0, 1)), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(gru.states[0], np.zeros((4, 3)))


def test_numbers_that_depend_on_normalized_values_need_the_batch_mode():
    """How many the generator draws behind the layer decides what the next batch gets before it."""
    generator = GeneratorNoise()
    image = keras.Input((2,))
    hidden = layers.BatchNormalization()(generator(image))
    model = keras.Model(image, layers.BatchNormalization(name="norm")(generator(hidden)))
    x = np.ones((4000, 2), "float32")
    with pytest.raises(ValueError, match='Pass upstream="batch"'):
        tfbn.recalibrate(model, x, batch_size=80)
    tfbn.recalibrate(model, x, batch_size=80, upstream="batch")
    norm = model.get_layer("norm")
    # The normalized noise and a second one, both of variance 1: if they were the same, it would be 4.
    np.testing.assert_allclose(norm.moving_variance, 2.0, atol=0.3)


@UPSTREAM
@pytest.mark.parametrize("counter", [Counted, CountedInBranch, CountedInLoop])
def test_a_variable_that_is_updated_before_it_is_read(counter, upstream):
    counted = counter()
    model = behind(counted)
    tfbn.recalibrate(model, np.ones((12, 2), "float32"), batch_size=3, upstream=upstream)
    norm = model.get_layer("norm")
    np.testing.assert_allclose(norm.moving_mean, np.mean([1, 2, 3, 4]) * np.ones(2))
    np.testing.assert_allclose(norm.moving_variance, np.var([1, 2, 3, 4]) * np.ones(2))
    assert float(counted.batches) == 0


def test_a_variable_that_depends_on_normalized_values_needs_the_batch_mode():
    layer = Remembering()
    model = keras.Sequential([keras.Input((2,)), layer])
    x = np.random.default_rng(0).normal(size=(12, 2)).astype("float32")
    with pytest.raises(ValueError, match='Pass upstream="batch", or do not update the variable'):
        tfbn.recalibrate(model, x, batch_size=3)
    np.testing.assert_array_equal(layer.norm.moving_mean, [0, 0])
    tfbn.recalibrate(model, x, batch_size=3, upstream="batch")
    # Normalized values have mean 0, so each batch but the first has 1 added to it.
    np.testing.assert_allclose(layer.norm.moving_mean, x.mean(0) + 0.75, rtol=1e-5)
    assert float(layer.stored) == 0


@pytest.mark.parametrize("mean", [1.0, 5.0])
def test_diagnose_compares_with_what_the_model_draws(mean):
    """The second time, something is wrong, and it runs the model in other ways."""
    noise = Noise()
    model = behind(noise)
    model.compile(loss="mse")
    model.get_layer("norm").moving_mean.assign([mean, mean])
    x = np.ones((1000, 2), "float32")
    diagnosis = tfbn.diagnose(model, (x, x), batch_size=4)
    (evidence,) = (layer for layer in diagnosis.layers if layer.layer == "norm")
    assert abs(evidence.log_variance_ratio) < 0.2  # From 1 to the variance of the noise, 1.
    np.testing.assert_array_equal(noise.generator.state, [1, 0])
