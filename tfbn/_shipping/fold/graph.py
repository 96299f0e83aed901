"""The graph of a model as plain data: calls of layers, connected by symbolic tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import keras

from tfbn._shipping.fold.absorb import Weights
from tfbn._shipping.fold.affine import Affine, CannotFold


@dataclass(eq=False)
class Call:
    """One call of a layer, or of an operation such as `keras.ops.add`.

    Attributes:
        operation: The layer or operation.
        args: Its positional arguments, nested; some are `keras.KerasTensor`s of the graph.
        kwargs: Its keyword arguments, likewise.
        outputs: Its outputs, likewise.
        within: The names of the models and layers that contain the call, outermost first.
        weights: For a linear layer that absorbed a map: its weights in this call.
        affine: For a batch normalization layer: the map that it computes in inference mode.
        kept_whole: For a custom layer that contains batch normalization: why it was not opened.
        inputs: The symbolic tensors among its arguments.
    """

    operation: Any
    args: Any
    kwargs: dict[str, Any]
    outputs: Any
    within: tuple[str, ...] = ()
    weights: Weights | None = None
    affine: Affine | None = None
    kept_whole: str | None = None
    inputs: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = tensors((self.args, self.kwargs))

    @property
    def name(self) -> str:
        return self.operation.name

    @property
    def source(self) -> Any:
        """The argument that the layer transforms; others are masks or flags."""
        return self.args[0] if self.args else self.kwargs["inputs"]

    @property
    def reason_inside(self) -> str:
        """Why the layers inside this one stay as they are."""
        why = f": {self.kept_whole}" if self.kept_whole else ""
        return f"it is inside {self}, which is kept whole{why}"

    def replace_inputs(self, replacement: Callable[[Any], Any]) -> None:
        """Replaces each argument by what a function returns for it."""
        self.args = keras.tree.map_structure(replacement, self.args)
        self.kwargs = keras.tree.map_structure(replacement, self.kwargs)
        self.inputs = tensors((self.args, self.kwargs))

    def __str__(self) -> str:
        return f"'{self.name}' ({type(self.operation).__name__})"


class Graph:
    """The calls of a model, in an order in which they can be executed.

    Args:
        model: A Functional model with the inputs of the graph.
        inputs: The symbolic tensors that stand for these inputs, with the same structure.
        outputs: The outputs, nested.
        calls: The calls.
    """

    def __init__(self, model: keras.Model, inputs: Any, outputs: Any, calls: Iterable[Call]):
        self.model = model
        self.inputs = inputs
        self.outputs = outputs
        self.calls = list(calls)
        self._index()

    def producer(self, tensor: Any) -> Call | None:
        """Returns the call that produces a tensor; None for an input of the model."""
        return self._producers.get(id(tensor))

    def consumers(self, tensor: Any) -> list[Call]:
        """Returns the calls that take a tensor; a call that takes it twice comes twice."""
        return self._consumers.get(id(tensor), [])

    def only_producer(self, tensor: Any) -> Call:
        """Returns the call that produces a tensor, if one other call takes the tensor and nothing else does.

        Raises:
            CannotFold: Otherwise.
        """
        call = self.producer(tensor)
        if call is None:
            raise CannotFold("its input is an input of the model")
        if self.is_output(tensor):
            raise CannotFold(f"the model also outputs {call}")
        consumers = self.consumers(tensor)
        if len(consumers) > 1:
            raise CannotFold(f"{call} feeds {len(consumers)} layers")
        return call

    def is_output(self, tensor: Any) -> bool:
        """Whether the model outputs the tensor."""
        return any(tensor is output for output in tensors(self.outputs))

    def bypass(self, call: Call) -> None:
        """Removes a call with one output; its consumers take its input instead."""
        new = Substitution(call.outputs, call.source)
        self.calls.remove(call)
        for consumer in dict.fromkeys(self.consumers(call.outputs)):
            consumer.replace_inputs(new)
        self.outputs = keras.tree.map_structure(new, self.outputs)
        self._index()

    def _index(self) -> None:
        """Indexes producers and consumers, and removes calls without effect, as of unused masks."""
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


class Substitution:
    """A function that returns a new symbolic tensor for an old one, and anything else as it is."""

    def __init__(self, old: Any = (), new: Any = ()) -> None:
        self._pairs: dict[int, tuple[Any, Any]] = {}
        self.add(old, new)

    def add(self, old: Any, new: Any) -> None:
        """Pairs the tensors of two nested structures."""
        for pair in zip(tensors(old), tensors(new), strict=True):
            self._pairs[id(pair[0])] = pair  # Holds the old tensor, so that its id stays unique.

    def __call__(self, x: Any) -> Any:
        return self._pairs.get(id(x), (x, x))[1]


def tensors(structure: Any) -> list[Any]:
    """Returns the symbolic tensors in a nested structure, in order."""
    return [x for x in keras.tree.flatten(structure) if isinstance(x, keras.KerasTensor)]
