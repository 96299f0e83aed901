"""One batch through the model: forward, backward, update. Compiled once for each kind of batch."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn._data import sharding
from tfbn._layer import collect_moments
from tfbn._models.walk import BatchNormLayer, batch_norm_layers
from tfbn._moments import replicas
from tfbn._moments.moments import Moments
from tfbn._support.keras_internals import gradients_summed, mask_of
from tfbn._support.optimizers import unwrap_optimizer
from tfbn._training.accumulate import Accumulator
from tfbn._training.gradients import (
    apply_gradients,
    over_replicas,
    share_of,
    total,
    update_statistics,
)
from tfbn._training.guard import learns_statistics
from tfbn._training.strategy import scope_of

Logs = dict[str, tf.Tensor]


class Steps:
    """The compiled steps of a model that Keras's `compile` has prepared.

    A batch comes with its spec, the nested `tf.TypeSpec` for which its step is compiled. Under a strategy
    every replica takes its share of it.
    """

    def __init__(
        self, model: keras.Model, accumulate: bool, strategy: tf.distribute.Strategy | None = None
    ):
        self._model = model
        self._strategy = strategy
        self._accumulate = accumulate
        self._accumulator: Accumulator | None = None
        self._class_weight: Mapping[int, float] | None = None
        self._traced_for: Any = None
        self._compiled: dict[str, list[tuple[Any, Callable[..., Any]]]] = {}
        self._logs: Logs = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """What is kept from one batch to the next, besides the model and its optimizer."""
        return [] if self._accumulator is None else self._accumulator.variables

    def prepare(self, spec: Any, class_weight: Mapping[int, float] | None) -> None:
        """Builds all that is not built and traces the training step: every variable exists after it."""
        class_weight = dict(class_weight) if class_weight else None  # The caller's own may change.
        self.build(spec)
        model = self._model
        trainable = model.trainable_variables
        if not model.optimizer.built:
            with scope_of(self._strategy):
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
            with scope_of(self._strategy):
                self._accumulator = Accumulator(trainable) if self._accumulate else None
        self._function(self._train, spec)

    def forget(self) -> None:
        """Drops a group of batches that an error left unfinished."""
        if self._accumulator is not None:
            self._accumulator.clear()

    def build(self, spec: Any) -> None:
        """Builds the model by tracing it: nothing is computed."""
        if self._strategy is not None and not self._compiled:
            # On a replica Keras cannot make variables, and its losses and metrics make some on first use.
            with scope_of(self._strategy):
                tf.function(self._dry_run, autograph=False).get_concrete_function(spec)
        elif not self._model.built:
            forward = tf.function(
                lambda batch: self._model(_unpack(batch)[0], training=False), autograph=False
            )
            forward.get_concrete_function(spec)

    def train(self, batch: Any, spec: Any) -> None:
        """One batch of training."""
        self._logs = self._function(self._train, spec)(batch)

    def update(self) -> None:
        """The update that ends a group of accumulated batches."""
        self._function(self._update, ())()

    def test(self, batch: Any, spec: Any) -> None:
        """One batch of evaluation."""
        self._logs = self._function(self._test, spec)(batch)

    def logs(self) -> Logs:
        """What the metrics say after the last batch, of all replicas."""
        return self._logs if self._strategy is None else self.results()

    def results(self) -> Logs:
        """What the metrics say."""
        if self._strategy is None:
            return self._model.get_metrics_result()
        return self._function(self._results, ())()

    def _function(self, step: Callable[..., Any], spec: Any) -> Callable[..., Any]:
        known = self._compiled.setdefault(step.__name__, [])
        for compiled_for, function in known:
            if compiled_for is spec or compiled_for == spec:
                return function
        compiled = tf.function(
            self._on_replicas(step), jit_compile=self._model.jit_compile, autograph=False
        )
        # Called directly: tf.function's own dispatch costs more than all else that a batch takes here.
        with scope_of(self._strategy), gradients_summed(unwrap_optimizer(self._model.optimizer)):
            function = compiled.get_concrete_function(*(() if spec == () else (spec,)))
        known.append((spec, function))
        return function

    def _on_replicas(self, step: Callable[..., Any]) -> Callable[..., Any]:
        strategy = self._strategy
        if strategy is None or step == self._results:
            return step

        def everywhere(*batch: Any) -> None:
            strategy.run(step, batch)  # What it returns is what each replica has seen alone.

        return everywhere

    def _dry_run(self, batch: Any) -> None:
        """All that makes variables in a step, without a change of any."""
        x, y, sample_weight = _unpack(batch)
        with keras.StatelessScope():
            y_pred = self._model(x, training=False)
        with keras.StatelessScope([(v, v) for v in self._model.variables]):
            self._model.compute_loss(x, y, y_pred, sample_weight)
            self._model.compute_metrics(x, y, y_pred, sample_weight)

    def _results(self) -> Logs:
        return self._model.get_metrics_result()

    def _train(self, batch: Any) -> Logs:
        model, optimizer = self._model, self._model.optimizer
        x, y, sample_weight = _unpack(sharding.local_shard(batch))
        if self._class_weight is not None:
            sample_weight = _class_weights(y, sample_weight, self._class_weight)
        seen: list[tuple[BatchNormLayer, Moments]] = []
        with tf.GradientTape() as tape:
            with self._collected(seen):
                y_pred = model(x, training=True)
            loss = self._loss(x, y, y_pred, sample_weight, batch, training=True)
            scaled_loss = optimizer.scale_loss(loss)
        trainable = model.trainable_variables
        gradients = tape.gradient(scaled_loss, trainable)
        if not trainable:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        elif self._accumulator is None:
            apply_gradients(optimizer, over_replicas(gradients), trainable)
        if self._accumulator is None:
            update_statistics(seen)
        else:
            self._accumulator.add(_values_behind(y_pred, x, batch)[1], gradients, seen)
        self._track(loss, x, batch)
        return model.compute_metrics(x, y, y_pred, sample_weight)

    def _collected(
        self, seen: list[tuple[BatchNormLayer, Moments]]
    ) -> contextlib.AbstractContextManager[None]:
        """Moments that wait for those of other batches or replicas."""
        if self._accumulator is None and replicas.num_replicas() == 1:
            return contextlib.nullcontext()
        return collect_moments.redirect(lambda layer, moments: seen.append((layer, moments)))

    def _update(self) -> None:
        assert self._accumulator is not None  # for the type checker: `update` serves accumulation
        trainable = self._model.trainable_variables
        if trainable:
            gradients = self._accumulator.gradients(trainable)
            apply_gradients(self._model.optimizer, gradients, trainable)
        update_statistics(self._accumulator.moments())
        self._accumulator.clear()

    def _test(self, batch: Any) -> Logs:
        model = self._model
        x, y, sample_weight = _unpack(sharding.local_shard(batch))
        y_pred = model(x, training=False)
        loss = self._loss(x, y, y_pred, sample_weight, batch, training=False)
        self._track(loss, x, batch)
        return model.compute_metrics(x, y, y_pred, sample_weight)

    def _loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any, batch: Any, training: bool
    ) -> tf.Tensor:
        """The mean loss of a batch, or this replica's share of it."""
        model = self._model
        shared = replicas.num_replicas() > 1
        before = [(v, tf.convert_to_tensor(v)) for v in model.metrics_variables if shared]
        loss = model.compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
        )
        if not shared:
            return loss
        own, everywhere = _values_behind(y_pred, x, batch)
        # Keras counts the loss of an output once for each batch: in the metric too, a share is a share.
        for variable, value in before:
            if value.dtype.is_floating:
                added = tf.convert_to_tensor(variable) - value
                variable.assign(value + share_of(added, own, everywhere))
        return share_of(loss * replicas.num_replicas(), own, everywhere)

    def _track(self, loss: tf.Tensor, x: Any, batch: Any) -> None:
        """Takes the loss into the running mean that Keras's `compile` makes for it."""
        size = sharding.batch_size(x)
        if replicas.num_replicas() > 1:
            # The shares of the replicas are to add up to the loss as often as there are examples.
            repeats = tf.math.divide_no_nan(
                tf.cast(sharding.batch_size(batch), loss.dtype), tf.cast(size, loss.dtype)
            )
            loss *= repeats
        for metric in self._model.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=size)


def _unpack(batch: Any) -> tuple[Any, Any, Any]:
    return keras.utils.unpack_x_y_sample_weight(batch)


def _values_behind(y_pred: Any, x: Any, batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Over how many values the loss is a mean, on this replica and on all of them.

    They are the examples, or the steps that a Keras mask keeps.
    """
    masks = [mask_of(part) for part in tf.nest.flatten(y_pred)]
    if all(mask is None for mask in masks):
        own, everywhere = sharding.batch_size(x), sharding.batch_size(batch)
        return tf.cast(own, tf.float32), tf.cast(everywhere, tf.float32)
    if len(masks) > 1:
        raise ValueError(
            "Accumulation and replicas need one count of values for each batch, and the outputs of this "
            f"model have masks of their own. Received: {len(masks)} outputs, masks {masks}. Train it with "
            "accumulation_steps=1 on one device, or mask by sample weights."
        )
    kept = tf.reduce_sum(tf.cast(masks[0], tf.float32))
    return kept, total(kept)


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
