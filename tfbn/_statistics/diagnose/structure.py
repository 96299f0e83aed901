"""How a model uses its batch normalization layers: the `training` they receive, and what feeds them."""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

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


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the code of a model shows. All of these are names of layers.

    Attributes:
        called: The model calls them in inference.
        forced: They run in training mode although the model is called with ``training=False``.
        ignored: They run in inference mode in `fit`, although it trains the model.
        overridden: They are inside a part of the model that is called with ``training=False``, and run in
            training mode nevertheless.
        behind_noise: A layer that is random in training, such as dropout, is somewhere before them.
        behind_rectifier: A ReLU is between the previous batch normalization layer and them.
        masked: They receive a mask.
    """

    called: frozenset[str] = frozenset()
    forced: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    overridden: frozenset[str] = frozenset()
    behind_noise: frozenset[str] = frozenset()
    behind_rectifier: frozenset[str] = frozenset()
    masked: frozenset[str] = frozenset()


def structure_of(
    model: keras.layers.Layer, layers: Sequence[BatchNormLayer], forward: Forward | None, spec: Any
) -> Structure:
    """Traces the model in inference mode and, unless a ``forward`` is given, in training mode."""
    layers = [layer for layer in layers if layer.built]
    noisy = random_layers(model)
    seen = _Trace(layers, noisy)
    seen.run(lambda batch: (forward or run_model)(model, batch), spec)
    found = seen.found
    in_training = found.pop("in_training", set())
    if forward is None:
        learning = [layer for layer in layers if not statistics_are_frozen(layer)]
        training = _Trace(learning, [])
        # As `fit` does: it passes `training` only to a `call` that takes it.
        takes_training = "training" in inspect.signature(model.call).parameters
        training.run(lambda batch: run_model(model, batch, training=takes_training), spec)
        inference_asked = {name_of(layer) for layer in _called_with_training_false(model)}
        trained = training.found["in_training"]
        found["forced"] = in_training & {name_of(layer) for layer in learning}
        found["ignored"] = training.found["called"] - trained - inference_asked
        found["overridden"] = trained & inference_asked
    return Structure(**{name: frozenset(names) for name, names in found.items()})


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
        found: The names of layers, by the attributes of `Structure`, and those that run "in_training".
    """

    def __init__(self, layers: Sequence[BatchNormLayer], noisy: Sequence[keras.layers.Layer]):
        self._layers = layers
        self._noisy = noisy
        self._outputs: dict[Any, bool] = {}  # by reference: whether noise is before or in it
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
        self._outputs[output.ref()] = noise
        return output

    def _mark(self, layer: keras.layers.Layer, call: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = tf.nest.map_structure(tf.identity, call(*args, **kwargs))
        for output in tf.nest.flatten(outputs):
            self._outputs[output.ref()] = True
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
            if one.ref() in self._outputs:
                noise |= self._outputs[one.ref()]
            else:
                operations.add(one.op.type)
                waiting.extend(one.op.inputs)
        return noise, operations


def _called_with_training_false(model: keras.layers.Layer) -> list[BatchNormLayer]:
    """Returns the layers in parts of Functional models that are called with ``training=False``."""
    found: list[BatchNormLayer] = []
    if not isinstance(model, keras.Model):
        return found
    try:
        configs = model.get_config().get("layers", [])
    except NotImplementedError:  # A subclassed model: only its code shows what it passes on.
        configs = []
    for config in configs:
        nodes = config.get("inbound_nodes", [])
        if any(node["kwargs"].get("training") is False for node in nodes):
            found += batch_norm_layers(model.get_layer(config["name"]))
    for part in model.layers:
        found += _called_with_training_false(part)
    return found
