"""Copying a model with some of its layers replaced.

Keras clones Functional and Sequential models around new layers. A layer or model of a custom class is
created again from its config, and then layers inside it are replaced. What cannot be copied is shared.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tfbn._models.compilation import compile_alike, without_compilation
from tfbn._models.copy_layer import (
    build_alike,
    check_weights,
    copy_operation,
    move_state,
    move_weights,
)
from tfbn._models.functional import (
    clones_graph,
    input_like,
    is_functional,
    match_graph,
    with_class_of,
)
from tfbn._models.recorded import record_batch_norms
from tfbn._models.replace_layers import swap_children
from tfbn._models.tensorflow_state import tensorflow_variables
from tfbn._models.walk import layers_inside, walk
from tfbn._support.checks import first_line
from tfbn._support.keras_internals import layers_in


def rebuild(
    model: keras.layers.Layer, replacements: Mapping[int, keras.layers.Layer]
) -> keras.layers.Layer:
    """Copies a model, with some of its layers replaced.

    Args:
        model: A model, or any layer. It is not modified.
        replacements: A new, unbuilt layer for the `id` of each layer to replace. It receives the weights of
            the layer that it replaces.

    Returns:
        The copy. Shared layers are shared in the copy too. If the model is compiled, so is the copy, with
        the state of the optimizer. Its batch normalization layers survive saving, loading and cloning.

    Raises:
        ValueError: If a layer that holds layers to replace cannot be copied.
    """
    copies = Copies(model, replacements)
    new = copies.copy_and_build(model)
    copies.transfer_state()
    copies.warn()
    record_batch_norms(new)
    if isinstance(model, keras.Model) and model.compiled:
        compile_alike(model, new)
    return new


class Copies:
    """Copies the layers of a model, each once, so that shared layers are shared in the copy too.

    A layer that cannot be copied is shared with the model, unless a layer inside it is to be replaced.

    Args:
        model: The model that holds the layers.
        replacements: Layers to use instead of a copy, by the `id` of the original.
    """

    def __init__(
        self, model: keras.layers.Layer, replacements: Mapping[int, keras.layers.Layer]
    ) -> None:
        self._model = model
        self._copies: dict[int, Any] = dict(replacements)
        self._originals: dict[int, Any] = {}
        self._shared: list[ValueError] = []  # Why they cannot be copied.
        self._without_class: dict[int, keras.Model] = {}

    def copy_and_build(self, layer: Any) -> Any:
        """Copies a layer, or an operation of a graph.

        It is built here, so that its weights keep their paths wherever it is called first.

        Raises:
            ValueError: If a layer that holds layers to replace cannot be copied.
        """
        before = self._copies.copy(), self._originals.copy()
        try:
            return self._build(layer, self._copy(layer))
        except ValueError as error:
            if clones_graph(layer):
                raise
            self._copies, self._originals = before
            if not is_functional(layer):
                return self._share(layer, error)
        self._add(layer, self._clone(layer))
        return self._build(layer, self._copies[id(layer)])

    def transfer_state(self) -> None:
        """Copies weights, state and trainable flags."""
        originals = [old for old in self._originals.values() if isinstance(old, keras.Layer)]
        for old in originals:
            new = self._copies[id(old)]
            if new is not old and id(old) not in self._without_class:
                move_state(old, new)
                move_weights(old, new)  # Bit for bit. Some hooks merge weights, as for LoRA.
        # Setting a parent's flag also sets those of its children.
        for old in _parents_first(originals):
            new = self._copies.get(id(old), old)
            if new.trainable != old.trainable:
                new.trainable = old.trainable

    def warn(self) -> None:
        """Warns if the copy shares weights with the model, or lacks the class of a model."""
        for model in self._without_class.values():
            kind = type(model).__name__
            warnings.warn(
                f"The copy of the model '{model.name}' is a {type(self._copies[id(model)]).__name__}, not a {kind}, "
                f"because {kind} cannot create it from its config. The copy has the same layers and outputs, but "
                f"lacks the methods of {kind}.",
                stacklevel=4,
            )
        if self._shared:
            reasons = " ".join(map(str, self._shared))
            warnings.warn(
                "The copy shares layers with the model, because they cannot be copied. Training one changes the "
                f"other. {reasons}",
                stacklevel=4,
            )

    def _copy(self, layer: Any) -> Any:
        """The copy of a layer. It is not built, unless its class builds it."""
        if id(layer) in self._copies:
            self._originals[id(layer)] = layer  # It may be a replacement.
        elif clones_graph(layer):
            self._add(layer, self._clone(layer))
        else:
            new = copy_operation(layer)
            self._add(layer, new)
            if isinstance(layer, keras.Layer):
                self._match(layer, new)
        return self._copies[id(layer)]

    def _add(self, layer: Any, new: Any) -> None:
        self._originals[id(layer)] = layer
        self._copies[id(layer)] = new

    def _clone(self, model: keras.Model) -> keras.Model:
        """The copy of a Functional or Sequential model, layer by layer."""
        if isinstance(model, keras.Sequential) and not model.layers:
            return copy_operation(model)  # Keras cannot clone it.
        inputs = None
        if is_functional(model):
            inputs = keras.tree.map_structure(lambda x: input_like(model, x), model.input)
        with without_compilation(model):
            try:
                new = keras.models.clone_model(model, inputs, clone_function=self.copy_and_build)
            except TypeError as error:  # Its constructor takes something else than the graph.
                raise ValueError(
                    f"Cannot copy the model '{model.name}' of class {type(model).__name__}. "
                    f"Received: {first_line(error)} Give {type(model).__name__} a `get_config` that returns the "
                    "arguments of its `__init__`, and a `from_config`."
                ) from error
        new = with_class_of(model, new)
        if type(new) is not type(model):
            self._without_class[id(model)] = model
        else:
            self._copy_attributes(model, new)
        return new

    def _copy_attributes(self, old: keras.Model, new: keras.Model) -> None:
        """Copies the layers that a model of Keras's own class holds in attributes."""

        def copy(value: Any) -> Any:
            if isinstance(value, keras.Layer):
                return self.copy_and_build(value)
            if isinstance(value, list | tuple):
                return [copy(item) for item in value]
            if isinstance(value, dict):
                return {key: copy(item) for key, item in value.items()}
            return value

        for name, value in vars(old).items():
            if not name.startswith("_") and name not in vars(new) and any(layers_in([value])):
                setattr(new, name, copy(value))

    def _match(self, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
        """Pairs the layers inside a layer with those inside its copy, and replaces those that differ."""
        if not _alike(old, new) and old.built:
            build_alike(old, new)  # It creates its layers in `build`.
        if not _alike(old, new):
            kind = type(old).__name__
            raise ValueError(
                f"Cannot copy the layer '{old.name}' of class {kind}: created from its config, it holds other "
                f"layers. Received: {_kinds(new)} instead of {_kinds(old)}. "
                f"Let {kind} create all of its layers in `__init__` or `build`, from its config."
            )
        self._add(old, new)
        new.name = old.name  # Keras has numbered unnamed layers anew.
        swaps = []
        for old_child, new_child in zip(layers_inside(old), layers_inside(new), strict=True):
            if id(old_child) not in self._copies and _same_settings(old_child, new_child):
                self._match(old_child, new_child)
            elif self._copy(old_child) is not new_child:
                swaps.append((new_child, self._copy(old_child)))
        swap_children(new, swaps)
        if is_functional(new):
            match_graph(old, new)

    def _build(self, layer: Any, new: Any) -> Any:
        """Builds the copy of a layer, and those of the layers inside it, if the originals are built."""
        if not isinstance(layer, keras.Layer):
            return new
        for old in _parents_first([layer]):  # A parent may build its children itself.
            copied = self._copies.get(id(old))
            if copied is not None and old.built and not copied.built:
                build_alike(old, copied)
        for old in walk(layer, inside=layers_inside):
            copied = self._copies.get(id(old))
            if copied is not None and id(old) not in self._without_class:
                check_weights(old, copied)
        return new

    def _share(self, layer: Any, error: ValueError) -> Any:
        """Uses a layer that cannot be copied itself."""
        inside = list(walk(layer, inside=layers_inside)) if isinstance(layer, keras.Layer) else []
        replaced = [old for old in inside if self._copies.get(id(old), old) is not old]
        if layer is self._model:
            raise error
        if replaced:
            raise ValueError(
                f"{error} It cannot be shared with the copy instead, because the layer '{replaced[0].name}' inside "
                "it is to be replaced, or is used elsewhere in the model."
            ) from error
        for old in inside or [layer]:
            self._add(old, old)
        if inside and (layer.weights or any(map(tensorflow_variables, inside))):
            self._shared.append(error)
        return layer


def _parents_first(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """These layers and all layers inside them, each after all of its parents."""
    seen: set[int] = set()
    children_first: list[keras.layers.Layer] = []

    def visit(layer: keras.layers.Layer) -> None:
        if id(layer) not in seen:
            seen.add(id(layer))
            for child in layers_inside(layer):
                visit(child)
            children_first.append(layer)

    for layer in layers:
        visit(layer)
    return children_first[::-1]


def _kinds(layer: keras.layers.Layer) -> list[str]:
    return [type(child).__name__ for child in layers_inside(layer)]


def _alike(old: keras.layers.Layer, new: keras.layers.Layer) -> bool:
    return _kinds(old) == _kinds(new)


def _same_settings(old: keras.layers.Layer, new: keras.layers.Layer) -> bool:
    """Whether two layers have the same class and, if no layers are inside them, the same config."""
    if type(old) is not type(new):
        return False
    if layers_inside(old):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            configs = [
                {**layer.get_config(), "name": None, "trainable": None} for layer in (old, new)
            ]
        return bool(configs[0] == configs[1])
    except Exception:  # Without a config to compare, they are what the same constructor made.
        return True
