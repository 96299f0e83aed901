"""The graph of a model as plain data: calls of layers, and the symbolic tensors between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import keras

from tfbn._shipping.fold.absorb import Weights
from tfbn._shipping.fold.affine import Affine


@dataclass(eq=False)
class Call:
    """One call of a layer, or of an operation such as `keras.ops.add`.

    Attributes:
        operation: What is called.
        args: Positional arguments, nested, with `keras.KerasTensor`s of the graph among them.
        kwargs: Keyword arguments, likewise.
        outputs: What comes out, likewise.
        within: The names of the models that it is inside of, outermost first.
        weights: The weights of a linear layer for this call alone, once something is folded in.
        affine: The map that a batch normalization layer is in inference.
        kept: For a batch normalization layer that has to stay what it is: why.
    """

    operation: Any
    args: Any
    kwargs: dict[str, Any]
    outputs: Any
    within: tuple[str, ...] = ()
    weights: Weights | None = None
    affine: Affine | None = None
    kept: str | None = None
    inputs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = tensors((self.args, self.kwargs))

    @property
    def name(self) -> str:
        return self.operation.name

    @property
    def source(self) -> Any:
        """What a layer of one input works on; a mask may come in beside it."""
        return self.args[0] if self.args else self.kwargs["inputs"]

    def put(self, arguments: Callable[[Any], Any]) -> None:
        """Replaces the tensors that go in."""
        self.args = keras.tree.map_structure(arguments, self.args)
        self.kwargs = keras.tree.map_structure(arguments, self.kwargs)
        self.inputs = tensors((self.args, self.kwargs))

    def __str__(self) -> str:
        return f"'{self.name}' ({type(self.operation).__name__})"


class Graph:
    """The calls of a model in an order in which they can be made.

    Args:
        holder: A Functional model with the inputs that the graph has.
        inputs: The symbolic tensors in the place of those inputs, nested as they are.
        outputs: The outputs, nested.
        calls: The calls.
    """

    def __init__(self, holder: keras.Model, inputs: Any, outputs: Any, calls: Iterable[Call]):
        self.holder = holder
        self.inputs = inputs
        self.outputs = outputs
        self.calls = list(calls)
        self._index()

    def producer(self, tensor: Any) -> Call | None:
        """The call that a tensor comes out of; None for an input of the model."""
        return self._producers.get(id(tensor))

    def consumers(self, tensor: Any) -> list[Call]:
        """The calls that a tensor goes into, each as often as it does."""
        return self._consumers.get(id(tensor), [])

    def is_output(self, tensor: Any) -> bool:
        return any(tensor is output for output in tensors(self.outputs))

    def bypass(self, call: Call) -> None:
        """Takes out a call of one output: what it went into gets its input instead."""
        (old,), new = tensors(call.outputs), call.source
        self.calls.remove(call)
        for consumer in dict.fromkeys(self.consumers(old)):
            consumer.put(lambda x: new if x is old else x)
        self.outputs = keras.tree.map_structure(lambda x: new if x is old else x, self.outputs)
        self._index()

    def _index(self) -> None:
        """Finds who makes and who takes what, and leaves out what nobody takes: masks that served nothing else."""
        needed = {id(tensor) for tensor in tensors(self.outputs)}
        used = []
        for call in reversed(self.calls):
            if any(id(tensor) in needed for tensor in tensors(call.outputs)):
                used.append(call)
                needed |= {id(tensor) for tensor in call.inputs}
        self.calls = used[::-1]
        self._producers = {id(t): call for call in self.calls for t in tensors(call.outputs)}
        self._consumers: dict[int, list[Call]] = {}
        for call in self.calls:
            for tensor in call.inputs:
                self._consumers.setdefault(id(tensor), []).append(call)


def tensors(structure: Any) -> list[Any]:
    """The symbolic tensors in a nested structure, in order."""
    return [x for x in keras.tree.flatten(structure) if isinstance(x, keras.KerasTensor)]
