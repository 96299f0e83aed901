"""A pause: training's outputs, and statistics that stand still."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from tfbn._layer import collect_moments

X = np.random.default_rng(0).normal(3.0, 2.0, (8, 5, 3)).astype("float32")
X[0, 0, 0] = 40.0
POISON = np.full((8, 5, 3), np.nan, "float32")
KINDS = {
    "stock": lambda: keras.layers.BatchNormalization(),
    "stock renorm": lambda: keras.layers.BatchNormalization(renorm=True),
    "ours": lambda: tfbn.BatchNormalization(),
    "cumulative": lambda: tfbn.BatchNormalization(momentum=None),
    "renorm": lambda: tfbn.BatchNormalization(renorm=True),
    "virtual": lambda: tfbn.BatchNormalization(virtual_batch_size=4),
}


def made(kind: str) -> keras.Model:
    return keras.Sequential([keras.Input((5, 3)), KINDS[kind](), keras.layers.Dense(2)])


def weights(model: keras.Model) -> list[np.ndarray]:
    return [w.numpy() for w in model.weights]


def assert_same(model: keras.Model, before: list[np.ndarray]) -> None:
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old, err_msg=weight.path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_batch_statistics_are_used_and_moving_ones_stand_still(kind, mode):
    model, reference = made(kind), made(kind)
    reference.set_weights(model.get_weights())

    def step(x):
        with tfbn.pause_statistics(model):
            return model(x, training=True)

    run = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    before = weights(model)
    y = run(X)
    run(POISON)
    assert_same(model, before)
    np.testing.assert_allclose(y, reference(X, training=True), rtol=1e-4, atol=1e-4)
    reference.layers[0](X, training=True)
    assert any(not np.array_equal(a, b) for a, b in zip(weights(reference), before, strict=True))


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_after_the_block_they_move_again_and_nothing_is_left_on_the_layers(kind):
    model = made(kind)
    with tfbn.pause_statistics(model), tfbn.pause_statistics(model):
        model(X, training=True)
    assert "call" not in vars(model.layers[0])
    before = weights(model)
    model(X, training=True)
    assert not np.array_equal(model.layers[0].moving_mean.numpy(), before[2])


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_an_inner_block_does_not_end_the_outer_one(kind):
    model = made(kind)
    before = weights(model)
    with tfbn.pause_statistics(model):
        with tfbn.pause_statistics(model.layers[0]):
            pass
        model(X, training=True)
    assert_same(model, before)


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_an_exception_ends_the_pause(kind):
    model = made(kind)
    with pytest.raises(ValueError, match="8, 5, 2"), tfbn.pause_statistics(model):
        model(X[..., :2], training=True)
    model(X, training=True)
    assert np.all(model.layers[0].moving_mean.numpy() != 0)


def test_a_training_flag_known_only_as_the_graph_runs_is_obeyed():
    model = made("ours")
    layer = model.layers[0]

    @tf.function
    def step(x, training):
        with tfbn.pause_statistics(model):
            return layer(x, training=training)

    before = weights(model)
    assert np.abs(np.mean(step(X, tf.constant(True)))) < 1e-5
    np.testing.assert_array_equal(step(X, tf.constant(False)), layer(X, training=False))
    assert_same(model, before)


def test_who_collects_moments_does_not_hear_of_a_paused_pass():
    model = made("ours")
    seen = []
    with collect_moments.redirect(lambda layer, moments: seen.append(layer)):
        with tfbn.pause_statistics(model):
            model(X, training=True)
        assert seen == []
        model(X, training=True)
    assert seen == [model.layers[0]]


def test_sharpness_aware_minimization_in_a_train_step_moves_them_once():
    class Sam(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            ascent = [0.05 * tf.sign(g) for g in tape.gradient(loss, self.trainable_variables)]
            for v, e in zip(self.trainable_variables, ascent, strict=True):
                v.assign_add(e)
            with tf.GradientTape() as tape, tfbn.pause_statistics(self):
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            for v, e in zip(self.trainable_variables, ascent, strict=True):
                v.assign_sub(e)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    inputs = keras.Input((5, 3))
    layer = tfbn.BatchNormalization(momentum=0.9)
    model = Sam(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile("sgd", "mse")
    model.fit(X, X[..., :1], batch_size=8, verbose=0)
    np.testing.assert_allclose(layer.moving_mean, 0.1 * X.mean((0, 1)), rtol=1e-5)


def test_a_model_without_batch_normalization_has_nothing_to_pause():
    with tfbn.pause_statistics(keras.Sequential([keras.layers.Dense(1)])):
        pass


def test_what_is_no_model_is_refused():
    with (
        pytest.raises(TypeError, match="Received: model='a name'"),
        tfbn.pause_statistics("a name"),
    ):
        pass
