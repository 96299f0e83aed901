"""Custom layers and models like those of other packages: their classes create the layers inside them."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

layers = keras.layers
registered = keras.saving.register_keras_serializable("custom_models")


@registered
class Block(layers.Layer):
    """Creates its layers in `__init__`, like KerasHub's MobileNet."""

    def __init__(self, width: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.dense = layers.Dense(width)
        self.norm = layers.BatchNormalization(momentum=0.9)

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.width))

    def call(self, x: Any, training: Any = None) -> Any:
        return self.norm(self.dense(x), training=training)

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], self.width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


@registered
class Nest(layers.Layer):
    """Holds blocks and layers in attributes, lists, tuples and dicts, like KerasHub's HGNetV2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = Block()
        self.listed = [Block(), [layers.BatchNormalization()]]
        self.keyed = {"a": layers.BatchNormalization(), "b": {"c": Block()}}
        self.fixed = (layers.BatchNormalization(), layers.ReLU())
        self.chain = keras.Sequential([layers.Dense(4), layers.BatchNormalization()])

    def build(self, shape: Any) -> None:
        for layer in (self.block, *self.listed[:1], *self.listed[1], *self.fixed, self.chain):
            layer.build(shape)
        self.keyed["a"].build(shape)
        self.keyed["b"]["c"].build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        x = self.block(x, training=training)
        x = self.listed[1][0](self.listed[0](x, training=training), training=training)
        x = self.keyed["b"]["c"](self.keyed["a"](x, training=training), training=training)
        x = self.fixed[1](self.fixed[0](x, training=training))
        return self.chain(x, training=training)


@registered
class Late(layers.Layer):
    """Creates its layers in `build`, like keras-tcn."""

    def build(self, shape: Any) -> None:
        self.blocks = [Block(), layers.BatchNormalization()]
        self.norm = layers.BatchNormalization()
        for layer in (*self.blocks, self.norm):
            layer.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        for layer in (*self.blocks, self.norm):
            x = layer(x, training=training)
        return x


@registered
class Given(layers.Layer):
    """Gets its layer from outside, and saves it in its config, as wrappers do."""

    def __init__(self, norm: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = norm

    def build(self, shape: Any) -> None:
        if not self.norm.built:
            self.norm.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.norm(x, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "norm": keras.saving.serialize_keras_object(self.norm)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Given:
        norm = keras.saving.deserialize_keras_object(config["norm"])
        return cls(**{**config, "norm": norm})


@registered
class Cell(layers.Layer):
    """A recurrent cell with batch normalization."""

    state_size = output_size = 4

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = Block()

    def build(self, shape: Any) -> None:
        self.block.build((*shape[:-1], 4))

    def call(self, x: Any, states: Any, training: Any = None) -> Any:
        h = self.block(x + states[0], training=training)
        return h, [h]


@registered
class Network(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first, self.nest = layers.BatchNormalization(), Nest()

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.nest.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.nest(self.first(x, training=training), training=training)


@registered
class Backbone(keras.Model):
    """A Functional model with its own constructor, like KerasHub's backbones and kimm's models.

    One layer is tracked before the graph, and the others in the order of the graph; one is outside of it.
    """

    def __init__(self, width: int = 4, **kwargs: Any) -> None:
        inputs = keras.Input((4,))
        last = layers.BatchNormalization()
        x = layers.BatchNormalization(name="first")(layers.Dense(width)(inputs))
        levels = {"P1": x}
        x = Block(4)(x) + inputs
        x = layers.Add()([keras.ops.relu(x), layers.Activation(lambda t: 2.0 * t)(x)])
        self.last = last
        super().__init__(inputs, last(x), **kwargs)
        self.width, self.levels, self.auxiliary = width, levels, Block(4)

    def get_config(self) -> dict[str, Any]:
        return {"width": self.width, "name": self.name, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Backbone:
        return cls(**config)


@registered
class Task(keras.Model):
    """A Functional model around a backbone, which preprocesses in `predict`, like KerasHub's tasks."""

    def __init__(self, backbone: Any, preprocessor: Any, **kwargs: Any) -> None:
        inputs = backbone.input
        x = layers.BatchNormalization(name="head_norm")(backbone(inputs))
        super().__init__(inputs, layers.Dense(2, name="head")(x), **kwargs)
        self.backbone, self.preprocessor = backbone, preprocessor
        self.compile()

    def compile(self, optimizer: Any = "sgd", loss: Any = "mse", **kwargs: Any) -> None:
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        return super().predict(self.preprocessor(x), **kwargs)

    def get_config(self) -> dict[str, Any]:
        parts = {"backbone": self.backbone, "preprocessor": self.preprocessor}
        serialized = {k: keras.saving.serialize_keras_object(v) for k, v in parts.items()}
        return {**serialized, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Task:
        for part in ("backbone", "preprocessor"):
            config[part] = keras.saving.deserialize_keras_object(config[part])
        return cls(**config)


def functional(*parts: keras.layers.Layer) -> keras.Model:
    x = inputs = keras.Input((4,))
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


def network() -> keras.Model:
    model = Network()
    model(keras.ops.zeros((1, 4)))
    return model


def shared_block() -> keras.Model:
    block = Block()
    inner = keras.Sequential([keras.Input((4,)), block], name="inner")
    return functional(block, inner, block)


def recurrent() -> keras.Model:
    inputs = keras.Input((3, 4))
    x = layers.Bidirectional(layers.RNN(Cell(), return_sequences=True))(inputs)
    return keras.Model(inputs, layers.TimeDistributed(Block())(x))


MODELS = {
    "block": lambda: functional(Block()),
    "nest": lambda: functional(Nest()),
    "late": lambda: functional(Late()),
    "given": lambda: functional(Given(layers.BatchNormalization())),
    "given a block": lambda: functional(Given(Block())),
    "sequential": lambda: keras.Sequential([keras.Input((4,)), Block(), Late()]),
    "shared": shared_block,
    "recurrent": recurrent,
    "network": network,
    "backbone": Backbone,
    "backbone inside": lambda: functional(Backbone(), Block()),
    "task": lambda: Task(Backbone(), layers.Rescaling(0.5)),
}


@registered
class Noise(layers.Layer):
    """Is random in inference too, as the sampling of a variational autoencoder."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(1)

    def call(self, x: Any) -> Any:
        return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)


class TensorFlowState(layers.Layer):
    """Keeps a scale, a counter and random numbers in variables of TensorFlow, and draws or counts in inference."""

    def __init__(self, what: str = "scale", **kwargs: Any):
        super().__init__(**kwargs)
        self.what = what
        self.variables_of_mine = {"scale": [tf.Variable(1.0)], "count": tf.Variable(0.0)}
        self.generator = tf.random.Generator.from_seed(1)
        self.norm = layers.BatchNormalization() if what == "norm" else None

    def build(self, shape: Any) -> None:
        if self.norm is not None:
            self.norm.build(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        if self.norm is not None:
            x = self.norm(x, training=training)
        if self.what == "counter":
            x = x + self.variables_of_mine["count"].assign_add(1.0)
        if self.what == "generator":
            x = x + self.generator.normal(tf.shape(x))
        return x * self.variables_of_mine["scale"][0]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "what": self.what}

    def state(self) -> list[Any]:
        values = [
            *self.variables_of_mine["scale"],
            self.variables_of_mine["count"],
            self.generator.state,
        ]
        return [value.numpy() for value in values]
