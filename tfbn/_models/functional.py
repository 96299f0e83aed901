"""The inputs and outputs of a model, as its Keras graph or its build config records them."""

import inspect
import warnings
from typing import Any

import keras


def is_functional(layer: Any) -> bool:
    """Whether this is a Functional model, that is, a model with a Keras graph."""
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function)


def clones_graph(model: keras.layers.Layer) -> bool:
    """Whether a model is copied layer by layer along its graph, rather than created from its config.

    That is so for Functional and Sequential models, unless their class has its own config or, for a
    Functional one, its own constructor, from which it creates its layers.
    """
    keras_knows = getattr(type(model).get_config, "__module__", "").startswith("keras.")
    if isinstance(model, keras.Sequential):
        return keras_knows
    if not is_functional(model):
        return False
    constructor = inspect.getfullargspec(type(model).__init__)
    if constructor.varargs and constructor.varkw:
        return keras_knows
    return constructor.args[1:] == ["inputs", "outputs", "name"]


def with_class_of(model: keras.Model, clone: keras.Model) -> keras.Model:
    """The clone of a Sequential model as an instance of its class, if the class adds no constructor."""
    if isinstance(model, keras.Sequential) and type(model).__init__ is keras.Sequential.__init__:
        object.__setattr__(clone, "__class__", type(model))
    return clone


def match_graph(old: keras.Model, new: keras.Model) -> None:
    """Gives the operations of a graph the names of those of another, which must be connected alike.

    Raises:
        ValueError: If the graphs differ.
    """
    kinds = [[type(operation).__name__ for operation in m.operations] for m in (old, new)]
    if kinds[0] == kinds[1]:
        for source, target in zip(old.operations, new.operations, strict=True):
            target.name = source.name
    if kinds[0] != kinds[1] or _connections(old) != _connections(new):
        raise ValueError(
            f"Cannot copy the model '{old.name}' of class {type(old).__name__}: created from its config, it has "
            "another graph."
        )
    new.output_names = list(old.output_names)


def _connections(model: keras.Model) -> list[Any] | None:
    """Which operation gets which tensors, by name. None if Keras cannot tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = keras.Model(model.inputs, model.outputs).get_config()
    except Exception:  # A custom layer without a config.
        return None
    return [*(layer["inbound_nodes"] for layer in config["layers"]), config["output_layers"]]


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
