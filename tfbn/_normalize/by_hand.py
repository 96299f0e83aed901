"""Kernels with gradients written by hand, made differentiable to any order."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfbn._moments.moments import Moments
from tfbn._normalize import second_order
from tfbn._normalize.kernel import Infer, InferenceKernel, Normalization, Train, TrainingKernel

_local = threading.local()


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """While open, what this thread traces cannot be differentiated, and its graph can be freed.

    TensorFlow registers the gradient of every `tf.custom_gradient` in a graph, and so keeps the graph alive
    for as long as the process runs: 13 MB for each trace of a ResNet-20. TensorFlow's own all-reduce has a
    custom gradient too, so a trace with synchronized layers on several replicas is kept all the same.

    The threads that `strategy.run` of a `tf.distribute.MirroredStrategy` starts must open it themselves.
    """
    before = getattr(_local, "without_gradients", False)
    _local.without_gradients = True
    try:
        yield
    finally:
        _local.without_gradients = before


def trained_by(kernel: Callable[[Normalization], TrainingKernel]) -> Train:
    """Training by a kernel whose first derivative is its own; higher ones are the formula's.

    The higher derivatives are formulas: TensorFlow's forward mode pauses all tapes, so a tape that was opened
    here would record nothing. The fused kernel's own second derivative is incomplete, and rarely needed.
    """

    def train(
        x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, over: Normalization
    ) -> tuple[tf.Tensor, Moments]:
        own = kernel(over)
        moments: list[Moments] = []

        def forward(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            y, batch, saved = own.forward(*inputs)
            moments.append(batch)
            return y, lambda dy, x, gamma, beta: own.backward(saved, dy, x, gamma)

        second = functools.partial(second_order.training, over=over)
        return _differentiable(forward, second, x, gamma, beta), moments[0]

    return train


def inferred_by(kernel: Callable[[Normalization], InferenceKernel]) -> Infer:
    """Inference by a kernel whose first derivative is its own; higher ones are the formula's."""

    def infer(
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
        beta: tf.Tensor,
        over: Normalization,
    ) -> tf.Tensor:
        own = kernel(over)

        def backward(
            dy: tf.Tensor,
            x: tf.Tensor,
            mean: tf.Tensor,
            variance: tf.Tensor,
            gamma: tf.Tensor,
            beta: tf.Tensor,
        ) -> Sequence[tf.Tensor]:
            dx, dgamma, dbeta = own.inference_backward(dy, x, mean, variance, gamma)
            s = tf.math.rsqrt(variance + over.epsilon)
            return dx, -gamma * s * dbeta, -0.5 * gamma * tf.square(s) * dgamma, dgamma, dbeta

        def forward(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
            return own.inference(*inputs), backward

        second = functools.partial(second_order.inference, over=over)
        return _differentiable(forward, second, x, mean, variance, gamma, beta)

    return infer


def _differentiable(
    forward: Callable[..., tuple[tf.Tensor, Callable[..., Any]]],
    second: Callable[..., Sequence[tf.Tensor]],
    *inputs: tf.Tensor,
) -> tf.Tensor:
    """Runs ``forward`` with the given first and second derivative.

    Args:
        forward: Takes the inputs. Returns the output and ``back(dy, *inputs)``, which returns the gradient
            of each input.
        second: ``second(upstream, dy, *inputs)`` returns the gradients of ``back``'s results with respect to
            dy and each input. ``upstream`` holds the gradients with respect to these results, None where
            there is none.
        *inputs: Tensors.
    """
    if getattr(_local, "without_gradients", False):
        return forward(*inputs)[0]

    with _running((forward, second)):
        return _function(*inputs)


@contextlib.contextmanager
def _running(functions: tuple[Callable, Callable]) -> Iterator[None]:
    """Hands functions to the two below. To decorate new ones for each call would take 0.1 ms eagerly."""
    before = getattr(_local, "functions", None)
    _local.functions = functions
    try:
        yield
    finally:
        _local.functions = before


@tf.custom_gradient
def _function(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    forward, second = _local.functions
    y, back = forward(*inputs)

    def gradient(dy: tf.Tensor) -> Sequence[tf.Tensor]:
        with _running((back, second)):
            return _first_derivative(dy, *inputs)

    return y, gradient


@tf.custom_gradient
def _first_derivative(dy: tf.Tensor, *inputs: tf.Tensor) -> tuple[Sequence[tf.Tensor], Callable]:
    back, second = _local.functions
    own = (dy, *inputs)
    if not tf.executing_eagerly():
        # Copies in the graph of this derivative, which the second one can reach. Around a nested
        # tf.function, the inputs may be in a graph that it cannot.
        own = tuple(tf.identity(tensor) for tensor in own)
    return back(*own), lambda *upstream: second(upstream, *own)
