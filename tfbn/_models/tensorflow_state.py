"""What a layer keeps in variables of TensorFlow, which Keras neither saves nor copies."""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


def tensorflow_variables(layer: keras.layers.Layer) -> list[tf.Variable]:
    """The `tf.Variable` objects, and the states of random generators, in the attributes of a layer."""
    found = {id(variable): variable for variable in _held(list(vars(layer).values()))}
    return list(found.values())


def _held(value: Any) -> Iterator[tf.Variable]:
    if isinstance(value, tf.Variable):
        yield value
    elif isinstance(value, tf.random.Generator):
        yield value.state
    elif isinstance(value, tf.Module):
        yield from value.variables
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _held(item)
    elif isinstance(value, dict):
        yield from _held(list(value.values()))
