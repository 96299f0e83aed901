"""The layers that batch normalization folds into, and the algebra of their weights.

For y = W x + b, the map s · y + t of the output is made by the weights s W and s b + t, and the map
s · x + t of the input by W s and W t + b, where nothing but x comes into W (no padding).
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbn._shipping.fold.affine import Affine, CannotFold


@dataclass(frozen=True)
class Weights:
    """The weights of a layer in float64, by name, and what its config must say to have them."""

    arrays: dict[str, np.ndarray]
    config: dict[str, Any] = field(default_factory=dict)

    def updated(self, bias: np.ndarray | None, **arrays: np.ndarray) -> "Weights":
        """With some arrays replaced, and this bias, unless it is None or nothing but a new zero."""
        if bias is None or ("bias" not in self.arrays and not np.any(bias)):
            return Weights({**self.arrays, **arrays}, self.config)
        config = {**self.config, "use_bias": True}
        return Weights({**self.arrays, **arrays, "bias": bias}, config)


class Linear(NamedTuple):
    """How a class of layers takes a map of its output, and of its input, into its weights.

    Both functions take the layer, its weights, the map and the shape of its input, and raise `CannotFold`
    where it cannot be done.
    """

    absorb_output: Callable[[Any, Weights, Affine, Any], Weights]
    absorb_input: Callable[[Any, Weights, Affine, Any], Weights]


def weights_of(layer: keras.layers.Layer) -> Weights:
    """The weights of a layer of a class in `LINEAR`.

    Raises:
        CannotFold: if it has other weights than its class has by itself.
    """
    arrays = {weight.name: np.asarray(weight.numpy(), np.float64) for weight in layer.weights}
    separable = LINEAR[type(layer)] is _SEPARABLE
    expected = {"depthwise_kernel", "pointwise_kernel"} if separable else {"kernel"}
    if set(arrays) - {"bias"} != expected:
        raise CannotFold(f"'{layer.name}' has weights of another kind: {', '.join(sorted(arrays))}")
    return Weights(arrays)


def linear_reason(layer: keras.layers.Layer) -> str | None:
    """Why the output of a layer of a class in `LINEAR` is no linear map, or None."""
    if layer.activation in (None, keras.activations.linear):
        return None
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    return f"'{layer.name}' ends in the activation {name}"


def _bias(weights: Weights) -> Any:
    return weights.arrays.get("bias", 0.0)


def _channel_axis(layer: Any) -> int:
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def _require_no_border(layer: Any, affine: Affine, sizes: Any) -> None:
    if affine.shifts and layer.padding != "valid" and prod(sizes) > 1:
        raise CannotFold(
            f"'{layer.name}' pads its input with zeros, which the shift would have to reach ({layer.padding})"
        )


# Dense and convolutions: the kernel ends in (input channels of the group, output channels).


def _output_into_kernel(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    scale, shift = affine.along(_channel_axis(layer), kernel.shape[-1])
    return weights.updated(_bias(weights) * scale + shift, kernel=kernel * scale)


def _input_into_kernel(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    groups = getattr(layer, "groups", 1)
    inputs, outputs = kernel.shape[-2] * groups, kernel.shape[-1]
    if hasattr(layer, "padding"):
        _require_no_border(layer, affine, kernel.shape[:-2])
    # Row i, column o: the input channel number i of the group that the output channel o belongs to.
    channels = np.arange(inputs).reshape(groups, -1).repeat(outputs // groups, axis=0).T
    scale, shift = (v[channels] for v in affine.along(_channel_axis(layer), inputs))
    through = (kernel * shift).reshape(-1, outputs).sum(axis=0)
    return weights.updated(_bias(weights) + through, kernel=kernel * scale)


# Transposed convolutions: the kernel ends in (output channels, input channels).


def _output_into_transpose(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    scale, shift = affine.along(_channel_axis(layer), kernel.shape[-2])
    return weights.updated(_bias(weights) * scale + shift, kernel=kernel * scale[:, None])


def _input_into_transpose(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    if affine.shifts and (prod(kernel.shape[:-2]) > 1 or prod(layer.strides) > 1):
        raise CannotFold(f"'{layer.name}' adds up another number of inputs from place to place")
    scale, shift = affine.along(_channel_axis(layer), kernel.shape[-1])
    through = (kernel * shift).reshape(-1, *kernel.shape[-2:]).sum(axis=(0, -1))
    return weights.updated(_bias(weights) + through, kernel=kernel * scale)


# Depthwise convolutions: the kernel ends in (input channels, outputs of each).


def _output_into_depthwise(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    scale, shift = affine.along(_channel_axis(layer), prod(kernel.shape[-2:]))
    return weights.updated(
        _bias(weights) * scale + shift, kernel=kernel * scale.reshape(kernel.shape[-2:])
    )


def _input_into_depthwise(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    _require_no_border(layer, affine, kernel.shape[:-2])
    scale, shift = affine.along(_channel_axis(layer), kernel.shape[-2])
    through = _through_depthwise(kernel, shift)
    return weights.updated(_bias(weights) + through, kernel=kernel * scale[:, None])


def _through_depthwise(kernel: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return (kernel * shift[:, None]).reshape(-1, prod(kernel.shape[-2:])).sum(axis=0)


# Separable convolutions: depthwise, then a convolution of size 1.


def _output_into_separable(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    pointwise = weights.arrays["pointwise_kernel"]
    scale, shift = affine.along(_channel_axis(layer), pointwise.shape[-1])
    return weights.updated(_bias(weights) * scale + shift, pointwise_kernel=pointwise * scale)


def _input_into_separable(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    depthwise, pointwise = (weights.arrays[f"{kind}_kernel"] for kind in ("depthwise", "pointwise"))
    _require_no_border(layer, affine, depthwise.shape[:-2])
    scale, shift = affine.along(_channel_axis(layer), depthwise.shape[-2])
    through = _through_depthwise(depthwise, shift) @ pointwise.reshape(-1, pointwise.shape[-1])
    return weights.updated(_bias(weights) + through, depthwise_kernel=depthwise * scale[:, None])


# EinsumDense: each letter of its equation is an axis.


def _output_into_einsum(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    _, letters, output = _letters(layer, len(shape))
    kernel = weights.arrays["kernel"] * _moved(layer, affine.scale, output, letters)
    bias = _full_bias(weights, len(output)) * affine.scale + affine.shift
    return _with_einsum_bias(layer, weights, kernel, bias, letters, output)


def _input_into_einsum(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    inputs, letters, output = _letters(layer, len(shape))
    kernel = weights.arrays["kernel"]
    through = kernel * _moved(layer, affine.shift, inputs, letters)
    through = through.sum(axis=tuple(i for i, c in enumerate(letters) if c not in output))
    through = _moved(layer, through, [c for c in letters if c in output], output)
    bias = _full_bias(weights, len(output)) + through
    kernel = kernel * _moved(layer, affine.scale, inputs, letters)
    return _with_einsum_bias(layer, weights, kernel, bias, letters, output)


def _letters(layer: Any, rank: int) -> tuple[str, str, str]:
    """The letters of an input of this rank, of the kernel and of the output."""
    equation = layer.equation.replace(" ", "")
    inputs, kernel, output = equation.replace("->", ",").split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = "".join(unused[: rank - len(inputs.replace("...", ""))])
    inputs, output = (letters.replace("...", hidden) for letters in (inputs, output))
    repeats = any(len(set(letters)) < len(letters) for letters in (inputs, kernel, output))
    # A letter on one side alone is summed before the product, or copied.
    if repeats or not (set(inputs) ^ set(kernel)) <= set(output) <= set(inputs + kernel):
        raise CannotFold(f"'{layer.name}' has the equation '{layer.equation}', which is not plain")
    return inputs, kernel, output


def _moved(layer: Any, array: np.ndarray, letters: Sequence[str], to: str) -> np.ndarray:
    """The array with its axes, named by letters, where others have them."""
    kept = [letter for letter, size in zip(letters, array.shape, strict=True) if size > 1]
    if not set(kept) <= set(to):
        raise CannotFold(
            f"'{layer.name}' has no weights for the axis of the statistics: '{layer.equation}'"
        )
    order = sorted(range(len(letters)), key=lambda i: to.find(letters[i]))
    sizes = dict(zip(letters, array.shape, strict=True))
    return array.transpose(order).reshape([sizes.get(letter, 1) for letter in to])


def _full_bias(weights: Weights, rank: int) -> np.ndarray:
    bias = weights.arrays.get("bias", np.zeros(()))
    return bias.reshape((1,) * (rank - bias.ndim) + bias.shape)


def _with_einsum_bias(
    layer: Any, weights: Weights, kernel: np.ndarray, bias: np.ndarray, letters: str, output: str
) -> Weights:
    if "bias" not in weights.arrays and not np.any(bias):
        return Weights({"kernel": kernel})
    axes = weights.config.get("bias_axes", layer.bias_axes) or ""
    axes = [c for c, size in zip(output, bias.shape, strict=True) if size > 1 or c in axes]
    if not set(axes or ["-"]) <= set(letters):
        raise CannotFold(f"'{layer.name}' has no channel for a bias: '{layer.equation}'")
    # Keras leaves out the axes before the first of the bias.
    arrays = {"kernel": kernel, "bias": bias.reshape(bias.shape[output.index(axes[0]) :])}
    return Weights(arrays, {"bias_axes": "".join(axes)})


_KERNEL = Linear(_output_into_kernel, _input_into_kernel)
_TRANSPOSE = Linear(_output_into_transpose, _input_into_transpose)
_DEPTHWISE = Linear(_output_into_depthwise, _input_into_depthwise)
_SEPARABLE = Linear(_output_into_separable, _input_into_separable)

# By class, not by subclass: that may compute something else.
LINEAR: dict[type, Linear] = {
    keras.layers.Dense: _KERNEL,
    keras.layers.EinsumDense: Linear(_output_into_einsum, _input_into_einsum),
    keras.layers.Conv1D: _KERNEL,
    keras.layers.Conv2D: _KERNEL,
    keras.layers.Conv3D: _KERNEL,
    keras.layers.Conv1DTranspose: _TRANSPOSE,
    keras.layers.Conv2DTranspose: _TRANSPOSE,
    keras.layers.Conv3DTranspose: _TRANSPOSE,
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
}
