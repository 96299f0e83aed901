"""From a model to its graph: nested models are laid out flat, and layers made of layers are opened.

Nothing is called for real: the layers of the model see no call, so that `layer.output` stays what it is.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import keras

from tfbn._models.functional import (
    functional_of,
    input_like,
    is_custom,
    is_functional,
    key_names,
    seen_inputs,
    without_compilation,
)
from tfbn._models.rebuild import Copies
from tfbn._models.walk import CLASSES, batch_norm_layers, children, walk
from tfbn._shipping.fold.graph import Call, Graph, tensors
from tfbn._support.checks import first_line


def traced(model: keras.Model) -> Graph:
    """The graph of a model in calls of its own layers.

    Nested models are laid out flat. So are layers of the user's own with batch normalization inside,
    where their `call` can be followed with symbolic tensors; otherwise they stay whole.

    Raises:
        ValueError: if the model is not built, or is a subclassed one whose `call` cannot be followed.
    """
    return _Tracer(model).graph(model)


class _Tracer:
    def __init__(self, model: keras.layers.Layer) -> None:
        self._copies = Copies(model, {})

    def graph(self, model: keras.Model) -> Graph:
        graph = _graph_of(self._functional(model))
        calls: list[Call] = []
        replaced: dict[int, Any] = {}

        now = partial(_given, replaced)
        originals = self._copies.originals
        for call in graph.calls:
            call.operation = originals.get(id(call.operation), call.operation)
            call.put(now)
            inner = self._inside(call)
            if inner is None:
                calls.append(call)
                continue
            given = dict(zip(map(id, tensors(inner.inputs)), tensors(call.args), strict=True))
            for inner_call in inner.calls:
                inner_call.put(partial(_given, given))
                inner_call.within = (call.name, *inner_call.within)
            made = [_given(given, x) for x in tensors(inner.outputs)]
            replaced |= dict(zip(map(id, tensors(call.outputs)), made, strict=True))
            calls += inner.calls
        outputs = keras.tree.map_structure(now, graph.outputs)
        return Graph(graph.holder, graph.inputs, outputs, calls)

    def _functional(self, model: keras.Model) -> keras.Model:
        if is_functional(model):
            return model
        if not model.built:
            raise ValueError(
                "The model is not built, hence has no shapes yet. Call it on an example, or give it an "
                f"Input. Received: model '{model.name}' of class {type(model).__name__}."
            )
        if isinstance(model, keras.Sequential):
            return functional_of(model)
        inputs = _inputs_of(model)
        try:
            return self._followed(model, [inputs])
        except Exception as error:  # `call` is the user's own code.
            raise ValueError(
                f"The graph of the model '{model.name}' of class {type(model).__name__} cannot be seen: "
                "its `call` does not work on symbolic tensors. "
                f"Received: {first_line(error)} "
                "Use layers and keras.ops in `call`, with one argument for the inputs, or build a "
                "Functional model."
            ) from error

    def _inside(self, call: Call) -> Graph | None:
        """The graph inside a called layer, or None if the layer is to stay whole."""
        layer = call.operation
        if not isinstance(layer, keras.layers.Layer) or isinstance(layer, CLASSES):
            return None
        known = is_functional(layer) or isinstance(layer, keras.Sequential)
        own = is_custom(layer) and batch_norm_layers(layer)
        if not (known or own) or set(call.kwargs) - {"training", "mask"}:
            return None
        if call.kwargs.get("training") or (own and call.kwargs.get("mask") is not None):
            return None
        try:
            if known:
                graph = self.graph(layer)
            else:
                inputs = keras.tree.map_structure(_input_like, list(call.args))
                graph = self.graph(self._followed(layer, inputs))
        except Exception:  # Whatever the user's code raises on symbolic tensors.
            return None
        return graph if _fits(graph, call) else None

    def _followed(self, layer: keras.layers.Layer, args: list[Any]) -> keras.Model:
        """The way through the `call` of a layer as a Functional model of copies of what it calls."""
        inside = {id(weight) for child in children(layer) for weight in child.weights}
        if any(id(weight) not in inside for weight in layer.weights):
            raise ValueError("it has weights of its own")
        copy = self._copies.copy_and_build(layer)
        inference = {"training": False} if "training" in signature(copy.call).parameters else {}
        inputs = args[0] if len(args) == 1 else args
        model = keras.Model(inputs, copy.call(*args, **inference))
        known = self._copies.originals
        if any(layer.weights and id(layer) not in known for layer in model.layers):
            raise ValueError("it makes layers as it is called")
        return model


def _inputs_of(model: keras.Model) -> Any:
    """New inputs for a subclassed model; Keras wants those in a dict to have the names of their keys."""
    seen = seen_inputs(model)
    flat = keras.tree.flatten(seen)
    taken = {layer.name for layer in walk(model, set())}
    keys = [None if key in taken else key for key in key_names(seen)]
    inputs = [
        keras.Input(batch_shape=tensor.shape, name=key)
        for tensor, key in zip(flat, keys or [None] * len(flat), strict=True)
    ]
    return keras.tree.pack_sequence_as(seen, inputs)


def _given(values: dict[int, Any], x: Any) -> Any:
    return values.get(id(x), x)


class _Recorder(keras.Operation):
    """Stands in the graph for a layer, and knows the shapes that come out of it."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self._operation = operation

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return self._operation.compute_output_spec(*args, **kwargs)


def _graph_of(model: keras.Model) -> Graph:
    """The graph of a Functional model, nested models as they are."""
    calls = []

    def record(operation: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = _Recorder(operation)(*args, **kwargs)
        calls.append(Call(operation, args, kwargs, outputs))
        return outputs

    inputs = keras.tree.map_structure(lambda x: input_like(model, x), model.input)
    with without_compilation(model):
        walked = keras.models.clone_model(
            model, input_tensors=inputs, clone_function=lambda layer: layer, call_function=record
        )
    return Graph(model, inputs, walked.output, calls)


def _input_like(tensor: Any) -> Any:
    if not isinstance(tensor, keras.KerasTensor):
        return tensor
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse)


def _fits(graph: Graph, call: Call) -> bool:
    """Whether the layers inside get by themselves what they would get by a call of the whole.

    A call converts its inputs to the types that it wants. Every layer does so too, an operation does not.
    """
    given, wanted = tensors(call.args), tensors(graph.inputs)
    if [len(tensor.shape) for tensor in given] != [len(tensor.shape) for tensor in wanted]:
        return False
    custom = is_custom(call.operation)
    for outside, inside in zip(given, wanted, strict=True):
        dtype = call.operation.compute_dtype if custom else inside.dtype
        takers = [consumer.operation for consumer in graph.consumers(inside)]
        converted = "float" in dtype and all(getattr(taker, "autocast", False) for taker in takers)
        if outside.dtype != dtype and (not converted or graph.is_output(inside)):
            return False
    return True
