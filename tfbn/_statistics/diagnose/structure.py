"""How a model uses its batch normalization layers: the `training` they receive, and what feeds them."""

import collections
import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._models.functional import clones_graph, is_functional
from tfbn._models.intercept import intercept_calls, isolated_tracing
from tfbn._models.walk import (
    BatchNormLayer,
    batch_norm_layers,
    name_of,
    statistics_are_frozen,
    walk,
)
from tfbn._statistics.diagnose.batch_mode import is_true
from tfbn._statistics.plan import run_model
from tfbn._statistics.traced_model import Forward

RECTIFIERS = {"Relu", "Relu6"}


class Structure:
    """What the code of a model shows, traced when it is first asked for.

    All properties are names of layers. Without a model, nothing is found.

    Args:
        model: The model.
        layers: Batch normalization layers of it.
        forward: Runs the model in inference mode, if it is not called as usual. What it does in training is
            unknown then.
        spec: The nested `tf.TypeSpec` of a batch.
    """

    def __init__(
        self,
        model: keras.layers.Layer | None = None,
        layers: Sequence[BatchNormLayer] = (),
        forward: Forward | None = None,
        spec: Any = None,
    ):
        self._model = model
        self._layers = [layer for layer in layers if layer.built]
        self._learning = [layer for layer in self._layers if not statistics_are_frozen(layer)]
        self._forward = forward
        self._spec = spec

    def trace(self) -> None:
        """Traces the model in both modes now. Whatever it raises is raised here, and not by a property."""
        _ = self._inference, self._training

    @property
    def called(self) -> set[str]:
        """The model calls them in inference."""
        return self._inference["called"]

    @property
    def forced(self) -> set[str]:
        """They run in training mode although the model is called with ``training=False``."""
        if self._forward is not None:
            return set()
        return self._inference["in_training"] & set(map(name_of, self._learning))

    @property
    def masked(self) -> set[str]:
        """They receive a mask."""
        return self._inference["masked"]

    @property
    def behind_noise(self) -> set[str]:
        """A layer that is random in training, such as dropout, is somewhere before them."""
        return self._inference["behind_noise"]

    @property
    def behind_rectifier(self) -> set[str]:
        """A ReLU is between the previous batch normalization layer and them."""
        return self._inference["behind_rectifier"]

    @property
    def ignored(self) -> set[str]:
        """They run in inference mode in `fit`, although it trains the model."""
        return self._training["called"] - self._training["in_training"] - self._asked_for_inference

    @property
    def overridden(self) -> set[str]:
        """They are in a part of the model that is called with ``training=False``, but run in training mode."""
        asked = self._asked_for_inference
        return asked & self._training["in_training"] if asked else set()

    @functools.cached_property
    def _inference(self) -> dict[str, set[str]]:
        forward = self._forward or run_model
        return self._trace(self._layers, lambda batch: forward(self._model, batch))

    @functools.cached_property
    def _training(self) -> dict[str, set[str]]:
        if self._forward is not None:
            return collections.defaultdict(set)

        def as_fit(batch: Any) -> Any:
            assert self._model is not None
            # It passes `training` only to a `call` that takes it.
            training = "training" in inspect.signature(self._model.call).parameters
            return run_model(self._model, batch, training=training)

        return self._trace(self._learning, as_fit)

    def _trace(
        self, layers: Sequence[BatchNormLayer], run: Callable[[Any], Any]
    ) -> dict[str, set[str]]:
        if self._model is None:
            return collections.defaultdict(set)
        trace = _Trace(layers, random_layers(self._model))
        trace.run(run, self._spec)
        return trace.found

    @functools.cached_property
    def _asked_for_inference(self) -> set[str]:
        if self._model is None or self._forward is not None:
            return set()
        return set(map(name_of, _called_with_training_false(self._model)))


def random_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that are random in training: dropout, noise, augmentation."""
    return [
        layer
        for layer in walk(model)
        if any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values())
    ]


class _Trace:
    """Observes the calls of layers while a model is traced.

    Attributes:
        found: The names of layers, by what was observed of them.
    """

    def __init__(self, layers: Sequence[BatchNormLayer], noisy: Sequence[keras.layers.Layer]):
        self._layers = layers
        self._noisy = noisy
        # By reference: the outputs of observed layers, whether noise is before them, and of random layers.
        self._observed: dict[Any, bool] = {}
        self._random: set[Any] = set()
        self.found: dict[str, set[str]] = collections.defaultdict(set)

    def run(self, forward: Callable[[Any], Any], spec: Any) -> None:
        def trace(batch: Any) -> None:
            with (
                intercept_calls(self._layers, self._observe),
                intercept_calls(self._noisy, self._mark),
            ):
                forward(batch)

        with isolated_tracing():
            tf.function(trace, autograph=False).get_concrete_function(spec)

    def _observe(
        self, layer: BatchNormLayer, call: Any, inputs: Any, training: Any = None, mask: Any = None
    ) -> tf.Tensor:
        x = tf.convert_to_tensor(inputs)
        noise, operations = self._before(x)
        observed = {
            "called": True,
            "in_training": is_true(training),
            "masked": mask is not None,
            "behind_noise": noise,
            "behind_rectifier": bool(operations & RECTIFIERS),
        }
        for what, holds in observed.items():
            if holds:
                self.found[what].add(name_of(layer))
        # What it computes does not matter here.
        output = tf.identity(tf.cast(x, layer.compute_dtype))
        self._observed[output.ref()] = noise
        return output

    def _mark(self, layer: keras.layers.Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = tf.nest.map_structure(tf.identity, call(*args, **kwargs))
        for output in tf.nest.flatten(outputs):
            self._random.add(output.ref())
        return outputs

    def _before(self, tensor: tf.Tensor) -> tuple[bool, set[str]]:
        """Whether noise is before a tensor, and the operations since the last layer observed."""
        noise, operations = False, set()
        seen, waiting = set(), [tensor]
        while waiting:
            one = waiting.pop()
            if one.ref() in seen:
                continue
            seen.add(one.ref())
            noise |= one.ref() in self._random or self._observed.get(one.ref(), False)
            if one.ref() not in self._observed:
                operations.add(one.op.type)
                waiting.extend(one.op.inputs)
        return noise, operations


def _called_with_training_false(model: keras.layers.Layer) -> list[BatchNormLayer]:
    """Returns the layers in parts of Functional models that are called with ``training=False``."""
    found: list[BatchNormLayer] = []
    if not isinstance(model, keras.Model):
        return found
    configs = []
    if is_functional(model) and clones_graph(model):  # Of other models, only the code shows it.
        with contextlib.suppress(NotImplementedError):  # A layer cannot be serialized.
            configs = model.get_config()["layers"]
    for config in configs:
        nodes = config["inbound_nodes"]
        if any(node["kwargs"].get("training") is False for node in nodes):
            found += batch_norm_layers(model.get_layer(config["name"]))
    for part in model.layers:
        found += _called_with_training_false(part)
    return found
