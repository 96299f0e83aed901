"""The calls of a model's layers while it runs or is traced: stepping in between, and what feeds what."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfbn._normalize import without_gradients


@contextlib.contextmanager
def calls_replaced(
    replacements: Iterable[tuple[keras.layers.Layer, Callable[..., Any]]],
) -> Iterator[None]:
    """While open, each of these layers runs the given function in place of its own ``call``.

    Keras looks ``layer.call`` up on the instance, so this holds wherever the layer is: in a
    Functional, Sequential or subclassed model, in a wrapper, shared by several parents. Functions
    that were compiled before keep what they were traced with. Blocks nest.
    """
    before = []
    try:
        for layer, call in replacements:
            before.append((layer, vars(layer).get("call")))
            layer.call = call
        yield
    finally:
        for layer, call in reversed(before):
            if call is None:
                del layer.call
            else:
                layer.call = call


@contextlib.contextmanager
def traced_apart() -> Iterator[None]:
    """While open, a model can be traced into a function of one's own that leaves no trace in the model.

    A ``tf.function`` inside the one that is being traced becomes a part of its graph: left alone, it
    would run what it was traced with before, and it would keep, for its owner to run later, what it is
    traced with now. Functions to be traced here need ``get_concrete_function``. Nor do our layers leave
    gradients behind, which TensorFlow would keep.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with without_gradients():
            yield
    finally:
        tf.config.run_functions_eagerly(before)


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
