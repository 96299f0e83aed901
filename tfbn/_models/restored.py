"""Variables that are restored after a model has run."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf


@contextlib.contextmanager
def variables_restored(variables: Sequence[Any]) -> Iterator[list[tf.Tensor]]:
    """Restores variables of Keras or TensorFlow on exit. Yields the values that they have on entry."""
    before = [tf.identity(variable) for variable in variables]
    try:
        yield before
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
