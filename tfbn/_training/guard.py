"""A check for the most common mistake of custom loops: moving statistics that training never updates."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._models.intercept import intercept_calls, isolated_tracing
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, learns_statistics


class StatisticsNotUpdatedError(RuntimeError):
    """Raised by `tfbn.TrainingLoop.fit` when batch normalization layers learned no moving statistics.

    Example:
        >>> class Classifier(keras.Model):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm = tfbn.BatchNormalization()
        ...         self.dense = keras.layers.Dense(3)
        ...
        ...     def call(self, x):
        ...         return self.dense(self.norm(x, training=False))  # never trains
        >>> loop = tfbn.TrainingLoop(Classifier(), "sgd", loss)
        >>> loop.fit(images.reshape(-1, 64), labels, verbose=0)
        Traceback (most recent call last):
        tfbn.StatisticsNotUpdatedError: ...
    """


class StatisticsWatch:
    """Watches whether training updates a model's moving statistics.

    Statistics that did not change are only a suspicion: they may have been right already. `probe` then
    displaces them and looks whether a training step would move them.

    Args:
        model: The model, before the first step.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._layers = [
            layer for layer in batch_norm_layers(model) if layer.built and learns_statistics(layer)
        ]
        self._before = [_values(layer) for layer in self._layers]

    @property
    def is_suspicious(self) -> bool:
        """Whether the statistics of any layer are unchanged."""
        return any(map(self._is_unchanged, range(len(self._layers))))

    def probe(self, x: Any) -> dict[str, tf.Tensor]:
        """Runs the model on inputs, changes nothing, and returns which layers behave as they should.

        That is: in training mode the layer moves its statistics, or the model does not call it at all.
        """
        called: set[BatchNormLayer] = set()

        def record(
            layer: BatchNormLayer, call: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> Any:
            called.add(layer)
            return call(*args, **kwargs)

        statistics = [variable for layer in self._layers for variable in _variables(layer)]
        displaced = [v + (1 + tf.abs(v)) for v in map(tf.convert_to_tensor, statistics)]
        pairs = list(zip(statistics, displaced, strict=True))
        with isolated_tracing(), intercept_calls(self._layers, record):
            with keras.StatelessScope():
                self._model(x, training=False)
            with keras.StatelessScope(pairs) as scope:
                self._model(x, training=True)
        moved = [
            tf.reduce_any(scope.get_current_value(variable) != value) for variable, value in pairs
        ]
        return {
            str(index): tf.constant(layer not in called) | moved[2 * index] | moved[2 * index + 1]
            for index, layer in enumerate(self._layers)
        }

    def check(self, steps: int, healthy: Mapping[str, Any]) -> None:
        """Checks the statistics after this many steps, and what `probe` returned.

        Raises:
            StatisticsNotUpdatedError: If layers are not updated. It names them, the likely causes and the
                cure.
        """
        stuck = [
            layer
            for index, layer in enumerate(self._layers)
            if self._is_unchanged(index) and not healthy.get(str(index), False)
        ]
        if not stuck:
            return
        names = ", ".join(repr(layer.name) for layer in stuck)
        raise StatisticsNotUpdatedError(
            "Batch normalization learned nothing for inference: the moving statistics of "
            f"{len(stuck)} of {len(self._layers)} layers did not change in the first epoch. "
            f"Received: {names}, after {steps} step{'s' * (steps > 1)}.\n"
            "Likely causes, most common first:\n"
            "- The model's own `call` passes `training=False` to them instead of the value it received. Write "
            "`def call(self, x, training=None)` and `self.bn(x, training=training)`.\n"
            "- The model calls them in inference only. Remove them, or call them in training too.\n"
            "- They skipped every batch, because each was empty, fully masked or not finite. Look for NaN and "
            "infinity in the data and in the preceding layers.\n"
            "If their statistics are meant to stay fixed, freeze them: `tfbn.freeze(model)`."
        )

    def _is_unchanged(self, index: int) -> bool:
        layer = self._layers[index]
        return learns_statistics(layer) and np.array_equal(self._before[index], _values(layer))


def _variables(layer: BatchNormLayer) -> tuple[keras.Variable, keras.Variable]:
    return layer.moving_mean, layer.moving_variance


def _values(layer: BatchNormLayer) -> np.ndarray:
    return np.stack([variable.numpy() for variable in _variables(layer)])
