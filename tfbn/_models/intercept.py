"""Intercepting the calls of layers while a model runs or is traced."""

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
    """While open, each of these layers runs the given function instead of its own `call`.

    Keras looks up `layer.call` on the instance, so this works wherever the layer is: in a Functional,
    Sequential or subclassed model, in a wrapper, or shared by several parents. Functions that were traced
    earlier are not affected. Contexts can be nested.
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
    """While open, tracing a model into a function reads nothing from earlier traces and leaves none behind.

    A `tf.function` inside the model would reuse its earlier trace, and would keep the new one, with its
    intercepted layers, for later calls. Here it runs as plain Python, so trace the outer function with
    `get_concrete_function`. Our layers define no gradients, because TensorFlow would keep them.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with without_gradients():
            yield
    finally:
        tf.config.run_functions_eagerly(before)
