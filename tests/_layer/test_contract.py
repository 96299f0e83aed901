"""What Keras asks of a layer, and a Keras user of BatchNormalization: all of it holds for ours."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from cases import LAYOUTS, MODES, Case
from layer_runs import compiled, weights

X = np.random.default_rng(0).normal(1.0, 2.0, (8, 3)).astype("float32")
IMAGES = np.random.default_rng(1).normal(1.0, 2.0, (8, 4, 4, 3)).astype("float32")


def trained(**arguments) -> tfbn.BatchNormalization:
    """A layer that has seen one batch."""
    layer = tfbn.BatchNormalization(**{"momentum": 0.5, **arguments})
    layer(X, training=True)
    return layer


def by_batch(y: tf.Tensor, x: np.ndarray = X) -> bool:
    """Whether y is x normalized by its own statistics."""
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    return bool(np.allclose(y, expected, rtol=1e-4, atol=1e-5))


# Arguments


def test_arguments_are_keras_s_in_the_same_order_with_the_same_defaults():
    def arguments(layer_class):
        parameters = inspect.signature(layer_class.__init__).parameters.values()
        return [p for p in parameters if p.name not in ("self", "kwargs")]

    stock = arguments(keras.layers.BatchNormalization)
    names = [p.name for p in stock]
    ours = arguments(tfbn.BatchNormalization)
    assert [(p.name, p.default, p.kind) for p in ours if p.name in names] == [
        (p.name, p.default, p.kind) for p in stock
    ]
    own = [p for p in ours if p.kind is p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in own] == [
        ("virtual_batch_size", None),
        ("freeze_statistics", False),
        ("freeze_affine", False),
    ]
    assert ours[-len(own) :] == own  # all that Keras may give by position is before


def test_call_arguments_are_keras_s():
    ours = inspect.signature(tfbn.BatchNormalization.call).parameters
    stock = inspect.signature(keras.layers.BatchNormalization.call).parameters
    assert [(n, p.default) for n, p in ours.items()] == [(n, p.default) for n, p in stock.items()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_have_the_shape_of_the_channel_axes_in_ascending_order(layout):
    shape, axis = layout
    layer = tfbn.BatchNormalization(axis=axis)
    layer.build((None, *shape))
    axes = sorted(a % (len(shape) + 1) for a in ([axis] if isinstance(axis, int) else axis))
    for weight in layer.weights:
        assert tuple(weight.shape) == tuple(shape[a - 1] for a in axes), weight.name


def test_a_list_of_one_axis_is_that_axis():
    ours, listed = tfbn.BatchNormalization(axis=1), tfbn.BatchNormalization(axis=[1])
    np.testing.assert_array_equal(ours(IMAGES, training=True), listed(IMAGES, training=True))
    assert [w.shape for w in ours.weights] == [w.shape for w in listed.weights]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False}, {"renorm": True}],
    ids=str,
)
def test_weight_names_and_order_are_keras_s(arguments):
    ours, stock = tfbn.BatchNormalization(**arguments), keras.layers.BatchNormalization(**arguments)
    for layer in (ours, stock):
        layer.build((None, 3))
    for kind in ("weights", "trainable_weights", "non_trainable_weights"):
        assert [w.name for w in getattr(ours, kind)] == [w.name for w in getattr(stock, kind)]


def test_cumulative_average_adds_only_the_count_of_updates():
    layer = trained(momentum=None)
    names = [w.name for w in layer.weights]
    assert names == ["gamma", "beta", "moving_mean", "moving_variance", "update_count"]
    np.testing.assert_array_equal(weights(layer)["update_count"], [1, 1, 1])


def test_a_file_of_version_0_1_loads_whose_update_count_was_one_number():
    layer = trained(momentum=None)
    store = {}
    layer.save_own_variables(store)
    store["4"] = np.int64(7)
    layer.load_own_variables(store)
    np.testing.assert_array_equal(weights(layer)["update_count"], [7, 7, 7])


def test_weights_of_a_stock_layer_fit():
    stock = keras.layers.BatchNormalization(momentum=0.5)
    stock(X, training=True)
    ours = tfbn.BatchNormalization()
    ours.build((None, 3))
    ours.set_weights(stock.get_weights())
    np.testing.assert_allclose(ours(X), stock(X), rtol=1e-5, atol=1e-6)


def test_initializers_give_the_first_values():
    layer = tfbn.BatchNormalization(
        beta_initializer=keras.initializers.Constant(2.0),
        gamma_initializer=keras.initializers.Constant(3.0),
        moving_mean_initializer=keras.initializers.Constant(4.0),
        moving_variance_initializer=keras.initializers.Constant(5.0),
    )
    layer.build((None, 1))
    first = {name: float(value[0]) for name, value in weights(layer).items()}
    assert first == {"gamma": 3.0, "beta": 2.0, "moving_mean": 4.0, "moving_variance": 5.0}


def test_renorm_starts_from_the_moving_statistics():
    layer = tfbn.BatchNormalization(
        renorm=True,
        moving_mean_initializer=keras.initializers.Constant(4.0),
        moving_variance_initializer=keras.initializers.Constant(9.0),
    )
    layer.build((None, 1))
    first = {name: float(value[0]) for name, value in weights(layer).items()}
    assert first["renorm_mean"] == 4.0
    assert first["moving_stddev"] == first["renorm_stddev"] == 3.0


def test_regularizers_give_losses():
    layer = trained(beta_regularizer="l2", gamma_regularizer=keras.regularizers.L1(0.5))
    layer.beta.assign([1.0, 2.0, 3.0])
    assert sorted(float(loss) for loss in layer.losses) == pytest.approx([0.14, 1.5])


def test_constraints_are_on_the_weights():
    layer = trained(beta_constraint="non_neg", gamma_constraint=keras.constraints.UnitNorm(axis=0))
    assert isinstance(layer.beta.constraint, keras.constraints.NonNeg)
    assert isinstance(layer.gamma.constraint, keras.constraints.UnitNorm)
    layer.beta.assign([-1.0, 2.0, -3.0])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(layer.trainable_variables)
    optimizer.apply_gradients([(tf.zeros([3]), v) for v in layer.trainable_variables])
    np.testing.assert_array_equal(layer.beta.numpy(), [0.0, 2.0, 0.0])


# Momentum


@pytest.mark.parametrize("mode", MODES)
def test_momentum_zero_keeps_the_last_batch_and_one_the_first_values(mode):
    last, first = tfbn.BatchNormalization(momentum=0.0), tfbn.BatchNormalization(momentum=1.0)
    for layer in (last, first):
        layer.build((None, 3))
        compiled(lambda x, layer=layer: layer(x, training=True), mode)(tf.constant(X))
    np.testing.assert_allclose(last.moving_mean.numpy(), X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(last.moving_variance.numpy(), X.var(0), rtol=1e-6)
    np.testing.assert_array_equal(first.moving_mean.numpy(), np.zeros(3))
    np.testing.assert_array_equal(first.moving_variance.numpy(), np.ones(3))


@pytest.mark.parametrize("mode", MODES)
def test_no_momentum_is_the_plain_average_over_the_updates(mode):
    layer = tfbn.BatchNormalization(momentum=None)
    layer.build((None, 3))
    batches = np.random.default_rng(2).normal(3.0, 2.0, (5, 8, 3)).astype("float32")
    train = compiled(lambda x: layer(x, training=True), mode)
    for batch in batches:
        train(tf.constant(batch))
    np.testing.assert_allclose(layer.moving_mean.numpy(), batches.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), batches.var(1).mean(0), rtol=1e-5)


# The training flag


@pytest.mark.parametrize("training", [True, np.True_, "tensor"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_training_true_normalizes_by_the_batch_and_moves_the_statistics(training, mode):
    layer = tfbn.BatchNormalization(momentum=0.5)
    layer.build((None, 3))
    flag = tf.constant(True) if training == "tensor" else training
    y = compiled(lambda x: layer(x, training=flag), mode)(tf.constant(X))
    assert by_batch(y)
    np.testing.assert_allclose(layer.moving_mean.numpy(), X.mean(0) / 2, rtol=1e-5)


@pytest.mark.parametrize("training", [False, None, np.False_, "tensor"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_training_false_or_unsaid_takes_the_moving_statistics_and_leaves_them(training, mode):
    layer = trained()
    before = weights(layer)
    flag = tf.constant(False) if training == "tensor" else training
    y = compiled(lambda x: layer(x, training=flag), mode)(tf.constant(X))
    expected = (X - before["moving_mean"]) / np.sqrt(before["moving_variance"] + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("arguments", [{}, {"renorm": True}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_training_flag_that_is_known_only_when_the_graph_runs(mode, arguments):
    layer, plain = (tfbn.BatchNormalization(**arguments) for _ in range(2))

    def step(layer, x, training):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
            loss = tf.reduce_sum(y**3)
        return y, *tape.gradient(loss, [x, *[v.value for v in layer.trainable_variables]])

    for each in (layer, plain):
        each.build((None, 3))
    run = compiled(lambda x, training: step(layer, x, training), mode)
    for flag in (True, False, True):
        got = run(tf.constant(X), tf.constant(flag))
        for a, b in zip(got, step(plain, tf.constant(X), flag), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        for name, value in weights(plain).items():
            np.testing.assert_allclose(weights(layer)[name], value, rtol=1e-6, err_msg=name)


def functional(layer: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((3,))
    return keras.Model(inputs, layer(inputs))


def test_in_a_functional_model_fit_trains_and_predict_infers():
    layer = tfbn.BatchNormalization(momentum=0.5)
    model = functional(layer)
    model.compile("sgd", "mse")
    model.predict(X, verbose=0)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), np.zeros(3))
    model.fit(X, X, batch_size=8, verbose=0)
    np.testing.assert_allclose(layer.moving_mean.numpy(), X.mean(0) / 2, rtol=1e-5)
    before = weights(layer)
    model.evaluate(X, X, verbose=0)
    assert not by_batch(model.predict(X, verbose=0))
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_in_a_functional_model_the_call_s_flag_holds():
    layer = tfbn.BatchNormalization()
    model = functional(layer)
    assert by_batch(model(X, training=True))
    assert by_batch(model(X, training=tf.constant(True)))
    assert not by_batch(model(X, training=False))
    assert not by_batch(model(X))


def test_fit_with_xla_moves_as_without():
    models = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(4), tfbn.BatchNormalization()]
        )
        model.compile("sgd", "mse", jit_compile=jit_compile)
        model.fit(X, np.ones((8, 4)), batch_size=4, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    for a, b in zip(models[0].weights, models[1].weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-5, err_msg=a.path)


@pytest.mark.parametrize("training", [True, "tensor"])
def test_not_trainable_is_inference_whatever_the_flag(training):
    layer = trained()
    layer.trainable = False
    before = weights(layer)
    y = layer(X, training=tf.constant(True) if training == "tensor" else training)
    np.testing.assert_array_equal(y, layer(X, training=False))
    for name, value in weights(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert layer.trainable_weights == []
    assert len(layer.non_trainable_weights) == 4
    layer.trainable = True
    assert by_batch(layer(X, training=True))
    assert len(layer.trainable_weights) == 2


def test_without_center_and_scale_there_is_nothing_to_train():
    layer = trained(center=False, scale=False)
    assert layer.trainable_weights == []
    assert layer.gamma is None
    assert layer.beta is None
    assert by_batch(layer(X, training=True))


# Configuration and files

CONFIGURED = {
    "axis": [-1, 1],
    "momentum": None,
    "epsilon": 1e-4,
    "center": True,
    "scale": True,
    "beta_initializer": keras.initializers.Constant(0.5),
    "gamma_initializer": "he_normal",
    "moving_mean_initializer": keras.initializers.RandomNormal(seed=3),
    "moving_variance_initializer": "ones",
    "beta_regularizer": keras.regularizers.L2(0.1),
    "gamma_regularizer": "l1",
    "beta_constraint": keras.constraints.MaxNorm(2.0),
    "gamma_constraint": "non_neg",
    "virtual_batch_size": 4,
    "freeze_statistics": True,
    "freeze_affine": True,
    "name": "named",
    "trainable": False,
    "dtype": "mixed_bfloat16",
}
RENORMED = {
    "renorm": True,
    "renorm_clipping": {"rmax": 3.0, "dmax": 5.0},
    "renorm_momentum": 0.9,
    "synchronized": False,
}


@pytest.mark.parametrize("arguments", [{}, CONFIGURED, RENORMED, {"synchronized": True}])
def test_config_survives_json(arguments):
    layer = tfbn.BatchNormalization(**arguments)
    config = json.loads(json.dumps(layer.get_config()))
    again = tfbn.BatchNormalization.from_config(config)
    assert again.get_config() == layer.get_config()
    whole = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    )
    assert type(whole) is tfbn.BatchNormalization
    assert whole.get_config() == layer.get_config()


def test_config_names_every_argument_and_keeps_its_value():
    config = tfbn.BatchNormalization(**CONFIGURED).get_config()
    arguments = inspect.signature(tfbn.BatchNormalization.__init__).parameters
    assert set(arguments) - {"self", "kwargs"} <= set(config)
    plain = ("momentum", "epsilon", "center", "scale", "virtual_batch_size", "name", "trainable")
    assert {k: config[k] for k in plain} == {k: CONFIGURED[k] for k in plain}
    config = tfbn.BatchNormalization(**RENORMED).get_config()
    assert {k: config[k] for k in RENORMED} == RENORMED


def test_config_of_a_stock_layer_builds_ours():
    stock = keras.layers.BatchNormalization(
        momentum=0.9, beta_regularizer="l2", gamma_initializer="he_normal", name="bn"
    )
    ours = tfbn.BatchNormalization.from_config(stock.get_config())
    config = ours.get_config()
    assert {k: config[k] for k in stock.get_config()} == stock.get_config()


def test_config_can_be_changed_without_changing_the_layer():
    layer = tfbn.BatchNormalization(axis=[1, 2], **RENORMED)
    config = layer.get_config()
    config["axis"].append(3)
    config["renorm_clipping"]["rmax"] = 7.0
    assert (
        layer.get_config()
        == tfbn.BatchNormalization(axis=[1, 2], name=layer.name, **RENORMED).get_config()
    )


def test_build_config_builds_an_equal_layer():
    layer = tfbn.BatchNormalization(axis=[1, -1])
    layer.build((None, 4, 5, 3))
    again = tfbn.BatchNormalization.from_config(layer.get_config())
    again.build_from_config(json.loads(json.dumps(layer.get_build_config())))
    assert again.built
    assert [(w.name, w.shape) for w in again.weights] == [(w.name, w.shape) for w in layer.weights]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"renorm": True}, {"momentum": None}, {"axis": [-1]}, CONFIGURED],
    ids=["default", "renorm", "cumulative", "list", "all"],
)
def test_keras_file_keeps_weights_and_outputs(arguments, tmp_path):
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, tfbn.BatchNormalization(**arguments)(inputs))
    model(IMAGES, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.layers[1]) is tfbn.BatchNormalization
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    np.testing.assert_array_equal(model(IMAGES), again(IMAGES))
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")


def test_weights_file_of_a_stock_model_loads_into_ours(tmp_path):
    def model(layer_class):
        return keras.Sequential([keras.Input((3,)), layer_class(momentum=0.5)])

    stock, ours = model(keras.layers.BatchNormalization), model(tfbn.BatchNormalization)
    stock(X, training=True)
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_allclose(ours(X), stock(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["copy", "pickle"],
)
def test_copies_are_equal_and_independent(copied):
    layer = trained()
    again = copied(layer)
    np.testing.assert_array_equal(again(X), layer(X))
    again(X + 5, training=True)
    assert not np.allclose(again.moving_mean.numpy(), layer.moving_mean.numpy())


# In models


def test_clone_model_puts_ours_in_the_place_of_keras_s():
    inputs = keras.Input((3,))
    x = keras.layers.Dense(4)(inputs)
    x = keras.layers.BatchNormalization(name="bn")(x)
    model = keras.Model(inputs, keras.layers.ReLU()(x))

    def swap(layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return tfbn.BatchNormalization.from_config(layer.get_config())
        return layer.__class__.from_config(layer.get_config())

    # The recorded call carries mask=None, which the clone hands to our layer.
    clone = keras.models.clone_model(model, clone_function=swap)
    assert isinstance(clone.get_layer("bn"), tfbn.BatchNormalization)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(clone(X), model(X), rtol=1e-5, atol=1e-6)
    again = keras.models.clone_model(clone)
    assert isinstance(again.get_layer("bn"), tfbn.BatchNormalization)


def test_masks_reach_the_layer_and_pass_through_it():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 2, 3, 4]])
    layer = tfbn.BatchNormalization(momentum=0.0)
    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    inputs = keras.Input((4,), dtype="int32")
    outputs = layer(embedding(inputs))
    assert layer.supports_masking
    model = keras.Model(inputs, outputs)
    model(tokens, training=True)
    seen = embedding(tokens).numpy()[tokens != 0]
    np.testing.assert_allclose(layer.moving_mean.numpy(), seen.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.moving_variance.numpy(), seen.var(0), rtol=1e-5, atol=1e-9)
    # What comes after sees the mask too: pooling averages over the unmasked steps alone.
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    y = keras.Model(inputs, [outputs, pooled])(tokens)
    first = y[0].numpy()[0, :2].mean(0)
    np.testing.assert_allclose(y[1].numpy()[0], first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("training", [True, False])
def test_inside_time_distributed_as_keras_s(mode, training):
    x = np.random.default_rng(3).normal(1.0, 2.0, (6, 4, 3)).astype("float32")
    results = []
    for layer_class in (tfbn.BatchNormalization, keras.layers.BatchNormalization):
        layer = keras.layers.TimeDistributed(layer_class(momentum=0.5))
        layer.build((None, 4, 3))
        y = compiled(lambda x, layer=layer: layer(x, training=training), mode)(tf.constant(x))
        results.append([y.numpy(), *[w.numpy() for w in layer.weights]])
    for ours, stock in zip(*results, strict=True):
        np.testing.assert_allclose(ours, stock, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="this Keras has no RematScope")
def test_under_rematerialization_gradients_are_the_same_and_the_statistics_move():
    def step(layer):
        x = tf.constant(X)
        layer.build((None, 3))
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

    with keras.RematScope(mode="full"):
        layer = tfbn.BatchNormalization(momentum=0.0)
    for a, b in zip(step(layer), step(tfbn.BatchNormalization()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean.numpy(), X.mean(0), rtol=1e-5)


def test_shared_layer_called_twice_moves_twice_in_order():
    layer = tfbn.BatchNormalization(momentum=0.5)
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], keras.layers.Add()([layer(a), layer(b)]))
    assert len(model.weights) == 4
    model([X, X + 2], training=True)
    expected = 0.5 * (0.5 * X.mean(0)) + 0.5 * (X + 2).mean(0)
    np.testing.assert_allclose(layer.moving_mean.numpy(), expected, rtol=1e-5)


def test_subclassed_model_trains_with_fit():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)
            self.norm = tfbn.BatchNormalization(momentum=0.5)

        def call(self, inputs, training=None):
            return self.norm(self.dense(inputs), training=training)

    model = Net()
    model.compile("adam", "mse")
    model.fit(X, np.ones((8, 4)), verbose=0)
    assert np.abs(model.norm.moving_mean.numpy()).max() > 0
    assert model.predict(X, verbose=0).shape == (8, 4)


def test_summary_counts_the_weights():
    lines: list[str] = []
    functional(tfbn.BatchNormalization()).summary(print_fn=lambda line, **_: lines.append(line))
    text = "\n".join(lines)
    assert "Trainable params: 6" in text
    assert "Non-trainable params: 6" in text


# Shapes and graphs


def test_symbolic_calls_know_shape_and_dtype():
    layer = tfbn.BatchNormalization(dtype="mixed_float16")
    assert layer.compute_output_shape((None, 7, 3)) == (None, 7, 3)
    y = layer(keras.Input((7, 3)))
    assert (y.shape, y.dtype) == ((None, 7, 3), "float16")
    spec = layer.compute_output_spec(keras.KerasTensor((2, 7, 3)))
    assert (spec.shape, spec.dtype) == ((2, 7, 3), "float16")


@pytest.mark.parametrize("training", [True, False])
def test_unknown_spatial_sizes(training):
    inputs = keras.Input((None, None, 3))
    layer = tfbn.BatchNormalization()
    model = keras.Model(inputs, layer(inputs))
    run = tf.function(
        lambda x: model(x, training=training),
        input_signature=[tf.TensorSpec([None, None, None, 3])],
    )
    for size in (4, 2):
        x = tf.constant(IMAGES[:, :size, :size])
        again = tfbn.BatchNormalization()
        again.build(x.shape)
        again.set_weights(layer.get_weights())
        expected = again(x, training=training)
        np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_one_trace_serves_all_batches(mode):
    layer = tfbn.BatchNormalization()
    layer.build((None, 3))
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([None, 3])], jit_compile=(mode == "xla"))
    def train(x):
        traces.append(x)
        return layer(x, training=True)

    for size in (8, 4, 4, 2):
        assert train(tf.constant(X[:size])).shape == (size, 3)
    assert len(traces) == 1


def test_first_call_inside_a_function_builds_the_layer():
    layer = tfbn.BatchNormalization(momentum=0.5)

    @tf.function
    def train(x):
        return layer(x, training=True)

    assert by_batch(train(tf.constant(X)))
    np.testing.assert_allclose(layer.moving_mean.numpy(), X.mean(0) / 2, rtol=1e-5)


# Dtypes


@pytest.mark.parametrize(
    ("policy", "compute", "variables"),
    [
        ("float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("renorm", [False, True])
def test_weights_are_at_least_float32_and_outputs_of_the_compute_dtype(
    policy, compute, variables, renorm
):
    layer = tfbn.BatchNormalization(dtype=keras.DTypePolicy(policy), renorm=renorm)
    x = tf.constant(X)  # float32, which Keras casts to the compute dtype
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
    assert y.dtype == compute
    assert layer(x).dtype == compute
    assert {str(w.dtype) for w in layer.weights} == {variables}
    gradients = tape.gradient(y, [v.value for v in layer.trainable_variables])
    assert {g.dtype.name for g in gradients} == {variables}
    assert layer.dtype_policy.name == policy
    again = tfbn.BatchNormalization.from_config(layer.get_config())
    assert again.dtype_policy.name == policy


def test_global_policy_is_followed():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = tfbn.BatchNormalization()
        assert layer(X, training=True).dtype == "bfloat16"
        assert layer.moving_mean.dtype == "float32"
    finally:
        keras.config.set_dtype_policy(before)


def test_moving_statistics_of_half_precision_move_by_less_than_its_rounding():
    # In float16, 1 + 2^-12 would be 1: the average would stand still.
    layer = tfbn.BatchNormalization(momentum=1 - 2.0**-12, dtype="float16")
    layer.build((None, 1))
    layer.moving_mean.assign([1.0])
    layer(np.full((4, 1), 2.0, "float16"), training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), [1 + 2.0**-12], rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_as_float32_does_within_its_rounding(dtype):
    case = Case(LAYOUTS[5], dtype)
    x = tf.cast(case.batches()[0].x, dtype)
    half, full = tfbn.BatchNormalization(dtype=dtype), tfbn.BatchNormalization()
    y, expected = half(x, training=True), full(tf.cast(x, "float32"), training=True)
    np.testing.assert_array_equal(y, tf.cast(expected, dtype))
