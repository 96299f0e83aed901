"""One batch through the model: forward, backward, update. Compiled once for each kind of batch."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn import _updates
from tfbn._models import BatchNormLayer, batch_norm_layers
from tfbn._moments import Moments
from tfbn._training._accumulate import Accumulator
from tfbn._training._guard import learns_statistics

Logs = dict[str, tf.Tensor]


class Steps:
    """The compiled steps of a model that Keras's `compile` has prepared.

    A batch comes with its spec, the nested `tf.TypeSpec` for which its step is compiled.
    """

    def __init__(self, model: keras.Model, accumulate: bool):
        self._model = model
        self._accumulate = accumulate
        self._accumulator: Accumulator | None = None
        self._class_weight: Mapping[int, float] | None = None
        self._traced_for: Any = None
        self._compiled: dict[str, list[tuple[Any, Callable[..., Logs]]]] = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """What is kept from one batch to the next, besides the model and its optimizer."""
        return [] if self._accumulator is None else self._accumulator.variables

    def prepare(self, spec: Any, class_weight: Mapping[int, float] | None) -> None:
        """Builds all that is not built and traces the training step: every variable exists after it."""
        self.build(spec)
        model = self._model
        trainable = model.trainable_variables
        if not model.optimizer.built:
            model.optimizer.build(trainable)
        # Which variables to train, and which layers learn, is fixed when a step is traced.
        traced_for = (
            [id(variable) for variable in trainable],
            [learns_statistics(layer) for layer in batch_norm_layers(model)],
            class_weight,
        )
        if traced_for != self._traced_for:
            self._traced_for = traced_for
            self._compiled = {}
            self._class_weight = class_weight
            self._accumulator = Accumulator(trainable) if self._accumulate else None
        self._function(self._train, spec)

    def build(self, spec: Any) -> None:
        """Builds the model by tracing it: nothing is computed."""
        if not self._model.built:
            forward = tf.function(lambda batch: self._model(_unpack(batch)[0], training=False))
            forward.get_concrete_function(spec)

    def train(self, batch: Any, spec: Any) -> Logs:
        """One batch of training, and what the metrics say after it."""
        return self._function(self._train, spec)(batch)

    def update(self) -> None:
        """The update that ends a group of accumulated batches."""
        self._function(self._update, ())()

    def test(self, batch: Any, spec: Any) -> Logs:
        """One batch of evaluation, and what the metrics say after it."""
        return self._function(self._test, spec)(batch)

    def _function(self, step: Callable[..., Any], spec: Any) -> Callable[..., Logs]:
        known = self._compiled.setdefault(step.__name__, [])
        for compiled_for, function in known:
            if compiled_for is spec or compiled_for == spec:
                return function
        compiled = tf.function(step, jit_compile=self._model.jit_compile, autograph=False)
        # Called directly: tf.function's own dispatch costs more than all else that a batch takes here.
        function = compiled.get_concrete_function(*(() if spec == () else (spec,)))
        known.append((spec, function))
        return function

    def _train(self, batch: Any) -> Logs:
        model, optimizer = self._model, self._model.optimizer
        x, y, sample_weight = _unpack(batch)
        if self._class_weight is not None:
            sample_weight = _class_weights(y, sample_weight, self._class_weight)
        seen: list[tuple[BatchNormLayer, Moments]] = []
        with tf.GradientTape() as tape:
            with self._collected(seen):
                y_pred = model(x, training=True)
            loss = model.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
            scaled_loss = optimizer.scale_loss(loss)
        trainable = model.trainable_variables
        gradients = tape.gradient(scaled_loss, trainable)
        if not trainable:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        elif self._accumulator is None:
            optimizer.apply(gradients, trainable)
        if self._accumulator is not None:
            self._accumulator.add(_values_behind(y_pred, _size(x)), gradients, seen)
        _track(model, loss, _size(x))
        return model.compute_metrics(x, y, y_pred, sample_weight)

    def _collected(
        self, seen: list[tuple[BatchNormLayer, Moments]]
    ) -> contextlib.AbstractContextManager[None]:
        if self._accumulator is None:
            return contextlib.nullcontext()
        return _updates.redirect(lambda layer, moments: seen.append((layer, moments)))

    def _update(self) -> None:
        assert self._accumulator is not None  # for the type checker: `update` serves accumulation
        trainable = self._model.trainable_variables
        if trainable:
            self._model.optimizer.apply(self._accumulator.gradients(trainable), trainable)
        self._accumulator.update_statistics()
        self._accumulator.clear()

    def _test(self, batch: Any) -> Logs:
        model = self._model
        x, y, sample_weight = _unpack(batch)
        y_pred = model(x, training=False)
        loss = model.compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False
        )
        _track(model, loss, _size(x))
        return model.compute_metrics(x, y, y_pred, sample_weight)


def _unpack(batch: Any) -> tuple[Any, Any, Any]:
    return keras.utils.unpack_x_y_sample_weight(batch)


def _size(x: Any) -> tf.Tensor:
    """The number of examples."""
    return tf.shape(next(part for part in tf.nest.flatten(x) if part is not None))[0]


def _track(model: keras.Model, loss: tf.Tensor, size: tf.Tensor) -> None:
    """Takes the loss into the running mean that Keras's `compile` makes for it."""
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss, sample_weight=size)


def _values_behind(y_pred: Any, size: tf.Tensor) -> tf.Tensor:
    """Over how many values the loss is a mean: the examples, or the steps that a Keras mask keeps."""
    masks = [getattr(part, "_keras_mask", None) for part in tf.nest.flatten(y_pred)]
    if all(mask is None for mask in masks):
        return tf.cast(size, tf.float32)
    if len(masks) > 1:
        raise ValueError(
            "Accumulation needs one count of values for each batch, and the outputs of this model have "
            f"masks of their own. Received: {len(masks)} outputs, masks {masks}. Train it with "
            "accumulation_steps=1, or mask by sample weights."
        )
    return tf.reduce_sum(tf.cast(masks[0], tf.float32))


def _class_weights(y: Any, sample_weight: Any, class_weight: Mapping[int, float]) -> tf.Tensor:
    """The weight of each example's class: 1 where none is given."""
    if sample_weight is not None or not isinstance(y, tf.Tensor) or y.shape.rank not in (1, 2):
        raise ValueError(
            "`class_weight` needs one output with one class for each example, as integers or one-hot, "
            f"and no sample weights beside it. Received: y={y}, sample_weight={sample_weight}."
        )
    if y.shape.rank == 2:
        y = tf.squeeze(y, -1) if y.shape[-1] == 1 else tf.argmax(y, -1)
    classes, weights = zip(*class_weight.items(), strict=True)
    here = tf.cast(tf.round(tf.cast(y, tf.float32)), tf.int64)[:, tf.newaxis] == tf.constant(
        classes, tf.int64
    )
    extra = tf.where(here, tf.constant(weights, tf.float32) - 1, 0.0)
    return 1 + tf.reduce_sum(extra, axis=-1)
