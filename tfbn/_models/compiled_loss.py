"""The loss that a model was compiled with."""

import inspect
from typing import Any

import keras
import tensorflow as tf


def compute_loss(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool
) -> tf.Tensor:
    """Calls the model's `compute_loss`, which need not have a `training` argument if it is the user's own."""
    arguments = inspect.signature(model.compute_loss).parameters
    mode = {"training": training} if "training" in arguments else {}
    return model.compute_loss(x, y, y_pred, sample_weight, **mode)
