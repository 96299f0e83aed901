"""Other views of the same tensor, in which a kernel is faster, or works at all."""

import itertools
from collections.abc import Sequence

import tensorflow as tf

from tfbn._moments.moments import reduced_axes


def merged(
    x: tf.Tensor, axes: Sequence[int]
) -> tuple[tf.Tensor, tuple[int, ...], list[int | tf.Tensor]]:
    """Views ``x`` with neighbouring axes of a kind merged: (N, H, W, C) as (N·H·W, C).

    Args:
        x: Tensor of known rank.
        axes: Its channel axes, ascending.

    Returns:
        The view, its channel axes, and the shape that per-channel values have there.
    """
    runs = [
        (is_channel, list(run))
        for is_channel, run in itertools.groupby(range(x.shape.rank), lambda axis: axis in axes)
    ]
    sizes = [_size(x, run) for _, run in runs]
    view_axes = tuple(i for i, (is_channel, _) in enumerate(runs) if is_channel)
    channels = [sizes[i] for i in view_axes]
    if len(runs) == x.shape.rank:
        return x, view_axes, channels
    view = tf.reshape(x, tf.stack(sizes))
    static = [None if tf.is_tensor(size) else size for size in sizes]
    return with_shape(view, static), view_axes, channels


def like(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """``y`` in the shape of ``x``."""
    if x.shape.is_fully_defined():
        return y if y.shape == x.shape else tf.reshape(y, x.shape)
    return with_shape(tf.reshape(y, tf.shape(x)), x.shape)


def with_shape(x: tf.Tensor, shape: Sequence[int | None] | tf.TensorShape) -> tf.Tensor:
    """``x``, of which more is known than its operation says.

    ``tf.ensure_shape`` would check it again when the graph runs, and stop forward-mode differentiation.
    """
    x.set_shape(shape)
    return x


def known(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether the sizes of the axes are known. Virtual batches are channels, too, and their number may not be."""
    return all(x.shape[axis] is not None for axis in axes)


def interleaved(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether per-channel values cannot be broadcast against ``x`` as it stands.

    TensorFlow's kernels broadcast over at most 5 alternating runs of axes; a list of axes can make
    more.
    """
    return len(list(itertools.groupby(range(x.shape.rank), lambda axis: axis in axes))) > 5


def channels_last(rank: int, axes: Sequence[int]) -> tuple[list[int], list[int], tuple[int, ...]]:
    """The permutation that brings the channel axes to the end, its inverse, and where they are then."""
    to_last = [*reduced_axes(rank, axes), *axes]
    back_again = [to_last.index(axis) for axis in range(rank)]
    return to_last, back_again, tuple(range(rank - len(axes), rank))


def _size(x: tf.Tensor, run: list[int]) -> int | tf.Tensor:
    known = tf.TensorShape([x.shape[axis] for axis in run]).num_elements()
    return tf.reduce_prod(tf.shape(x)[run[0] : run[-1] + 1]) if known is None else known
