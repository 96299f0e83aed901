"""Converting batch normalization layers changes nothing else in a model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from graphs import randomize
from tfbn._models.walk import batch_norm_layers, walk

layers = keras.layers
Stock = keras.layers.BatchNormalization


@keras.saving.register_keras_serializable("test_convert")
class Block(layers.Layer):
    """Layers in attributes, lists, tuples and dicts."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.dense = layers.Dense(width)
        self.norm = Stock()
        self.listed = [Stock(), layers.Dense(width), [Stock()]]
        self.keyed = {"a": Stock(), "b": {"c": Stock()}}
        self.fixed = (Stock(), layers.Dense(width))

    def call(self, x: Any, training: Any = None) -> Any:
        x = self.norm(self.dense(x), training=training)
        x = self.listed[1](self.listed[0](x, training=training))
        x = self.keyed["a"](self.listed[2][0](x, training=training), training=training)
        x = self.keyed["b"]["c"](x, training=training)
        return self.fixed[1](self.fixed[0](x, training=training))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


class Late(layers.Layer):
    """Makes its layer when it is built."""

    def build(self, shape: Any) -> None:
        self.norm = Stock()
        self.norm.build(shape)

    def call(self, x: Any) -> Any:
        return self.norm(x)


class Subclassed(keras.Model):
    """Without a get_config: Keras finds its argument by itself."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.block = Block(width)
        self.late = Late()
        self.base = keras.Sequential([layers.Dense(4), Stock()])
        self.blocks = [Block(3), Block(width)]

    def call(self, x: Any, training: Any = None) -> Any:
        x = self.base(self.late(self.block(x, training=training)), training=training)
        for block in self.blocks:
            x = block(x, training=training)
        return x


@keras.saving.register_keras_serializable("test_convert")
class Cell(layers.Layer):
    """A recurrent cell with batch normalization."""

    state_size = output_size = 3

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(3), Stock()

    def build(self, shape: Any) -> None:
        self.dense.build((*shape[:-1], shape[-1] + 3))
        self.norm.build((*shape[:-1], 3))

    def call(self, x: Any, states: Any, training: Any = None) -> Any:
        joined = keras.ops.concatenate([x, states[0]], -1)
        h = self.norm(self.dense(joined), training=training)
        return h, [h]


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((6, 4)), layers.Dense(5), Stock(), layers.ReLU()])


def functional() -> keras.Model:
    x = keras.Input((6, 4), name="features")
    h = Stock(axis=1, center=False)(layers.Dense(5)(x))
    return keras.Model(x, {"a": h[:, :2] + 1.0, "b": keras.ops.relu(h)}, name="two_outputs")


def nested_and_shared() -> keras.Model:
    norm = Stock(name="shared")
    base = keras.Sequential([keras.Input((6, 4)), layers.Dense(4), norm], name="base")
    x = keras.Input((6, 4))
    h = base(layers.Dense(4)(x), training=False)
    model = keras.Model(x, base(norm(h) + h))
    base.trainable = False
    norm.trainable = True
    return model


def blocks() -> keras.Model:
    x = keras.Input((6, 4))
    return keras.Model(x, layers.Lambda(lambda h: tf.square(h))(Block(5)(x)))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 6, 4), "float32"))
    return model


def wrapped() -> keras.Model:
    x = keras.Input((6, 4))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), Stock()])
    dense, norm = layers.Dense(3), Stock()
    h = layers.TimeDistributed(norm)(layers.TimeDistributed(dense)(x))
    h = layers.Bidirectional(layers.RNN(Cell(), return_sequences=True))(h)
    return keras.Model(x, [h, layers.TimeDistributed(inner)(x), dense(x)])


def half_precision() -> keras.Model:
    x = keras.Input((6, 4))
    return keras.Model(x, Stock(dtype="float16")(layers.Dense(5, dtype="mixed_bfloat16")(x)))


def renormalized() -> keras.Model:
    arguments = {"renorm_clipping": {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}}
    return keras.Sequential([keras.Input((6, 4)), Stock(renorm=True, **arguments)])


def masked() -> keras.Model:
    x = keras.Input((6,), dtype="int32")
    return keras.Model(x, Stock()(layers.Embedding(9, 4, mask_zero=True)(x)))


MODELS = [
    sequential,
    functional,
    nested_and_shared,
    blocks,
    subclassed,
    wrapped,
    half_precision,
    renormalized,
    masked,
]


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {f"{i} {w.path}": np.asarray(w.numpy()) for i, w in enumerate(model.weights)}


def assert_same_bits(actual: Any, expected: Any) -> None:
    keras.tree.map_structure(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("make", MODELS)
def test_there_and_back_again_is_the_identity(make):
    model = randomize(make())
    x = tf.constant([[1, 2, 3, 0, 0, 0]] * 3)
    if make is not masked:
        x = tf.random.stateless_normal((3, 6, 4), (1, 2))
    before, outputs = values(model), model(x, training=False)
    ours = tfbn.convert(model)
    back = tfbn.convert(ours, to=Stock)
    assert {type(layer) for layer in batch_norm_layers(ours)} == {tfbn.BatchNormalization}
    assert {type(layer) for layer in batch_norm_layers(back)} == {Stock}
    for other in (ours, back):
        assert_same_bits(values(other), before)  # Values, order, names and paths.
        named = [(old.name, new.name) for old, new in walked(model, other)]
        assert [old for old, _ in named] == [new for _, new in named]
        flags = [(old.trainable, new.trainable) for old, new in walked(model, other)]
        assert [old for old, _ in flags] == [new for _, new in flags]
    assert type(back) is type(model)
    assert_same_bits(back(x, training=False), outputs)
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(
            tf.cast(a, tf.float32),
            tf.cast(b, tf.float32),
            rtol=1e-2 if make is half_precision else 1e-5,
            atol=1e-2 if make is half_precision else 1e-5,
        ),
        ours(x, training=False),
        outputs,
    )
    # The model itself is as it was.
    assert_same_bits(values(model), before)
    assert {type(layer) for layer in batch_norm_layers(model)} == {Stock}
    assert not {id(w) for w in model.weights} & {id(w) for w in ours.weights}


def walked(*models: keras.Model) -> list[tuple[keras.layers.Layer, ...]]:
    return list(zip(*(walk(model) for model in models), strict=True))


def test_shared_layers_stay_shared():
    ours = tfbn.convert(nested_and_shared())
    assert len(batch_norm_layers(ours)) == 1
    assert ours.get_layer("base").layers[-1] is ours.get_layer("shared")
    model = wrapped()
    back = tfbn.convert(model)
    (dense,) = [layer for layer in back.layers if isinstance(layer, layers.Dense)]
    assert any(getattr(layer, "layer", None) is dense for layer in back.layers)


def test_the_training_flag_recorded_on_a_call_is_honoured():
    x = keras.Input((4,))
    model = keras.Model(x, Stock(name="still")(x, training=False))
    ours = tfbn.convert(model)
    data = np.random.default_rng(0).normal(3, 2, (8, 4)).astype("float32")
    np.testing.assert_allclose(ours(data), data / np.sqrt(1.001), rtol=1e-6)


def test_layers_of_the_model_do_not_see_calls_of_the_new_one():
    model = functional()
    tfbn.convert(model)
    # An output is ill-defined once a layer has been called twice.
    assert keras.Model(model.input, model.layers[1].output).output_shape == (None, 6, 5)


def test_it_can_be_trained_on_where_it_stopped():
    x = np.random.default_rng(0).normal(size=(16, 6, 4)).astype("float32")
    y = np.zeros((16, 6, 5))
    model = sequential()
    model.compile(keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
    model.fit(x, y, epochs=2, verbose=0)
    ours = tfbn.convert(model)
    for a, b in zip(model.optimizer.variables, ours.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    histories = [m.fit(x, y, epochs=2, verbose=0, shuffle=False).history for m in (model, ours)]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-4)
    assert "mae" in histories[1]


def test_a_loss_that_cannot_be_serialized_leaves_it_uncompiled_with_a_warning():
    model = sequential()
    model.compile("sgd", loss=lambda y, z: keras.ops.mean(keras.ops.square(y - z)))
    with pytest.warns(
        UserWarning, match=r"Cannot compile the copy .* Received: .* Compile the copy"
    ):
        ours = tfbn.convert(model)
    assert model.compiled
    assert not ours.compiled


def test_files_of_stock_models_load_convert_and_save(tmp_path):
    model = randomize(functional())
    model.save(tmp_path / "stock.keras")
    ours = tfbn.convert(keras.models.load_model(tmp_path / "stock.keras"))
    ours.save(tmp_path / "ours.keras")
    loaded = keras.models.load_model(tmp_path / "ours.keras")
    assert {type(layer) for layer in batch_norm_layers(loaded)} == {tfbn.BatchNormalization}
    assert_same_bits(values(loaded), values(ours))


def test_layers_can_be_synchronized_and_not():
    ours = tfbn.convert(nested_and_shared(), synchronized=True)
    assert [layer.synchronized for layer in batch_norm_layers(ours)] == [True]
    again = tfbn.convert(ours)
    assert [layer.synchronized for layer in batch_norm_layers(again)] == [True]
    apart = tfbn.convert(ours, to=Stock, synchronized=False)
    assert [layer.synchronized for layer in batch_norm_layers(apart)] == [False]


@pytest.mark.parametrize(
    ("layer", "data", "inputs"),
    [
        (layers.StringLookup(output_mode="one_hot"), ["red", "red", "blue"], ["red", "grey"]),
        (layers.Discretization(num_bins=3, output_mode="one_hot"), [1.0, 2.0, 5.0], [1.0, 4.0]),
        (layers.Normalization(axis=-1), [[1.0], [2.0], [9.0]], [3.0, 4.0]),
    ],
    ids=["lookup", "bins", "normalization"],
)
def test_what_layers_have_adapted_to_moves_along(layer, data, inputs):
    layer.adapt(np.array(data))
    inputs = tf.constant([[x] for x in inputs])
    x = keras.Input((1,), dtype=inputs.dtype)
    model = keras.Model(x, Stock()(layers.Dense(2)(layer(x))))
    back = tfbn.convert(tfbn.convert(model), to=Stock)
    assert_same_bits(back(inputs), model(inputs))
    assert tfbn.fold(model, inputs).report.difference < 1e-6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("virtual_batch_size", 2),
        ("axis", [1, 2]),
        ("momentum", None),
        ("freeze_statistics", True),
        ("freeze_affine", True),
    ],
)
def test_what_keras_has_no_equivalent_of_is_refused_by_name(option, value):
    model = keras.Sequential(
        [keras.Input((6, 4)), tfbn.BatchNormalization(**{option: value}, name="special")]
    )
    with pytest.raises(
        ValueError, match=rf"the layer 'special': .* lacks .* Received: {option}="
    ) as raised:
        tfbn.convert(model, to=Stock)
    assert repr(value) in str(raised.value)
    assert type(tfbn.convert(model).layers[0]) is tfbn.BatchNormalization


def test_contradictory_options_are_refused_by_the_name_of_the_layer():
    model = keras.Sequential(
        [keras.Input((6, 4)), tfbn.BatchNormalization(virtual_batch_size=2, name="ghost")]
    )
    with pytest.raises(ValueError, match=r"Cannot convert the layer 'ghost': .*synchronized"):
        tfbn.convert(model, synchronized=True)


def test_another_class_to_convert_to_is_refused():
    with pytest.raises(
        ValueError, match=r"`to` must be tfbn.BatchNormalization or .* Received: to=<class"
    ):
        tfbn.convert(sequential(), to=layers.LayerNormalization)


def test_a_subclass_with_a_behaviour_of_its_own_is_refused():
    class Special(Stock):
        pass

    model = keras.Sequential([keras.Input((4,)), Special(name="mine")])
    with pytest.raises(ValueError, match=r"the layer 'mine': its class .* Received: .*Special"):
        tfbn.convert(model)


def test_a_layer_that_its_config_cannot_make_again_is_refused():
    class NeedsArray(layers.Layer):
        def __init__(self, array: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.array, self.norm = array, Stock()

        def call(self, x: Any) -> Any:
            return self.norm(x)

    x = keras.Input((4,))
    model = keras.Model(x, NeedsArray(np.zeros(3), name="array")(x))
    with pytest.raises(
        ValueError, match=r"Cannot copy the layer 'array' of class NeedsArray .*get_config"
    ):
        tfbn.convert(model)


def test_a_layer_whose_inside_hangs_on_more_than_its_config_is_refused():
    class Growing(layers.Layer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.parts = [Stock()]

        def call(self, x: Any) -> Any:
            for part in self.parts:
                x = part(x)
            return x

    growing = Growing(name="growing")
    growing.parts.append(Stock())
    x = keras.Input((4,))
    with pytest.raises(ValueError, match=r"it holds other layers\. Received: \['BatchNorm"):
        tfbn.convert(keras.Model(x, growing(x)))


def test_a_functional_class_that_its_config_cannot_create_becomes_a_plain_model():
    class Named(keras.Model):
        def __init__(self, width: int) -> None:
            x = keras.Input((4,))
            super().__init__(x, Stock()(layers.Dense(width)(x)))

    with pytest.warns(UserWarning, match="is a Functional, not a Named"):
        ours = tfbn.convert(Named(3))
    assert ours.output_shape == (None, 3)


@pytest.mark.parametrize("inside", [[], [keras.Input((3,))]], ids=["empty", "input"])
def test_an_empty_sequential_gives_an_empty_one(inside):
    ours = tfbn.convert(keras.Sequential(inside, name="nothing"))
    assert (type(ours), ours.name, ours.layers) == (keras.Sequential, "nothing", [])
    ours.add(layers.Dense(2))
    assert ours(np.ones((1, 3))).shape == (1, 2)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="Keras model or layer"):
        tfbn.convert("model.keras")
