"""Custom layers that save which batch normalization layers they hold.

Keras saves a custom layer as the arguments of its constructor. A batch normalization layer that the
constructor creates comes back as it is written there, whatever it was replaced with. A recorded layer has
a subclass of its class, which adds the batch normalization layers to the config and puts them back when
it is created from that config: in `load_model`, `clone_model` and `from_config`. The same holds for the
layers that `tfbn.fuse` puts in. PyTorch's parametrizations change the class of a module in the same way, for
the same reason.
"""

import functools
import inspect
import warnings
from typing import Any

import keras

from tfbn._models.copy_layer import custom_classes_of
from tfbn._models.functional import clones_graph, is_custom
from tfbn._models.fused_part import FusedPart
from tfbn._models.replace_layers import replace_inside
from tfbn._models.walk import BATCH_NORM_CLASSES, batch_norm_layers, layers_inside, walk

KEY = "tfbn_batch_normalization"
"""The entry that recorded layers add to the config of their class."""


def record_batch_norms(model: keras.layers.Layer) -> None:
    """Makes `model.save` save batch normalization layers that the constructors of custom layers do not create.

    Changes the class of those custom layers to a subclass with the same name. A custom layer whose config
    tells which batch normalization layers it holds, such as a wrapper, keeps its class. So does a layer that
    Keras cannot load at all.

    Args:
        model: A model or layer.

    Warns:
        UserWarning: If loading a layer would still give other batch normalization layers.
    """
    lost = []
    # Children first: the config of a parent may include them.
    for layer in reversed(_custom_layers(model)):
        expected = list(map(_settings, _recorded_inside(layer).values()))
        kind = original_class(type(layer))
        _set_class(layer, kind)
        if _loaded_settings(layer) in (expected, None):
            continue
        if _cannot_have_subclasses(kind):
            reason = "a subclass would break it, because it calls super(self.__class__, self) instead of super()"
        else:
            _set_class(layer, _recorded_class(kind))
            if _loaded_settings(layer) == expected:
                continue
            reason = "created from its config, it holds other layers"
        lost.append(f"'{layer.name}' of class {kind.__name__}: {reason}.")
    if lost:
        warnings.warn(
            "Saving and loading the model, or cloning it, loses the batch normalization layers inside "
            f"{' '.join(lost)} Save the weights instead of the model, and convert or freeze it again after "
            "loading.",
            stacklevel=4,
        )


def _cannot_have_subclasses(kind: type) -> bool:
    """Whether a method calls `super(self.__class__, self)`, which in a subclass finds the same method again.

    In `__init__` it does no harm: recorded layers are created by their original class.
    """
    methods = (
        inspect.unwrap(value)
        for base in kind.__mro__
        if not base.__module__.startswith("keras.")
        for name, value in vars(base).items()
        if inspect.isfunction(value) and name != "__init__"
    )
    return any({"super", "__class__"} <= set(method.__code__.co_names) for method in methods)


def original_class(kind: type) -> Any:
    """The class that a recorded class is a subclass of. Any other class is its own."""
    return vars(kind).get("_tfbn_original", kind)


@functools.cache
def _recorded_class(kind: Any) -> type:
    @functools.wraps(kind.get_config)  # Keras looks for attributes of this function.
    def get_config(self: Any) -> dict[str, Any]:
        inside = _recorded_inside(self)
        saved = [keras.saving.serialize_keras_object(inner) for inner in inside.values()]
        layers = [{k: v for k, v in inner.items() if k != "build_config"} for inner in saved]
        original = {
            "module": kind.__module__,
            "class_name": kind.__name__,
            "registered_name": keras.saving.get_registered_name(kind),
        }
        record = {"layer": original, "shapes": self.get_build_config(), "layers": layers}
        if any(isinstance(inner, FusedPart) for inner in inside.values()):
            record |= {"positions": list(inside), "of": len(_all_inside(self))}
        return {**kind.get_config(self), KEY: record}

    def __reduce__(self: Any) -> Any:
        _, file = kind.__reduce__(self)
        return kind._unpickle_model, file  # Python finds `kind` by its name, but not its subclass.

    namespace = {
        **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
        "_tfbn_original": kind,
        "get_config": get_config,
        "from_config": classmethod(_from_config),
        "__reduce__": __reduce__,
    }
    return _register(type(kind)(kind.__name__, (kind,), namespace))


def _register(kind: Any) -> Any:
    """Registers a class under the name that all recorded classes share: the config tells them apart."""
    return keras.saving.register_keras_serializable("tfbn", "Recorded")(kind)


def _from_config(cls: Any, config: dict[str, Any]) -> keras.layers.Layer:
    """Creates a layer of its original class, puts its batch normalization layers back, and records it again."""
    config = dict(config)
    record = config.pop(KEY, None)
    if record is None:
        return original_class(cls).from_config(config)
    layer = _create(cls, record["layer"], config)
    made = _created(layer, record)
    if made is None:  # It creates them in `build`.
        layer = _create(cls, record["layer"] | {"build_config": record["shapes"]}, config)
        made = _created(layer, record)
    if made is None:
        kind = type(layer).__name__
        raise ValueError(
            f"Cannot load the layer '{layer.name}' of class {kind}: it was saved with {len(record['layers'])} "
            f"batch normalization layers, and creates {len(batch_norm_layers(layer, layers_inside))} from its config. "
            f"Received: config={config}. "
            f"Let {kind} create all of its layers in `__init__` or `build`, from its config."
        )
    saved = map(keras.saving.deserialize_keras_object, record["layers"])
    replace_inside(layer, {id(old): new for old, new in zip(made, saved, strict=True)})
    for inside in _custom_layers(layer):
        _set_class(inside, _recorded_class(original_class(type(inside))))
    return layer


def _created(layer: keras.layers.Layer, record: dict[str, Any]) -> list[keras.layers.Layer] | None:
    """The layers inside a layer in whose place the recorded ones belong, or None if it holds others."""
    if "positions" not in record:  # All batch normalization layers, in order.
        norms = batch_norm_layers(layer, layers_inside)
        return norms if len(norms) == len(record["layers"]) else None
    inside = _all_inside(layer)
    if len(inside) != record["of"]:
        return None
    others = [x for at, x in enumerate(inside) if at not in record["positions"]]
    if any(isinstance(other, BATCH_NORM_CLASSES) for other in others):
        return None
    return [inside[position] for position in record["positions"]]


def _create(cls: Any, original: dict[str, Any], config: dict[str, Any]) -> keras.layers.Layer:
    """Creates a layer of its original class, which only `cls` may know if it is not registered."""
    name, kind = original["registered_name"], original_class(cls)
    known = {name: kind} if keras.saving.get_registered_name(kind) == name else {}
    return keras.saving.deserialize_keras_object({**original, "config": config}, known)


@_register
class _Recorded:
    """Loads recorded layers in a process that has not recorded any yet."""

    from_config = classmethod(_from_config)

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError


def _set_class(layer: keras.layers.Layer, kind: type) -> None:
    object.__setattr__(layer, "__class__", kind)  # Keras's own `__setattr__` tracks values.


def _custom_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that hold batch normalization and are created from their configs by a custom class."""
    return [
        layer
        for layer in walk(model, inside=layers_inside)
        if is_custom(layer)
        and not isinstance(layer, (*BATCH_NORM_CLASSES, FusedPart))
        and not clones_graph(layer)
        and batch_norm_layers(layer, layers_inside)
    ]


def _all_inside(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """This layer and all layers inside it, except those that are part of a layer of `tfbn.fuse`."""

    def inside(inner: keras.layers.Layer) -> list[keras.layers.Layer]:
        return [] if isinstance(inner, FusedPart) else layers_inside(inner)

    return list(walk(layer, inside=inside))


def _recorded_inside(layer: keras.layers.Layer) -> dict[int, keras.layers.Layer]:
    """The layers to record inside a layer, by their positions in `_all_inside`."""
    kinds = (*BATCH_NORM_CLASSES, FusedPart)
    inside = enumerate(_all_inside(layer))
    return {position: inner for position, inner in inside if isinstance(inner, kinds)}


def _loaded_settings(layer: keras.layers.Layer) -> list[Any] | None:
    """The settings of the batch normalization layers that Keras would load, or None if it cannot load the layer."""
    try:
        with custom_classes_of(layer), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = type(layer).from_config(layer.get_config())
            if len(_recorded_inside(loaded)) != len(_recorded_inside(layer)):
                loaded.build_from_config(layer.get_build_config())
    except Exception:  # The class of the user can raise anything.
        return None
    return list(map(_settings, _recorded_inside(loaded).values()))


def _settings(layer: keras.layers.Layer) -> tuple[type, dict[str, Any]]:
    return type(layer), {**layer.get_config(), "name": None, "trainable": None}
