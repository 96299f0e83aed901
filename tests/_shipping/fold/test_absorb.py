"""Every kind of linear layer absorbs a scale and a shift: the algebra of the weights, in float64."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import tfbn
from graphs import randomize
from tfbn._models.walk import batch_norm_layers
from tfbn._shipping.fold.assemble import assemble
from tfbn._shipping.fold.search import fold_graph
from tfbn._shipping.fold.trace import trace

layers = keras.layers
Norm = layers.BatchNormalization

SIZES = {1: (9, 4), 2: (9, 8, 4), 3: (5, 6, 5, 4)}


def image(rank: int, data_format: str = "channels_last") -> Any:
    sizes = SIZES[rank]
    shape = sizes if data_format == "channels_last" else (sizes[-1], *sizes[:-1])
    return keras.Input(shape, dtype="float64")


def norm(data_format: str = "channels_last", kind: Any = Norm, **arguments: Any) -> Any:
    axis = -1 if data_format == "channels_last" else 1
    return kind(axis=axis, dtype="float64", **arguments)


def create(kind: str, data_format: str = "channels_last", **arguments: Any) -> Any:
    """Creates the layer of this name in the table below."""
    return MAKERS[kind][1](data_format, dtype="float64", **arguments)


def folded_exactly(model: keras.Model, left: int = 0) -> Any:
    """Folds, and compares on other inputs than `fold` does, as exactly as float64 allows."""
    randomize(model)
    folded = tfbn.fold(model, tolerance=1e-12)
    assert batch_norm_layers(folded) == []
    assert len(folded.report.left) == left, folded.report
    x = np.random.default_rng(5).normal(size=(3, *model.input_shape[1:]))
    expected = model(x, training=False).numpy()
    np.testing.assert_allclose(
        folded(x, training=False).numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max()
    )
    return folded.report


LINEAR: dict[str, tuple[int, Any]] = {
    "dense": (2, lambda f, **k: layers.Dense(5, **k)),
    "dense rank 3": (1, lambda f, **k: layers.Dense(5, **k)),
    "conv 1": (1, lambda f, **k: layers.Conv1D(6, 3, data_format=f, **k)),
    "conv 1 dilated": (1, lambda f, **k: layers.Conv1D(6, 2, dilation_rate=3, data_format=f, **k)),
    "conv 2": (2, lambda f, **k: layers.Conv2D(6, (3, 2), data_format=f, **k)),
    "conv 2 strided": (2, lambda f, **k: layers.Conv2D(6, 3, 2, data_format=f, **k)),
    "conv 2 dilated": (2, lambda f, **k: layers.Conv2D(6, 2, dilation_rate=2, data_format=f, **k)),
    "conv 2 grouped": (2, lambda f, **k: layers.Conv2D(6, 3, groups=2, data_format=f, **k)),
    "conv 3": (3, lambda f, **k: layers.Conv3D(6, 2, data_format=f, **k)),
    "depthwise 1": (
        1,
        lambda f, **k: layers.DepthwiseConv1D(3, depth_multiplier=2, data_format=f, **k),
    ),
    "depthwise 2": (
        2,
        lambda f, **k: layers.DepthwiseConv2D(3, 2, depth_multiplier=2, data_format=f, **k),
    ),
    "separable 1": (
        1,
        lambda f, **k: layers.SeparableConv1D(6, 3, depth_multiplier=2, data_format=f, **k),
    ),
    "separable 2": (2, lambda f, **k: layers.SeparableConv2D(6, 3, data_format=f, **k)),
}
TRANSPOSED: dict[str, tuple[int, Any]] = {
    "transpose 1": (1, lambda f, **k: layers.Conv1DTranspose(6, 3, 2, data_format=f, **k)),
    "transpose 2": (2, lambda f, **k: layers.Conv2DTranspose(6, 3, 2, data_format=f, **k)),
    "transpose 3": (3, lambda f, **k: layers.Conv3DTranspose(6, 2, data_format=f, **k)),
}
MAKERS = LINEAR | TRANSPOSED
CONVOLUTIONS = [name for name in LINEAR if "dense" not in name]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_each_linear_layer_absorbs_the_batch_normalization_after_it(name, use_bias):
    x = image(MAKERS[name][0])
    layer = create(name, use_bias=use_bias)
    report = folded_exactly(keras.Model(x, norm()(layer(x))))
    assert (report.rows[0].into, report.rows[0].outcome) == (
        layer.name,
        "folded into the preceding layer",
    )


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_each_linear_layer_absorbs_the_batch_normalization_before_it(name, use_bias):
    x = image(MAKERS[name][0])
    # The activation comes later, so it does not matter.
    layer = create(name, use_bias=use_bias, activation="tanh")
    report = folded_exactly(keras.Model(x, layer(norm(kind=tfbn.BatchNormalization)(x))))
    assert (report.rows[0].into, report.rows[0].outcome) == (
        layer.name,
        "folded into the following layer",
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_no_shift_is_folded_into_a_following_layer_that_pads_with_zeros(name):
    x = image(MAKERS[name][0])
    report = folded_exactly(keras.Model(x, create(name, padding="same")(norm()(x))), left=1)
    assert "pads its input with zeros" in report.rows[0].reason
    assert report.rows[0].outcome == "multiply-add"


@pytest.mark.parametrize("name", TRANSPOSED)
def test_no_shift_is_folded_into_a_following_transposed_convolution(name):
    x = image(MAKERS[name][0])
    report = folded_exactly(keras.Model(x, create(name)(norm()(x))), left=1)
    assert "sums a different number of inputs" in report.rows[0].reason


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *TRANSPOSED])
def test_a_scale_without_a_shift_is_folded_whatever_the_padding(name):
    x = image(MAKERS[name][0])
    bn = norm(center=False)
    layer = create(name, padding="same")
    model = randomize(keras.Model(x, layer(bn(x))))
    bn.moving_mean.assign(np.zeros(4))
    assert tfbn.fold(model, tolerance=1e-12).report.rows[0].into == layer.name


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *TRANSPOSED])
def test_both_data_formats_give_the_same_weights(name, behind):
    # Compares weights only: TensorFlow has no CPU kernel for many layers with channels first.
    folded = []
    for data_format in ("channels_last", "channels_first"):
        x = image(MAKERS[name][0], data_format)
        bn, layer = norm(data_format, center=behind), create(name, data_format, name="layer")
        model = randomize(keras.Model(x, bn(layer(x)) if behind else layer(bn(x))))
        if name in TRANSPOSED:  # They do not absorb a shift of their input.
            bn.moving_mean.assign(np.zeros(bn.moving_mean.shape))
        graph = trace(model)
        assert [row.into for row in fold_graph(graph)] == ["layer"]
        folded.append(assemble(graph, model)[0].get_layer("layer").get_weights())
    for last, first in zip(*folded, strict=True):
        np.testing.assert_array_equal(first, last)


def test_a_model_with_channels_first_is_folded():
    x = keras.Input((4, 8, 9))
    bn, conv = Norm(axis=1), layers.Conv2D(3, 3, data_format="channels_first")
    folded = tfbn.fold(randomize(keras.Model(x, conv(bn(x)))))
    assert folded.report.left == ()


def test_a_layer_without_a_bias_gets_none_without_a_shift():
    x = keras.Input((8, 8, 4))
    bn = Norm(center=False)
    model = keras.Model(x, bn(layers.Conv2D(3, 3, use_bias=False, name="conv")(x)))
    assert not tfbn.fold(model).get_layer("conv").use_bias


def test_a_kernel_of_size_one_never_pads():
    x = image(2)
    conv = layers.Conv2D(5, 1, 2, padding="same", dtype="float64")
    assert folded_exactly(keras.Model(x, conv(norm()(x)))).rows[0].into == conv.name


def test_causal_padding_pads_with_zeros():
    x = image(1)
    conv = layers.Conv1D(5, 2, padding="causal", dtype="float64")
    folded_exactly(keras.Model(x, conv(norm()(x))), left=1)


# EinsumDense

EINSUMS = [  # equation, input, output, bias axes, axis of the batch normalization after and before
    ("abc,cd->abd", (9, 4), (9, 5), None, -1, -1),
    ("abc,cd->abd", (9, 4), (9, 5), "d", -1, -1),
    ("...x,xy->...y", (9, 4), 5, "y", -1, -1),
    ("abc,cde->abde", (9, 4), (9, 5, 2), "de", 2, -1),
    ("abc,cde->abde", (9, 4), (9, 5, 2), "e", [2, 3], -1),
    ("abcd,cde->abe", (9, 4, 3), (9, 5), "e", -1, [2, 3]),
    ("abcd,cde->abe", (9, 4, 3), (9, 5), None, -1, 2),
    ("abc,cd->adb", (9, 4), (5, 9), "d", 1, -1),
    ("abc,bd->adc", (9, 4), (5, 4), "d", 1, 1),
    ("ab,b->ab", (9,), (9,), "b", -1, -1),
]


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("case", EINSUMS, ids=lambda case: f"{case[0]}-{case[3]}")
def test_einsum_dense_absorbs_batch_normalization_on_either_side(case, behind):
    equation, shape, output, bias, axis_behind, axis_in_front = case
    x = keras.Input(shape, dtype="float64")
    einsum = layers.EinsumDense(equation, output, bias_axes=bias, dtype="float64")
    bn = tfbn.BatchNormalization(axis_behind if behind else axis_in_front, dtype="float64")
    report = folded_exactly(keras.Model(x, bn(einsum(x)) if behind else einsum(bn(x))))
    assert report.rows[0].into == einsum.name


def test_einsum_dense_does_not_absorb_statistics_along_an_axis_without_weights():
    x = keras.Input((9, 4), dtype="float64")
    einsum = layers.EinsumDense("abc,cd->abd", (9, 5), dtype="float64")
    bn = tfbn.BatchNormalization(axis=1, dtype="float64")
    report = folded_exactly(keras.Model(x, bn(einsum(x))), left=1)
    assert "no weights along the axis" in report.rows[0].reason


# Several axes, and what remains


def test_a_list_of_axes_is_folded_into_a_layer_with_weights_for_each_position():
    x = image(2)
    h = layers.Flatten(dtype="float64")(tfbn.BatchNormalization([1, 2, 3], dtype="float64")(x))
    folded_exactly(keras.Model(x, layers.Dense(5, dtype="float64")(h)))


def test_what_no_layer_absorbs_becomes_a_rescaling_on_any_axes():
    for axis in (1, 2, -1, [1, 3], [1, 2, 3]):
        x = image(2)
        model = randomize(
            keras.Model(x, tfbn.BatchNormalization(axis, dtype="float64", name="bn")(x))
        )
        folded = tfbn.fold(model, tolerance=1e-12)
        assert type(folded.get_layer("bn")) is layers.Rescaling


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_multiply_add_is_right_under_either_image_data_format(rank, monkeypatch):
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        x = keras.Input((5, 6, 7, 4)[-rank:], dtype="float64")
        folded_exactly(keras.Model(x, norm()(x)), left=1)
    finally:
        keras.config.set_image_data_format(before)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_half_precision_weights_are_rounded_once(dtype):
    x = keras.Input((8, 8, 4))
    conv = layers.Conv2D(5, 3, dtype=dtype, name="conv")
    bn = Norm(dtype=dtype)
    model = randomize(keras.Model(x, bn(conv(x))))
    folded = tfbn.fold(model).get_layer("conv")
    gamma, beta, mean, variance = (np.asarray(w.numpy(), "float64") for w in bn.weights)
    scale = gamma / np.sqrt(variance + bn.epsilon)
    kernel, bias = (np.asarray(w.numpy(), "float64") for w in conv.weights)
    stored = conv.kernel.numpy().dtype
    np.testing.assert_array_equal(folded.kernel.numpy(), (kernel * scale).astype(stored))
    np.testing.assert_array_equal(
        folded.bias.numpy(), (beta + (bias - mean) * scale).astype(stored)
    )
    assert folded.dtype_policy.name == dtype
