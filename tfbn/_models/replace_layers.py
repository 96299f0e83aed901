"""Replacing layers in place, wherever their parents hold them."""

import contextlib
import functools
import types
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
            swapped = _swapped(value, old, new)
            if swapped is not value:
                setattr(parent, name, swapped)


def _swapped(value: Any, old: keras.layers.Layer, new: keras.layers.Layer) -> Any:
    """A value with one layer in place of another. Lists, dicts and closures change in place.

    A layer that is stored as `self.norm = layer.__call__`, in a `functools.partial` or in a lambda would
    otherwise go on running, with weights that nothing else knows.
    """

    def swap(item: Any) -> Any:
        return _swapped(item, old, new)

    if value is old:
        return new
    if isinstance(value, types.MethodType) and value.__self__ is old:
        return getattr(new, value.__name__)
    if isinstance(value, tuple):
        items = [swap(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, tuple(value.keywords.values()))
        function, arguments, values = swap(parts)
        keywords = dict(zip(value.keywords, values, strict=True))
        changed = any(a is not b for a, b in zip(parts, (function, arguments, values), strict=True))
        return functools.partial(function, *arguments, **keywords) if changed else value
    if isinstance(value, list | dict):
        for key, item in list(enumerate(value) if isinstance(value, list) else value.items()):
            swapped = swap(item)
            if swapped is not item:
                value[key] = swapped
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # A cell may be empty.
                if cell.cell_contents is old:
                    cell.cell_contents = new
    return value
