"""Networks for scikit-learn's handwritten digits, and what it takes to train them well or badly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfbn

NETWORKS = ("small", "resnet20", "mobilenetv2")
LAYERS = {"keras": layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}
PIXELS = {"small": 8, "resnet20": 8, "mobilenetv2": 32}
EPOCHS = {"small": 8, "resnet20": 8, "mobilenetv2": 12}
BATCH = 64
MOMENTUM = 0.95  # with 0.99, the shortest trainings leave 16 % of the initial statistics
RATE = {"small": 3e-3, "resnet20": 3e-3, "mobilenetv2": 2e-3}
CLASSES = 10
TRAINING = 1437  # examples; the rest is for validation

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Trained:
    """What a case hands over.

    Attributes:
        model: The model to diagnose.
        data: What to diagnose it with.
        test: Other examples from where the data is from, to compute losses on.
        options: Arguments of `tfbn.diagnose`.
    """

    model: keras.Model
    data: Any
    test: Arrays
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@functools.cache
def digits(pixels: int) -> tuple[Arrays, Arrays]:
    """The training and the validation examples: RGB images with values from 0 to 1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    images = images.repeat(pixels // 8, 1).repeat(pixels // 8, 2).repeat(3, 3)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order].astype("int32")
    train, test = slice(TRAINING), slice(TRAINING, None)
    return (images[train], labels[train]), (images[test], labels[test])


class Lab:
    """Makes and trains networks of one kind, with one kind of layer, from one seed."""

    def __init__(self, network: str, layer: str, seed: int):
        self.network, self.layer, self.seed = network, layer, seed
        self.train, self.test = digits(PIXELS[network])
        self._weights: dict[str, list[np.ndarray]] = {}

    def norm(self, **arguments: Any) -> layers.Layer:
        return LAYERS[self.layer](**arguments)

    def build(self, seed: int = 0, **options: Any) -> keras.Model:
        """An untrained network. The options are those of `network`."""
        keras.utils.set_random_seed(1000 * seed + self.seed)
        return network(self.network, LAYERS[self.layer], **options)

    def compile(self, model: keras.Model, steps: int = 0, **options: Any) -> keras.Model:
        """Compiles with Adam, whose learning rate falls to 0 in so many steps; 0: it is constant."""
        rate = options.pop("rate", RATE[self.network])
        schedule = keras.optimizers.schedules.CosineDecay(rate, steps) if steps else rate
        loss = options.pop("loss", None)
        loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(
            keras.optimizers.Adam(schedule, **options),
            loss,
            metrics=["accuracy"],
            jit_compile=False,
        )
        # Keras would do it in the first step, and trace that step twice.
        model.optimizer.build(model.trainable_variables)
        return model

    def fit(
        self,
        model: keras.Model,
        epochs: float | None = None,
        data: Arrays | None = None,
        batch_size: int = BATCH,
        shuffle: bool = True,
        constant: bool = False,
        order: int = 0,
        **options: Any,
    ) -> keras.Model:
        """Compiles and trains."""
        x, y = self.train if data is None else data
        epochs = EPOCHS[self.network] if epochs is None else epochs
        steps = max(1, round(epochs * len(x) / batch_size))
        self.compile(model, 0 if constant else steps, **options)
        batches = tf.data.Dataset.from_tensor_slices((x, y))
        if shuffle:
            batches = batches.shuffle(len(x), seed=100 * order + self.seed)
        batches = batches.batch(batch_size).repeat()
        model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0)
        return model

    def healthy(self) -> keras.Model:
        """A network that was trained well."""
        return self._kept("healthy", self.build(), self.fit)

    def lagging(self) -> keras.Model:
        """A network whose momentum was too slow: as in keras.applications, for 360 steps."""
        model = self.build(momentum=0.999)
        return self._kept("lagging", model, lambda model: self.fit(model, 360 * BATCH / TRAINING))

    def _kept(
        self, name: str, model: keras.Model, train: Callable[[keras.Model], keras.Model]
    ) -> keras.Model:
        """Trains the model, or gives it the weights of the last time, as if it had been loaded."""
        if name not in self._weights:
            self._weights[name] = train(model).get_weights()
        model.set_weights(self._weights[name])
        return self.compile(model)

    def trained(self, model: keras.Model, data: Any = None, **options: Any) -> Trained:
        return Trained(model, self.train if data is None else data, self.test, options)

    def norms(self, model: keras.Model) -> list[Any]:
        """The batch normalization layers of a model."""
        return [part for part in flatten(model) if isinstance(part, tuple(LAYERS.values()))]


def flatten(layer: Any) -> list[Any]:
    children = getattr(layer, "layers", None) or []
    return [layer, *(part for child in children for part in flatten(child))]


def network(name: str, norm: Any, **options: Any) -> keras.Model:
    """A classifier of digits.

    Args:
        name: One of `NETWORKS`.
        norm: The class of the normalization layers.
        options: ``dropout``: the rate of dropout behind every activation that a normalization follows;
            ``head_dropout``: the rate before the last layer; ``first``: layers that see the images first;
            ``shape``: of the images; everything else goes to the normalization layers.
    """
    dropout = options.pop("dropout", 0.0)
    head_dropout = options.pop("head_dropout", 0.0)
    first = options.pop("first", ())
    shape = options.pop("shape", (PIXELS[name], PIXELS[name], 3))
    norm = functools.partial(norm, **{"momentum": MOMENTUM, **options})
    image = keras.Input(shape)
    x: Any = image
    for layer in first:
        x = layer(x)
    if name == "small":
        x = _small(x, norm, dropout)
    elif name == "resnet20":
        x = _resnet20(x, norm, dropout)
    else:
        x = _mobilenetv2(shape, norm, dropout)(x)
    if head_dropout:
        x = layers.Dropout(head_dropout)(x)
    return keras.Model(image, layers.Dense(CLASSES, name="head")(x))


def _active(x: Any, dropout: float) -> Any:
    x = layers.ReLU()(x)
    return layers.Dropout(dropout)(x) if dropout else x


def _small(x: Any, norm: Any, dropout: float) -> Any:
    x = norm(name="n0")(layers.Conv2D(16, 3, padding="same", name="conv0")(x))
    x = _active(x, dropout)
    x = norm(name="n1")(layers.Conv2D(32, 3, strides=2, padding="same", name="conv1")(x))
    x = layers.Flatten()(_active(x, dropout))
    return layers.ReLU()(norm(name="n2")(layers.Dense(64, name="dense")(x)))


def _resnet20(x: Any, norm: Any, dropout: float) -> Any:
    convolution = functools.partial(layers.Conv2D, kernel_size=3, padding="same", use_bias=False)
    x = layers.ReLU()(norm(name="n0")(convolution(16, name="conv0")(x)))
    number = 0
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if stage and not block else 1
            shortcut = x
            if strides == 2:
                shortcut = layers.Conv2D(channels, 1, strides=2, use_bias=False)(x)
                shortcut = norm()(shortcut)
            number += 1
            x = convolution(channels, strides=strides, name=f"conv{number}a")(x)
            x = _active(norm(name=f"n{number}a")(x), dropout)
            x = norm(name=f"n{number}b")(convolution(channels, name=f"conv{number}b")(x))
            x = layers.ReLU()(layers.Add()([x, shortcut]))
    return layers.GlobalAveragePooling2D()(x)


def _mobilenetv2(shape: Any, norm: Any, dropout: float) -> keras.Model:
    stock = keras.applications.MobileNetV2(
        weights=None, input_shape=shape, alpha=0.35, include_top=False, pooling="avg"
    )

    def replaced(layer: Any) -> Any:
        if isinstance(layer, layers.BatchNormalization):
            return norm(name=layer.name)
        if dropout and isinstance(layer, layers.ReLU):
            return keras.Sequential([layers.ReLU(6.0), layers.Dropout(dropout)], name=layer.name)
        return layer.__class__.from_config(layer.get_config())

    return keras.models.clone_model(stock, clone_function=replaced)


# What cases are made of


class NegativeLoss(keras.losses.Loss):
    """Cross-entropy, less a constant that makes it negative."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        loss = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        return loss - 20.0


class Fixed(keras.Model):
    """Runs a network in one mode, whatever it is called with."""

    def __init__(self, net: keras.Model, training: bool):
        super().__init__()
        self.net, self.fixed = net, training

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.net(x, training=self.fixed)


class Unaware(keras.Model):
    """Runs a network without passing `training` on."""

    def __init__(self, net: keras.Model):
        super().__init__()
        self.net = net

    def call(self, x: Any) -> Any:
        return self.net(x)


class policy:
    """A dtype policy while it is open."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        self._before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self._name)

    def __exit__(self, *error: object) -> None:
        keras.config.set_dtype_policy(self._before)


def custom_loop(lab: Lab, model: keras.Model, training: bool) -> None:
    x, y = lab.train
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=lab.seed).batch(BATCH)

    @tf.function(autograph=False)
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=y, y_pred=model(x, training=training))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)

    for _ in range(EPOCHS[lab.network]):
        for batch in batches:
            step(*batch)


def sequences(lab: Lab, epochs: float = 8, mask: bool = True) -> tuple[keras.Model, Arrays]:
    """A network that reads digits line by line; every example has as much padding as lines."""
    keras.utils.set_random_seed(lab.seed)
    lines = keras.Input((16, 8))
    x = layers.Masking()(lines) if mask else lines
    for number in range(2):
        x = layers.Dense(32)(x)
        x = layers.ReLU()(lab.norm(name=f"n{number}", momentum=0.9)(x))
    x = layers.Flatten()(x[:, :8])
    model = keras.Model(lines, layers.Dense(CLASSES)(x))
    x, y = lab.train
    padded = np.zeros((len(x), 16, 8), "float32")
    padded[:, :8] = x[..., 0] + 0.5
    data = padded, y
    return (lab.fit(model, epochs, data) if epochs else lab.compile(model)), data


def prices(lab: Lab) -> tuple[keras.Model, Arrays]:
    """A network on log-normal inputs, such as prices: a few of them are many times as large as the others."""
    keras.utils.set_random_seed(lab.seed)
    inputs = keras.Input((8,))
    x = lab.norm(name="n0", momentum=0.95)(inputs)
    x = lab.norm(name="n1", momentum=0.95)(layers.Dense(32, activation="relu")(x))
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    random = np.random.default_rng(lab.seed)
    x = np.exp(1.5 * random.normal(size=(3000, 8))).astype("float32")
    data = x, np.log(x[:, :1]) + np.log(x[:, 1:2])
    model.fit(*data, batch_size=32, epochs=15, verbose=0)
    return model, data


def shifted(lab: Lab, change: Callable[[np.ndarray], np.ndarray]) -> Trained:
    """A healthy network, used on images that are changed."""
    train, test = ((change(x), y) for x, y in (lab.train, lab.test))
    return Trained(lab.healthy(), train, test)


def inverted(data: Arrays) -> Arrays:
    return 1 - data[0], data[1]


def contrast(data: Arrays) -> Arrays:
    return 0.3 * data[0] + 0.4, data[1]


def by_class(data: Arrays) -> Arrays:
    order = np.argsort(data[1], kind="stable")
    return data[0][order], data[1][order]
