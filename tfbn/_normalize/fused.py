"""TensorFlow's fused kernel on a CPU: ``FusedBatchNormV3`` and its gradient, channels last.

The kernel takes float32, float16 and bfloat16 activations with float32 parameters, and no mask. It reads
half-precision activations as they are, without a float32 copy.

On a CPU the kernel (oneDNN's) adds float32 numbers one after the other. The rounding of such sums grows with
the number of values n. Measured, the mean was off by up to (1e-7 + 2e-8 √n) of its own size; where all values
of a channel are almost equal, by 1.2e-8 n, because then every addition rounds the same way. The variance of
normal values was off by 1e-10 n; where half of the values of a channel are equal, as after a ReLU, by up to
3e-9 n, about twice as much as in Keras's formula. So the moments are computed again, in pieces, where this shows:

- where the mean dominates: it is so much larger than the standard deviation that the rounding of the mean
  exceeds `_TOLERANCE` of a standard deviation, or `_TOLERANCE_OF_EQUALS` where all values are almost equal.
  (Not in half precision, where x itself has lost these digits, and equal values are added exactly for longer.)
- where there are many values, more than `MANY`.

`in_pieces` then subtracts a mean (in float32), takes the moments of pieces of a few thousand values, merges them
exactly, and normalizes by them as in inference. The check reads a few numbers per channel.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfbn._moments.moments import (
    Moments,
    count,
    merge_all,
    sum_over,
    zero_where_empty,
)
from tfbn._normalize.kernel import Gradients, Normalization

DTYPES = (tf.float32, tf.float16, tf.bfloat16)

MANY = 2**17  # values of a channel
PIECE = 2**11
_TOLERANCE = 1e-4
_TOLERANCE_OF_EQUALS = 1e-6


class Saved(NamedTuple):
    """What the backward pass needs: the input as the kernel saw it, with its mean and variance."""

    x: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


class Run(NamedTuple):
    """What the kernel saw and computed. ``mean`` is that of the input, ``mean_seen`` that of ``x``."""

    x: tf.Tensor
    y: tf.Tensor
    mean: tf.Tensor
    mean_seen: tf.Tensor
    variance: tf.Tensor


class Fused:
    """The fused kernel on a CPU, for a tensor of four axes, the channels last."""

    def __init__(self, over: Normalization):
        self._epsilon = over.epsilon

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Saved]:
        n = count(x, [3])
        known = tf.get_static_value(n)
        if known is not None and known > MANY:
            run = in_pieces(x, gamma, beta, self._epsilon)
        else:
            y, mean, _, mean_seen, variance, _ = kernel(x, gamma, beta, self._epsilon)
            run = Run(x, y, mean, mean_seen, variance)
            if x.dtype == tf.float32 or known is None:
                run = _if_rounding_shows(run, n, gamma, beta, self._epsilon)
        moments = Moments(n, run.mean, run.variance)
        if x.shape.num_elements() in (None, 0):
            moments = _zero_if_empty(moments)
        return run.y, moments, Saved(run.x, run.mean_seen, run.variance)

    def backward(self, saved: Saved, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor) -> Gradients:
        return gradient(dy, saved.x, gamma, saved[1:], self._epsilon, is_training=True)

    def moments(self, x: tf.Tensor) -> Moments:
        """The moments of x, whose mean should not be large."""
        return moments_in_pieces(x)

    def inference(
        self,
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
        beta: tf.Tensor,
    ) -> tf.Tensor:
        return normalized_by(x, mean, variance, gamma, beta, self._epsilon)

    def inference_backward(
        self,
        dy: tf.Tensor,
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
    ) -> Gradients:
        return gradient(dy, x, gamma, (mean, variance), self._epsilon, is_training=False)


def kernel(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, data_format: str = "NHWC"
) -> tuple[tf.Tensor, ...]:
    """Output, mean, unbiased variance, and three tensors for the backward pass.

    On a CPU the first two of these are the mean and the biased variance.
    """
    nothing = tf.constant([], tf.float32)
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=nothing,
        variance=nothing,
        epsilon=epsilon,
        exponential_avg_factor=1.0,  # As in the default, an integer, but TensorFlow runs it faster eagerly.
        data_format=data_format,
        is_training=True,
    )


def normalized_by(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
) -> tf.Tensor:
    """The kernel of inference."""
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        exponential_avg_factor=1.0,
        is_training=False,
    )
    return y


def gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    saved: Sequence[tf.Tensor],
    epsilon: float,
    *,
    is_training: bool,
    data_format: str = "NHWC",
) -> Gradients:
    """The kernel of the gradient. ``saved`` holds the tensors that the forward kernel reserved for it."""
    reserve = [*saved, tf.constant([], tf.float32)][:3]
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy,
        x=x,
        scale=gamma,
        reserve_space_1=reserve[0],
        reserve_space_2=reserve[1],
        reserve_space_3=reserve[2],
        epsilon=epsilon,
        data_format=data_format,
        is_training=is_training,
    )
    return dx, dgamma, dbeta


def in_pieces(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> Run:
    """Normalizes x by moments that are computed in pieces, relative to a shift near the mean."""
    shift = tf.zeros_like(gamma)
    seen = x
    if x.dtype == gamma.dtype:
        shift = tf.math.divide_no_nan(sum_over(x, [0, 1, 2]), count(x, [3]))
        seen = x - shift
    _, mean, variance = moments_in_pieces(seen)
    y = normalized_by(seen, mean, variance, gamma, beta, epsilon)
    return Run(seen, y, shift + mean, mean, variance)


def moments_in_pieces(x: tf.Tensor) -> Moments:
    """The moments of x by the kernel, in pieces of `PIECE` to 2·`PIECE` values of each channel, merged exactly."""
    n = count(x, [3])
    known = tf.get_static_value(n)
    if known is not None and known < 2 * PIECE:
        return _zero_if_empty(Moments(n, *_kernel_moments(x)))
    channels = tf.shape(x)[3] if x.shape[3] is None else x.shape[3]
    values = tf.reshape(x, [-1, channels])
    positions = tf.shape(values)[0]
    pieces = tf.maximum(positions // PIECE, 1)
    length = positions // pieces
    # To the kernel, the pieces of a channel are channels of their own: this view costs nothing.
    even, rest = values[: length * pieces], values[length * pieces :]
    of_even = _kernel_moments(tf.reshape(even, [length, 1, 1, pieces * channels]))
    of_rest = _kernel_moments(tf.reshape(rest, [-1, 1, 1, channels]))
    counts = tf.concat([tf.fill([pieces], length), [positions - length * pieces]], 0)
    mean, variance = (
        tf.cast(tf.concat([tf.reshape(a, [-1, channels]), [b]], 0), tf.float64)
        for a, b in zip(of_even, of_rest, strict=True)
    )
    parts = Moments(tf.cast(counts, tf.float64), mean, variance)
    shift, relative = merge_all(tf.zeros_like(mean), parts)
    return Moments(n, tf.cast(shift + relative.mean, n.dtype), tf.cast(relative.variance, n.dtype))


def _kernel_moments(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    ones = tf.ones([tf.shape(x)[3]])
    _, _, _, mean, variance, _ = kernel(x, ones, tf.zeros_like(ones), 1.0)
    return mean, variance


def _zero_if_empty(moments: Moments) -> Moments:
    """The kernel leaves whatever was in memory as the moments of an empty batch."""
    n, *values = moments
    return Moments(n, *(zero_where_empty(value, n) for value in values))


def _if_rounding_shows(
    run: Run, n: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float
) -> Run:
    """The run, or `in_pieces` in its place."""
    shows = _rounding_shows(run, n, epsilon)
    if tf.executing_eagerly():
        return in_pieces(run.x, gamma, beta, epsilon) if shows else run
    again, as_it_is = _branches(run.x.dtype, epsilon)
    outputs = tf.raw_ops.StatelessIf(
        cond=shows,
        input=(*run, gamma, beta),
        Tout=[value.dtype for value in run],
        then_branch=again,
        else_branch=as_it_is,
        output_shapes=[value.shape for value in run],
    )
    return Run(*outputs)


def _rounding_shows(run: Run, n: tf.Tensor, epsilon: float) -> tf.Tensor | bool:
    eager = tf.executing_eagerly()
    mean, variance = run.mean_seen, run.variance
    if eager:  # A few numbers that are already here: NumPy is ten times quicker with them.
        mean, variance, n = mean.numpy(), variance.numpy(), n.numpy()
        if n == 0:  # Some versions leave both uninitialized.
            return False
    many = n > MANY
    if run.x.dtype != run.mean.dtype:
        return many
    size, stddev = abs(mean), (variance + epsilon) ** 0.5  # not squared: that may overflow
    dominates = size * (1e-7 + 2e-8 * n**0.5) > _TOLERANCE * stddev
    bias = size * 1.2e-8 * (n - 2)  # The sum of two values is rounded once.
    equals = (variance**0.5 < 4 * bias) & (bias > _TOLERANCE_OF_EQUALS * stddev)
    shows = dominates | equals
    return many or shows.any() if eager else many | tf.reduce_any(shows)


@functools.cache
def _branches(dtype: tf.DType, epsilon: float) -> tuple[Any, Any]:
    """The functions to choose between, shared by all layers.

    `tf.cond` would make two for each layer: for 100 layers that took 24 MB, and half of the time to the
    first step.
    """
    view = tf.TensorSpec([None, None, 1, None], dtype)
    channels = tf.TensorSpec([None])
    signature = [Run(view, view, channels, channels, channels), channels, channels]

    def again(run: Run, gamma: tf.Tensor, beta: tf.Tensor) -> Run:
        return in_pieces(run.x, gamma, beta, epsilon)

    def as_it_is(run: Run, gamma: tf.Tensor, beta: tf.Tensor) -> Run:
        return run

    # They belong to no graph, and run where they are called.
    with tf.init_scope(), tf.device(None):
        return tuple(
            tf.function(branch, input_signature=signature, autograph=False).get_concrete_function()
            for branch in (again, as_it_is)
        )
