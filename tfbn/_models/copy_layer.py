"""Copying a single layer: its config, its build, its weights and state, and its place in a parent."""

import contextlib
import inspect
import tempfile
import warnings
from typing import Any

import keras

from tfbn._support.checks import first_line
from tfbn._support.keras_internals import replace_tracked_layer


def copy_operation(operation: keras.Operation, **changes: Any) -> keras.Operation:
    """Creates a layer, or an operation of a graph, again from its config. The copy is not built.

    Args:
        operation: The layer or operation to copy.
        **changes: Entries of the config to override.

    Raises:
        ValueError: If the layer cannot be created from its config.
    """
    try:
        config = {**operation.get_config(), **changes}
        if isinstance(operation, keras.layers.Lambda):
            return _copy_lambda(operation, config)
        new = type(operation).from_config(_for_constructor(type(operation), config))
        new.name = config.get("name", operation.name)
        return new
    except Exception as error:  # The class of the user can raise anything.
        raise ValueError(
            f"Cannot copy the layer '{operation.name}' of class {type(operation).__name__} from its config. "
            f"Received: {first_line(error)} "
            f"Give {type(operation).__name__} a `get_config` that returns the arguments of its `__init__`, "
            "which Keras also needs to save the layer."
        ) from error


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
        new.build_from_config(old.get_build_config())


def move_weights(
    old: keras.layers.Layer, new: keras.layers.Layer, moved: set[int] | None = None
) -> None:
    """Assigns the weights of one layer to those of another, except those whose `id` is in `moved`."""
    moved = set() if moved is None else moved
    shapes = [[tuple(weight.shape) for weight in layer.weights] for layer in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Cannot copy the layer '{old.name}' of class {type(old).__name__}: created from its config, it has "
            f"other weights. Received: shapes {shapes[1]} instead of {shapes[0]}. "
            f"Let {type(old).__name__} create all of its weights in `__init__` or `build`, from its config."
        )
    for source, target in zip(old.weights, new.weights, strict=True):
        if id(target) not in moved:
            target.assign(source)
            moved.add(id(target))


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


def swap_child(
    parent: keras.layers.Layer, old: keras.layers.Layer, new: keras.layers.Layer
) -> None:
    """Replaces a layer inside its parent: in attributes, tuples, lists and dicts.

    Assigning the attribute is not enough: Keras keeps tracking the old layer, and a parent that is built
    tracks no new ones.
    """
    replace_tracked_layer(parent, old, new)
    for name, value in list(vars(parent).items()):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, tuple) and any(item is old for item in value):
            setattr(parent, name, tuple(new if item is old else item for item in value))
        else:
            _swap_item(value, old, new)


def _swap_item(container: Any, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    # Bypasses the tracking of Keras's own lists and dicts: the tracker was updated above.
    if isinstance(container, list):
        for index, item in enumerate(container):
            if item is old:
                list.__setitem__(container, index, new)
            else:
                _swap_item(item, old, new)
    elif isinstance(container, dict):
        for key, item in container.items():
            if item is old:
                dict.__setitem__(container, key, new)
            else:
                _swap_item(item, old, new)
