"""Copying a model with some of its layers replaced.

Keras clones Functional and Sequential models around new layers. A custom layer or model is created again
from its config, and then the layers inside it are replaced.
"""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tfbn._models.copy_layer import (
    build_alike,
    copy_operation,
    move_state,
    move_weights,
    swap_child,
)
from tfbn._models.functional import input_like, is_custom, is_functional, without_compilation
from tfbn._models.walk import children, walk
from tfbn._support.checks import first_line


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
        the state of the optimizer.

    Raises:
        ValueError: If a layer cannot be created from its config.
    """
    copies = Copies(model, replacements)
    new = copies.copy_and_build(model)
    copies.transfer_state()
    if isinstance(model, keras.Model) and model.compiled:
        _compile_alike(model, new)
    return new


class Copies:
    """Copies the layers of a model, each once, so that shared layers are shared in the copy too.

    Args:
        model: The model that holds the layers.
        replacements: Layers to use instead of a copy, by the `id` of the original.
    """

    def __init__(
        self, model: keras.layers.Layer, replacements: Mapping[int, keras.layers.Layer]
    ) -> None:
        self._replacements = replacements
        self._originals: dict[int, Any] = {}
        self._copies: dict[int, Any] = dict(replacements)
        self._parents: dict[int, int] = {}
        self._custom_classes: dict[str, type] = {}
        self._meet(model)

    def copy(self, layer: Any) -> Any:
        """The copy of a layer, or of an operation of a graph."""
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self._create(layer)
        self._originals[id(layer)] = layer
        return self._copies[id(layer)]

    def _create(self, layer: Any) -> Any:
        if isinstance(layer, keras.layers.Layer) and id(layer) not in self._parents:
            self._meet(layer)
        if is_functional(layer):
            new = self._functional(layer)
        elif (
            isinstance(layer, keras.Sequential) and layer.layers
        ):  # Keras cannot clone an empty one.
            with without_compilation(layer):
                new = keras.models.clone_model(layer, clone_function=self.copy_and_build)
            _warn_of_another_class(layer, new)
        else:
            with self._custom_scope():
                new = copy_operation(layer)
            if isinstance(layer, keras.layers.Layer):
                self._match_inside(layer, new)
        return new

    def copy_and_build(self, layer: Any) -> Any:
        """The copy, built here so that its weights keep their paths, wherever it is called first."""
        new = self.copy(layer)
        if isinstance(layer, keras.layers.Layer):
            for old in _parents_first([layer]):  # A parent may build its children itself.
                copied = self._copies.get(id(old))
                if copied is not None and old.built and not copied.built:
                    build_alike(old, copied)
        return new

    def transfer_state(self) -> None:
        """Copies weights, state and trainable flags."""
        originals = list(self._originals.values())
        pairs = [(old, self._copies[id(old)]) for old in originals]
        pairs = [pair for pair in pairs if isinstance(pair[0], keras.layers.Layer)]
        moved: set[int] = set()
        for old, new in pairs:
            move_state(old, new)
            move_weights(old, new, moved)  # Bit for bit. Some hooks merge weights, as for LoRA.
        # Setting a parent's flag also sets those of its children.
        for old in _parents_first(old for old, _ in pairs):
            copied = self._copies.get(id(old))
            if copied is not None and copied.trainable != old.trainable:
                copied.trainable = old.trainable

    def _meet(self, layer: keras.layers.Layer) -> None:
        for parent in walk(layer, set()):
            self._parents.setdefault(id(parent), 0)
            kind = type(parent)
            if is_custom(parent) and keras.saving.get_registered_name(kind) == kind.__name__:
                self._custom_classes[kind.__name__] = kind
            for child in children(parent):
                self._parents[id(child)] = self._parents.get(id(child), 0) + 1

    def _custom_scope(self) -> contextlib.AbstractContextManager[Any]:
        return keras.saving.custom_object_scope(self._custom_classes)

    def _concerns(self, layer: keras.layers.Layer) -> bool:
        """Whether a layer inside is to be replaced, or has several parents."""
        inside = [inner for inner in walk(layer, set()) if inner is not layer]
        return any(id(i) in self._replacements or self._parents[id(i)] > 1 for i in inside)

    def _functional(self, model: keras.Model) -> keras.Model:
        inputs = keras.tree.map_structure(lambda x: input_like(model, x), model.input)
        with without_compilation(model):
            new = keras.models.clone_model(
                model, input_tensors=inputs, clone_function=self.copy_and_build
            )
        _warn_of_another_class(model, new)
        return new

    def _match_inside(self, layer: keras.layers.Layer, new: keras.layers.Layer) -> None:
        """Replaces layers inside a copy, and records the copies of the others."""
        concerns = self._concerns(layer)
        if not _alike(layer, new) and (concerns or is_custom(layer)):
            build_alike(layer, new)  # It creates its layers in `build`.
        if concerns or _alike(layer, new):
            self._pair(layer, new)

    def _pair(self, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
        if not _alike(old, new):
            raise ValueError(
                f"Cannot copy the layer '{old.name}' of class {type(old).__name__}: created from its config, it "
                f"holds other layers. Received: {_kinds(new)} instead of {_kinds(old)}. "
                f"Let {type(old).__name__} create all of its layers in `__init__` or `build`, from its config."
            )
        self._originals[id(old)] = old
        self._copies[id(old)] = new
        new.name = old.name  # Keras has numbered unnamed layers anew.
        for old_child, new_child in zip(children(old), list(children(new)), strict=True):
            if id(old_child) in self._copies or self._concerns_itself(old_child):
                swap_child(new, new_child, self.copy(old_child))
            else:
                self._pair(old_child, new_child)

    def _concerns_itself(self, layer: keras.layers.Layer) -> bool:
        return self._parents[id(layer)] > 1 or self._concerns(layer)


def _compile_alike(old: keras.Model, new: keras.Model) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns that a lambda cannot be saved.
            new.compile_from_config(old.get_compile_config())
    except Exception as error:  # A custom loss or metric can raise anything.
        warnings.warn(
            f"Cannot compile the copy of the model '{old.name}' from its compile config. "
            f"Received: {first_line(error)} "
            "Compile the copy with the arguments that you passed to `compile`.",
            stacklevel=4,
        )
        return
    states = [getattr(model.optimizer, "variables", []) for model in (old, new)]
    if [v.shape for v in states[0]] == [v.shape for v in states[1]]:
        for source, target in zip(*states, strict=True):
            target.assign(source)


def _warn_of_another_class(old: keras.Model, new: keras.Model) -> None:
    if type(new) is not type(old):
        warnings.warn(
            f"The copy of the model '{old.name}' is a {type(new).__name__}, not a {type(old).__name__}, because "
            f"Keras cannot create a {type(old).__name__} from a graph. The copy has the same layers and outputs, "
            f"but lacks the methods of {type(old).__name__}.",
            stacklevel=5,
        )


def _parents_first(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """These layers and all layers inside them, each after all of its parents."""
    seen: set[int] = set()
    children_first: list[keras.layers.Layer] = []

    def visit(layer: keras.layers.Layer) -> None:
        if id(layer) not in seen:
            seen.add(id(layer))
            for child in children(layer):
                visit(child)
            children_first.append(layer)

    for layer in layers:
        visit(layer)
    return children_first[::-1]


def _kinds(layer: keras.layers.Layer) -> list[str]:
    return [type(child).__name__ for child in children(layer)]


def _alike(old: keras.layers.Layer, new: keras.layers.Layer) -> bool:
    return _kinds(old) == _kinds(new)
