"""Batch normalization that stands still, whatever the model around it says."""

from collections.abc import Sequence

import keras

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.walk import BatchNormLayer, batch_norm_layers, statistics_are_frozen


def freeze(
    model: keras.layers.Layer,
    statistics: bool = True,
    affine: bool = True,
    *,
    within: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
) -> None:
    """Freezes the batch normalization layers of a model: their statistics, gamma and beta, or both.

    Frozen statistics stand still and are what the layer normalizes by, as in inference, under any
    ``training=True`` from outside: Keras's own way, calling a base model with ``training=False``, is
    overridden by `fit` (keras#20285). Frozen affine parameters are no trainable variables, under any
    ``trainable = True`` from outside.

    Our layer keeps it in its config, hence through saving and loading. A Keras layer has one switch for
    both, ``layer.trainable``, which is set to False; that holds under any ``training``, but a
    ``trainable = True`` of a model around it, if one comes later, opens it again.

    A compiled model need not be compiled again: its training step is traced anew.

    Args:
        model: A Keras model, or any layer. To be effective in training that has begun, it must be the
            model that is trained.
        statistics: Whether to freeze the statistics.
        affine: Whether to freeze gamma and beta.
        within: Freeze only the batch normalization layers in this part of the model, or in these: a
            base model, a block, single layers.

    Raises:
        TypeError: If `model`, or what is in `within`, is no Keras model or layer.
        ValueError: If there is nothing to freeze, or if a Keras layer is asked for one of the two only.
            Nothing has changed then.

    Example:
        Fine-tuning on small batches, with the statistics of the pretrained model:

        >>> base = tfbn.convert(keras.applications.ResNet50(include_top=False))
        >>> tfbn.freeze(base, affine=False)
    """
    for layer in _chosen("freeze", model, statistics, affine, within):
        if isinstance(layer, BatchNormalization):
            layer.freeze_statistics |= statistics
            layer.freeze_affine |= affine
        else:
            layer.trainable = False
    _renew(model)


def unfreeze(
    model: keras.layers.Layer,
    statistics: bool = True,
    affine: bool = True,
    *,
    within: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
) -> None:
    """Undoes `freeze`, and a ``trainable = False`` on the layers or on a model around them.

    A model that was first trained, or loaded with its optimizer, while gamma and beta were frozen has an
    optimizer that does not know them: compile it again after `unfreeze`.

    Args:
        model: As in `freeze`.
        statistics: Whether the statistics move again.
        affine: Whether gamma and beta learn again.
        within: As in `freeze`.

    Raises:
        TypeError: As in `freeze`.
        ValueError: As in `freeze`.
    """
    for layer in _chosen("unfreeze", model, statistics, affine, within):
        if isinstance(layer, BatchNormalization):
            # What `trainable = False` froze and shall stay frozen is frozen by its own switch instead.
            layer.freeze_statistics = statistics_are_frozen(layer) and not statistics
            layer.freeze_affine = (layer.freeze_affine or not layer.trainable) and not affine
        layer.trainable = True
    _renew(model)


def _chosen(
    verb: str,
    model: keras.layers.Layer,
    statistics: bool,
    affine: bool,
    within: keras.layers.Layer | Sequence[keras.layers.Layer] | None,
) -> list[BatchNormLayer]:
    """The layers that are meant, if what is asked of them is possible."""
    layers = batch_norm_layers(model)
    if within is not None:
        parts = [within] if isinstance(within, keras.layers.Layer) else within
        inside = {id(layer) for part in parts for layer in batch_norm_layers(part)}
        layers = [layer for layer in layers if id(layer) in inside]
    if not layers:
        raise ValueError(
            f"There is nothing to {verb}: found no batch normalization layer. A subclassed model shows layers "
            "that it makes on its first call only after that. "
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
            "keras.layers.BatchNormalization has one switch for its statistics and its affine parameters "
            f"together: {verb} both, or exchange the layers by `tfbn.convert(model)` and {verb} those. "
            f"Received: statistics={statistics}, affine={affine}, Keras layers {stock}."
        )
    return layers


def _renew(model: keras.layers.Layer) -> None:
    """Makes a compiled model trace its training step anew: what is frozen is fixed when it is traced."""
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
