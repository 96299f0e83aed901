"""Exchanging the batch normalization layers of a model: Keras's for ours, and ours for Keras's."""

import inspect
from typing import Any

import keras

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.rebuild import rebuild
from tfbn._models.walk import CLASSES, BatchNormLayer, batch_norm_layers


def convert(
    model: keras.Model,
    to: type[BatchNormLayer] = BatchNormalization,
    *,
    synchronized: bool | None = None,
) -> keras.Model:
    """The same model with every batch normalization layer of another class, or synchronized.

    Names, weights, their order, dtypes, trainable flags and the arguments recorded on calls stay;
    there and back again is the identity, bit for bit. Functional, Sequential and subclassed models,
    nested or not, shared layers and wrappers are rebuilt; a layer or model of a class of your own is made
    again from its config, which takes a `get_config` as saving does, and then its batch normalization
    layers are exchanged where its attributes, lists and dicts hold them. A Functional model whose
    class has a constructor of its own becomes a plain `keras.Model`, with a warning. If the model is
    compiled, so is the result, and the state of the optimizer moves over.

    Args:
        model: A Keras model, built, or any layer. It stays as it is.
        to: `tfbn.BatchNormalization` or `keras.layers.BatchNormalization`.
        synchronized: Whether the replicas of a `tf.distribute` strategy shall share the statistics of the
            global batch. By default each layer stays as it is.

    Returns:
        A new model with weights of its own.

    Raises:
        TypeError: if `model` is no Keras model or layer.
        ValueError: if `to` is another class; if a layer uses what `to` does not have, or is of a subclass
            with a behaviour of its own; if a layer cannot be made again from its config.

    Example:
        >>> ours = tfbn.convert(keras.applications.ResNet50(weights=None))
        >>> across_replicas = tfbn.convert(ours, synchronized=True)
        >>> stock = tfbn.convert(ours, to=keras.layers.BatchNormalization)
    """
    if to not in CLASSES:
        raise ValueError(
            "Batch normalization layers become tfbn.BatchNormalization or keras.layers.BatchNormalization. "
            f"Received: to={to!r}."
        )
    layers = batch_norm_layers(model)
    return rebuild(model, {id(layer): _converted(layer, to, synchronized) for layer in layers})


def _converted(
    layer: BatchNormLayer, to: type[BatchNormLayer], synchronized: bool | None
) -> BatchNormLayer:
    if type(layer) not in CLASSES:
        raise ValueError(
            f"The layer '{layer.name}' is of a subclass whose own behaviour would be lost. "
            f"Received: {type(layer).__module__}.{type(layer).__name__}. Exchange it by hand."
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
        raise ValueError(f"The layer '{layer.name}' cannot be converted: {reason}") from error


def _stock_config(
    layer: BatchNormLayer, config: dict[str, Any], to: type[BatchNormLayer]
) -> dict[str, Any]:
    """The config for Keras's layer, if that one can do all that ours is asked to."""

    def refuse(option: str, value: Any) -> None:
        raise ValueError(
            f"keras.layers.BatchNormalization of Keras {keras.__version__} cannot do what the layer "
            f"'{layer.name}' does. Received: {option}={value!r}. Change the option, or keep tfbn's layer."
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
