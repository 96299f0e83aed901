"""y = scale · x + shift, which is what batch normalization computes in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfbn._layer.arguments import resolved_axes
from tfbn._models.walk import BatchNormLayer


class CannotFold(Exception):
    """Raised where a map cannot be folded; the message is the reason in the report."""


class Affine(NamedTuple):
    """An affine map of tensors of one rank, batch axis first.

    Attributes:
        scale: A float64 array of that rank, with size 1 along the axes that it does not vary along.
        shift: Likewise.
    """

    scale: np.ndarray
    shift: np.ndarray

    @property
    def rank(self) -> int:
        return self.scale.ndim

    @property
    def shifts(self) -> bool:
        """Whether any shift is not zero."""
        return bool(np.any(self.shift))

    def after(self, first: Affine) -> Affine:
        """Returns the map that applies `first`, then this one."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def map_arrays(self, function: Callable[[np.ndarray], np.ndarray]) -> Affine:
        """Applies a function that rearranges values, such as a transpose, to both arrays."""
        return Affine(function(self.scale), function(self.shift))

    def expand(self, shape: Sequence[int | None]) -> Affine:
        """Broadcasts both arrays to this shape, except along the batch axis.

        Raises:
            CannotFold: If a size other than the batch size is unknown.
        """
        if None in shape[1:]:
            raise CannotFold(f"the shape {tuple(shape)} is not fully known")
        full: Any = (1, *shape[1:])
        return self.map_arrays(lambda array: np.broadcast_to(array, full))

    def squeeze_uniform_axes(self) -> Affine:
        """Returns the same map with size 1 along every axis along which all values are equal."""
        scale, shift = np.broadcast_arrays(self.scale, self.shift)
        for axis in range(scale.ndim):
            firsts = [array.take([0], axis) for array in (scale, shift)]
            if np.all(scale == firsts[0]) and np.all(shift == firsts[1]):
                scale, shift = firsts
        return Affine(scale, shift)

    def along(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns scale and shift as vectors along one axis.

        Raises:
            CannotFold: If they vary along another axis.
        """
        axis %= self.rank
        varies = [a for a in range(self.rank) if max(array.shape[a] for array in self) > 1]
        if set(varies) - {axis}:
            raise CannotFold(f"it varies along the axes {varies}, not only along axis {axis}")
        return tuple(np.broadcast_to(array.reshape(-1), (size,)) for array in self)  # type: ignore


def of_batch_norm(layer: BatchNormLayer, rank: int) -> Affine:
    """Returns what the layer computes in inference mode: γ (x − μ) / √(σ² + ε) + β.

    Args:
        layer: A built layer of Keras's class or ours.
        rank: The rank of its input.
    """
    axes = resolved_axes(layer.axis, [None] * rank)

    def values(weight: Any, default: float) -> np.ndarray:
        array = np.asarray(default if weight is None else weight.numpy(), np.float64)
        sizes = iter(layer.moving_mean.shape)
        shape = [next(sizes) if axis in axes else 1 for axis in range(rank)]
        return np.broadcast_to(array, layer.moving_mean.shape).reshape(shape)

    mean, variance = values(layer.moving_mean, 0), values(layer.moving_variance, 1)
    gamma, beta = values(layer.gamma, 1), values(layer.beta, 0)
    return Affine(*inference_map(gamma, beta, mean, variance, layer.epsilon))


def inference_map(
    gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float, sqrt: Any = np.sqrt
) -> tuple[Any, Any]:
    """Returns the scale γ / √(σ² + ε) and the shift β − μ · scale, for NumPy arrays or for tensors."""
    scale = gamma / sqrt(variance + epsilon)
    return scale, beta - mean * scale
