"""The loss of each network as a function of its weights: values, gradients, products with the Hessian."""

from typing import Any

import numpy as np
import tensorflow as tf

from examples.lectures.networks import Networks


class Surface:
    """The loss of the networks on the same images, each normalized by the statistics of these images.

    A place is a tensor (networks, weights): the trainable weights of each network in a row. The moving
    statistics move too; `tfbn.pause_statistics` holds them.

    Args:
        networks: They stand at one place; `move` takes them to another.
        examples: How many images of the training set.
    """

    def __init__(self, networks: Networks, examples: int):
        self._model = networks.model
        self._number = networks.number
        self._variables = networks.model.trainable_variables
        self._sizes = [int(np.prod(v.shape)) // self._number for v in self._variables]
        images, labels = (part[:examples] for part in networks.setting.train)
        self._images = networks.spread(images)
        self._labels = np.repeat(labels[:, np.newaxis], self._number, axis=1)
        # None of them calls another: the gradient of a custom gradient cannot reach into an inner function.
        self.loss = tf.function(self._loss)
        self.gradient = tf.function(self._gradient)
        self.hessian_times = tf.function(self._hessian_times)

    def place(self) -> tf.Tensor:
        """Where the networks stand."""
        return self._rows(self._variables)

    def move(self, place: tf.Tensor) -> None:
        """Takes the networks there."""
        parts = tf.split(place, self._sizes, axis=1)
        for variable, part in zip(self._variables, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))

    def random(self, seed: int) -> tf.Tensor:
        """A direction for each network, any as likely as any other: (networks, weights), of length 1."""
        return unit(tf.random.stateless_normal(self.place().shape, seed=(seed, 0)))

    def eigenvalues(self, iterations: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the Hessian: the largest, by power iteration, and the root mean square of all, by random directions."""
        bent = [self.hessian_times(self.random(seed)) for seed in range(draws)]
        mean_square = np.mean([length(b)[:, 0] ** 2 for b in bent], axis=0)
        direction = bent[0]
        for _ in range(iterations):
            direction = self.hessian_times(unit(direction))
        return length(direction)[:, 0], np.sqrt(mean_square)

    def _loss(self) -> tf.Tensor:
        """(networks,)."""
        logits = self._model(self._images, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(self._labels, logits)
        return tf.reduce_mean(losses, axis=0)

    def _gradient(self) -> tf.Tensor:
        """(networks, weights)."""
        with tf.GradientTape() as tape:
            loss = self._loss()
        return self._rows(tape.gradient(loss, [v.value for v in self._variables]))

    def _hessian_times(self, direction: tf.Tensor) -> tf.Tensor:
        """(networks, weights): the gradient of what the gradient is along the direction."""
        with tf.GradientTape() as tape:
            along = tf.reduce_sum(self._gradient() * direction)
        return self._rows(tape.gradient(along, [v.value for v in self._variables]))

    def _rows(self, parts: Any) -> tf.Tensor:
        """In every variable, networks come first."""
        return tf.concat([tf.reshape(part, (self._number, -1)) for part in parts], axis=1)


def length(rows: tf.Tensor) -> np.ndarray:
    """(networks, weights) → (networks, 1)."""
    return np.linalg.norm(rows, axis=1, keepdims=True)


def unit(rows: tf.Tensor) -> tf.Tensor:
    """The same directions with length 1."""
    return rows / length(rows)
