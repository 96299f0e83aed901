"""What a training loop requires of a `tf.distribute` strategy, and of what was created in its scope."""

import contextlib
import warnings
from typing import Any

import keras
import tensorflow as tf

from tfbn._models.walk import batch_norm_layers
from tfbn._support.optimizers import unwrap_optimizer

STRATEGIES = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)


def scope_of(strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    """Returns the strategy's scope, or a context that does nothing."""
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def check_strategy(strategy: tf.distribute.Strategy | None) -> None:
    """Raises unless this is a strategy that the loop supports, or `None`."""
    if strategy is not None and not isinstance(strategy, STRATEGIES):
        raise TypeError(
            "`strategy` must be None, a tf.distribute.MirroredStrategy, MultiWorkerMirroredStrategy or "
            f"OneDeviceStrategy. Received: strategy={strategy!r} of type {type(strategy).__name__}."
        )


def check_scope(
    strategy: tf.distribute.Strategy | None,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    metrics: Any,
    jit_compile: bool | str,
) -> None:
    """Raises if the replicas of the strategy could not train this model, or would train it wrong."""
    home = model.distribute_strategy
    if strategy is None and isinstance(home, STRATEGIES):
        raise ValueError(
            "The model was created in the scope of a strategy. Pass that strategy to TrainingLoop. "
            f"Received: strategy=None, and a model of {type(home).__name__}."
        )
    if strategy is None:
        return
    parts = {"model": model, "optimizer": optimizer} | {
        f"metric {metric.name!r}": metric
        for metric in keras.tree.flatten(metrics)
        if isinstance(metric, keras.metrics.Metric)
    }
    outside = [
        name
        for name, part in parts.items()
        if (name == "model" and home is not strategy)
        or not all(strategy.extended.variable_created_in_scope(v.value) for v in part.variables)
    ]
    if outside:
        raise ValueError(
            "The model, the optimizer and the metrics must be created in the scope of the strategy: "
            "`with strategy.scope(): model = ...; loop = tfbn.TrainingLoop(model, ..., strategy=strategy)`. "
            f"Received: created in another scope or in none: {', '.join(outside)}."
        )
    if strategy.num_replicas_in_sync > 1:
        _check_replicas(strategy.num_replicas_in_sync, model, optimizer, jit_compile)


def _check_replicas(
    number: int, model: keras.Model, optimizer: keras.optimizers.Optimizer, jit_compile: bool | str
) -> None:
    if jit_compile is True:
        raise ValueError(
            "XLA cannot compile a step that runs on several replicas. Pass jit_compile=False. "
            f"Received: jit_compile=True and {number} replicas."
        )
    inner = unwrap_optimizer(optimizer)
    leave_out = "Leave it out: the averages replace the weights when training ends."
    for name, instead in (
        ("gradient_accumulation_steps", "Set accumulation_steps of the loop instead."),
        ("ema_overwrite_frequency", leave_out),
    ):
        value = getattr(inner, name)
        if value and not (name == "ema_overwrite_frequency" and not inner.use_ema):
            raise ValueError(
                f"An optimizer's `{name}` does not work on several replicas. {instead} "
                f"Received: {name}={value} and {number} replicas."
            )
    unsynchronized = [
        layer.name
        for layer in batch_norm_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and not layer.synchronized
    ]
    if unsynchronized:
        warnings.warn(
            "keras.layers.BatchNormalization keeps different moving statistics on each replica and saves only "
            "those of the first. Call `tfbn.convert(model)` in the scope of the strategy to keep them equal. "
            f"Received: {number} replicas, and Keras's layers {', '.join(map(repr, unsynchronized))}.",
            stacklevel=4,
        )
