"""What Keras knows of a model's graph: its inputs and outputs, and what kind of model it is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


def is_functional(layer: Any) -> bool:
    """Whether this is a Functional model: a model whose graph Keras knows."""
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function)


def functional_of(model: keras.Sequential) -> keras.Model:
    """A built Sequential model as the function of one input that it is, with its own layers."""
    return keras.Model(model.inputs[0], model.outputs[0], name=model.name)


def seen_inputs(model: keras.Model) -> Any:
    """The inputs that a subclassed model was built for, as symbolic tensors of any batch size, nested.

    Raises:
        ValueError: if it was not built by a call with one argument.
    """
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            "The shapes of the inputs are not known: call the model on an example first, with one argument "
            f"for all inputs. Received: model '{model.name}' of class {type(model).__name__}."
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor((None, *shape[1:]), dtype=model.input_dtype), shapes
    )


def key_names(structure: Any) -> list[str]:
    """Names for what a dict holds: its keys, and of what is nested in it all on the way, as `boxes_0`.

    None at all for what is no dict.
    """
    if not isinstance(structure, dict):
        return []
    return ["_".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure)]


def is_custom(layer: keras.layers.Layer) -> bool:
    """Whether this is of a class that does not come with Keras."""
    return not type(layer).__module__.startswith("keras.")


def input_layer(model: keras.Model, tensor: keras.KerasTensor) -> keras.layers.InputLayer:
    """The layer behind one of the inputs of a Functional model: it has the name that users know."""
    (layer,) = (
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.InputLayer) and layer.output is tensor
    )
    return layer


def input_like(model: keras.Model, tensor: keras.KerasTensor) -> keras.KerasTensor:
    """A new input, equal to this one of a Functional model."""
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
    """Keras compiles the clone of a compiled model, and fails on a loss that it cannot serialize."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled
