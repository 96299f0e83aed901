"""What a served model takes and gives, and by which names."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn._rebuild import input_layer, is_functional


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

    Raises:
        ValueError: if the model is not built, or has been called with several arguments.
    """
    if isinstance(model, keras.Sequential) and model.built:
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    if is_functional(model):
        given, made = model.input, model.output
        names = [input_layer(model, tensor).name for tensor in keras.tree.flatten(given)]
        made_names = model.output_names
    else:
        given = _inputs_of_subclassed(model)
        made = model.compute_output_spec(given)
        names = _numbered("input", keras.tree.flatten(given))
        made_names = _numbered("output", keras.tree.flatten(made))
    if isinstance(made, dict):
        made_names = sorted(made)
    inputs = _specs(names, keras.tree.flatten(given))
    structure = keras.tree.pack_sequence_as(given, inputs)
    return Signature(structure, inputs, _specs(made_names, keras.tree.flatten(made)))


def _inputs_of_subclassed(model: keras.Model) -> Any:
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            "The shapes of the inputs are not known: call the model on an example first, with one argument "
            f"for all inputs. Received: model '{model.name}' of class {type(model).__name__}."
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor((None, *shape[1:]), dtype=model.input_dtype), shapes
    )


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
