"""Building a model anew: some layers replaced, the others copied, all weights moved over.

Keras knows the graph of Functional and Sequential models and rebuilds them around new layers. A layer
or model of the user's own is made again from its config, and then the layers inside it are exchanged.
"""

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from tfbn._models import _children, _walk


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
    new = copies.built(model)
    copies.finish()
    if isinstance(model, keras.Model) and model.compiled:
        _compile_alike(model, new)
    return new


def is_functional(layer: Any) -> bool:
    """Whether this is a Functional model: a model whose graph Keras knows."""
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Function)


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

    def of(self, layer: Any) -> Any:
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
                new = keras.models.clone_model(layer, clone_function=self.built)
            _warn_of_another_class(layer, new)
        elif isinstance(layer, keras.layers.Layer) and self._concerns(layer):
            new = self._opened(layer)
        else:
            with self._custom_scope():
                new = copy_operation(layer)
            if isinstance(layer, keras.layers.Layer) and _alike(layer, new):
                self._pair(layer, new)  # It may leave it to its layers to be built one by one.
        self._copies[id(layer)] = new
        return new

    def built(self, layer: Any) -> Any:
        """The copy, with weights of the same paths: not of those where it is called first."""
        new = self.of(layer)
        if isinstance(layer, keras.layers.Layer):
            for old in _parents_first([layer]):  # They may build their children themselves.
                copied = self._copies.get(id(old))
                if copied is not None and old.built and not copied.built:
                    _build_alike(old, copied)
        return new

    def finish(self) -> None:
        """Moves weights, state and trainable flags over."""
        originals = list(self._originals.values())
        pairs = [(old, self._copies[id(old)]) for old in originals]
        pairs = [pair for pair in pairs if isinstance(pair[0], keras.layers.Layer)]
        moved: set[int] = set()
        for old, new in pairs:
            move_weights(old, new, moved)
            _move_assets(old, new)
        for old in _parents_first(
            old for old, _ in pairs
        ):  # A parent's flag goes down to its children.
            copied = self._copies.get(id(old))
            if copied is not None and copied.trainable != old.trainable:
                copied.trainable = old.trainable

    def _meet(self, layer: keras.layers.Layer) -> None:
        for parent in _walk(layer, set()):
            self._parents.setdefault(id(parent), 0)
            if not type(parent).__module__.startswith("keras."):
                self._custom_classes[type(parent).__name__] = type(parent)
            for child in _children(parent):
                self._parents[id(child)] = self._parents.get(id(child), 0) + 1

    def _custom_scope(self) -> contextlib.AbstractContextManager[Any]:
        return keras.saving.custom_object_scope(self._custom_classes)

    def _concerns(self, layer: keras.layers.Layer) -> bool:
        """Whether something inside is to be replaced, or is shared with the outside."""
        inside = [inner for inner in _walk(layer, set()) if inner is not layer]
        return any(id(i) in self._replacements or self._parents[id(i)] > 1 for i in inside)

    def _functional(self, model: keras.Model) -> keras.Model:
        inputs = keras.tree.map_structure(lambda x: input_like(model, x), model.input)
        with without_compilation(model):
            new = keras.models.clone_model(model, input_tensors=inputs, clone_function=self.built)
        _warn_of_another_class(model, new)
        return new

    def _opened(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        """A copy from the config, with the layers inside exchanged for what they are to be."""
        with self._custom_scope():
            new = copy_operation(layer)
        if not _alike(layer, new):  # It makes its layers when it is built.
            _build_alike(layer, new)
        self._pair(layer, new)
        return new

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
        for old_child, new_child in zip(_children(old), list(_children(new)), strict=True):
            if id(old_child) in self._copies or self._concerns_itself(old_child):
                swap_child(new, new_child, self.of(old_child))
            else:
                self._pair(old_child, new_child)

    def _concerns_itself(self, layer: keras.layers.Layer) -> bool:
        return self._parents[id(layer)] > 1 or self._concerns(layer)


def copy_operation(operation: keras.Operation, **changes: Any) -> keras.Operation:
    """A layer (or an operation of a graph) made again from its config, unbuilt.

    Args:
        operation: What to copy.
        **changes: Entries of the config that shall be others.

    Raises:
        ValueError: if it cannot be made from its config.
    """
    try:
        config = {**operation.get_config(), **changes}
        if isinstance(operation, keras.layers.Lambda):
            return _copy_lambda(operation, config)
        new = type(operation).from_config(_for_constructor(type(operation), config))
        new.name = config.get("name", operation.name)
        return new
    except Exception as error:  # Whatever the class of the user raises.
        raise ValueError(
            f"The layer '{operation.name}' of class {type(operation).__name__} cannot be made again from "
            f"its config. Received: {type(error).__name__}: {str(error).strip().splitlines()[0]} "
            f"Give {type(operation).__name__} a get_config that returns the arguments of its __init__, as "
            "Keras needs it for saving too."
        ) from error


def _for_constructor(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """Without what Keras adds to every config, where the constructor does not take it."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return config
    surplus = {"name", "trainable", "dtype"} - {parameter.name for parameter in parameters}
    return {key: value for key, value in config.items() if key not in surplus}


def _copy_lambda(layer: keras.layers.Lambda, config: dict[str, Any]) -> keras.layers.Lambda:
    # From its config it would lose the globals that its function uses.
    shape = config.get("output_shape")
    base = {name: config[name] for name in ("name", "trainable", "dtype")}
    return keras.layers.Lambda(
        layer.function,
        output_shape=None if isinstance(shape, dict) else shape,
        mask=layer.mask,
        arguments=layer.arguments,
        **base,
    )


def move_weights(
    old: keras.layers.Layer, new: keras.layers.Layer, moved: set[int] | None = None
) -> None:
    """Assigns the weights of one layer to those of another, except to those in `moved`."""
    moved = set() if moved is None else moved
    shapes = [[tuple(weight.shape) for weight in layer.weights] for layer in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The layer '{old.name}' of class {type(old).__name__}, made again from its config, does not "
            f"have the weights that it had. Received: shapes {shapes[1]} where there were {shapes[0]}. "
            f"Let {type(old).__name__} make all of its weights in __init__ or build, from its config."
        )
    for source, target in zip(old.weights, new.weights, strict=True):
        if id(target) not in moved:
            target.assign(source)
            moved.add(id(target))


def _move_assets(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """State that is no weight, such as a vocabulary: Keras's hooks for saving carry it."""
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _build_alike(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    with contextlib.ExitStack() as stack:
        # Keras warns of what it cannot build from outside: then the layers inside are built one by one.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        scopes = (old.path or old.name).split("/")
        # `Model.build` runs the model outside of its own name scope.
        for name in scopes if type(old).build is keras.Model.build else scopes[:-1]:
            stack.enter_context(keras.name_scope(name))
        new.build_from_config(old.get_build_config())


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
            f"Received: {type(error).__name__}: {str(error).strip().splitlines()[0]} "
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
            for child in _children(layer):
                visit(child)
            children_first.append(layer)

    for layer in layers:
        visit(layer)
    return children_first[::-1]


def _kinds(layer: keras.layers.Layer) -> list[str]:
    return [type(child).__name__ for child in _children(layer)]


def _alike(old: keras.layers.Layer, new: keras.layers.Layer) -> bool:
    return _kinds(old) == _kinds(new)


def swap_child(
    parent: keras.layers.Layer, old: keras.layers.Layer, new: keras.layers.Layer
) -> None:
    """Puts a layer in the place of another inside a layer: in attributes, lists and dicts.

    Keras has no public way: it goes on tracking a layer that an attribute held, and tracks no new one
    once the parent is built.
    """
    parent._tracker.replace_tracked_value("layers", old, new)
    for name, value in list(vars(parent).items()):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, tuple) and any(item is old for item in value):
            setattr(parent, name, tuple(new if item is old else item for item in value))
        else:
            _swap_item(value, old, new)


def _swap_item(container: Any, old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    # Around Keras's lists and dicts that track: the tracker knows already.
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
