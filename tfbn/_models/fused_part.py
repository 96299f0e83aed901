"""What the layers have in common that `tfbn.fuse` puts into a model."""

from typing import Any

import keras

from tfbn._models.walk import layers_inside, walk


class FusedPart(keras.layers.Layer):
    """A layer that stands in the place of a layer of the original model.

    `tfbn.fuse` puts it there, and `tfbn.unfuse` puts the layer back that `original` returns.
    """

    def original(self) -> keras.layers.Layer:
        """Returns the layer in whose place this one stands."""
        raise NotImplementedError


def fused_parts(model: keras.layers.Layer) -> list[Any]:
    """The layers of a model that `tfbn.fuse` put there."""
    return [x for x in walk(model, inside=layers_inside) if isinstance(x, FusedPart)]


def require_unfused(model: keras.layers.Layer, verb: str) -> None:
    """Raises if a model is fused.

    Args:
        model: A model or layer.
        verb: What cannot be done with a fused model.

    Raises:
        ValueError: If it is.
    """
    parts = fused_parts(model)
    if parts:
        raise ValueError(
            f"Cannot {verb} a fused model: its batch normalization layers are part of other layers, with frozen "
            "statistics. Unfuse it first: `model = tfbn.unfuse(model)`. "
            f"Received: model {model.name!r}, with the fused layer '{parts[0].name}'."
        )
