"""The loop's steps against formulas: NumPy, one big batch, and Keras's own `fit`."""

import itertools
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._training.loop import TrainingLoop

LAYERS = keras.layers
KINDS = [LAYERS.BatchNormalization, BatchNormalization]
# The rate is a power of two: Keras keeps it in float32.
EPSILON, MOMENTUM, RATE = 1e-3, 0.9, 0.125


class Network:
    """L14 in NumPy: z[l] = W[l] a[l-1], BN with gamma[l] and beta[l], a[l] = tanh; softmax at the end."""

    def __init__(self, sizes: list[int], rng: np.random.Generator):
        self.weights = [rng.normal(0, 0.5, s) for s in itertools.pairwise(sizes)]
        hidden = sizes[1:-1]
        self.gamma = [rng.uniform(0.5, 1.5, n) for n in hidden]
        self.beta = [rng.normal(size=n) for n in hidden]
        self.mean = [np.zeros(n) for n in hidden]
        self.variance = [np.ones(n) for n in hidden]
        self.bias = np.zeros(sizes[-1])

    def step(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Forward, backward for dW, dgamma, dbeta, and one step of gradient descent."""
        m = len(x)
        activations, caches = [x], []
        for k, (gamma, beta) in enumerate(zip(self.gamma, self.beta, strict=True)):
            z = activations[-1] @ self.weights[k]
            mean, variance = z.mean(axis=0), z.var(axis=0)
            inverse = 1 / np.sqrt(variance + EPSILON)
            normal = (z - mean) * inverse
            caches.append((normal, inverse))
            activations.append(np.tanh(gamma * normal + beta))
            self.mean[k] = MOMENTUM * self.mean[k] + (1 - MOMENTUM) * mean
            self.variance[k] = MOMENTUM * self.variance[k] + (1 - MOMENTUM) * variance
        scores = activations[-1] @ self.weights[-1] + self.bias
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log(p[np.arange(m), labels]).mean()

        dz = (p - np.eye(p.shape[1])[labels]) / m
        da = dz @ self.weights[-1].T
        self.weights[-1] = self.weights[-1] - RATE * activations[-1].T @ dz
        self.bias = self.bias - RATE * dz.sum(axis=0)
        for k in reversed(range(len(self.gamma))):
            normal, inverse = caches[k]
            dy = da * (1 - activations[k + 1] ** 2)
            dgamma, dbeta = (dy * normal).sum(axis=0), dy.sum(axis=0)
            dz = self.gamma[k] * inverse / m * (m * dy - dbeta - normal * dgamma)
            da = dz @ self.weights[k].T
            self.weights[k] = self.weights[k] - RATE * activations[k].T @ dz
            self.gamma[k] = self.gamma[k] - RATE * dgamma
            self.beta[k] = self.beta[k] - RATE * dbeta
        return loss

    def all(self) -> list[np.ndarray]:
        """Every number of the network, in the order of Keras's weights."""
        hidden = zip(self.weights, self.gamma, self.beta, self.mean, self.variance, strict=False)
        return [*(part for layer in hidden for part in layer), self.weights[-1], self.bias]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_match_the_formulas_in_float64(kind):
    rng = np.random.default_rng(14)
    sizes, batch = [5, 7, 6, 3], 10
    x, labels = rng.normal(2, 3, (6 * batch, sizes[0])), rng.integers(0, sizes[-1], 6 * batch)
    network = Network(sizes, rng)
    model = keras.Sequential([keras.Input((sizes[0],), dtype="float64")])
    for size in sizes[1:-1]:
        model.add(LAYERS.Dense(size, use_bias=False, dtype="float64"))
        model.add(kind(momentum=MOMENTUM, epsilon=EPSILON, dtype="float64"))
        model.add(LAYERS.Activation("tanh", dtype="float64"))
    model.add(LAYERS.Dense(sizes[-1], dtype="float64"))
    model.set_weights(network.all())

    class Losses(keras.callbacks.Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, batch, logs):
            self.seen.append(logs["loss"])

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    loop = TrainingLoop(model, keras.optimizers.SGD(RATE), loss)
    losses = Losses()
    data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(batch)
    loop.fit(data, epochs=2, callbacks=losses, verbose=0)

    expected = []
    for _ in range(2):
        steps = [
            network.step(x[i : i + batch], labels[i : i + batch]) for i in range(0, len(x), batch)
        ]
        expected += list(np.cumsum(steps) / np.arange(1, 7))  # the metric is a running mean
    np.testing.assert_allclose(losses.seen, expected, rtol=1e-5)  # a float32 metric
    for seen, wanted in zip(model.get_weights(), network.all(), strict=True):
        assert seen.dtype == np.float64
        np.testing.assert_allclose(seen, wanted, rtol=1e-10, atol=1e-12)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "lion": lambda: keras.optimizers.Lion(0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_gamma_and_beta(name):
    """The data is a shifted and scaled normal: gamma and beta alone can fit it, and must."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(64, 3)).astype("float32")
    y = (x - x.mean(axis=0)) / x.std(axis=0) * [2.0, 0.5, 1.5] + [1.0, -1.0, 2.0]
    model = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    loop = TrainingLoop(model, OPTIMIZERS[name](), "mse")
    history = loop.fit((x, y), epochs=30, batch_size=64, verbose=0).history["loss"]
    assert history[-1] < history[0]
    gamma, beta = model.get_weights()[:2]
    assert np.all(np.sign(gamma - 1) == [1, -1, 1])
    assert np.all(np.sign(beta) == [1, -1, 1])


def network(kind: type | None = None, **arguments: object) -> keras.Model:
    """A small convolutional network, the same at every call; without normalization if there is no kind."""
    keras.utils.set_random_seed(1)
    layers = [keras.Input((6, 6, 2))]
    for filters in (4, 5):
        layers.append(LAYERS.Conv2D(filters, 3, use_bias=kind is None, kernel_regularizer="l2"))
        layers += [kind(**arguments)] if kind else []
        layers.append(LAYERS.ReLU())
    return keras.Sequential([*layers, LAYERS.Flatten(), LAYERS.Dropout(0.2), LAYERS.Dense(3)])


def images(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    x = rng.normal(1, 2, (number, 6, 6, 2)).astype("float32")
    return x, np.argmax(x.mean(axis=(1, 2)) @ rng.normal(size=(2, 3)), axis=1)


CROSSENTROPY = {"from_logits": True}


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_keras_fit_to_the_bit(kind):
    """The same bits: weights, optimizer, losses and metrics, on the data, and on that for validation."""
    train, test = images(70), images(40)
    data = tf.data.Dataset.from_tensor_slices((*train, np.linspace(0, 2, 70))).batch(16)

    def settings() -> dict[str, object]:
        """Metrics of their own for each model."""
        return {
            "optimizer": "adam",
            "loss": keras.losses.SparseCategoricalCrossentropy(**CROSSENTROPY),
            "metrics": ["accuracy"],
            "weighted_metrics": [keras.metrics.SparseCategoricalCrossentropy(**CROSSENTROPY)],
        }

    ours, theirs = network(kind), network(kind)
    theirs.compile(**settings())
    expected = theirs.fit(data, epochs=2, shuffle=False, validation_data=test, verbose=0)
    loop = TrainingLoop(ours, **settings())
    seen = loop.fit(data, epochs=2, validation_data=test, verbose=0)
    assert set(seen.history) == {
        prefix + name
        for prefix in ("", "val_")
        for name in ("loss", "accuracy", "sparse_categorical_crossentropy")
    }
    assert seen.history == expected.history
    pairs = zip(
        [*ours.variables, *ours.optimizer.variables],
        [*theirs.variables, *theirs.optimizer.variables],
        strict=True,
    )
    for mine, other in pairs:
        np.testing.assert_array_equal(mine.numpy(), other.numpy(), err_msg=mine.path)
    assert loop.evaluate(test, verbose=0) == theirs.evaluate(*test, verbose=0, return_dict=True)


class Batches:
    """Arrays cut into batches of these sizes: an iterable of a kind of its own."""

    def __init__(self, sizes: list[int], *arrays: np.ndarray):
        self.sizes, self.arrays = sizes, arrays

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        for end, size in zip(np.cumsum(self.sizes), self.sizes, strict=True):
            yield tuple(array[end - size : end] for array in self.arrays)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_updates_equal_those_of_the_concatenated_batches(optimizer):
    """Groups of 3 unequal batches, the last one short, are the updates of their concatenations."""
    x, y = images(50)
    weight = np.linspace(0, 2, 50).astype("float32")
    sizes = [8, 1, 7, 10, 5, 2, 12, 5]
    joined = [16, 17, 17]
    loss = keras.losses.SparseCategoricalCrossentropy(**CROSSENTROPY)
    seen = []
    for parts, steps in ((sizes, 3), (joined, 1)):
        model = network()
        model.pop()  # the dense layer
        model.pop()  # dropout
        model.add(LAYERS.Dense(3))
        loop = TrainingLoop(model, optimizer, loss, accumulation_steps=steps)
        history = loop.fit(Batches(parts, x, y, weight), epochs=3, verbose=0)
        assert int(model.optimizer.iterations) == 9
        seen.append((model.get_weights(), history.history["loss"]))
    for accumulated, whole in zip(seen[0][0], seen[1][0], strict=True):
        np.testing.assert_allclose(accumulated, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_training_with_xla_matches_training_without(steps):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (48, 4)), rng.normal(size=(48, 1))
    seen = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), LAYERS.Dense(5, use_bias=False)])
        model.add(BatchNormalization())
        model.add(LAYERS.Dense(1))
        loop = TrainingLoop(
            model, "adam", "mse", ["mae"], jit_compile=jit_compile, accumulation_steps=steps
        )
        history = loop.fit((x, y), batch_size=16, epochs=3, seed=1, verbose=0).history
        seen.append([*model.get_weights(), np.stack(list(history.values()))])
    for plain, compiled in zip(*seen, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_accumulated_statistics_equal_those_of_the_concatenated_batches(momentum):
    """One update of the moving statistics a group, with the mean and variance of all its values."""
    x = np.random.default_rng(0).normal(1e3, 1, (50, 4)).astype("float32")
    sizes, joined = [8, 1, 7, 10, 5, 2, 12, 5], [16, 17, 17]
    layer = BatchNormalization(momentum=momentum, moving_mean_initializer="ones")
    model = keras.Sequential([keras.Input((4,)), layer])
    loop = TrainingLoop(model, "sgd", "mse", accumulation_steps=3)
    loop.fit(Batches(sizes, x, x), verbose=0)
    mean, variance = np.ones(4), np.ones(4)
    for update, (group,) in enumerate(Batches(joined, x.astype("float64")), start=1):
        keep = momentum if momentum is not None else 1 - 1 / update
        mean = keep * mean + (1 - keep) * group.mean(axis=0)
        variance = keep * variance + (1 - keep) * group.var(axis=0)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)


def test_accumulation_updates_a_shared_layer_once_per_call():
    """A layer that the model calls twice makes two updates a batch, and two a group."""
    x = np.random.default_rng(0).normal(3, 2, (12, 4)).astype("float32")
    layer = BatchNormalization(momentum=0.5, center=False, scale=False)
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs, LAYERS.Dense(1)(layer(inputs) + layer(LAYERS.Rescaling(10.0)(inputs)))
    )
    loop = TrainingLoop(model, "sgd", "mse", accumulation_steps=2)
    loop.fit(Batches([5, 7], x, x[:, :1]), verbose=0)
    mean, variance = np.zeros(4), np.ones(4)
    for values in (x, 10 * x):
        mean = (mean + values.mean(axis=0)) / 2
        variance = (variance + values.var(axis=0)) / 2
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)


def test_accumulation_weights_batches_by_their_unmasked_steps():
    """Keras's loss is a mean over unmasked steps: so is the mean over all batches of a group."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5, 3)).astype("float32")
    for row, length in enumerate(rng.integers(1, 6, 12)):
        x[row, length:] = 0
    y = rng.normal(size=(12, 5, 2)).astype("float32")
    seen = []
    for sizes, steps in (([3, 4, 5], 3), ([12], 1)):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((5, 3)), LAYERS.Masking(), LAYERS.Dense(2)])
        loop = TrainingLoop(model, "sgd", "mse", accumulation_steps=steps)
        loop.fit(Batches(sizes, x, y), epochs=3, verbose=0)
        seen.append(model.get_weights())
    for accumulated, whole in zip(*seen, strict=True):
        np.testing.assert_allclose(accumulated, whole, rtol=1e-5, atol=1e-6)


def test_accumulation_supports_the_sparse_gradients_of_an_embedding():
    x = np.random.default_rng(0).integers(0, 6, (12, 3))
    y = np.arange(12.0)[:, None]
    seen = []
    for sizes, steps in (([3, 4, 5], 3), ([12], 1)):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((3,)), LAYERS.Embedding(6, 2), LAYERS.Flatten()])
        model.add(LAYERS.Dense(1))
        loop = TrainingLoop(model, keras.optimizers.SGD(0.01), "mse", accumulation_steps=steps)
        loop.fit(Batches(sizes, x, y), epochs=3, verbose=0)
        seen.append(model.get_weights())
    for accumulated, whole in zip(*seen, strict=True):
        np.testing.assert_allclose(accumulated, whole, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_adds_nothing_to_an_accumulated_update():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(20, 1))
    seen = []
    for sizes, steps in (([12, 0, 8], 3), ([12, 8], 2)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), BatchNormalization(), LAYERS.Dense(1)])
        loop = TrainingLoop(model, "sgd", "mse", accumulation_steps=steps)
        loop.fit(Batches(sizes, x, y), epochs=2, verbose=0)
        seen.append(model.get_weights())
    for with_empty, without in zip(*seen, strict=True):
        np.testing.assert_allclose(with_empty, without, rtol=1e-6, atol=1e-7)
