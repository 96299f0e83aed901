"""The compiled steps: one batch through the model, forward, backward and update."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfbn._data import sharding
from tfbn._layer import collect_moments
from tfbn._models.compiled_loss import compute_loss
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, learns_statistics
from tfbn._moments import replicas
from tfbn._moments.moments import Moments
from tfbn._support.keras_internals import gradients_summed
from tfbn._support.optimizers import unwrap_optimizer
from tfbn._training.accumulate import Accumulator
from tfbn._training.class_weights import class_weights
from tfbn._training.gradients import apply_gradients, sum_over_replicas
from tfbn._training.losses import (
    batch_loss,
    count_values,
    shard_weight,
    track_loss,
    weighted,
)
from tfbn._training.statistics import update_statistics
from tfbn._training.strategy import scope_of

Logs = dict[str, tf.Tensor]


class Steps:
    """The compiled steps of a model.

    Each is compiled once per spec, the nested `tf.TypeSpec` of the batches that it takes. Under a strategy
    every replica takes its shard of the batch.

    Args:
        model: A model that Keras's `compile` has prepared.
        loss_tracker: The metric that `compile` created for the loss, unless the model has other metrics.
        accumulate: Whether `train` only collects, and `update` updates.
        strategy: The strategy that the model was created under, or `None`.
    """

    def __init__(
        self,
        model: keras.Model,
        loss_tracker: keras.metrics.Metric | None,
        accumulate: bool,
        strategy: tf.distribute.Strategy | None,
    ):
        self._model = model
        self._loss_tracker = loss_tracker
        self._accumulate = accumulate
        self._strategy = strategy
        self._accumulator: Accumulator | None = None
        self._class_weight: Mapping[int, float] | None = None
        self._traced_for: Any = None
        self._compiled: dict[str, list[tuple[Any, Callable[..., Any]]]] = {}
        self._logs: Logs = {}

    @property
    def state(self) -> list[Any]:
        """All variables that the rest of the training depends on."""
        model = self._model
        collected = [] if self._accumulator is None else self._accumulator.variables
        return [*model.variables, *model.optimizer.variables, *model.metrics_variables, *collected]

    def prepare(self, spec: Any, class_weight: Mapping[int, float] | None) -> None:
        """Builds the model and the optimizer, and traces the training step: it creates every variable."""
        class_weight = dict(class_weight) if class_weight else None  # The caller may change theirs.
        self.build(spec)
        model = self._model
        trainable = model.trainable_variables
        if not model.optimizer.built:
            with scope_of(self._strategy):
                model.optimizer.build(trainable)
        # A trace fixes which variables are trained and which layers learn statistics.
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

    def build(self, spec: Any) -> None:
        """Builds the model by tracing it. Computes nothing."""
        if self._strategy is not None and not self._compiled:
            # Keras cannot create variables on a replica, and its losses and metrics create some on first use.
            with scope_of(self._strategy):
                tf.function(self._dry_run, autograph=False).get_concrete_function(spec)
        elif not self._model.built:
            forward = tf.function(
                lambda batch: self._model(_unpack(batch)[0], training=False), autograph=False
            )
            forward.get_concrete_function(spec)

    def reset(self) -> None:
        """Drops the collected batches that an error left without an update."""
        if self._accumulator is not None:
            self._accumulator.clear()

    def reset_metrics(self) -> None:
        """Starts the metrics from nothing."""
        self._model.reset_metrics()
        self._logs = {}

    def train(self, batch: Any, spec: Any) -> None:
        """Trains on one batch."""
        self._logs = self._function(self._train, spec)(batch)

    def update(self) -> None:
        """Applies the update for the batches collected since the last one."""
        self._function(self._update, ())()

    def test(self, batch: Any, spec: Any) -> None:
        """Evaluates one batch."""
        self._logs = self._function(self._test, spec)(batch)

    def run_once(self, function: Callable[[Any], Logs], batch: Any, spec: Any) -> Logs:
        """Runs a function of the inputs on this batch, on each replica, and returns what the first returns."""

        def run(batch: Any) -> Logs:
            return function(_unpack(sharding.local_shard(batch))[0])

        with scope_of(self._strategy):
            return tf.function(self._on_replicas(run), input_signature=[spec], autograph=False)(
                batch
            )

    def logs(self) -> Logs:
        """Returns the metrics after the last batch, over all replicas."""
        return self._logs if self._strategy is None else self.results()

    def results(self) -> Logs:
        """Returns the metrics over all batches and replicas.

        If the model's own `compute_metrics` returns other names, so does this, with the values of the last
        batch, as `keras.Model.fit` does.
        """
        if self._strategy is None:
            metrics = self._model.get_metrics_result()
            return self._logs if self._logs and self._logs.keys() != metrics.keys() else metrics
        metrics = self._function(self._results, ())()
        return {name: metrics.get(name, value) for name, value in (self._logs or metrics).items()}

    def _train(self, batch: Any) -> Logs:
        model, optimizer = self._model, self._model.optimizer
        x, y, sample_weight = _unpack(sharding.local_shard(batch))
        if self._class_weight is not None:
            sample_weight = class_weights(y, sample_weight, self._class_weight)
        collected: list[tuple[BatchNormLayer, Moments]] = []
        with tf.GradientTape() as tape:
            with self._collecting_moments(collected):
                y_pred = model(x, training=True)
            loss = batch_loss(model, x, y, y_pred, sample_weight, batch, training=True)
            scaled_loss = optimizer.scale_loss(loss)
        trainable = model.trainable_variables
        gradients = tape.gradient(scaled_loss, trainable)
        if not trainable:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        elif self._accumulator is None:
            apply_gradients(optimizer, sum_over_replicas(gradients), trainable)
        if self._accumulator is None:
            update_statistics(collected)
        else:
            _, weight = count_values(y_pred, x, batch)
            self._accumulator.add(weight, gradients, collected)
        track_loss(self._loss_tracker, loss, x, batch)
        return self._update_metrics(x, y, y_pred, sample_weight, batch)

    def _collecting_moments(
        self, collected: list[tuple[BatchNormLayer, Moments]]
    ) -> contextlib.AbstractContextManager[None]:
        """Defers the update of the moving statistics until all batches or replicas are merged."""
        if self._accumulator is None and replicas.num_replicas() == 1:
            return contextlib.nullcontext()
        return collect_moments.redirect(lambda layer, moments: collected.append((layer, moments)))

    def _update(self) -> None:
        assert self._accumulator is not None  # For the type checker: only accumulation calls this.
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
        loss = batch_loss(model, x, y, y_pred, sample_weight, batch, training=False)
        track_loss(self._loss_tracker, loss, x, batch)
        return self._update_metrics(x, y, y_pred, sample_weight, batch)

    def _update_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, batch: Any) -> Logs:
        """Updates the metrics and returns them, and what the model's own `compute_metrics` adds to them."""
        logs = self._model.compute_metrics(x, y, y_pred, sample_weight)
        if replicas.num_replicas() == 1:
            return logs
        added = sorted(logs.keys() - self._model.get_metrics_result().keys())
        if added:
            weight = shard_weight(y_pred, x, batch)
            values = [weighted(tf.cast(logs[name], tf.float32), weight) for name in added]
            logs |= dict(zip(added, replicas.all_reduce_sum(values), strict=True))
        return logs

    def _results(self) -> Logs:
        return self._model.get_metrics_result()

    def _dry_run(self, batch: Any) -> None:
        """Runs everything that creates variables in a step, and changes none of them."""
        x, y, sample_weight = _unpack(batch)
        with keras.StatelessScope(collect_losses=True) as forward:
            y_pred = self._model(x, training=False)
        with keras.StatelessScope([(v, v) for v in self._model.variables], True) as scope:
            scope.losses.extend(forward.losses)
            compute_loss(self._model, x, y, y_pred, sample_weight, training=False)
            self._model.compute_metrics(x, y, y_pred, sample_weight)

    def _function(self, step: Callable[..., Any], spec: Any) -> Callable[..., Any]:
        """Returns the compiled step for this spec."""
        known = self._compiled.setdefault(step.__name__, [])
        for compiled_for, function in known:
            if compiled_for is spec or compiled_for == spec:
                return function
        compiled = tf.function(
            self._on_replicas(step), jit_compile=self._model.jit_compile, autograph=False
        )
        optimizer = unwrap_optimizer(self._model.optimizer)
        with scope_of(self._strategy), gradients_summed(optimizer):
            # The concrete function is called directly: tf.function's dispatch would look at every tensor of
            # every batch, and costs more than everything else that Python does for a batch.
            function = compiled.get_concrete_function(*(() if spec == () else (spec,)))
        known.append((spec, function))
        return function

    def _on_replicas(self, step: Callable[..., Any]) -> Callable[..., Any]:
        strategy = self._strategy
        if strategy is None or step == self._results:
            return step

        def on_replicas(*batch: Any) -> Any:
            logs = strategy.run(step, batch)
            return {
                name: strategy.experimental_local_results(value)[0]
                for name, value in (logs or {}).items()
            }

        return on_replicas


def _unpack(batch: Any) -> tuple[Any, Any, Any]:
    return keras.utils.unpack_x_y_sample_weight(batch)
