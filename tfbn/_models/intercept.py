"""The calls of a model's layers while it runs or is traced: stepping in between, and what feeds what."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfbn._normalize.dispatch import without_gradients


@contextlib.contextmanager
def calls_replaced(
    replacements: Iterable[tuple[keras.layers.Layer, Callable[..., Any]]],
) -> Iterator[None]:
    """While open, each of these layers runs the given function in place of its own ``call``.

    Keras looks ``layer.call`` up on the instance, so this holds wherever the layer is: in a
    Functional, Sequential or subclassed model, in a wrapper, shared by several parents. Functions
    that were compiled before keep what they were traced with. Blocks nest.
    """
    before = []
    try:
        for layer, call in replacements:
            before.append((layer, vars(layer).get("call")))
            layer.call = call
        yield
    finally:
        for layer, call in reversed(before):
            if call is None:
                del layer.call
            else:
                layer.call = call


@contextlib.contextmanager
def isolated_tracing() -> Iterator[None]:
    """While open, a model can be traced into a function of one's own that leaves no trace in the model.

    A ``tf.function`` inside the one that is being traced becomes a part of its graph: left alone, it
    would run what it was traced with before, and it would keep, for its owner to run later, what it is
    traced with now. Functions to be traced here need ``get_concrete_function``. Nor do our layers leave
    gradients behind, which TensorFlow would keep.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with without_gradients():
            yield
    finally:
        tf.config.run_functions_eagerly(before)
