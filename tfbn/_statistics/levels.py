"""Which calls of a model's batch normalization layers feed which, and the levels that follow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf


class Call(NamedTuple):
    """What goes into one call of a layer and comes out of it, as tensors of the graph it ran in."""

    inputs: Sequence[tf.Tensor]
    output: tf.Tensor
    nested: bool
    """Whether it ran in a graph inside the traced one: a branch of ``tf.cond``, a loop."""


def levels(calls: Sequence[Call]) -> list[int]:
    """How far along each call is: 0 if no other feeds it, else one more than the highest that does.

    A nested call cannot be followed through the operations around its graph: it counts as fed by
    every call before it and as feeding every call after it.

    Args:
        calls: In the order in which they were traced; each output a tensor of its own.
    """
    numbers = {call.output.ref(): number for number, call in enumerate(calls)}
    found: list[int] = []
    for number, call in enumerate(calls):
        if call.nested:
            feeding = set(range(number))
        else:
            feeding = {earlier for earlier in range(number) if calls[earlier].nested}
            feeding |= _sources(call.inputs, numbers)
        found.append(1 + max((found[earlier] for earlier in feeding), default=-1))
    return found


def _sources(tensors: Sequence[tf.Tensor], numbers: dict[Any, int]) -> set[int]:
    """The nearest of the numbered tensors that these are computed from."""
    found: set[int] = set()
    seen = set()
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        key = tensor.ref()
        if key in seen:
            continue
        seen.add(key)
        if key in numbers:
            found.add(numbers[key])
        else:
            waiting.extend(tensor.op.inputs)
    return found
