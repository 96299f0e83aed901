"""The inputs and outputs of a model, as its Keras graph or its build config records them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


def is_functional(layer: Any) -> bool:
    """Whether this is a Functional model, that is, a model with a Keras graph."""
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function)


def functional_of(model: keras.Sequential) -> keras.Model:
    """A Functional model with the layers of a built Sequential model."""
    return keras.Model(model.inputs[0], model.outputs[0], name=model.name)


def seen_inputs(model: keras.Model) -> Any:
    """Symbolic tensors like the inputs that a subclassed model was built with, of any batch size.

    Raises:
        ValueError: If the model was not built by a call with a single argument.
    """
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            "The input shapes of the model are unknown. Call it on an example first, with a single argument "
            f"that holds all inputs. Received: model '{model.name}' of class {type(model).__name__}."
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor((None, *shape[1:]), dtype=model.input_dtype), shapes
    )


def key_names(structure: Any) -> list[str]:
    """Names for the values of a dict: their keys, joined with those of nested values, as in `boxes_0`.

    A structure that is not a dict has no names.
    """
    if not isinstance(structure, dict):
        return []
    return ["_".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure)]


def is_custom(layer: keras.layers.Layer) -> bool:
    """Whether the class of this layer is not part of Keras."""
    return not type(layer).__module__.startswith("keras.")


def input_layer(model: keras.Model, tensor: keras.KerasTensor) -> keras.layers.InputLayer:
    """The input layer of one of the inputs of a Functional model; it carries the name that users gave."""
    (layer,) = (
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.InputLayer) and layer.output is tensor
    )
    return layer


def input_like(model: keras.Model, tensor: keras.KerasTensor) -> keras.KerasTensor:
    """A new input with the shape, dtype and name of this input of a Functional model."""
    layer = input_layer(model, tensor)
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        name=layer.name,
        optional=layer.optional,
    )


@contextlib.contextmanager
def without_compilation(model: keras.Model) -> Iterator[None]:
    """While open, the model claims not to be compiled.

    Otherwise `keras.models.clone_model` compiles the clone and fails on losses that it cannot serialize.
    """
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled
