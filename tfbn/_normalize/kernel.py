"""What a kernel is asked to do, and the methods that kernels have."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import tensorflow as tf

from tfbn._moments.moments import Moments

Gradients = tuple[tf.Tensor, tf.Tensor, tf.Tensor]
"""With respect to x, gamma and beta. Over replicas, those of gamma and beta are this replica's share."""


class Normalization(NamedTuple):
    """What is normalized over what.

    Attributes:
        axes: The channel axes, ascending and non-negative. All other axes are reduced.
        epsilon: Added to the variance.
        mask: ``None``, or a boolean tensor of the rank of x that broadcasts to x. Only positions where it
            is True count in the statistics.
        synchronized: Whether the statistics are those of all replicas of a `tf.distribute` strategy.
    """

    axes: Sequence[int]
    epsilon: float
    mask: tf.Tensor | None = None
    synchronized: bool = False


class TrainingKernel(Protocol):
    """Batch normalization by the batch's own moments, with a gradient written by hand.

    Kernels take gamma, beta, means and variances in the dtype of the statistics, with the shape of the
    channel axes of x.
    """

    def forward(
        self, x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Moments, Any]:
        """Normalizes x by its own moments. Returns the output, the moments, and what to save."""

    def backward(self, saved: Any, dy: tf.Tensor, x: tf.Tensor, gamma: tf.Tensor) -> Gradients:
        """The gradients of `forward`."""


class InferenceKernel(Protocol):
    """Batch normalization by given statistics, with a gradient written by hand."""

    def inference(
        self,
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
        beta: tf.Tensor,
    ) -> tf.Tensor:
        """Normalizes x by the given statistics."""

    def inference_backward(
        self,
        dy: tf.Tensor,
        x: tf.Tensor,
        mean: tf.Tensor,
        variance: tf.Tensor,
        gamma: tf.Tensor,
    ) -> Gradients:
        """The gradients of `inference`, with the statistics held constant."""


Train: TypeAlias = Callable[
    [tf.Tensor, tf.Tensor, tf.Tensor, Normalization], tuple[tf.Tensor, Moments]
]
"""From x, gamma, beta and what is normalized over what, to the output and the moments of the batch."""
Infer: TypeAlias = Callable[
    [tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, Normalization], tf.Tensor
]
"""From x, mean, variance, gamma, beta and what is normalized over what, to the output."""
