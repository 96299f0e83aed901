"""Scale and shift are moved through the layers between batch normalization and a linear layer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfbn
from folding import folded, image, into, reasons
from graphs import randomize

layers = keras.layers
Norm = keras.layers.BatchNormalization


THROUGH_TO_DENSE = {
    "dropout": [layers.Dropout(0.5)],
    "spatial dropout": [layers.SpatialDropout2D(0.5)],
    "noise": [layers.GaussianNoise(1.0)],
    "identity": [layers.Identity(), layers.Activation("linear")],
    "average": [layers.GlobalAveragePooling2D()],
    "average, kept": [layers.GlobalAveragePooling2D(keepdims=True), layers.Flatten()],
    "windows": [layers.AveragePooling2D(3, 2, padding="same")],
    "crop": [layers.Cropping2D(1)],
    "upsample": [layers.UpSampling2D(2, interpolation="bilinear")],
    "flatten": [layers.Flatten()],
    "reshape": [layers.Reshape((64, 4)), layers.GlobalAveragePooling1D()],
    "reshape channels": [layers.Reshape((4, 64))],
    "permute": [layers.Permute((2, 1, 3)), layers.Flatten()],
    "many": [
        layers.AveragePooling2D(2),
        layers.Dropout(0.1),
        layers.Permute((2, 1, 3)),
        layers.Flatten(),
    ],
}


def chain(x: Any, *parts: Any) -> Any:
    for part in parts:
        x = type(part).from_config(part.get_config())(x)
    return x


@pytest.mark.parametrize("between", THROUGH_TO_DENSE.values(), ids=THROUGH_TO_DENSE)
def test_it_is_folded_into_the_dense_layer_after_them(between):
    x = image()
    model = keras.Model(x, layers.Dense(3, name="dense")(chain(Norm()(x), *between)))
    assert into(folded(model)) == ["dense"]


THROUGH_TO_CONV = {
    "dropout": [layers.Dropout(0.5)],
    "average": [layers.GlobalAveragePooling2D()],
    "windows": [layers.AveragePooling2D(2)],
    "crop": [layers.Cropping2D(1)],
    "permute": [layers.Permute((2, 1, 3))],
    "permute channels": [layers.Permute((3, 1, 2)), layers.Permute((2, 3, 1))],
    "reshape": [layers.Reshape((16, 4, 4))],
    "upsample": [layers.UpSampling2D(2)],
}


@pytest.mark.parametrize("between", THROUGH_TO_CONV.values(), ids=THROUGH_TO_CONV)
def test_it_is_folded_into_the_convolution_before_them(between):
    x = image()
    h = layers.Conv2D(4, 1, name="conv")(x)
    assert into(folded(keras.Model(x, Norm()(chain(h, *between))))) == ["conv"]


@pytest.mark.parametrize("first", [layers.MaxPooling2D(2), layers.GlobalMaxPooling2D()])
def test_it_moves_through_a_maximum_if_no_gamma_is_negative(first):
    x = image()
    norm = Norm(name="norm")
    model = keras.Model(x, norm(chain(layers.Conv2D(4, 1, name="conv")(x), first)))
    randomize(model)
    norm.gamma.assign(np.ones(4))
    assert into(tfbn.fold(model)) == ["conv"]
    norm.gamma.assign([1, 1, 1, -1])
    (reason,) = reasons(tfbn.fold(model))
    assert "some γ are negative" in reason


def test_it_moves_through_zero_padding_only_without_a_shift():
    x = image()
    norm = Norm(name="norm", center=False)
    model = keras.Model(x, norm(layers.ZeroPadding2D(1)(layers.Conv2D(4, 1, name="conv")(x))))
    (reason,) = reasons(folded(model))
    assert "pads with zeros" in reason
    norm.moving_mean.assign(np.zeros(4))
    assert into(tfbn.fold(model)) == ["conv"]


def test_it_is_folded_into_every_input_of_a_concatenation_and_a_sum():
    x = image()
    a, b, c = (layers.Conv2D(4, 1, name=name)(x) for name in "abc")
    joined = Norm()(layers.Concatenate()([a, layers.Add()([b, c])]))
    assert into(folded(keras.Model(x, joined))) == ["a, b, c"]


def test_every_input_of_an_average_absorbs_the_shift():
    x = image()
    a, b = (layers.Conv2D(4, 1, name=name)(x) for name in "ab")
    assert into(folded(keras.Model(x, Norm()(layers.Average()([a, b]))))) == ["a, b"]


def test_it_does_not_move_to_an_input_of_a_sum_that_is_broadcast():
    x = image()
    rows = layers.AveragePooling2D((8, 1))(layers.Conv2D(4, 1)(x))
    summed = layers.Add()([layers.Conv2D(4, 1)(x), rows])
    model = keras.Model(x, tfbn.BatchNormalization([1, 3])(summed))
    assert "different shapes" in reasons(folded(model))[0]


def test_successive_batch_normalizations_are_merged():
    x = image()
    h = Norm(name="c")(tfbn.BatchNormalization(name="b")(Norm(name="a")(layers.ReLU()(x))))
    model = folded(keras.Model(x, layers.ReLU()(h)))
    assert into(model) == ["b", "c", None]
    assert [layer.name for layer in model.layers if type(layer) is layers.Rescaling] == ["c"]
