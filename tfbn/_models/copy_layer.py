"""Copying a single layer: its config, its build, its weights and state."""

import contextlib
import inspect
import tempfile
import types
import warnings
from typing import Any

import keras

from tfbn._models.functional import is_custom
from tfbn._models.tensorflow_state import tensorflow_variables
from tfbn._models.walk import layers_inside, walk
from tfbn._support.checks import first_line
from tfbn._support.keras_internals import copy_path


def copy_operation(operation: keras.Operation, **changes: Any) -> keras.Operation:
    """Creates a layer, or an operation of a graph, again from its config. The copy is not built.

    Args:
        operation: The layer or operation to copy.
        **changes: Entries of the config to override.

    Raises:
        ValueError: If the layer cannot be created from its config.
    """
    try:
        with custom_classes_of(operation), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns that lambdas cannot be saved safely.
            config = operation.get_config()
            config = {**_without_builds(config), **_functions_of(operation, config), **changes}
            if isinstance(operation, keras.layers.Lambda):
                return _copy_lambda(operation, config)
            new = type(operation).from_config(_for_constructor(type(operation), config))
        new.name = config.get("name", operation.name)
        return new
    except Exception as error:  # The class of the user can raise anything.
        kind = type(operation).__name__
        raise ValueError(
            f"Cannot copy the layer '{operation.name}' of class {kind} from its config. "
            f"Received: {first_line(error)} "
            f"Give {kind} a `get_config` that returns the arguments of its `__init__`, which Keras also needs to "
            "save the layer."
        ) from error


def custom_classes_of(operation: keras.Operation) -> contextlib.AbstractContextManager[Any]:
    """While open, Keras finds the unregistered classes of this layer and of the layers inside it."""
    found: dict[str, set[type]] = {}
    inside = walk(operation, inside=layers_inside) if isinstance(operation, keras.Layer) else ()
    for layer in inside:
        for kind in type(layer).__mro__ if is_custom(layer) else ():
            if issubclass(kind, keras.Layer) and not kind.__module__.startswith("keras."):
                found.setdefault(keras.saving.get_registered_name(kind), set()).add(kind)
    unique = {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1}
    return keras.saving.custom_object_scope(unique)


def _without_builds(config: Any) -> Any:
    """The config without those with which Keras would build inner layers, outside of their name scopes."""
    if isinstance(config, dict):
        return {k: _without_builds(v) for k, v in config.items() if k != "build_config"}
    if type(config) in (list, tuple):
        return type(config)(map(_without_builds, config))
    return config


def _functions_of(
    operation: keras.Operation, config: dict[str, Any]
) -> dict[str, types.FunctionType]:
    """The functions, such as activations, that Keras cannot create again: lambdas and unregistered ones."""
    return {
        name: value
        for name, saved in config.items()
        if isinstance(saved, dict)
        and isinstance(value := getattr(operation, name, None), types.FunctionType)
    }


def _for_constructor(kind: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The config without the entries that Keras always adds and this constructor does not accept."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return config
    surplus = {"name", "trainable", "dtype"} - {parameter.name for parameter in parameters}
    return {key: value for key, value in config.items() if key not in surplus}


def _copy_lambda(layer: keras.layers.Lambda, config: dict[str, Any]) -> keras.layers.Lambda:
    # Its config would lose the globals that its function uses.
    shape = config.get("output_shape")
    base = {name: config[name] for name in ("name", "trainable", "dtype")}
    return keras.layers.Lambda(
        layer.function,
        output_shape=None if isinstance(shape, dict) else shape,
        mask=layer.mask,
        arguments=layer.arguments,
        **base,
    )


def build_alike(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Builds a layer for the shapes that another was built for, with weights of the same paths."""
    with contextlib.ExitStack() as stack:
        # Keras warns about models that it cannot build from outside. Their layers are built one by one.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        scopes = (old.path or old.name).split("/")
        # `Model.build` runs the model outside of its own name scope.
        for name in scopes if type(old).build is keras.Model.build else scopes[:-1]:
            stack.enter_context(keras.name_scope(name))
        config = old.get_build_config()
        new.build_from_config(config)
        if config:  # As when Keras loads a file: for a model without a `build`, Keras forgets it.
            new.built = True


def _own(kind: str, layer: keras.layers.Layer) -> list[keras.Variable]:
    """The `weights` or the `variables` of a layer without those of the layers inside it."""
    inside = {id(variable) for inner in layers_inside(layer) for variable in getattr(inner, kind)}
    return [variable for variable in getattr(layer, kind) if id(variable) not in inside]


def check_weights(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Checks that a copy has weights and variables of its own with the shapes of those of the original.

    Raises:
        ValueError: If it does not.
    """
    shapes = [
        [tuple(v.shape) for v in (*_own("weights", layer), *tensorflow_variables(layer))]
        for layer in (old, new)
    ]
    if shapes[0] != shapes[1]:
        kind = type(old).__name__
        raise ValueError(
            f"Cannot copy the layer '{old.name}' of class {kind}: created from its config, it has other weights. "
            f"Received: shapes {shapes[1]} instead of {shapes[0]}. "
            f"Let {kind} create all of its weights in `__init__` or `build`, from its config."
        )


def move_weights(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Assigns the variables of one layer, random seeds too, to another, except those of the layers inside them."""
    copy_path(old, new)
    # The weights come first. A layer may create its seed in a call.
    for source, target in zip(_own("variables", old), _own("variables", new), strict=False):
        target.assign(source)
        copy_path(source, target)  # A constructor numbers layers without a name anew.
    variables = zip(tensorflow_variables(old), tensorflow_variables(new), strict=True)
    for value, variable in variables:
        variable.assign(value)


def move_state(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Copies state that is not a weight, such as a vocabulary, through Keras's hooks for saving."""
    kind = type(old)
    if kind is type(new) and kind.load_own_variables is not keras.layers.Layer.load_own_variables:
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        new.load_own_variables({k: keras.ops.convert_to_tensor(v) for k, v in store.items()})
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
