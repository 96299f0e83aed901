"""Gradients that several parts of the examples have a share in: batches of a group, replicas of a strategy."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from tfbn import _replicas
from tfbn._optimizers import innermost

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices | None

# Keras's optimizers sum the gradients over replicas only after they have clipped them and looked for
# overflows, in each replica's share; and there is no public way to hand them the sum. So for as long as
# a step is traced, this private method is replaced.
_SUM = "_all_reduce_sum_gradients"


def over_replicas(gradients: Sequence[Gradient]) -> list[Gradient]:
    """The sum over all replicas, in one all-reduce; `None` stays where nothing depends on a variable."""
    if _replicas.number() == 1 or all(gradient is None for gradient in gradients):
        return list(gradients)
    known = [tf.convert_to_tensor(gradient) for gradient in gradients if gradient is not None]
    sums = iter(_replicas.summed(known))
    return [None if gradient is None else next(sums) for gradient in gradients]


def apply(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Gradient],
    variables: Sequence[keras.Variable],
) -> None:
    """A step of the optimizer with the gradients over all replicas; traced inside of `summed_before`."""
    if not hasattr(innermost(optimizer), _SUM):
        # Then it will sum them again.
        share = 1 / _replicas.number()
        gradients = [None if g is None else g * tf.cast(share, g.dtype) for g in gradients]
    optimizer.apply(gradients, variables)


@contextlib.contextmanager
def summed_before(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """What is traced here hands the optimizer gradients that are summed over the replicas already."""
    inner = innermost(optimizer)
    if not hasattr(inner, _SUM):
        yield
        return
    setattr(inner, _SUM, list)
    try:
        yield
    finally:
        delattr(inner, _SUM)
