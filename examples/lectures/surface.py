"""The loss of each network as a function of its weights: values, gradients, and Hessian-vector products."""

from typing import Any

import numpy as np
import tensorflow as tf

from examples.lectures.networks import Networks


class Surface:
    """The loss of the networks on a fixed batch of images, normalized by the statistics of that batch.

    A point is a tensor of shape (networks, weights) with the trainable weights of each network in a row.
    Evaluating the loss updates the moving statistics; wrap it in `tfbn.pause_statistics` to prevent that.

    Args:
        networks: The networks. Their weights are the current point; `move` changes it.
        examples: The number of images from the training set.
    """

    def __init__(self, networks: Networks, examples: int):
        self._model = networks.model
        self._number = networks.number
        self._variables = networks.model.trainable_variables
        self._sizes = [int(np.prod(v.shape)) // self._number for v in self._variables]
        images, labels = (part[:examples] for part in networks.setting.train)
        self._images = networks.spread(images)
        self._labels = np.repeat(labels[:, np.newaxis], self._number, axis=1)
        # None calls another: TensorFlow cannot differentiate a custom gradient through a nested tf.function.
        self.loss = tf.function(self._loss)
        self.gradient = tf.function(self._gradient)
        self.hessian_times = tf.function(self._hessian_times)

    def place(self) -> tf.Tensor:
        """Returns the current point."""
        return self._rows(self._variables)

    def move(self, place: tf.Tensor) -> None:
        """Sets the weights to a point."""
        parts = tf.split(place, self._sizes, axis=1)
        for variable, part in zip(self._variables, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))

    def random(self, seed: int) -> tf.Tensor:
        """Returns a uniformly random unit vector for each network, of shape (networks, weights)."""
        return unit(tf.random.stateless_normal(self.place().shape, seed=(seed, 0)))

    def eigenvalues(self, iterations: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the Hessian's largest eigenvalue, by power iteration, and the RMS of all, by random directions."""
        bent = [self.hessian_times(self.random(seed)) for seed in range(draws)]
        mean_square = np.mean([length(b)[:, 0] ** 2 for b in bent], axis=0)
        direction = bent[0]
        for _ in range(iterations):
            direction = self.hessian_times(unit(direction))
        return length(direction)[:, 0], np.sqrt(mean_square)

    def _loss(self) -> tf.Tensor:
        """Returns the losses, of shape (networks,)."""
        logits = self._model(self._images, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(self._labels, logits)
        return tf.reduce_mean(losses, axis=0)

    def _gradient(self) -> tf.Tensor:
        """Returns the gradients, of shape (networks, weights)."""
        with tf.GradientTape() as tape:
            loss = self._loss()
        return self._rows(tape.gradient(loss, [v.value for v in self._variables]))

    def _hessian_times(self, direction: tf.Tensor) -> tf.Tensor:
        """Returns Hessian-vector products of shape (networks, weights): the gradient of gradient · direction."""
        with tf.GradientTape() as tape:
            along = tf.reduce_sum(self._gradient() * direction)
        return self._rows(tape.gradient(along, [v.value for v in self._variables]))

    def _rows(self, parts: Any) -> tf.Tensor:
        """Concatenates variables, whose first axis is the networks, into (networks, weights)."""
        return tf.concat([tf.reshape(part, (self._number, -1)) for part in parts], axis=1)


def length(rows: tf.Tensor) -> np.ndarray:
    """Returns the norm of each row: (networks, weights) → (networks, 1)."""
    return np.linalg.norm(rows, axis=1, keepdims=True)


def unit(rows: tf.Tensor) -> tf.Tensor:
    """Scales each row to length 1."""
    return rows / length(rows)
