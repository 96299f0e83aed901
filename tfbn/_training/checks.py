"""Checks of the arguments of a training loop."""

from typing import Any

import keras
import tensorflow as tf

from tfbn._data.sources import ArraySource
from tfbn._support.optimizers import unwrap_optimizer
from tfbn._training.stream import Stream


def check_own_steps(model: keras.Model) -> None:
    """Raises if the model has its own training or test step, which the loop would not call."""
    own = [
        name
        for name in ("train_step", "test_step")
        if getattr(getattr(model, name), "__func__", None) is not getattr(keras.Model, name)
    ]
    if own:
        raise ValueError(
            "TrainingLoop has steps of its own and would not call the model's. Move what differs to "
            "`compute_loss`, `compute_metrics` or `call`, or train with `model.fit`. "
            f"Received: a {type(model).__name__} that overrides {' and '.join(own)}."
        )


def check_batch_size(batch_size: int | None, *streams: Stream | None) -> None:
    if batch_size is not None and not any(
        s is not None and isinstance(s.source, ArraySource) for s in streams
    ):
        raise ValueError(
            "`batch_size` is for arrays, but the data comes in batches already. Leave it out. "
            f"Received: batch_size={batch_size!r}."
        )


def check_mean_loss(
    optimizer: keras.optimizers.Optimizer,
    loss: Any,
    accumulation_steps: int,
    strategy: tf.distribute.Strategy | None,
) -> None:
    """Raises if accumulated or distributed gradients would not be those of the mean loss over all examples."""
    inner = unwrap_optimizer(optimizer)
    if accumulation_steps > 1 and inner.gradient_accumulation_steps:
        raise ValueError(
            "Gradients would be accumulated twice. Set either accumulation_steps of the loop or "
            "gradient_accumulation_steps of the optimizer, not both. Received: "
            f"gradient_accumulation_steps={inner.gradient_accumulation_steps}."
        )
    replicas = 1 if strategy is None else strategy.num_replicas_in_sync
    if accumulation_steps == replicas == 1:
        return
    who = "Accumulation" if accumulation_steps > 1 else "A strategy of several replicas"
    for part in keras.tree.flatten(loss):
        reduction = getattr(part, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                f"{who} needs a loss that averages over the examples of a batch: pass "
                f"reduction='sum_over_batch_size'. Received: {part!r} with reduction={reduction!r}."
            )
