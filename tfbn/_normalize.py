"""(x, gamma, beta) → y, with the right gradients of every order: the one place that chooses the kernel.

The choice is made while the graph is traced, from what is known then:

====================================================================  ========================
case                                                                  kernel
====================================================================  ========================
float32, float16, bfloat16; channels last; no mask; not under XLA     fused (``_fused.py``)
everything else: XLA, float64, masks, channels first, virtual batches  formula (``_formula.py``)
====================================================================  ========================

The first derivative is the kernel's own or written by hand. Derivatives of derivatives are those of
the plain formula, by automatic differentiation: the fused kernel's own second derivative is neither
complete nor needed often.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfbn import _formula, _fused, _xla
from tfbn._moments import Moments, reduced_axes


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    *,
    axes: Sequence[int],
    epsilon: float,
    mask: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Moments]:
    """Normalizes ``x`` by the mean and biased variance of this batch, per channel.

    Args:
        x: Floating-point tensor of known rank.
        gamma: Scale, in the dtype of the statistics, shaped like the channel axes of ``x``.
        beta: Offset, likewise.
        axes: The channel axes, ascending and non-negative.
        epsilon: Added to the variance.
        mask: Boolean tensor of the rank of ``x`` that broadcasts to it: the values that count.

    Returns:
        The output in the dtype of ``x``, differentiable in ``x``, ``gamma`` and ``beta``; and the
        batch's moments, for bookkeeping: they carry no gradient.
    """
    if _interleaved(x, axes):
        to_last, back_again, last = _channels_last(x.shape.rank, axes)
        y, batch = normalize_batch(
            tf.transpose(x, to_last),
            gamma,
            beta,
            axes=last,
            epsilon=epsilon,
            mask=None if mask is None else tf.transpose(mask, to_last),
        )
        return tf.transpose(y, back_again), batch
    run: Callable[..., tuple[tf.Tensor, Moments, Any]]
    back: Callable[..., tuple[tf.Tensor, ...]]
    if mask is None and _fused.serves(x, axes) and not _xla.compiling():
        run = functools.partial(_fused.forward, axes=axes, epsilon=epsilon, on_gpu=_on_gpu(x))
        back = functools.partial(_fused.backward, epsilon=epsilon)
    else:
        run = functools.partial(_formula.forward, axes=axes, epsilon=epsilon, mask=mask)
        back = functools.partial(_formula.backward, axes=axes, epsilon=epsilon, mask=mask)
    moments: list[Moments] = []

    def forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y, batch, saved = run(x, gamma, beta)
        moments.append(Moments(*map(tf.stop_gradient, batch)))
        return y, lambda dy, x, gamma, beta: back(dy, x, gamma, saved)

    plain = functools.partial(_formula.plain, axes=axes, epsilon=epsilon, mask=mask)
    return _differentiable(forward, plain, x, gamma, beta), moments[0]


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
    if _interleaved(x, axes):
        to_last, back_again, last = _channels_last(x.shape.rank, axes)
        y = normalize(
            tf.transpose(x, to_last), mean, variance, gamma, beta, axes=last, epsilon=epsilon
        )
        return tf.transpose(y, back_again)
    plain = functools.partial(_formula.inference, axes=axes, epsilon=epsilon)
    if not _fused.serves(x, axes) or _xla.compiling():
        return plain(x, mean, variance, gamma, beta)

    def forward(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        def back(
            dy: tf.Tensor,
            x: tf.Tensor,
            mean: tf.Tensor,
            variance: tf.Tensor,
            gamma: tf.Tensor,
            beta: tf.Tensor,
        ) -> tuple[tf.Tensor, ...]:
            dx, dgamma, dbeta = _fused.inference_backward(
                dy, x, mean, variance, gamma, epsilon=epsilon
            )
            s = tf.math.rsqrt(variance + epsilon)
            return dx, -gamma * s * dbeta, -0.5 * gamma * tf.square(s) * dgamma, dgamma, dbeta

        return _fused.inference(*inputs, epsilon=epsilon), back

    return _differentiable(forward, plain, x, mean, variance, gamma, beta)


def _interleaved(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether per-channel values cannot be broadcast against ``x`` as it stands.

    TensorFlow's kernels broadcast over at most 5 alternating runs of axes; a list of axes can make more.
    """
    channel = [axis in axes for axis in range(x.shape.rank)]
    return 1 + sum(a != b for a, b in itertools.pairwise(channel)) > 5


def _channels_last(rank: int, axes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The permutation that brings the channel axes to the end, its inverse, and where they are then."""
    to_last = [*reduced_axes(rank, axes), *axes]
    back_again = [to_last.index(axis) for axis in range(rank)]
    return to_last, back_again, list(range(rank - len(axes), rank))


def _on_gpu(x: tf.Tensor) -> bool:
    """Where ``x`` will be: its device, or, while a graph has placed nothing yet, the best there is."""
    return "GPU" in x.device if x.device else bool(tf.config.list_logical_devices("GPU"))


def _differentiable(
    forward: Callable[..., tuple[tf.Tensor, Callable[..., Any]]],
    plain: Callable[..., tf.Tensor],
    *inputs: tf.Tensor,
) -> tf.Tensor:
    """Runs ``forward``, whose gradient is the one it returns and whose higher derivatives are those of ``plain``.

    Args:
        forward: Takes the inputs; returns the output and ``back(dy, *inputs)``, which returns one
            gradient each.
        plain: The same function of the inputs, in operations that TensorFlow differentiates.
        *inputs: Tensors.
    """

    @tf.custom_gradient
    def function(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        y, back = forward(*inputs)

        @tf.custom_gradient
        def first(dy: tf.Tensor, *inputs: tf.Tensor) -> tuple[Sequence[tf.Tensor], Callable]:
            def second(*upstream: tf.Tensor) -> Sequence[tf.Tensor]:
                with tf.GradientTape() as outer:
                    outer.watch([dy, *inputs])
                    with tf.GradientTape() as inner:
                        inner.watch(inputs)
                        y = plain(*inputs)
                    gradients = inner.gradient(y, inputs, output_gradients=dy)
                return outer.gradient(
                    gradients,
                    [dy, *inputs],
                    output_gradients=upstream,
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )

            return back(dy, *inputs), second

        return y, lambda dy: first(dy, *inputs)

    return function(*inputs)
