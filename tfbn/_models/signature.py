"""The names, shapes and dtypes of the inputs and outputs of a served model."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn._models.functional import (
    functional_of,
    input_layer,
    is_functional,
    key_names,
    seen_inputs,
)
from tfbn._support.checks import first_line


class Signature(NamedTuple):
    """The inputs and outputs of a model.

    Attributes:
        structure: A `tf.TensorSpec` for each input, nested as the model expects them.
        inputs: The same, flat.
        outputs: A `tf.TensorSpec` for each output, flat. Axes that the model leaves open have size `None`.
    """

    structure: Any
    inputs: list[tf.TensorSpec]
    outputs: list[tf.TensorSpec]


def signature_of(model: keras.Model) -> Signature:
    """The signature of a model, with the names of its input and output layers, or the keys of a dict.

    Values nested in a dict get all keys and positions on the way, as in `boxes_0`.

    Raises:
        ValueError: If the model is not built, or its `call` does not work with a single symbolic argument.
    """
    if isinstance(model, keras.Sequential) and model.built:
        model = functional_of(model)
    if is_functional(model):
        inputs, outputs = model.input, model.output
        input_names = [input_layer(model, tensor).name for tensor in keras.tree.flatten(inputs)]
        output_names = model.output_names
    else:
        inputs = seen_inputs(model)
        try:
            outputs = model.compute_output_spec(inputs)
        except Exception as error:  # `call` is the user's own code.
            raise ValueError(
                "Cannot infer the model's outputs from the inputs it was built with. Let `call` work on symbolic "
                f"tensors, with one argument for all inputs. Received: model '{model.name}' of class "
                f"{type(model).__name__}, {first_line(error)}"
            ) from error
        input_names = _numbered("input", keras.tree.flatten(inputs))
        output_names = _numbered("output", keras.tree.flatten(outputs))
    input_specs = _specs(key_names(inputs) or input_names, keras.tree.flatten(inputs))
    output_specs = _specs(key_names(outputs) or output_names, keras.tree.flatten(outputs))
    return Signature(keras.tree.pack_sequence_as(inputs, input_specs), input_specs, output_specs)


def _numbered(name: str, values: list[Any]) -> list[str]:
    return [name] if len(values) == 1 else [f"{name}_{number}" for number in range(len(values))]


def _specs(names: Iterable[str], tensors: Iterable[Any]) -> list[tf.TensorSpec]:
    found: dict[str, tf.TensorSpec] = {}
    for name, tensor in zip(names, tensors, strict=True):
        # Names in a TensorFlow signature must be valid argument names.
        clean = stem = re.sub(r"\W|^(?=\d)", "_", name)
        number = 0
        while clean in found:
            number += 1
            clean = f"{stem}_{number}"
        found[clean] = tf.TensorSpec(tensor.shape, tensor.dtype, name=clean)
    return list(found.values())
