"""Tracing a model into a graph without nested models.

The layers of the model are not called, so that their recorded calls (`layer.output`) do not change.
"""

from __future__ import annotations

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
from tfbn._shipping.fold.graph import Call, Graph, Substitution, tensors
from tfbn._support.checks import first_line


def trace(model: keras.Model) -> Graph:
    """Returns the graph of a model, as calls of its own layers.

    Nested models are flattened. So are custom layers that contain batch normalization if their `call` works on
    symbolic tensors; others are kept whole.

    Raises:
        ValueError: If the model is not built, or is a subclassed model whose `call` cannot be traced.
    """
    return _Tracer(model).graph(model)


class _Tracer:
    def __init__(self, model: keras.layers.Layer) -> None:
        self._copies = Copies(model, {})

    def graph(self, model: keras.Model) -> Graph:
        graph = _graph_of(self._functional(model))
        originals = self._copies.originals
        calls: list[Call] = []
        outer = Substitution()
        for call in graph.calls:
            call.operation = originals.get(id(call.operation), call.operation)
            call.replace_inputs(outer)
            inside = self._inside(call)
            if inside is None:
                calls.append(call)
                continue
            inner = Substitution(inside.inputs, call.args)
            for inner_call in inside.calls:
                inner_call.replace_inputs(inner)
                inner_call.within = (call.name, *inner_call.within)
            outer.add(call.outputs, keras.tree.map_structure(inner, inside.outputs))
            calls += inside.calls
        outputs = keras.tree.map_structure(outer, graph.outputs)
        return Graph(graph.model, graph.inputs, outputs, calls)

    def _functional(self, model: keras.Model) -> keras.Model:
        if is_functional(model):
            return model
        if not model.built:
            raise ValueError(
                "The model is not built, so its shapes are unknown. Call it on an example, or give it an "
                f"Input. Received: model '{model.name}' of class {type(model).__name__}."
            )
        if isinstance(model, keras.Sequential):
            return functional_of(model)
        inputs = _inputs_of(model)
        try:
            return self._trace_call(model, [inputs])
        except Exception as error:  # `call` is user code, which can raise anything.
            raise ValueError(
                f"Cannot trace the model '{model.name}' of class {type(model).__name__}: its `call` "
                f"does not work on symbolic tensors. Received: {first_line(error)} "
                "In `call`, use only layers and keras.ops, and one argument for all inputs; or build a "
                "Functional model."
            ) from error

    def _inside(self, call: Call) -> Graph | None:
        """Returns the graph inside a called layer, or None if the layer is to be kept whole."""
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
                graph = self.graph(self._trace_call(layer, inputs))
        except Exception:  # `call` is user code, which can raise anything on symbolic tensors.
            return None
        return graph if _casts_alike(graph, call) else None

    def _trace_call(self, layer: keras.layers.Layer, args: list[Any]) -> keras.Model:
        """Returns the `call` of a layer as a Functional model, made of copies of the layers that it calls."""
        inside = {id(weight) for child in children(layer) for weight in child.weights}
        if any(id(weight) not in inside for weight in layer.weights):
            raise ValueError("it has weights of its own")
        copy = self._copies.copy_and_build(layer)
        inference = {"training": False} if "training" in signature(copy.call).parameters else {}
        inputs = args[0] if len(args) == 1 else args
        model = keras.Model(inputs, copy.call(*args, **inference))
        known = self._copies.originals
        if any(layer.weights and id(layer) not in known for layer in model.layers):
            raise ValueError("it creates layers in its call")
        return model


def _inputs_of(model: keras.Model) -> Any:
    """Returns new inputs for a subclassed model. Keras requires inputs in a dict to be named after their keys."""
    seen = seen_inputs(model)
    flat = keras.tree.flatten(seen)
    taken = {layer.name for layer in walk(model, set())}
    keys = [None if key in taken else key for key in key_names(seen)]
    inputs = [
        keras.Input(batch_shape=tensor.shape, name=key)
        for tensor, key in zip(flat, keys or [None] * len(flat), strict=True)
    ]
    return keras.tree.pack_sequence_as(seen, inputs)


class _Recorder(keras.Operation):
    """Stands for a layer in the traced graph: it computes the output shapes without calling the layer."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self._operation = operation

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return self._operation.compute_output_spec(*args, **kwargs)


def _graph_of(model: keras.Model) -> Graph:
    """Returns the graph of a Functional model, with nested models as single calls."""
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


def _casts_alike(graph: Graph, call: Call) -> bool:
    """Whether the layers inside cast their inputs as the call of the whole layer does.

    A call casts its inputs to the compute dtype of the layer. A layer inside does so itself, an operation does
    not.
    """
    given, wanted = tensors(call.args), tensors(graph.inputs)
    if [len(tensor.shape) for tensor in given] != [len(tensor.shape) for tensor in wanted]:
        return False
    custom = is_custom(call.operation)
    for outside, inside in zip(given, wanted, strict=True):
        dtype = call.operation.compute_dtype if custom else inside.dtype
        consumers = [consumer.operation for consumer in graph.consumers(inside)]
        cast = "float" in dtype and all(getattr(layer, "autocast", False) for layer in consumers)
        if outside.dtype != dtype and (not cast or graph.is_output(inside)):
            return False
    return True
