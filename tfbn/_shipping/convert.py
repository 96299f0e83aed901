"""Converting batch normalization layers between Keras's class and ours."""

import inspect
from typing import Any

import keras

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.rebuild import rebuild
from tfbn._models.walk import BATCH_NORM_CLASSES, BatchNormLayer, batch_norm_layers, layers_inside


def convert(
    model: keras.Model,
    to: type[BatchNormLayer] = BatchNormalization,
    *,
    synchronized: bool | None = None,
) -> keras.Model:
    """Copies a model, with its batch normalization layers converted to another class.

    The copy keeps names, weights and their order, dtypes, trainable flags and the arguments recorded on
    calls. Converting there and back again is the identity, bit for bit. Works on Functional, Sequential and
    subclassed models, nested or not, with shared layers and wrappers. If the model is compiled, so is the
    copy, with the state of the optimizer.

    A layer or model of a custom class is created again from its config, and then layers inside it are
    replaced. Its class becomes a subclass with the same name, so that saving, loading and cloning keep the
    converted layers; `isinstance` is not affected, and loading needs `import tfbn`. A Functional model that
    its config cannot create becomes a plain `keras.Model`, with a warning. A layer that cannot be copied
    and holds no batch normalization is shared with the model, with a warning if it has weights.

    Args:
        model: A built Keras model, or any layer. It is not modified.
        to: `tfbn.BatchNormalization` or `keras.layers.BatchNormalization`.
        synchronized: Whether the replicas of a `tf.distribute` strategy share the statistics of the global
            batch. By default each layer keeps its setting.

    Returns:
        A new model with its own weights.

    Raises:
        TypeError: If `model` is not a Keras model or layer.
        ValueError: If `to` is another class; if a layer uses an option that `to` lacks, or is of a subclass
            with its own behavior; if a layer that holds batch normalization cannot be created from its config.

    Example:
        >>> ours = tfbn.convert(keras.applications.ResNet50(weights=None))
        >>> across_replicas = tfbn.convert(ours, synchronized=True)
        >>> stock = tfbn.convert(ours, to=keras.layers.BatchNormalization)
    """
    if to not in BATCH_NORM_CLASSES:
        raise ValueError(
            "`to` must be tfbn.BatchNormalization or keras.layers.BatchNormalization. "
            f"Received: to={to!r}."
        )
    layers = batch_norm_layers(model, layers_inside)
    return rebuild(model, {id(layer): _converted(layer, to, synchronized) for layer in layers})


def _converted(
    layer: BatchNormLayer, to: type[BatchNormLayer], synchronized: bool | None
) -> BatchNormLayer:
    if type(layer) not in BATCH_NORM_CLASSES:
        raise ValueError(
            f"Cannot convert the layer '{layer.name}': its class may behave differently. "
            f"Received: {type(layer).__module__}.{type(layer).__name__}, a subclass. Replace the layer by hand."
        )
    config = layer.get_config()
    if synchronized is not None:
        config["synchronized"] = synchronized
    if to is not BatchNormalization:
        config = _stock_config(layer, config, to)
    try:
        return to.from_config(config)
    except (TypeError, ValueError) as error:  # Keras wraps what the constructor raises.
        reason = str(error).split("Exception encountered: ")[-1]
        raise ValueError(f"Cannot convert the layer '{layer.name}': {reason}") from error


def _stock_config(
    layer: BatchNormLayer, config: dict[str, Any], to: type[BatchNormLayer]
) -> dict[str, Any]:
    """The config for Keras's layer, which must support every option that the layer uses."""

    def refuse(option: str, value: Any) -> None:
        raise ValueError(
            f"Cannot convert the layer '{layer.name}': keras.layers.BatchNormalization of Keras "
            f"{keras.__version__} lacks one of its options. Received: {option}={value!r}. "
            "Change the option, or keep tfbn's layer."
        )

    config = dict(config)
    if not isinstance(config["axis"], int):
        refuse("axis", config["axis"])
    if config["momentum"] is None:
        refuse("momentum", None)
    known = {*inspect.signature(to.__init__).parameters, "name", "trainable", "dtype"}
    defaults = inspect.signature(BatchNormalization.__init__).parameters
    for option in set(config) - known:
        value = config.pop(option)
        if option not in defaults or value != defaults[option].default:
            refuse(option, value)
    return config
