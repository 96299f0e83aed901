"""What a served model takes and gives, and by which names."""

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
    """Inputs and outputs of a model.

    Attributes:
        structure: The inputs, nested as the model takes them: a `tf.TensorSpec` each.
        inputs: The same, flat.
        outputs: A `tf.TensorSpec` for each output, flat, the batch size and other sizes unknown where the
            model leaves them open.
    """

    structure: Any
    inputs: list[tf.TensorSpec]
    outputs: list[tf.TensorSpec]


def signature_of(model: keras.Model) -> Signature:
    """The signature of a model: the names are those of its input and output layers, or the keys of a dict.

    Where a dict holds dicts or lists, a name is all keys and numbers on the way, as `boxes_0`.

    Raises:
        ValueError: if the model is not built, or has been called with several arguments.
    """
    if isinstance(model, keras.Sequential) and model.built:
        model = functional_of(model)
    if is_functional(model):
        given, made = model.input, model.output
        given_names = [input_layer(model, tensor).name for tensor in keras.tree.flatten(given)]
        made_names = model.output_names
    else:
        given = seen_inputs(model)
        try:
            made = model.compute_output_spec(given)
        except Exception as error:  # `call` is the user's own code.
            raise ValueError(
                "What the model gives cannot be found out from the inputs that it was built for: let `call` "
                f"take one argument for all inputs. Received: model '{model.name}' of class "
                f"{type(model).__name__}, {first_line(error)}"
            ) from error
        given_names = _numbered("input", keras.tree.flatten(given))
        made_names = _numbered("output", keras.tree.flatten(made))
    inputs = _specs(key_names(given) or given_names, keras.tree.flatten(given))
    structure = keras.tree.pack_sequence_as(given, inputs)
    outputs = _specs(key_names(made) or made_names, keras.tree.flatten(made))
    return Signature(structure, inputs, outputs)


def _numbered(name: str, values: list[Any]) -> list[str]:
    return [name] if len(values) == 1 else [f"{name}_{number}" for number in range(len(values))]


def _specs(names: Iterable[str], tensors: Iterable[Any]) -> list[tf.TensorSpec]:
    found: dict[str, tf.TensorSpec] = {}
    for name, tensor in zip(names, tensors, strict=True):
        # TensorFlow's signatures take names that are fit for arguments.
        clean = stem = re.sub(r"\W|^(?=\d)", "_", name)
        number = 0
        while clean in found:
            number += 1
            clean = f"{stem}_{number}"
        found[clean] = tf.TensorSpec(tensor.shape, tensor.dtype, name=clean)
    return list(found.values())
