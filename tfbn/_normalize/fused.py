"""Batch normalization by TensorFlow's fused kernel, ``FusedBatchNormV3`` and its gradient.

The kernel takes float32, float16 and bfloat16 activations with float32 parameters, channels last,
no mask; to train on a GPU, channels on axis 1, too. It reads half-precision activations as they
are, without a float32 copy.

On a CPU the input is handed over as (positions, 1, 1, channels) or, for training, as (rows,
positions, 1, channels): the views cost nothing, and the kernel's time depends on them. The first
took up to half of the time of (N, H, W, C) and (1, N, 1, C); but each position has a price of its
own there, which short rows share: in training 128×32×32×16 ran forward in 1.23 ms, by rows in 0.82,
64×32×32×64 in bfloat16 in 0.90 and 0.61, while rows of 128×256 values were the slower view.

In inference the output of a two-dimensional convolution is handed over as it stands: TensorFlow's
graph optimizer then joins convolution, normalization and activation (in half precision, the latter
two) in one operation, which it does not across a view. An inference of MobileNetV2 took 40 ms
instead of 48 (Keras 49), in bfloat16 51 instead of 65 (Keras 71).

On a GPU the kernel is cuDNN's, which refuses many examples (pytorch#19911) but not many positions:
it gets images as they stand, unless they are known to be too many, so that TensorFlow may join an
activation that follows; all else as (1, positions, 1, channels), or, with channels on axis 1, as
(examples, channels, positions, 1) in NCHW. That is for training alone: a SavedModel in which it
stands would not run on a CPU, the kernel knows no gradient of inference there, and more than 65,535
examples fail.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfbn._moments.moments import Moments, count
from tfbn._normalize.reshape import known, like, merged

DTYPES = (tf.float32, tf.float16, tf.bfloat16)

# On the CPU the kernel (oneDNN's) adds float32 numbers one after the other. Its mean of n values
# was measured to be off by about (1e-7 + 1.1e-10 n) of its own size: 1e-5 for a 32×56×56 image
# batch, so that a channel with mean 1e4 and spread 1 came out 0.1 wrong. Where the mean is that
# much larger than the spread, the kernel runs again on x - mean. The check is on a few numbers per
# channel; outputs are right to about this tolerance.
_TOLERANCE = 1e-4
_MEAN_ERROR = 1e-7
_MEAN_ERROR_PER_VALUE = 1.1e-10

_SHORT_ROW = 2**14  # values
_MOST_EXAMPLES = 880_801  # More cuDNN refuses to train on in NCHW,
_MOST_IMAGES = 65_535  # and more than these in inference.


class Setting(NamedTuple):
    """Over what a channel is normalized, and where.

    Attributes:
        axes: The channel axes, ascending and non-negative.
        epsilon: Added to the variance.
        on_gpu: Whether the kernel is cuDNN's.
    """

    axes: Sequence[int]
    epsilon: float
    on_gpu: bool


class Saved(NamedTuple):
    """What the backward pass needs: the input as the kernel saw it, and the kernel's own reserve."""

    x: tf.Tensor
    reserve: tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def serves(x: tf.Tensor, axes: Sequence[int], *, nchw: bool = False) -> bool:
    """Whether the kernel can take ``x``: its dtype, and channels of a known number that are the last axes.

    Args:
        x: Tensor of known rank.
        axes: Its channel axes, ascending.
        nchw: Whether the channels may be other axes in a row, too.
    """
    in_a_row = list(axes) == list(range(axes[0], axes[0] + len(axes)))
    if x.dtype not in DTYPES or not in_a_row or not known(x, axes):
        return False
    if _data_format(x, axes) == "NHWC":
        return True
    examples = x.shape[: axes[0]].num_elements()
    return nchw and (examples is None or examples <= _MOST_EXAMPLES)


def forward(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: Setting,
) -> tuple[tf.Tensor, Moments, Saved]:
    """Normalizes ``x`` by its own moments. Returns the output, the moments and what to save."""
    axes, epsilon, on_gpu = setting
    flat = _flat(x, setting) if on_gpu else _rows(x, setting)
    data_format = _data_format(x, axes)
    scale, offset = _vector(gamma), _vector(beta)
    n = count(flat, [data_format.index("C")])
    perhaps_empty = flat.shape.num_elements() in (None, 0)

    y, mean, unbiased, *reserve = _kernel(flat, scale, offset, epsilon, data_format)
    if on_gpu:  # cuDNN's reserve is its own; one value has no unbiased variance (0/0 there).
        variance = tf.math.multiply_no_nan(unbiased, tf.math.divide_no_nan(n - 1, n))
    else:  # cuDNN is accurate, and a decision by value would stop the GPU's queue.
        run = _Run(flat, y, mean, *reserve[:2])
        flat, y, mean, *reserve[:2] = _centred_if(
            _mean_dominates(mean, run.variance, n, epsilon), run, scale, offset, epsilon
        )
        variance = reserve[1]
    if perhaps_empty:  # The kernel then leaves whatever was in memory.
        mean, variance = (
            tf.where(n > 0, value, tf.zeros_like(value)) for value in (mean, variance)
        )
    moments = Moments(n, like(mean, gamma), like(variance, gamma))
    return like(y, x), moments, Saved(flat, tuple(reserve))


def backward(
    saved: Saved,
    dy: tf.Tensor,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: Setting,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta."""
    return _gradient(dy, x, saved.x, gamma, saved.reserve, setting, is_training=True)


def inference(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    setting: Setting,
    as_it_stands: bool = False,
) -> tf.Tensor:
    """Normalizes ``x`` by the given statistics; an ``x`` of four axes, if wanted, not as a view."""
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x if as_it_stands else _flat(x, setting),
        scale=_vector(gamma),
        offset=_vector(beta),
        mean=_vector(mean),
        variance=_vector(variance),
        epsilon=setting.epsilon,
        is_training=False,
    )
    return like(y, x)


def inference_backward(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    *,
    setting: Setting,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients with respect to x, gamma and beta, with the statistics held constant."""
    reserve = (_vector(mean), _vector(variance), tf.zeros([0]))
    return _gradient(dy, x, _flat(x, setting), gamma, reserve, setting, is_training=False)


def _gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    seen: tf.Tensor,
    gamma: tf.Tensor,
    reserve: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
    setting: Setting,
    is_training: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=like(dy, seen),
        x=seen,
        scale=_vector(gamma),
        reserve_space_1=reserve[0],
        reserve_space_2=reserve[1],
        reserve_space_3=reserve[2],
        epsilon=setting.epsilon,
        data_format=_data_format(x, setting.axes),
        is_training=is_training,
    )
    return like(dx, x), like(dgamma, gamma), like(dbeta, gamma)


def _mean_dominates(
    mean: tf.Tensor, variance: tf.Tensor, n: tf.Tensor, epsilon: float
) -> tf.Tensor | bool:
    if tf.executing_eagerly():  # A few numbers, here already: NumPy is ten times quicker with them.
        mean, variance, n = mean.numpy(), variance.numpy(), n.numpy()
        if n == 0:  # Some versions leave both uninitialized.
            return False
    limit = _TOLERANCE / (_MEAN_ERROR + _MEAN_ERROR_PER_VALUE * n)
    dominates = abs(mean) > limit * (variance + epsilon) ** 0.5  # not squared: that may overflow
    return dominates.any() if tf.executing_eagerly() else tf.reduce_any(dominates)


def _kernel(
    x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, data_format: str = "NHWC"
) -> tuple[tf.Tensor, ...]:
    """Output, mean, unbiased variance, and three tensors for the backward pass."""
    nothing = tf.zeros([0])
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=scale,
        offset=offset,
        mean=nothing,
        variance=nothing,
        epsilon=epsilon,
        data_format=data_format,
        is_training=True,
    )


class _Run(NamedTuple):
    """What the kernel saw and made of it, on a CPU; the mean is that of the input, whatever was seen."""

    x: tf.Tensor
    y: tf.Tensor
    mean: tf.Tensor
    mean_seen: tf.Tensor
    variance: tf.Tensor


def _centred(run: _Run, scale: tf.Tensor, offset: tf.Tensor, epsilon: float) -> _Run:
    """The kernel run again, on x - mean."""
    shift = tf.cast(run.mean, run.x.dtype)
    x = run.x - shift
    y, mean, _, *reserve = _kernel(x, scale, offset, epsilon)
    return _Run(x, y, tf.cast(shift, tf.float32) + mean, *reserve[:2])


def _centred_if(
    condition: tf.Tensor | bool, run: _Run, scale: tf.Tensor, offset: tf.Tensor, epsilon: float
) -> _Run:
    if tf.executing_eagerly():
        return _centred(run, scale, offset, epsilon) if condition else run
    centred, as_it_is = _branches(run.x.dtype, epsilon)
    outputs = tf.raw_ops.StatelessIf(
        cond=condition,
        input=(*run, scale, offset),
        Tout=[value.dtype for value in run],
        then_branch=centred,
        else_branch=as_it_is,
        output_shapes=[value.shape for value in run],
    )
    return _Run(*outputs)


@functools.cache
def _branches(dtype: tf.DType, epsilon: float) -> tuple[Any, Any]:
    """The functions to choose between, the same for all layers.

    ``tf.cond`` would make two for each layer: for 100 layers that took 24 MB, and half of the time to the
    first step.
    """
    views = tf.TensorSpec([None, None, 1, None], dtype)
    channels = tf.TensorSpec([None])
    signature = [_Run(views, views, channels, channels, channels), channels, channels]

    def centred(run: _Run, scale: tf.Tensor, offset: tf.Tensor) -> _Run:
        return _centred(run, scale, offset, epsilon)

    def as_it_is(run: _Run, scale: tf.Tensor, offset: tf.Tensor) -> _Run:
        return run

    # They belong to no graph, and run where they are called.
    with tf.init_scope(), tf.device(None):
        return tuple(
            tf.function(branch, input_signature=signature, autograph=False).get_concrete_function()
            for branch in (centred, as_it_is)
        )


def _data_format(x: tf.Tensor, axes: Sequence[int]) -> str:
    return "NHWC" if axes[-1] == x.shape.rank - 1 else "NCHW"


def _flat(x: tf.Tensor, setting: Setting) -> tf.Tensor:
    axes, _, on_gpu = setting
    if _data_format(x, axes) == "NCHW":
        examples_channels_positions, *_ = merged(x, axes)
        return examples_channels_positions[..., tf.newaxis]
    if on_gpu and x.shape.rank == 4 and len(axes) == 1 and (x.shape[0] or 0) <= _MOST_IMAGES:
        return x
    channels = x.shape[axes[0] :].num_elements()
    return tf.reshape(x, [1, -1, 1, channels] if on_gpu else [-1, 1, 1, channels])


def _rows(x: tf.Tensor, setting: Setting) -> tf.Tensor:
    along_row = setting.axes[0] - 1
    length, channels = x.shape[along_row], x.shape[along_row + 1 :].num_elements()
    if along_row == 0 or not length or length * channels > _SHORT_ROW:
        return _flat(x, setting)
    return tf.reshape(x, [-1, length, 1, channels])


def _vector(values: tf.Tensor) -> tf.Tensor:
    return values if values.shape.rank == 1 else tf.reshape(values, [-1])
