"""Building a model anew: some layers replaced, the others copied, all weights moved over.

Keras knows the graph of Functional and Sequential models and rebuilds them around new layers. A layer
or model of the user's own is made again from its config, and then the layers inside it are exchanged.
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
    """A copy of the model in which some layers are others.

    Args:
        model: A model, or any layer. It stays as it is.
        replacements: The new layer, unbuilt, for the `id` of each layer to replace. It takes the weights of
            the old one.

    Returns:
        The copy. Layers that were shared are shared in it; it is compiled if the model is, and
        then its optimizer goes on where the model's stands.

    Raises:
        ValueError: if a layer cannot be made again from its config.
    """
    copies = Copies(model, replacements)
    new = copies.copy_and_build(model)
    copies.transfer_state()
    if isinstance(model, keras.Model) and model.compiled:
        _compile_alike(model, new)
    return new


class Copies:
    """Copies of the layers of a model, each made once, so that shared layers are shared again.

    Args:
        model: The model that the layers are from.
        replacements: Layers to take instead of a copy, by the `id` of the original.
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
        """The copy of this layer, or of this operation of a graph."""
        self._originals[id(layer)] = layer
        if id(layer) in self._copies:
            return self._copies[id(layer)]
        if isinstance(layer, keras.layers.Layer) and id(layer) not in self._parents:
            self._meet(layer)
        if is_functional(layer):
            new = self._functional(layer)
        elif isinstance(layer, keras.Sequential):
            with without_compilation(layer):
                new = keras.models.clone_model(layer, clone_function=self.copy_and_build)
            _warn_of_another_class(layer, new)
        else:
            with self._custom_scope():
                new = copy_operation(layer)
            if isinstance(layer, keras.layers.Layer):
                self._match_inside(layer, new)
        self._copies[id(layer)] = new
        return new

    @property
    def originals(self) -> dict[int, Any]:
        """What each copy was made of, by the `id` of the copy."""
        return {id(self._copies[number]): layer for number, layer in self._originals.items()}

    def copy_and_build(self, layer: Any) -> Any:
        """The copy, with weights of the same paths: not of those where it is called first."""
        new = self.copy(layer)
        if isinstance(layer, keras.layers.Layer):
            for old in _parents_first([layer]):  # They may build their children themselves.
                copied = self._copies.get(id(old))
                if copied is not None and old.built and not copied.built:
                    build_alike(old, copied)
        return new

    def transfer_state(self) -> None:
        """Moves weights, state and trainable flags over."""
        originals = list(self._originals.values())
        pairs = [(old, self._copies[id(old)]) for old in originals]
        pairs = [pair for pair in pairs if isinstance(pair[0], keras.layers.Layer)]
        moved: set[int] = set()
        for old, new in pairs:
            move_state(old, new)
            move_weights(old, new, moved)  # Bit for bit: some hooks merge weights, of LoRA for one.
        for old in _parents_first(
            old for old, _ in pairs
        ):  # A parent's flag goes down to its children.
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
        """Whether something inside is to be replaced, or is shared with the outside."""
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
        """Exchanges the layers inside a copy for what they are to be, and keeps track of the others."""
        concerns = self._concerns(layer)
        if not _alike(layer, new) and (concerns or is_custom(layer)):
            build_alike(layer, new)  # It makes its layers when it is built.
        if concerns or _alike(layer, new):
            self._pair(layer, new)

    def _pair(self, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
        if not _alike(old, new):
            raise ValueError(
                f"The layer '{old.name}' of class {type(old).__name__}, made again from its config, does "
                "not have the layers inside that it had. "
                f"Received: {_kinds(new)} where there were {_kinds(old)}. "
                f"Let {type(old).__name__} make all of its layers in __init__ or build, from its config."
            )
        self._originals[id(old)] = old
        self._copies[id(old)] = new
        new.name = old.name  # A layer that its parent does not name has a new number by now.
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
            warnings.simplefilter(
                "ignore"
            )  # About saving a loss that is a lambda: it is not saved.
            new.compile_from_config(old.get_compile_config())
    except Exception as error:  # A loss or a metric of the user's own can raise anything.
        warnings.warn(
            f"The new model '{new.name}' is not compiled. "
            f"Received: {first_line(error)} "
            "Compile it with the same arguments as the old one.",
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
            f"The copy of the model '{old.name}' is a {type(new).__name__}, no {type(old).__name__}: Keras "
            "cannot make one from a graph. Its layers and outputs are the same, its methods are gone.",
            stacklevel=5,
        )


def _parents_first(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """These layers and all inside, each after all those that hold it."""
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
