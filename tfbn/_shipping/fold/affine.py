"""y = scale · x + shift with values that vary along some axes only: what batch normalization is in inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tfbn._models.walk import BatchNormLayer


class CannotFold(Exception):
    """Why something cannot be folded, in words for the report."""


class Affine(NamedTuple):
    """A map of tensors of one rank, batch first, in float64.

    Both arrays have that rank, and size 1 along every axis that they do not vary along.
    """

    scale: np.ndarray
    shift: np.ndarray

    @property
    def rank(self) -> int:
        return self.scale.ndim

    @property
    def shifts(self) -> bool:
        """Whether there is a shift at all."""
        return bool(np.any(self.shift))

    def after(self, first: Affine) -> Affine:
        """The map that applies `first` and then this one."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def map_arrays(self, function: Any) -> Affine:
        """Both arrays put through a function that moves values about, nothing more."""
        return Affine(function(self.scale), function(self.shift))

    def expand(self, shape: Sequence[int | None]) -> Affine:
        """With values for every position of an example of this shape (with its batch axis).

        Raises:
            CannotFold: if the shape is not known.
        """
        if None in shape[1:]:
            raise CannotFold(f"the shape {tuple(shape)} is not known in full")
        full: Any = (1, *shape[1:])
        return self.map_arrays(lambda array: np.broadcast_to(array, full))

    def squeeze_uniform_axes(self) -> Affine:
        """The same map with size 1 along every axis that the values do not vary along after all."""
        scale, shift = np.broadcast_arrays(self.scale, self.shift)
        for axis in range(scale.ndim):
            heads = [array.take([0], axis) for array in (scale, shift)]
            if np.array_equal(scale, np.broadcast_to(heads[0], scale.shape)) and np.array_equal(
                shift, np.broadcast_to(heads[1], shift.shape)
            ):
                scale, shift = heads
        return Affine(scale, shift)

    def along(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift as vectors along one axis.

        Raises:
            CannotFold: if they vary along another one.
        """
        axis %= self.rank
        for array in self:
            others = [a for a in range(self.rank) if a != axis and array.shape[a] > 1]
            if others:
                raise CannotFold(
                    f"it varies along the axes {[*others]}, not along the axis {axis} alone"
                )
        return tuple(np.broadcast_to(array.reshape(-1), (size,)) for array in self)  # type: ignore


def of_batch_norm(layer: BatchNormLayer, rank: int) -> Affine:
    """The map that the layer is in inference: γ (x − μ) / √(σ² + ε) + β.

    Args:
        layer: Keras's layer or ours, built.
        rank: Of its input.
    """
    axes = [layer.axis] if isinstance(layer.axis, int) else layer.axis
    axes = sorted(axis % rank for axis in axes)

    def values(weight: Any, absent: float) -> np.ndarray:
        array = np.asarray(absent if weight is None else weight.numpy(), np.float64)
        sizes = iter(layer.moving_mean.shape)
        shape = [next(sizes) if axis in axes else 1 for axis in range(rank)]
        return np.broadcast_to(array, layer.moving_mean.shape).reshape(shape)

    mean, variance = values(layer.moving_mean, 0), values(layer.moving_variance, 1)
    scale = values(layer.gamma, 1) / np.sqrt(variance + layer.epsilon)
    return Affine(scale, values(layer.beta, 0) - mean * scale)
