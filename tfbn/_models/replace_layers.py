"""Replacing layers in place, wherever their parents hold them."""

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from tfbn._models.copy_layer import build_alike
from tfbn._models.functional import is_functional
from tfbn._models.walk import layers_inside, walk
from tfbn._support.keras_internals import replace_in_graph, replace_tracked_layer

Swap = tuple[keras.layers.Layer, keras.layers.Layer]
"""A layer and its replacement."""


def replace_inside(
    layer: keras.layers.Layer, replacements: Mapping[int, keras.layers.Layer]
) -> None:
    """Replaces layers everywhere inside a layer, in place, and builds replacements of built layers.

    Args:
        layer: A layer or model.
        replacements: A new, unbuilt layer for the `id` of each layer to replace.
    """
    swaps: dict[int, Swap] = {}
    for parent in list(walk(layer, inside=layers_inside)):
        found = [
            (old, replacements[id(old)]) for old in layers_inside(parent) if id(old) in replacements
        ]
        swap_children(parent, found)
        swaps |= {id(old): (old, new) for old, new in found}
    for old, new in swaps.values():
        if old.built and not new.built:
            build_alike(old, new)


def swap_children(parent: keras.layers.Layer, swaps: Iterable[Swap]) -> None:
    """Replaces layers directly inside their parent: in attributes, tuples, lists, dicts and its graph.

    Assigning the attribute is not enough: Keras keeps tracking the old layer, and a parent that is built
    tracks no new ones.
    """
    swaps = list(swaps)
    for model in [parent, *vars(parent).values()] if swaps else ():
        if is_functional(model):  # A Sequential model holds the Functional one that it runs.
            replace_in_graph(model, swaps)
    for old, new in swaps:
        replace_tracked_layer(parent, old, new)
        for name, value in list(vars(parent).items()):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, tuple) and any(item is old for item in value):
                setattr(parent, name, tuple(new if item is old else item for item in value))
            else:
                _swap_item(value, old, new)


def _swap_item(container: Any, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    if not isinstance(container, list | dict):
        return
    items = enumerate(container) if isinstance(container, list) else container.items()
    for key, item in list(items):
        if item is old:
            container[key] = new
        else:
            _swap_item(item, old, new)
