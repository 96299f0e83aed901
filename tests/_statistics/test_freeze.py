"""What is frozen stands still: under any outer flag, in compiled training, through a file."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn

BOTH = [keras.layers.BatchNormalization, tfbn.BatchNormalization]
X = np.random.default_rng(0).normal(3.0, 2.0, (16, 3)).astype("float32")
Y = X.sum(1, keepdims=True)


def network(norm=tfbn.BatchNormalization) -> keras.Model:
    """A base with two layers, and a head with one."""
    base = keras.Sequential(
        [keras.Input((3,)), norm(name="first"), keras.layers.Dense(4), norm(name="second")],
        name="base",
    )
    image = keras.Input((3,))
    # Called so, a base is thought to be frozen; under fit it is not (keras#20285).
    features = norm(name="third")(base(image, training=False))
    return keras.Model(image, keras.layers.Dense(1)(features), name="whole")


def trained(model: keras.Model, epochs: int = 1) -> dict[str, np.ndarray]:
    """Fits, and tells the weights by path."""
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0)
    return state(model)


def state(model: keras.Model) -> dict[str, np.ndarray]:
    return {
        f"{layer.name}/{weight.name}": weight.numpy()
        for layer in [model, model.get_layer("base")]
        for layer in layer.layers
        for weight in (layer.weights if not isinstance(layer, keras.Model) else [])
    }


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray], layer: str) -> set[str]:
    """Which kinds of weights of a layer changed: "statistics", "affine"."""
    kinds = {"gamma": "affine", "beta": "affine"}
    return {
        kinds.get(name.split("/")[1], "statistics")
        for name in before
        if name.startswith(f"{layer}/") and not np.array_equal(before[name], after[name])
    }


def test_without_freezing_a_base_called_with_training_false_trains_all_the_same():
    model = network(keras.layers.BatchNormalization)  # the fault that freeze is for, keras#20285
    before = state(model)
    assert moved(before, trained(model), "first") == {"statistics", "affine"}


@pytest.mark.parametrize("norm", BOTH)
def test_frozen_layers_stand_still_under_an_outer_training_true(norm):
    model = network(norm)
    tfbn.freeze(model, within=model.get_layer("base"))
    before = state(model)
    after = trained(model)
    assert moved(before, after, "first") == moved(before, after, "second") == set()
    assert moved(before, after, "third") == {"statistics", "affine"}


@pytest.mark.parametrize("norm", BOTH)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_frozen_statistics_are_what_a_training_call_normalizes_by(norm, mode):
    model = keras.Sequential([keras.Input((3,)), norm()])
    tfbn.freeze(model)
    call = tf.function(model) if mode == "graph" else model
    np.testing.assert_array_equal(call(X, training=True), call(X, training=False))


def test_a_training_flag_known_only_as_the_graph_runs_does_not_open_frozen_statistics():
    layer = tfbn.BatchNormalization(freeze_statistics=True)
    call = tf.function(lambda x, training: layer(x, training=training))
    np.testing.assert_array_equal(call(X, tf.constant(True)), layer(X, training=False))
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))


@pytest.mark.parametrize(
    ("frozen", "left"), [("statistics", "affine"), ("affine", "statistics")], ids=str
)
def test_statistics_and_affine_parameters_freeze_apart(frozen, left):
    model = network()
    tfbn.freeze(model, **{left: False})
    before = state(model)
    after = trained(model)
    for layer in ("first", "second", "third"):
        assert moved(before, after, layer) == {left}


def test_an_outer_trainable_true_does_not_open_frozen_affine_parameters():
    model = network()
    tfbn.freeze(model)
    dense_only = [v.path for v in model.trainable_variables]
    model.trainable = False
    model.trainable = True
    assert [v.path for v in model.trainable_variables] == dense_only
    assert len(dense_only) == 4
    assert {"first/gamma", "first/beta"} <= set(state(model))


@pytest.mark.parametrize("norm", BOTH)
def test_it_takes_effect_without_compiling_again(norm):
    model = network(norm)
    weights = [trained(model)]
    tfbn.freeze(model)
    weights.append(trained(model))
    tfbn.unfreeze(model)
    weights.append(trained(model))
    for layer in ("first", "second", "third"):
        assert moved(weights[0], weights[1], layer) == set()
        assert moved(weights[1], weights[2], layer) == {"statistics", "affine"}


@pytest.mark.parametrize("loop", ["fit", "TrainingLoop"])
def test_it_takes_effect_between_the_epochs_of_one_fit(loop):
    model = network()
    after = []

    class FreezeAfterTheFirst(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            after.append(state(model))
            if epoch == 0:
                tfbn.freeze(model)

    if loop == "fit":
        model.compile("sgd", "mse")
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[FreezeAfterTheFirst()])
    else:
        trainer = tfbn.TrainingLoop(model, "sgd", "mse")
        trainer.fit((X, Y), epochs=2, verbose=0, callbacks=[FreezeAfterTheFirst()])
    assert moved(after[0], after[1], "first") == set()


def test_the_training_loop_follows():
    model = network()
    loop = tfbn.TrainingLoop(model, keras.optimizers.SGD(0.01), "mse")
    weights = []
    for change in (tfbn.freeze, tfbn.unfreeze):
        loop.fit((X, Y), verbose=0)
        weights.append(state(model))
        change(model)
    loop.fit((X, Y), verbose=0)
    weights.append(state(model))
    assert moved(weights[0], weights[1], "third") == set()
    assert moved(weights[1], weights[2], "third") == {"statistics", "affine"}


@pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True)], ids=str)
def test_it_is_kept_in_a_file(flags, tmp_path):
    model = network()
    tfbn.freeze(model, *flags)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    third = loaded.get_layer("third")
    assert (third.freeze_statistics, third.freeze_affine) == flags
    before = state(loaded)
    expected = {"statistics", "affine"} - {
        name for name, frozen in zip(("statistics", "affine"), flags, strict=True) if frozen
    }
    assert moved(before, trained(loaded), "third") == expected


def test_it_is_kept_in_a_file_of_a_layer_that_creates_its_own_normalization(tmp_path):
    @keras.saving.register_keras_serializable("freeze")
    class Own(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm = tfbn.BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x):
            return self.norm(x)

    model = keras.Sequential([keras.Input((3,)), Own()])
    tfbn.freeze(model, affine=False)
    model.save(tmp_path / "model.keras")
    norm = keras.models.load_model(tmp_path / "model.keras").layers[0].norm
    assert (norm.freeze_statistics, norm.freeze_affine) == (True, False)
    tfbn.unfreeze(model)
    assert type(model.layers[0]) is Own


@pytest.mark.parametrize("way", ["tfbn.freeze", "layer.trainable"])
def test_unfreeze_of_one_half_leaves_the_other_frozen_whichever_way_it_was(way):
    model = network()
    if way == "tfbn.freeze":
        tfbn.freeze(model)
    else:
        model.get_layer("third").trainable = False
    tfbn.unfreeze(model, affine=False)
    before = state(model)
    assert moved(before, trained(model), "third") == {"statistics"}


def test_the_gradient_of_a_custom_loop_leaves_frozen_parameters_out():
    layer = tfbn.BatchNormalization()
    layer.build((None, 3))
    tfbn.freeze(layer, statistics=False)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(X, training=True))
    assert layer.trainable_variables == []
    assert tape.gradient(loss, layer.trainable_variables) == []


@pytest.mark.parametrize("change", [tfbn.freeze, tfbn.unfreeze])
@pytest.mark.parametrize("half", ["statistics", "affine"])
def test_half_of_a_stock_layer_is_refused_with_the_cure(change, half):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            tfbn.BatchNormalization(),
            keras.layers.BatchNormalization(name="stock"),
        ]
    )
    with pytest.raises(ValueError, match=r"separately.*tfbn\.convert\(model\).*'[^']*stock'"):
        change(model, **{half: False})
    assert not model.layers[0].freeze_statistics
    assert not model.layers[0].freeze_affine
    assert all(layer.trainable for layer in model.layers)


def test_nothing_to_freeze_is_an_error():
    with pytest.raises(ValueError, match=r"no batch normalization layer.*model 'plain'"):
        tfbn.freeze(keras.Sequential([keras.layers.Dense(1)], name="plain"))
    model = network()
    with pytest.raises(ValueError, match=r"Received: statistics=False, affine=False"):
        tfbn.freeze(model, statistics=False, affine=False)
    with pytest.raises(ValueError, match=r"no batch normalization layer.*within=<Dense"):
        tfbn.unfreeze(model, within=model.layers[-1])
    with pytest.raises(TypeError, match=r"Received: model='a name'"):
        tfbn.freeze("a name")
