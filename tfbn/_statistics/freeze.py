"""Freezing and unfreezing batch normalization layers."""

from collections.abc import Sequence

import keras

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.fused_part import require_unfused
from tfbn._models.recorded import record_batch_norms
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, statistics_are_frozen


def freeze(
    model: keras.layers.Layer,
    statistics: bool = True,
    affine: bool = True,
    *,
    within: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
) -> None:
    """Freezes the moving statistics of a model's batch normalization layers, their gamma and beta, or both.

    A layer with frozen statistics normalizes by its moving statistics and does not update them, even if
    the model is called with ``training=True``. (Keras's own recipe, calling the base model with
    ``training=False``, does not survive `fit`: see keras#20285.) Frozen gamma and beta are not trainable,
    even if a model around the layer sets ``trainable = True``.

    tfbn's layer stores both flags in its config, so saving and loading keep them. Keras's layer has a single
    switch, ``layer.trainable``, which `freeze` sets to False. It holds for any ``training``, but a later
    ``trainable = True`` on a model around the layer undoes it.

    You do not need to compile the model again.

    Args:
        model: A Keras model or layer. If training has begun, pass the model that is being trained.
        statistics: Whether to freeze the moving statistics.
        affine: Whether to freeze gamma and beta.
        within: A layer or model inside of `model`, or a list of them. Only the batch normalization layers in
            these are frozen. By default, all are.

    Raises:
        TypeError: If `model` or an item of `within` is not a Keras model or layer.
        ValueError: If there is nothing to freeze, or if only one of the two is to be frozen in a Keras
            layer. The model does not change.

    Warns:
        UserWarning: If saving the model would lose the flags of a layer that a custom layer creates.

    Example:
        Fine-tune on small batches with the statistics of the pretrained model:

        >>> base = tfbn.convert(keras.applications.ResNet50(include_top=False))
        >>> tfbn.freeze(base, affine=False)
    """
    for layer in _selected_layers("freeze", model, statistics, affine, within):
        if isinstance(layer, BatchNormalization):
            layer.freeze_statistics |= statistics
            layer.freeze_affine |= affine
        else:
            layer.trainable = False
    _keep(model)


def unfreeze(
    model: keras.layers.Layer,
    statistics: bool = True,
    affine: bool = True,
    *,
    within: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
) -> None:
    """Undoes `freeze`, and ``trainable = False`` on the layers or on a model around them.

    If gamma and beta were frozen when the optimizer was built, compile the model again after `unfreeze`:
    the optimizer does not know them.

    Args:
        model: A Keras model or layer, as in `freeze`.
        statistics: Whether to unfreeze the moving statistics.
        affine: Whether to unfreeze gamma and beta.
        within: A layer or model inside of `model`, or a list of them, as in `freeze`.

    Raises:
        TypeError: As `freeze` does.
        ValueError: As `freeze` does.

    Example:
        >>> tfbn.unfreeze(model)
        >>> model.compile("adam", loss)
    """
    if statistics:
        require_unfused(model, "unfreeze the statistics of")
    for layer in _selected_layers("unfreeze", model, statistics, affine, within):
        if isinstance(layer, BatchNormalization):
            # `trainable = False` froze both. What is to stay frozen gets its own flag.
            layer.freeze_statistics = statistics_are_frozen(layer) and not statistics
            layer.freeze_affine = (layer.freeze_affine or not layer.trainable) and not affine
        layer.trainable = True
    _keep(model)


def _selected_layers(
    verb: str,
    model: keras.layers.Layer,
    statistics: bool,
    affine: bool,
    within: keras.layers.Layer | Sequence[keras.layers.Layer] | None,
) -> list[BatchNormLayer]:
    """Returns the layers to change, after checking that the change is possible."""
    layers = batch_norm_layers(model)
    if within is not None:
        parts = [within] if isinstance(within, keras.layers.Layer) else within
        inside = {id(layer) for part in parts for layer in batch_norm_layers(part)}
        layers = [layer for layer in layers if id(layer) in inside]
    if not layers:
        raise ValueError(
            f"There is nothing to {verb}: found no batch normalization layer. A subclassed model that creates "
            "its layers in its first call must be called first. "
            f"Received: model {model.name!r}, within={within!r}."
        )
    if not (statistics or affine):
        raise ValueError(
            f"There is nothing to {verb}: pass statistics=True, affine=True, or both. "
            "Received: statistics=False, affine=False."
        )
    stock = [layer.path for layer in layers if not isinstance(layer, BatchNormalization)]
    if stock and not (statistics and affine):
        raise ValueError(
            "keras.layers.BatchNormalization cannot freeze its statistics and its affine parameters "
            f"separately. Either {verb} both, or convert the model with `tfbn.convert(model)` first. "
            f"Received: statistics={statistics}, affine={affine}, Keras layers {stock}."
        )
    return layers


def _keep(model: keras.layers.Layer) -> None:
    """Makes what is frozen survive saving, and a compiled model trace its training step again."""
    record_batch_norms(model)
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
