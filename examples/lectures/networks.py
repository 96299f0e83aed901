"""Trains the networks of all seeds side by side in one model.

A measurement over five seeds takes five training runs. Small networks spend nearly all their time on overhead
between operations, so here they share the operations and nothing else. Each layer holds the weights of all
networks, and the features of all networks are concatenated on the channel axis, where batch normalization treats
each channel separately anyway. The loss is the sum of all losses, so each network gets its own gradient. Every
seed has its own initial weights and its own order of the data. Each network learns what it would learn alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfbn
from examples.lectures.setting import Setting
from examples.models import Hidden
from examples.optimizers import optimizer as named_optimizer

CLASSES = 10
DIVERGED = 1e15  # its square still fits into float32


@keras.saving.register_keras_serializable("examples.lectures")
class SideBySide(keras.layers.Layer):
    """`keras.layers.Dense` for several networks at once: (batch, networks·inputs) → (batch, networks·units).

    The kernel has shape (networks, inputs, units), the bias (networks, units). Outputs that diverged become 0:
    batch normalization skips updates for a batch with an infinity in any channel, which would affect the others.
    """

    def __init__(
        self,
        units: int,
        networks: int,
        use_bias: bool = True,
        kernel_initializer: Any = "zeros",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units, self.networks, self.use_bias = units, networks, use_bias

    def build(self, input_shape: Sequence[int]) -> None:
        """Creates the weights. `Networks.begin` initializes them."""
        shape = (self.networks, input_shape[-1] // self.networks, self.units)
        self.kernel = self.add_weight(shape=shape, initializer="zeros", name="kernel")
        if self.use_bias:
            bias = (self.networks, self.units)
            self.bias = self.add_weight(shape=bias, initializer="zeros", name="bias")

    def call(self, a: Any) -> Any:
        """Multiplies each network's features by its own kernel."""
        a = tf.reshape(a, (-1, self.networks, self.kernel.shape[1]))
        z = tf.einsum("bni,niu->bnu", a, tf.convert_to_tensor(self.kernel))
        if self.use_bias:
            z += self.bias
        z = tf.where(tf.abs(z) < DIVERGED, z, 0)
        return tf.reshape(z, (-1, self.networks * self.units))


class Networks:
    """Fully connected networks, `copies` of them per seed. The index of a network is ``copy · seeds + seed``.

    Args:
        setting: The data and the seeds.
        hidden: Builds a hidden layer: an `examples.models.Hidden`, or a function
            ``(a, linear, width) -> a'``, where `linear` creates a `SideBySide` layer.
        widths: The numbers of units of the hidden layers.
        optimizer: A key of `examples.optimizers.DEFAULT_RATES`.
        copies: The number of networks per seed. They share their initial draws and the order of the data, and
            differ in the arguments of `begin`.

    Attributes:
        model: The Keras model: (batch, networks·pixels) → (batch, networks, classes).
            The linear layers are named hidden_1, hidden_2, ... and logits.
        number: The number of networks.
    """

    def __init__(
        self,
        setting: Setting,
        hidden: Hidden | Callable[..., Any],
        widths: Sequence[int] = (100, 100, 100),
        optimizer: str = "sgd",
        copies: int = 1,
    ):
        self.setting = setting
        self.number = copies * setting.seeds
        image = a = keras.Input((self.number * setting.pixels,), name="images")
        for index, width in enumerate(widths, 1):
            a = hidden(a, self._linear(f"hidden_{index}"), width)
        a = self._linear("logits")(CLASSES)(a)
        logits = keras.layers.Reshape((self.number, CLASSES))(a)
        self.model = keras.Model(image, logits)
        self._loop = tfbn.TrainingLoop(self.model, named_optimizer(optimizer), self._sum_of_losses)
        self._untrained = self.model.get_weights()
        self._train = tuple(tf.constant(part) for part in setting.train)
        self._infer = tf.function(
            lambda images: self.model(images, training=False),
            autograph=False,
            reduce_retracing=True,
        )

    def begin(self, learning_rate: float, gain: float | np.ndarray = 1.0) -> None:
        """Resets all networks: draws W ~ N(0, gain² / inputs), and sets b = β = 0 and γ = 1.

        Args:
            learning_rate: The learning rate of the following steps.
            gain: One value for all networks, or one for each.
        """
        self.model.set_weights(self._untrained)
        gains = np.broadcast_to(gain, self.number)
        for index, layer in enumerate(self.kernels()):
            _, inputs, units = layer.kernel.shape
            draws = [
                np.random.default_rng((seed, 1 + index)).normal(size=(inputs, units))
                for seed in range(self.setting.seeds)
            ]
            drawn = np.stack(draws * (self.number // self.setting.seeds))
            layer.kernel.assign(drawn * gains[:, np.newaxis, np.newaxis] / np.sqrt(inputs))
        for variable in self._loop.optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self._loop.optimizer.learning_rate = learning_rate
        self._orders = [
            _order(np.random.default_rng((seed, 0)), len(self.setting.train.labels))
            for seed in range(self.setting.seeds)
        ]

    def train(
        self,
        steps: int,
        batch_size: int = 60,
        at: Sequence[int] = (),
        call: Callable[[int], bool | None] | None = None,
    ) -> None:
        """Trains for some steps, continuing where the last call stopped. Each seed has its own mini-batches.

        Args:
            steps: The number of steps.
            batch_size: The number of examples in a mini-batch.
            at: The steps after which to call `call(step)`; 0 means before the first step.
            call: Records something. Training stops when it returns True.
        """
        due = set(at)
        if 0 in due and call is not None:
            call(0)

        def after(batch: int, logs: Any) -> None:
            if batch + 1 in due and call is not None and call(batch + 1):
                self.model.stop_training = True

        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=after)] if due else []
        rows = np.stack(
            [[next(o) for _ in range(steps * batch_size)] for o in self._orders], axis=1
        )
        rows = rows.reshape(steps, batch_size, self.setting.seeds)
        batches = tf.data.Dataset.from_tensor_slices(rows).map(self._batch).prefetch(8)
        self._loop.fit(batches, callbacks=callbacks, verbose=0)

    def kernels(self) -> list[SideBySide]:
        """The linear layers, from the first to the logits."""
        return [layer for layer in self.model.layers if isinstance(layer, SideBySide)]

    def normalizations(self) -> list[tfbn.BatchNormalization]:
        """The batch normalization layers, from the first to the last."""
        return [x for x in self.model.layers if isinstance(x, tfbn.BatchNormalization)]

    def probe(self, layers: Sequence[Any]) -> Callable[..., list[np.ndarray]]:
        """Returns a function that maps images (batch, pixels) to these layers' outputs, each (networks, batch, units).

        The function takes `training`, False by default. It never updates the moving statistics.
        """
        inside = keras.Model(self.model.input, [layer.output for layer in layers])

        def look(images: np.ndarray, training: bool = False) -> list[np.ndarray]:
            with tfbn.pause_statistics(self.model):
                outputs = inside(self.spread(images), training=training)
            return [self.each(output) for output in tf.nest.flatten(outputs)]

        return look

    def gradients(self, variables: Sequence[keras.Variable], rows: np.ndarray) -> list[np.ndarray]:
        """Returns the gradients of each network's loss on these training examples, taken as one mini-batch.

        The moving statistics do not change.

        Returns:
            A gradient of shape (networks, values) for each variable.
        """
        images, labels = (part[rows] for part in self.setting.train)
        labels = np.repeat(labels[:, np.newaxis], self.number, axis=1)
        with tfbn.pause_statistics(self.model), tf.GradientTape() as tape:
            logits = self.model(self.spread(images), training=True)
            loss = tf.reduce_mean(self._sum_of_losses(labels, logits))
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        return [np.reshape(gradient, (self.number, -1)) for gradient in gradients]

    def spread(self, images: np.ndarray | tf.Tensor) -> tf.Tensor:
        """Feeds every network the same images: (batch, pixels) → (batch, networks·pixels)."""
        return tf.tile(images, (1, self.number))

    def each(self, features: np.ndarray | tf.Tensor) -> np.ndarray:
        """Splits features by network: (batch, networks·units) → (networks, batch, units)."""
        parts = np.asarray(features).reshape(len(features), self.number, -1)
        return parts.transpose(1, 0, 2)

    def accuracy(
        self, images: np.ndarray | None = None, labels: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the accuracy of each network in inference mode, by default on the test set.

        Shape: (networks,).
        """
        test = self.setting.test
        images, labels = (
            (test.images if images is None else images),
            (test.labels if labels is None else labels),
        )
        right = [
            self._infer(self.spread(images[i : i + 1000])).numpy().argmax(-1)
            == labels[i : i + 1000, np.newaxis]
            for i in range(0, len(images), 1000)
        ]
        return np.concatenate(right).mean(0)

    def _linear(self, name: str) -> Callable[..., Any]:
        return lambda units, **kwargs: SideBySide(units, self.number, name=name, **kwargs)

    def _batch(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Gathers training examples for all networks; `rows` has shape (batch, seeds)."""
        copies = (1, self.number // self.setting.seeds)
        images, labels = self._train
        features = tf.reshape(tf.gather(images, rows), (len(rows), -1))
        return tf.tile(features, copies), tf.tile(tf.gather(labels, rows), copies)

    def _sum_of_losses(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Undoes Keras's mean over networks, so that each network gets the gradient of its own loss."""
        return self.number * keras.losses.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )


def _order(rng: np.random.Generator, examples: int) -> Iterator[int]:
    """Yields the examples' indices in one shuffled pass after another."""
    while True:
        yield from rng.permutation(examples).tolist()
