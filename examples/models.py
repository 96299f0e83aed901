"""Small networks, written to be read, with batch normalization before or after the activation.

A hidden layer is a linear map, a normalization and an activation g:

    before (the default)    a' = g(BN(W a))
    after                   a' = BN(g(W a + b))
    no normalization        a' = g(W a + b)

A layer followed by normalization has no bias: BN subtracts the mean, and any constant with it. Its β
takes the place of the bias.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

import tfbn

NORMS = {
    "tfbn": tfbn.BatchNormalization,
    "keras": keras.layers.BatchNormalization,
    "none": None,
}
PLACEMENTS = ("before", "after")


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Builds the hidden layers of a network.

    Attributes:
        norm: A key of `NORMS`.
        placement: One of `PLACEMENTS`: whether normalization comes before or after the activation.
        activation: The name of a Keras activation.
        momentum: The momentum of the moving statistics. Keras's default, 0.99, averages over some hundred
            steps, which may be the whole training of a small network: the statistics would be outdated.
        initializer: The initializer of W.
    """

    norm: str = "tfbn"
    placement: str = "before"
    activation: str = "relu"
    momentum: float = 0.9
    initializer: Any = "he_normal"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {tuple(NORMS)}. Received: {self.norm!r}.")
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement must be one of {PLACEMENTS}. Received: {self.placement!r}."
            )

    def __call__(self, a: Any, linear: type[layers.Layer], *args: Any, **kwargs: Any) -> Any:
        """A whole hidden layer: `hidden(a, layers.Dense, 100)` for 100 units on the input `a`."""
        return self.activate(self.weigh(a, linear, *args, **kwargs))

    def weigh(self, a: Any, linear: type[layers.Layer], *args: Any, **kwargs: Any) -> Any:
        """Returns the input of the activation: z = W a + b, or BN(W a)."""
        normalize = self._normalization("before")
        weights = linear(
            *args, use_bias=normalize is None, kernel_initializer=self.initializer, **kwargs
        )
        return weights(a) if normalize is None else normalize(weights(a))

    def activate(self, z: Any) -> Any:
        """Returns the output of the hidden layer: g(z), or BN(g(z))."""
        normalize = self._normalization("after")
        a = layers.Activation(self.activation)(z)
        return a if normalize is None else normalize(a)

    def _normalization(self, placement: str) -> layers.Layer | None:
        normalization = NORMS[self.norm]
        if normalization is None or placement != self.placement:
            return None
        return normalization(momentum=self.momentum)


def mlp(
    image_shape: Sequence[int],
    classes: int,
    hidden: Hidden,
    widths: Sequence[int] = (128, 128, 128),
) -> keras.Model:
    """A multilayer perceptron on the flattened image, with layers of `widths` units."""
    image = keras.Input(image_shape, name="image")
    a = layers.Flatten()(image)
    for width in widths:
        a = hidden(a, layers.Dense, width)
    return keras.Model(image, layers.Dense(classes, name="logits")(a), name="mlp")


def cnn(
    image_shape: Sequence[int], classes: int, hidden: Hidden, widths: Sequence[int] = (32, 64, 128)
) -> keras.Model:
    """3×3 convolutions of `widths` channels, each at half the resolution of the previous one."""
    image = keras.Input(image_shape, name="image")
    a = hidden(image, layers.Conv2D, widths[0], 3, padding="same")
    for width in widths[1:]:
        a = layers.MaxPool2D(2)(a)
        a = hidden(a, layers.Conv2D, width, 3, padding="same")
    a = layers.Flatten()(a)
    return keras.Model(image, layers.Dense(classes, name="logits")(a), name="cnn")


def resnet(
    image_shape: Sequence[int], classes: int, hidden: Hidden, widths: Sequence[int] = (16, 32, 64)
) -> keras.Model:
    """Residual blocks of two 3×3 convolutions, each block at half the resolution of the previous one."""
    image = keras.Input(image_shape, name="image")
    a = hidden(image, layers.Conv2D, widths[0], 3, padding="same")
    a = _residual(a, hidden, widths[0], strides=1)
    for width in widths[1:]:
        a = _residual(a, hidden, width, strides=2)
    a = layers.GlobalAveragePooling2D()(a)
    return keras.Model(image, layers.Dense(classes, name="logits")(a), name="resnet")


def _residual(a: Any, hidden: Hidden, width: int, strides: int) -> Any:
    shortcut = a
    if strides != 1 or a.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, strides, use_bias=False)(a)
    a = hidden(a, layers.Conv2D, width, 3, strides, padding="same")
    z = hidden.weigh(a, layers.Conv2D, width, 3, padding="same")
    return hidden.activate(layers.Add()([z, shortcut]))


MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet}
