"""Views: the same tensor with other axes, in which a kernel is faster, or works at all."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from tfbn._moments.moments import Moments, reduced_axes
from tfbn._normalize.kernel import Infer, Normalization, Train

_SHORT_ROW = 2**14  # values


class View(NamedTuple):
    """How a tensor looks to a kernel, and back.

    Attributes:
        over: What is normalized over what, in the view.
        apply: From the tensor to the view.
        restore: From a tensor like the view to one like the original.
        channels: The shape of per-channel values in the view; None where it is the original one.
    """

    over: Normalization
    apply: Callable[[tf.Tensor], tf.Tensor]
    restore: Callable[[tf.Tensor], tf.Tensor]
    channels: Sequence[int | tf.Tensor] | None = None

    def train(
        self, run: Train, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments]:
        """Trains on the view of x."""
        y, batch = run(self.apply(x), self._in(gamma), self._in(beta), self.over)
        moments = batch._replace(mean=like(batch.mean, gamma), variance=like(batch.variance, gamma))
        return self.restore(y), moments

    def infer(self, run: Infer, x: tf.Tensor, *channels: tf.Tensor) -> tf.Tensor:
        """Infers on the view of x."""
        mean, variance, gamma, beta = map(self._in, channels)
        return self.restore(run(self.apply(x), mean, variance, gamma, beta, self.over))

    def _in(self, values: tf.Tensor) -> tf.Tensor:
        if self.channels is None or values.shape.rank == len(self.channels):
            return values
        return tf.reshape(values, self.channels)


def unchanged(over: Normalization) -> View:
    """The tensor itself."""
    return View(over, lambda x: x, lambda y: y)


def merged(x: tf.Tensor, over: Normalization) -> View:
    """Neighbouring axes of one kind as one: (N, H, W, C) as (N·H·W, C). Not for masks, which may broadcast."""
    runs = [
        (is_channel, list(run))
        for is_channel, run in itertools.groupby(range(x.shape.rank), lambda a: a in over.axes)
    ]
    if over.mask is not None or len(runs) == x.shape.rank:
        return unchanged(over)
    sizes = [_size(x, run) for _, run in runs]
    axes = tuple(i for i, (is_channel, _) in enumerate(runs) if is_channel)
    return _reshaped(x, over._replace(axes=axes), sizes, [sizes[i] for i in axes])


def transposed(x: tf.Tensor, over: Normalization) -> View:
    """The channel axes brought to the end."""
    rank = x.shape.rank
    to_last = [*reduced_axes(rank, over.axes), *over.axes]
    back_again = [to_last.index(axis) for axis in range(rank)]
    mask = None if over.mask is None else tf.transpose(over.mask, to_last)
    last = tuple(range(rank - len(over.axes), rank))
    return View(
        over._replace(axes=last, mask=mask),
        lambda x: tf.transpose(x, to_last),
        lambda y: tf.transpose(y, back_again),
    )


def flat(x: tf.Tensor, over: Normalization) -> View:
    """Channels last as (positions, 1, 1, channels)."""
    channels = x.shape[over.axes[0] :].num_elements()
    return _reshaped(x, over._replace(axes=(3,)), [-1, 1, 1, channels], [channels])


def rows(x: tf.Tensor, over: Normalization) -> View:
    """Channels last as (rows, positions, 1, channels), where rows are short; else as `flat`."""
    along_row = over.axes[0] - 1
    length, channels = x.shape[along_row], x.shape[along_row + 1 :].num_elements()
    if along_row == 0 or not length or length * channels > _SHORT_ROW:
        return flat(x, over)
    return _reshaped(x, over._replace(axes=(3,)), [-1, length, 1, channels], [channels])


def one_image(x: tf.Tensor, over: Normalization) -> View:
    """Channels last as (1, positions, 1, channels)."""
    channels = x.shape[over.axes[0] :].num_elements()
    return _reshaped(x, over._replace(axes=(3,)), [1, -1, 1, channels], [channels])


def channels_second(x: tf.Tensor, over: Normalization) -> View:
    """Channels in a row of axes as (examples, channels, positions, 1): NCHW."""
    view = merged(x, over)
    return View(
        view.over,
        lambda x: view.apply(x)[..., tf.newaxis],
        lambda y: view.restore(tf.squeeze(y, -1)),
        view.channels,
    )


def interleaved(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether per-channel values cannot be broadcast against x in its present axes.

    TensorFlow's kernels broadcast over at most 5 alternating runs of axes. A list of axes can make more.
    """
    return len(list(itertools.groupby(range(x.shape.rank), lambda axis: axis in axes))) > 5


def like(y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Reshapes y to the shape of x."""
    if x.shape.is_fully_defined():
        return y if y.shape == x.shape else tf.reshape(y, x.shape)
    return with_shape(tf.reshape(y, tf.shape(x)), x.shape)


def with_shape(x: tf.Tensor, shape: Sequence[int | None] | tf.TensorShape) -> tf.Tensor:
    """Tells TensorFlow more about the shape of x than its operation does.

    `tf.ensure_shape` would check the shape again when the graph runs, and stop forward-mode differentiation.
    """
    if not tf.executing_eagerly():  # There it is known.
        x.set_shape(shape)
    return x


def _reshaped(
    x: tf.Tensor,
    over: Normalization,
    sizes: list[int | tf.Tensor],
    channels: Sequence[int | tf.Tensor],
) -> View:
    static = [size if isinstance(size, int) and size >= 0 else None for size in sizes]

    def apply(x: tf.Tensor) -> tf.Tensor:
        return with_shape(tf.reshape(x, sizes), static)

    return View(over, apply, lambda y: like(y, x), channels)


def _size(x: tf.Tensor, run: list[int]) -> int | tf.Tensor:
    known = tf.TensorShape([x.shape[axis] for axis in run]).num_elements()
    return tf.reduce_prod(tf.shape(x)[run[0] : run[-1] + 1]) if known is None else known
