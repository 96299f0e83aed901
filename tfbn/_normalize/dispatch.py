"""(x, gamma, beta) → y, with the right gradients of every order: the one place that chooses the kernel.

The choice is made while the graph is traced, from what is known then. XLA comes first:

====================================================  ==============================================
case                                                  kernel
====================================================  ==============================================
under XLA                                             formula, differentiated by TensorFlow
                                                      (over replicas: by hand)
float32, float16, bfloat16; channels last             fused (``fused.py``)
the same over replicas                                fused (``fused_synchronized.py``)
channels elsewhere in a row, on a GPU: training       fused, as NCHW
channels elsewhere, on a CPU: training, and           fused, between two transpositions
inference in half precision
what a Conv2D gives in a graph on a CPU, inference    fused, joined to it by TensorFlow
a small tensor in a graph on a CPU                    formula, with a gradient written by hand
all else: float64, masks, channels elsewhere          formula, with a gradient written by hand
====================================================  ==============================================

Each call of the fused kernel costs a CPU about 0.1 ms before it does anything: on 64×32 values,
forward and backward, a layer took 0.47 ms with it, 0.23 with the formula and in Keras; from about
100,000 values on it is the faster one. With channels on axis 1 a training step on 32×64×56×56
values took 12 ms through two transpositions and 20 by the formula (Keras 25); inference, where the
formula is three passes, 6.0 and 3.5. XLA compiles the fused kernel badly (two to seven times slower
than Keras's formula on a CPU). It is left to differentiate the formula itself: from a gradient
written by hand it computed the same products several times. The formulas run on views with as few
axes as can be, in which XLA reduces twice as fast.

The formula computes in float32, and a half-precision tensor is copied for it, though not kept for the
backward pass: under a mask, in virtual batches of unknown number, and on a GPU wherever the channels
are not last, but for training with them in a row on one replica. (XLA fuses the cast.)

Derivatives of derivatives are always those of the formula: the fused kernel's own second derivative
is neither complete nor needed often.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfbn._moments import replicas
from tfbn._moments.moments import Moments
from tfbn._normalize import formula, fused, fused_synchronized, reshape
from tfbn._support.keras_internals import compiling_with_xla

# Up to this many values the formula is faster than the fused kernel, in a graph on a CPU.
SMALL = 2**16
_TYPICAL_BATCH = 128  # Taken where the batch size is unknown.

_local = threading.local()


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """While open, what this thread traces cannot be differentiated, and can be forgotten.

    The threads that `strategy.run` of a `tf.distribute.MirroredStrategy` starts open it themselves.

    TensorFlow registers the gradient of each `tf.custom_gradient` in a graph, and thereby keeps the graph,
    for as long as the process lives: 13 MB for each trace of a ResNet-20. Its own all-reduce is one, too:
    a trace in which synchronized layers meet is kept all the same.
    """
    before = getattr(_local, "without_gradients", False)
    _local.without_gradients = True
    try:
        yield
    finally:
        _local.without_gradients = before


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    mask: tf.Tensor | None = None,
    synchronized: bool = False,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes ``x`` by the mean and biased variance of this batch, per channel.

    Args:
        x: Floating-point tensor of known rank.
        gamma: Scale, in the dtype of the statistics, shaped like the channel axes of ``x``.
        beta: Offset, likewise.
        axes: The channel axes, ascending and non-negative.
        epsilon: Added to the variance.
        mask: Boolean tensor of the rank of ``x`` that broadcasts to it: the values that count.
        synchronized: Whether the batch is that of all replicas together.

    Returns:
        The output in the dtype of ``x``, differentiable in ``x``, ``gamma`` and ``beta``; and the
        batch's moments, for bookkeeping: they are not to be differentiated.
    """
    synchronized = synchronized and replicas.num_replicas() > 1
    if reshape.interleaved(x, axes) or (mask is None and _fused_is_best_transposed(x, axes)):
        to_last, back_again, last = reshape.channels_last(x.shape.rank, axes)
        y, batch = normalize_batch(
            tf.transpose(x, to_last),
            gamma,
            beta,
            axes=last,
            epsilon=epsilon,
            mask=None if mask is None else tf.transpose(mask, to_last),
            synchronized=synchronized,
        )
        return tf.transpose(y, back_again), batch
    on_gpu = _on_gpu()
    # Over replicas inference's kernel runs, too, which has no gradient as NCHW (see `_fused`).
    if mask is None and _fused_is_best(x, axes, nchw=on_gpu and not synchronized):
        kernel = fused_synchronized if synchronized else fused
        of_kernel = fused.Setting(axes, epsilon, on_gpu)
        of_formula = formula.Setting(axes, epsilon, synchronized=synchronized)
        return _by_kernel(
            functools.partial(kernel.forward, setting=of_kernel),
            functools.partial(kernel.backward, setting=of_kernel),
            functools.partial(formula.second_backward, setting=of_formula),
            x,
            gamma,
            beta,
        )
    shape = tf.shape(gamma)
    view = x
    if mask is None:  # A mask may broadcast over one of two axes that would be merged.
        view, axes, channels = reshape.merged(x, axes)
        gamma, beta = tf.reshape(gamma, channels), tf.reshape(beta, channels)
    setting = formula.Setting(axes, epsilon, mask, synchronized)
    if compiling_with_xla() and not synchronized:
        y, batch = formula.plain(view, gamma, beta, setting=setting)
    else:
        y, batch = _by_kernel(
            functools.partial(formula.forward, setting=setting),
            functools.partial(formula.backward, setting=setting),
            functools.partial(formula.second_backward, setting=setting),
            view,
            gamma,
            beta,
        )
    mean, variance = tf.reshape(batch.mean, shape), tf.reshape(batch.variance, shape)
    return reshape.like(y, x), Moments(batch.count, mean, variance)


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """Normalizes ``x`` by the given statistics; differentiable in every argument.

    Shapes and dtypes as in :func:`normalize_batch`; ``mean`` and ``variance`` are like ``gamma``.
    """
    # In float32 a formula of three passes beats two transpositions; half precision it would copy.
    transposed = x.dtype != tf.float32 and _fused_is_best_transposed(x, axes)
    if reshape.interleaved(x, axes) or transposed:
        to_last, back_again, last = reshape.channels_last(x.shape.rank, axes)
        y = normalize(
            tf.transpose(x, to_last), mean, variance, gamma, beta, axes=last, epsilon=epsilon
        )
        return tf.transpose(y, back_again)
    joined = _is_joined_to_convolution(x, axes)
    if not joined and not _fused_is_best(x, axes):
        return formula.inference(x, mean, variance, gamma, beta, axes=axes, epsilon=epsilon)
    setting = fused.Setting(axes, epsilon, _on_gpu())

    def back(dy: tf.Tensor, x: tf.Tensor, *weights: tf.Tensor) -> tuple[tf.Tensor, ...]:
        mean, variance, gamma, _ = weights
        dx, dgamma, dbeta = fused.inference_backward(dy, x, mean, variance, gamma, setting=setting)
        s = tf.math.rsqrt(variance + epsilon)
        return dx, -gamma * s * dbeta, -0.5 * gamma * tf.square(s) * dgamma, dgamma, dbeta

    kernel = functools.partial(fused.inference, setting=setting, as_it_stands=joined)
    return _differentiable(
        lambda *inputs: (kernel(*inputs), back),
        functools.partial(formula.second_inference_backward, axes=axes, epsilon=epsilon),
        x,
        mean,
        variance,
        gamma,
        beta,
    )


def _fused_is_best(x: tf.Tensor, axes: Sequence[int], *, nchw: bool = False) -> bool:
    return fused.serves(x, axes, nchw=nchw) and _kernel_pays(x)


def _fused_is_best_transposed(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether to bring the channels to the end and back again, so that the fused kernel serves."""
    last = reshape.channels_last(x.shape.rank, axes)[2]
    elsewhere = list(axes) != list(last) and reshape.known(x, axes) and not _on_gpu()
    return elsewhere and x.dtype in fused.DTYPES and _kernel_pays(x)


def _kernel_pays(x: tf.Tensor) -> bool:
    if compiling_with_xla():
        return False
    if tf.executing_eagerly() or _on_gpu():  # There each operation of the formula has its price.
        return True
    batch = _TYPICAL_BATCH if x.shape[0] is None else x.shape[0]
    size = tf.TensorShape([batch, *x.shape[1:]]).num_elements()
    return size is None or size > SMALL


def _is_joined_to_convolution(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether TensorFlow will make one operation of the convolution that ``x`` is from, and this."""
    if tf.executing_eagerly() or compiling_with_xla() or not fused.serves(x, axes):
        return False
    return x.op.type == "Conv2D" and len(axes) == 1 and not _on_gpu()


def _on_gpu() -> bool:
    """Whether operations run on a GPU here, if they can. Where their inputs are says nothing of it."""
    if not tf.config.list_logical_devices("GPU"):
        return False
    device = _device()
    if not device:  # In a function, which runs where it is traced.
        with tf.init_scope():
            device = _device()
    return "CPU" not in device


def _device() -> str:
    return tf.fill([], 0.0).device


def _by_kernel(
    kernel: Callable[..., tuple[tf.Tensor, Moments, Any]],
    back: Callable[..., tuple[tf.Tensor, ...]],
    second: Callable[..., tuple[tf.Tensor, ...]],
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
) -> tuple[tf.Tensor, Moments]:
    moments: list[Moments] = []

    def forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y, batch, saved = kernel(x, gamma, beta)
        moments.append(batch)
        return y, functools.partial(back, saved)

    return _differentiable(forward, second, x, gamma, beta), moments[0]


def _differentiable(
    forward: Callable[..., tuple[tf.Tensor, Callable[..., Any]]],
    second: Callable[..., Sequence[tf.Tensor]],
    *inputs: tf.Tensor,
) -> tf.Tensor:
    """Runs ``forward``, with the first and second derivative that are given.

    Both are formulas rather than tapes of their own: TensorFlow's forward mode runs them with all
    tapes stopped.

    Args:
        forward: Takes the inputs; returns the output and ``back(dy, *inputs)``, which returns one
            gradient each.
        second: ``second(upstream, dy, *inputs)`` returns the gradients of ``back``'s results, given
            those with respect to them (None where nobody asks), for dy and each input.
        *inputs: Tensors.
    """
    if getattr(_local, "without_gradients", False):
        return forward(*inputs)[0]

    @tf.custom_gradient
    def function(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y, back = forward(*inputs)

        @tf.custom_gradient
        def first(dy: tf.Tensor, *inputs: tf.Tensor) -> tuple[Sequence[tf.Tensor], Callable]:
            own = (dy, *inputs)
            if not tf.executing_eagerly():
                # In the graph of this derivative, which the second one can reach. Around a nested
                # tf.function the inputs may be in one that it cannot.
                own = tuple(tf.identity(tensor) for tensor in own)
            return back(*own), lambda *upstream: second(upstream, *own)

        return y, lambda dy: first(dy, *inputs)

    return function(*inputs)
