"""The layers that can absorb an affine map, and the algebra of their weights.

For y = W x + b, the weights s W and s b + t apply the map s · y + t to the output as well. The weights
W s and W t + b apply the map s · x + t to the input first, provided that W sees nothing but x (no padding).
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
    """The weights of a layer.

    Attributes:
        arrays: The weights by name, in float64.
        config: The entries of the layer's config that these weights require.
    """

    arrays: dict[str, np.ndarray]
    config: dict[str, Any] = field(default_factory=dict)

    def updated(self, bias: np.ndarray, **arrays: np.ndarray) -> "Weights":
        """Replaces some arrays and the bias. A layer without a bias gets none if it would be zero."""
        if "bias" not in self.arrays and not np.any(bias):
            return Weights({**self.arrays, **arrays}, self.config)
        config = {**self.config, "use_bias": True}
        return Weights({**self.arrays, **arrays, "bias": bias}, config)


class OutputChannels(NamedTuple):
    """Where the weights of a class of layers hold the output channels.

    Attributes:
        kernel: The name of the kernel whose values belong to one output channel each.
        scale_shape: Takes the shape of this kernel, and returns the shape in which one number per output
            channel multiplies it.
    """

    kernel: str
    scale_shape: Callable[[Any], tuple[int, ...]]

    def absorb(self, layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
        """Returns the weights that apply a map to the output as well."""
        kernel = weights.arrays[self.kernel]
        channels = prod(self.scale_shape(kernel.shape))
        scale, shift = affine.along(channel_axis(layer), channels)
        kernel, bias = self.scaled(kernel, _bias(weights), scale, shift)
        return weights.updated(bias, **{self.kernel: kernel})

    def scaled(
        self, kernel: Any, bias: Any, scale: Any, shift: Any, reshape: Any = np.reshape
    ) -> tuple[Any, Any]:
        """Returns the kernel s W and the bias s b + t, for NumPy arrays or for tensors."""
        return kernel * reshape(scale, self.scale_shape(kernel.shape)), bias * scale + shift


class Linear(NamedTuple):
    """How a class of layers absorbs a map of its output, and a map of its input.

    Both functions take the layer, its weights, the map and the shape of the layer's input, and return new
    weights. They raise `CannotFold` if the layer cannot absorb the map. `channels` says the same of the
    output as `absorb_output` does, for the weights alone; `EinsumDense` has none.
    """

    absorb_output: Callable[[Any, Weights, Affine, Any], Weights]
    absorb_input: Callable[[Any, Weights, Affine, Any], Weights]
    channels: OutputChannels | None = None


def weights_of(layer: keras.layers.Layer) -> Weights:
    """Returns the weights of a layer whose class is in `LINEAR`.

    Raises:
        CannotFold: If the layer has other weights than its class defines, such as those of LoRA.
    """
    arrays = {weight.name: np.asarray(weight.numpy(), np.float64) for weight in layer.weights}
    separable = LINEAR[type(layer)] is _SEPARABLE
    expected = {"depthwise_kernel", "pointwise_kernel"} if separable else {"kernel"}
    if set(arrays) - {"bias"} != expected:
        raise CannotFold(f"'{layer.name}' has unusual weights: {', '.join(sorted(arrays))}")
    return Weights(arrays)


def linear_reason(layer: keras.layers.Layer) -> str | None:
    """Returns why a layer of a class in `LINEAR` is not linear, or None."""
    if layer.activation in (None, keras.activations.linear):
        return None
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    return f"'{layer.name}' has the activation {name}"


def _bias(weights: Weights) -> Any:
    return weights.arrays.get("bias", 0.0)


def channel_axis(layer: Any) -> int:
    """The axis of the output channels of a layer whose class is in `LINEAR`."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def _require_no_padding(layer: Any, affine: Affine, sizes: Any) -> None:
    if affine.shifts and layer.padding != "valid" and prod(sizes) > 1:
        raise CannotFold(
            f"'{layer.name}' pads its input with zeros, to which the shift does not apply ({layer.padding})"
        )


# Dense and convolutions: the kernel ends in (input channels of the group, output channels).


def _absorb_input_dense(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    groups = getattr(layer, "groups", 1)
    inputs, outputs = kernel.shape[-2] * groups, kernel.shape[-1]
    if hasattr(layer, "padding"):
        _require_no_padding(layer, affine, kernel.shape[:-2])
    # Row i, column o: the i-th input channel of the group that output channel o belongs to.
    channels = np.arange(inputs).reshape(groups, -1).repeat(outputs // groups, axis=0).T
    scale, shift = (v[channels] for v in affine.along(channel_axis(layer), inputs))
    through = (kernel * shift).reshape(-1, outputs).sum(axis=0)
    return weights.updated(_bias(weights) + through, kernel=kernel * scale)


# Transposed convolutions: the kernel ends in (output channels, input channels).


def _absorb_input_transposed(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    if affine.shifts and (prod(kernel.shape[:-2]) > 1 or prod(layer.strides) > 1):
        raise CannotFold(f"'{layer.name}' sums a different number of inputs at each position")
    scale, shift = affine.along(channel_axis(layer), kernel.shape[-1])
    through = (kernel * shift).reshape(-1, *kernel.shape[-2:]).sum(axis=(0, -1))
    return weights.updated(_bias(weights) + through, kernel=kernel * scale)


# Depthwise convolutions: the kernel ends in (input channels, outputs per input channel).


def _absorb_input_depthwise(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    kernel = weights.arrays["kernel"]
    _require_no_padding(layer, affine, kernel.shape[:-2])
    scale, shift = affine.along(channel_axis(layer), kernel.shape[-2])
    through = _through_depthwise(kernel, shift)
    return weights.updated(_bias(weights) + through, kernel=kernel * scale[:, None])


def _through_depthwise(kernel: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return (kernel * shift[:, None]).reshape(-1, prod(kernel.shape[-2:])).sum(axis=0)


# Separable convolutions: a depthwise convolution, then one of size 1.


def _absorb_input_separable(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    depthwise, pointwise = (weights.arrays[f"{kind}_kernel"] for kind in ("depthwise", "pointwise"))
    _require_no_padding(layer, affine, depthwise.shape[:-2])
    scale, shift = affine.along(channel_axis(layer), depthwise.shape[-2])
    through = _through_depthwise(depthwise, shift) @ pointwise.reshape(-1, pointwise.shape[-1])
    return weights.updated(_bias(weights) + through, depthwise_kernel=depthwise * scale[:, None])


# EinsumDense: each letter of the equation is an axis.


def _absorb_output_einsum(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    _, letters, output = _letters(layer, len(shape))
    kernel = weights.arrays["kernel"] * _transposed(layer, affine.scale, output, letters)
    bias = _full_bias(weights, len(output)) * affine.scale + affine.shift
    return _with_einsum_bias(layer, weights, kernel, bias, letters, output)


def _absorb_input_einsum(layer: Any, weights: Weights, affine: Affine, shape: Any) -> Weights:
    inputs, letters, output = _letters(layer, len(shape))
    kernel = weights.arrays["kernel"]
    through = kernel * _transposed(layer, affine.shift, inputs, letters)
    through = through.sum(axis=tuple(i for i, c in enumerate(letters) if c not in output))
    through = _transposed(layer, through, [c for c in letters if c in output], output)
    bias = _full_bias(weights, len(output)) + through
    kernel = kernel * _transposed(layer, affine.scale, inputs, letters)
    return _with_einsum_bias(layer, weights, kernel, bias, letters, output)


def _letters(layer: Any, rank: int) -> tuple[str, str, str]:
    """Returns the letters of an input of this rank, of the kernel, and of the output."""
    equation = layer.equation.replace(" ", "")
    inputs, kernel, output = equation.replace("->", ",").split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = "".join(unused[: rank - len(inputs.replace("...", ""))])
    inputs, output = (letters.replace("...", hidden) for letters in (inputs, output))
    repeats = any(len(set(letters)) < len(letters) for letters in (inputs, kernel, output))
    # A letter that only one operand has is summed before the product, or broadcast.
    if repeats or not (set(inputs) ^ set(kernel)) <= set(output) <= set(inputs + kernel):
        raise CannotFold(
            f"'{layer.name}' has an equation that is not supported: '{layer.equation}'"
        )
    return inputs, kernel, output


def _transposed(layer: Any, array: np.ndarray, letters: Sequence[str], to: str) -> np.ndarray:
    """Transposes an array from one order of letters to another, with size 1 for new letters."""
    varies = {letter for letter, size in zip(letters, array.shape, strict=True) if size > 1}
    if not varies <= set(to):
        raise CannotFold(
            f"'{layer.name}' has no weights along the axis of the statistics: '{layer.equation}'"
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
        raise CannotFold(f"'{layer.name}' has no axis for a bias: '{layer.equation}'")
    # Keras omits the axes before the first axis of the bias.
    arrays = {"kernel": kernel, "bias": bias.reshape(bias.shape[output.index(axes[0]) :])}
    return Weights(arrays, {"bias_axes": "".join(axes)})


_OUTPUT_LAST = OutputChannels("kernel", lambda shape: (shape[-1],))
_OUTPUT_BEFORE_INPUT = OutputChannels("kernel", lambda shape: (shape[-2], 1))
_OUTPUT_FROM_INPUT = OutputChannels("kernel", lambda shape: tuple(shape[-2:]))
_OUTPUT_OF_POINTWISE = OutputChannels("pointwise_kernel", lambda shape: (shape[-1],))

_DENSE = Linear(_OUTPUT_LAST.absorb, _absorb_input_dense, _OUTPUT_LAST)
_TRANSPOSED = Linear(_OUTPUT_BEFORE_INPUT.absorb, _absorb_input_transposed, _OUTPUT_BEFORE_INPUT)
_DEPTHWISE = Linear(_OUTPUT_FROM_INPUT.absorb, _absorb_input_depthwise, _OUTPUT_FROM_INPUT)
_SEPARABLE = Linear(_OUTPUT_OF_POINTWISE.absorb, _absorb_input_separable, _OUTPUT_OF_POINTWISE)

# Subclasses are not included: they may compute something else.
LINEAR: dict[type, Linear] = {
    keras.layers.Dense: _DENSE,
    keras.layers.EinsumDense: Linear(_absorb_output_einsum, _absorb_input_einsum),
    keras.layers.Conv1D: _DENSE,
    keras.layers.Conv2D: _DENSE,
    keras.layers.Conv3D: _DENSE,
    keras.layers.Conv1DTranspose: _TRANSPOSED,
    keras.layers.Conv2DTranspose: _TRANSPOSED,
    keras.layers.Conv3DTranspose: _TRANSPOSED,
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
    keras.layers.SeparableConv1D: _SEPARABLE,
    keras.layers.SeparableConv2D: _SEPARABLE,
}
