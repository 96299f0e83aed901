"""The layers that an affine map can be moved through, from their output to their inputs or the other way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tfbn._shipping.fold.affine import Affine, CannotFold

Shape = Sequence[int | None]


class Commutation(NamedTuple):
    """How a map is moved through a class of layers. Both functions raise `CannotFold` if it cannot be.

    Attributes:
        backward: Takes the layer, a map of its output, the shapes of its inputs, and the shape of its
            output. Returns the equivalent maps of the inputs.
        forward: Takes the layer, a map of its only input, the shape of the input, and the shape of the output.
            Returns the equivalent map of the output.
    """

    backward: Callable[[Any, Affine, Sequence[Shape], Shape], list[Affine]]
    forward: Callable[[Any, Affine, Shape, Shape], Affine]


def _channel_axis(layer: Any, rank: int) -> int:
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _as_channels(layer: Any, affine: Affine, size: int | None, rank: int) -> Affine:
    """Returns a map along the channel axis as a map of tensors of this rank."""
    if size is None:
        raise CannotFold(f"'{layer.name}' has an unknown number of channels")
    vectors = affine.along(_channel_axis(layer, affine.rank), size)
    shape = [1] * rank
    shape[_channel_axis(layer, rank)] = size
    return Affine(*(vector.reshape(shape) for vector in vectors))


def _channelwise(
    require: Callable[[Any, Affine], None] = lambda layer, affine: None,
) -> Commutation:
    """For layers that average or select positions within a channel: a constant stays as it is."""

    def through(layer: Any, affine: Affine, source: Shape, target: Shape) -> Affine:
        require(layer, affine)
        size = source[_channel_axis(layer, len(source))]
        return _as_channels(layer, affine, size, len(target))

    return Commutation(
        backward=lambda layer, affine, inputs, output: [through(layer, affine, output, inputs[0])],
        forward=through,
    )


def _require_positive_scale(layer: Any, affine: Affine) -> None:
    if np.any(affine.scale < 0):
        raise CannotFold(f"'{layer.name}' takes a maximum, and some γ are negative")


def _require_no_shift(layer: Any, affine: Affine) -> None:
    if affine.shifts:
        raise CannotFold(f"'{layer.name}' pads with zeros, to which the shift does not apply")


def _require_known_interpolation(layer: Any, affine: Affine) -> None:
    if getattr(layer, "interpolation", "nearest") not in ("nearest", "bilinear"):
        raise CannotFold(f"'{layer.name}' uses {layer.interpolation} interpolation")


def _require_linear(layer: Any, affine: Affine) -> None:
    if layer.activation is not keras.activations.linear:
        raise CannotFold(f"'{layer.name}' is not linear")


def _identity(require: Callable[[Any, Affine], None] = lambda layer, affine: None) -> Commutation:
    """For layers that return their input in inference mode."""

    def through(layer: Any, affine: Affine, source: Shape, target: Shape) -> Affine:
        require(layer, affine)
        return affine

    return Commutation(
        backward=lambda layer, affine, inputs, output: [through(layer, affine, output, inputs[0])],
        forward=through,
    )


def _permute_backward(
    layer: Any, affine: Affine, inputs: Sequence[Shape], output: Shape
) -> list[Affine]:
    order = np.argsort((0, *layer.dims))
    return [affine.map_arrays(lambda array: array.transpose(order))]


def _permute_forward(layer: Any, affine: Affine, source: Shape, target: Shape) -> Affine:
    return affine.map_arrays(lambda array: array.transpose((0, *layer.dims)))


def _reshape(affine: Affine, source: Shape, target: Shape) -> Affine:
    if None in target[1:]:
        raise CannotFold(f"the shape {tuple(target)} is not fully known")
    sizes: Any = (1, *target[1:])
    full = affine.expand(source)
    return full.map_arrays(lambda array: array.reshape(sizes)).squeeze_uniform_axes()


def _channels_last(layer: Any, shape: Shape) -> Shape:
    """The shape after `Flatten` has moved channels to the last axis."""
    first = getattr(layer, "data_format", None) == "channels_first" and len(shape) > 2
    return (shape[0], *shape[2:], shape[1]) if first else shape


def _reshape_backward(
    layer: Any, affine: Affine, inputs: Sequence[Shape], output: Shape
) -> list[Affine]:
    seen = _channels_last(layer, inputs[0])
    affine = _reshape(affine, output, seen)
    if seen is not inputs[0]:
        affine = affine.map_arrays(lambda array: np.moveaxis(array, -1, 1))
    return [affine]


def _reshape_forward(layer: Any, affine: Affine, source: Shape, target: Shape) -> Affine:
    seen = _channels_last(layer, source)
    if seen is not source:
        affine = affine.map_arrays(lambda array: np.moveaxis(array, 1, -1))
    return _reshape(affine, seen, target)


def _only_backward(layer: Any, affine: Affine, source: Shape, target: Shape) -> Affine:
    raise CannotFold(f"'{layer.name}' ({type(layer).__name__}) has other inputs, too")


def _concatenate_backward(
    layer: Any, affine: Affine, inputs: Sequence[Shape], output: Shape
) -> list[Affine]:
    axis = layer.axis % len(output)
    sizes = [shape[axis] for shape in inputs]
    if None in sizes:
        raise CannotFold(f"'{layer.name}' concatenates inputs of unknown size")
    ends = np.cumsum(sizes)[:-1]

    def parts(array: np.ndarray) -> list[np.ndarray]:
        return [array] * len(sizes) if array.shape[axis] == 1 else np.split(array, ends, axis)

    return [Affine(*pair) for pair in zip(parts(affine.scale), parts(affine.shift), strict=True)]


def _require_same_shapes(layer: Any, affine: Affine, inputs: Sequence[Shape]) -> None:
    for shape in inputs:
        sizes = [max(pair) for pair in zip(*(array.shape for array in affine), strict=True)]
        if len(shape) != affine.rank or any(
            size > 1 and size != own for size, own in zip(sizes, shape, strict=True)
        ):
            raise CannotFold(f"'{layer.name}' has inputs of different shapes")


def _add_backward(
    layer: Any, affine: Affine, inputs: Sequence[Shape], output: Shape
) -> list[Affine]:
    _require_same_shapes(layer, affine, inputs)
    others = affine._replace(shift=np.zeros_like(affine.shift))
    return [affine, *[others] * (len(inputs) - 1)]


def _average_backward(
    layer: Any, affine: Affine, inputs: Sequence[Shape], output: Shape
) -> list[Affine]:
    _require_same_shapes(layer, affine, inputs)
    return [affine] * len(inputs)


def _classes(*names: str) -> list[type]:
    return [getattr(keras.layers, name) for name in names]


COMMUTING: dict[type, Commutation] = {
    keras.layers.Activation: _identity(_require_linear),
    keras.layers.Permute: Commutation(_permute_backward, _permute_forward),
    keras.layers.Flatten: Commutation(_reshape_backward, _reshape_forward),
    keras.layers.Reshape: Commutation(_reshape_backward, _reshape_forward),
    keras.layers.Concatenate: Commutation(_concatenate_backward, _only_backward),
    keras.layers.Add: Commutation(_add_backward, _only_backward),
    keras.layers.Average: Commutation(_average_backward, _only_backward),
}
COMMUTING |= dict.fromkeys(
    _classes(
        "Dropout",
        "SpatialDropout1D",
        "SpatialDropout2D",
        "SpatialDropout3D",
        "AlphaDropout",
        "GaussianDropout",
        "GaussianNoise",
        "Identity",
    ),
    _identity(),
)
for _rank in ("1D", "2D", "3D"):
    COMMUTING |= dict.fromkeys(
        _classes(f"AveragePooling{_rank}", f"GlobalAveragePooling{_rank}", f"Cropping{_rank}"),
        _channelwise(),
    )
    COMMUTING |= dict.fromkeys(
        _classes(f"MaxPooling{_rank}", f"GlobalMaxPooling{_rank}"),
        _channelwise(_require_positive_scale),
    )
    COMMUTING |= dict.fromkeys(
        _classes(f"UpSampling{_rank}"), _channelwise(_require_known_interpolation)
    )
    COMMUTING |= dict.fromkeys(_classes(f"ZeroPadding{_rank}"), _channelwise(_require_no_shift))
