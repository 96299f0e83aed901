"""What tells similar causes apart: the model run in another way, on the batches set aside.

Each experiment runs when a cause first asks for it; a healthy model needs none.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._models.intercept import intercept_calls, traced_once
from tfbn._models.restored import variables_restored
from tfbn._models.walk import BatchNormLayer, name_of
from tfbn._moments.moments import reduced_axes
from tfbn._statistics.diagnose.batch_mode import batch_statistics, no_updates
from tfbn._statistics.diagnose.held_out import Batch
from tfbn._statistics.diagnose.losses import Losses
from tfbn._statistics.diagnose.structure import random_layers
from tfbn._statistics.layer_call import values
from tfbn._statistics.plan import unpacked
from tfbn._statistics.traced_model import Forward

EPSILONS = (1e-3, 1e-5)
"""The defaults of Keras and of PyTorch."""
MOST_CLASSES = 1000

Statistics = tuple[np.ndarray, np.ndarray]
"""Mean and variance, with the shape of the moving statistics."""


class Experiments:
    """Runs a model in other ways.

    Args:
        model: The model.
        layers: Its built batch normalization layers.
        forward: Runs it in inference mode.
        batches: What to run it on.
        losses: Computes the losses, if there are any.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        layers: Sequence[BatchNormLayer],
        forward: Forward,
        batches: Sequence[Batch],
        losses: Losses | None = None,
    ):
        self._model = model
        self._layers = layers
        self._forward = forward
        self._batches = batches
        self._losses = losses

    @functools.cached_property
    def in_training(self) -> Mapping[str, Statistics]:
        """What each layer sees on average in a batch: what the moving statistics tend to in training."""
        return self._average(lambda x, axes, mask: values(x, axes, mask)[1:])

    @functools.cached_property
    def with_noise(self) -> Mapping[str, Statistics]:
        """What each layer sees on average in a batch while dropout and the like are active."""
        return self._average(lambda x, axes, mask: values(x, axes, mask)[1:], noise=True)

    @functools.cached_property
    def without_masks(self) -> Mapping[str, Statistics]:
        """What each layer sees on average in a batch if it does not look at masks."""
        return self._average(lambda x, axes, mask: values(x, axes, None)[1:])

    @functools.cached_property
    def between_classes(self) -> Mapping[str, np.ndarray]:
        """The variance between the means of the classes in each layer; empty without such labels."""
        labels = self._labels()
        if labels is None:
            return {}
        classes = np.unique(labels)
        found = {}
        for name, parts in self._observe(_example_means).items():
            means = np.concatenate(parts).astype("float64")
            if len(means) != len(labels):  # The model calls the layer several times.
                continue
            overall = means.mean(0)
            found[name] = sum(
                np.mean(labels == one) * np.square(means[labels == one].mean(0) - overall)
                for one in classes
            )
        return found

    @functools.cached_property
    def better_epsilon(self) -> float | None:
        """The epsilon, of the usual ones, that lowers the loss the most; None if none does."""
        if self._losses is None:
            return None
        found = {}
        for epsilon in EPSILONS:
            if all(layer.epsilon == epsilon for layer in self._layers):
                continue
            mode = f"epsilon={epsilon:g}"
            run = functools.partial(self._forward, self._model)
            self._losses.add(mode, run, functools.partial(self._epsilon, epsilon))
            if self._losses.is_better(mode, over="inference"):
                found[epsilon] = self._losses.modes[mode]["loss"]
        return min(found, key=found.__getitem__, default=None)

    @contextlib.contextmanager
    def _epsilon(self, epsilon: float) -> Iterator[None]:
        """While open, all layers have this epsilon."""
        before = [layer.epsilon for layer in self._layers]
        try:
            for layer in self._layers:
                layer.epsilon = epsilon
            with no_updates(self._layers):
                yield
        finally:
            for layer, value in zip(self._layers, before, strict=True):
                layer.epsilon = value

    def _labels(self) -> np.ndarray | None:
        """The class of each example, if the labels are classes."""
        found = []
        for batch, _ in self._batches:
            y = unpacked(self._model, batch)[1]
            if not tf.is_tensor(y) or y.dtype == tf.string:
                return None
            y = y.numpy()
            if y.ndim == 2 and y.shape[1] > 1 and np.allclose(y.sum(1), 1):  # One-hot.
                y = y.argmax(1)
            if y.size != len(y):
                return None
            found.append(y.reshape(-1))
        labels = np.concatenate(found)
        if not np.all(labels == np.round(labels)):
            return None
        return labels if 1 < len(np.unique(labels)) <= min(MOST_CLASSES, len(labels) / 2) else None

    def first_not_finite(self) -> str | None:
        """The first layer whose inputs are not finite in a batch set aside, or None."""

        def is_finite(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> tf.Tensor:
            seen = x if mask is None else tf.where(mask, x, tf.zeros_like(x))
            return tf.reduce_all(tf.math.is_finite(seen))

        observed = self._observe(is_finite)
        return next((name for name, finite in observed.items() if not all(finite)), None)

    def _average(
        self, measure: Callable[..., Any], noise: bool = False
    ) -> Mapping[str, Statistics]:
        """The average of what is measured in each batch: what a moving average tends to."""
        found = {}
        shapes = {name_of(layer): layer.moving_mean.shape for layer in self._layers}
        for name, parts in self._observe(measure, noise).items():
            mean, variance = (
                np.mean([np.reshape(part, shapes[name]) for part in kind], axis=0)
                for kind in zip(*parts, strict=True)
            )
            found[name] = mean, variance
        return found

    def _observe(self, measure: Callable[..., Any], noise: bool = False) -> dict[str, list[Any]]:
        """Measures what each call of each layer sees in each batch. The layers are in the order of the calls."""

        def step(batch: Any) -> dict[str, list[Any]]:
            measured: dict[str, list[Any]] = {}

            def observe(layer: Any, x: tf.Tensor, axes: Sequence[int], mask: Any) -> None:
                measured.setdefault(name_of(layer), []).append(measure(x, axes, mask))

            random = filter(_takes_training, random_layers(self._model)) if noise else []
            active = intercept_calls(random, _in_training)
            with batch_statistics(self._layers, observe), active:
                self._forward(self._model, batch)
            return measured

        run = traced_once(step)
        found: dict[str, list[Any]] = {}
        # What noise changes, such as the states of random generators.
        with variables_restored(self._model.variables if noise else ()):
            for batch, spec in self._batches:
                for name, parts in run(batch, spec).items():
                    found.setdefault(name, []).extend(
                        tf.nest.map_structure(lambda part: part.numpy(), parts)
                    )
        return found


def _takes_training(layer: keras.layers.Layer) -> bool:
    """Whether a layer takes `training`. A layer that does not is as random in inference as in training."""
    return "training" in inspect.signature(layer.call).parameters


def _in_training(
    layer: keras.layers.Layer, call: Any, *args: Any, training: Any = None, **kwargs: Any
) -> Any:
    return call(*args, training=True, **kwargs)


def _example_means(x: tf.Tensor, axes: Sequence[int], mask: tf.Tensor | None) -> tf.Tensor:
    within = [axis for axis in reduced_axes(x.shape.rank, axes) if axis]
    return tf.reduce_mean(tf.cast(x, tf.float32), within)
