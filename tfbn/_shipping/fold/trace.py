"""Tracing a model into a graph without nested models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from inspect import signature
from types import FunctionType
from typing import Any

import keras

from tfbn._models.functional import (
    functional_of,
    input_like,
    is_custom,
    is_functional,
    key_names,
    seen_inputs,
)
from tfbn._models.walk import BATCH_NORM_CLASSES, batch_norm_layers, children, walk
from tfbn._shipping.fold.graph import Call, Graph, Substitution, tensors
from tfbn._support.checks import first_line
from tfbn._support.keras_internals import calls_forgotten


class TraceError(ValueError):
    """Raised for a model whose graph cannot be traced."""


def trace(model: keras.Model) -> Graph:
    """Returns the graph of a model, as calls of its own layers.

    Nested models are flattened. So are custom layers that contain batch normalization if their `call` works on
    symbolic tensors; others are kept whole.

    Raises:
        ValueError: If the model is not built.
        TraceError: If it is a subclassed model whose `call` does not work on symbolic tensors.
    """
    require_built(model)
    with _attributes_restored(walk(model)), calls_forgotten(walk(model)):
        if _has_graph(model):
            return _flat_graph(model)
        try:
            inputs = _inputs_of(model)
            return _flat_graph_of_call(model, [inputs], inputs)
        except Exception as error:  # `call` is user code, which can raise anything.
            raise TraceError(
                f"Cannot trace the model '{model.name}' of class {type(model).__name__}: its `call` "
                f"does not work on symbolic tensors. Received: {first_line(error)} "
                "In `call`, use only layers and keras.ops, and one argument for all inputs; or build a "
                "Functional model."
            ) from error


def require_built(model: keras.Model) -> None:
    """Raises `ValueError` if a model is not built."""
    if not model.built:
        raise ValueError(
            "The model is not built, so its shapes are unknown. Call it on an example, or give it an "
            f"Input. Received: model '{model.name}' of class {type(model).__name__}."
        )


@contextlib.contextmanager
def _attributes_restored(layers: Iterable[keras.layers.Layer]) -> Iterator[None]:
    """Restores on exit what calls on symbolic tensors have stored in attributes of these layers."""
    before = [(vars(layer), dict(vars(layer))) for layer in layers]
    try:
        yield
    finally:
        for attributes, values in before:
            for name in set(attributes) - set(values):
                del attributes[name]
            attributes.update(values)


def _has_graph(layer: Any) -> bool:
    """Whether a layer is a Functional or Sequential model that computes what its graph says."""
    if not isinstance(layer, keras.Sequential) and not is_functional(layer):
        return False
    defines_call = next(kind for kind in type(layer).__mro__ if "call" in vars(kind))
    return defines_call.__module__.startswith("keras.")


def _flat_graph(model: keras.Model) -> Graph:
    """Returns the graph of a Functional or Sequential model, with nested models flattened."""
    graph = _graph_of(functional_of(model) if isinstance(model, keras.Sequential) else model)
    calls: list[Call] = []
    outer = Substitution()
    for call in graph.calls:
        call.replace_inputs(outer)
        inside = _inside(call)
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


def _inside(call: Call) -> Graph | None:
    """Returns the graph inside a called layer, or None if the layer is kept whole.

    Sets `call.kept_whole` to the reason if the layer contains batch normalization.
    """
    layer = call.operation
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, BATCH_NORM_CLASSES):
        return None
    has_graph = _has_graph(layer)
    if not has_graph and not (is_custom(layer) and batch_norm_layers(layer)):
        return None
    masked = not has_graph and call.kwargs.get("mask") is not None
    if call.kwargs.get("training") or masked or set(call.kwargs) - {"training", "mask"}:
        arguments = sorted(name for name, value in call.kwargs.items() if value is not None)
        call.kept_whole = f"it is called with {', '.join(arguments)}"
        return None
    try:
        if has_graph:
            graph = _flat_graph(layer)
        else:
            args = keras.tree.map_structure(_input_like, list(call.args))
            graph = _flat_graph_of_call(layer, args, tensors(args))
    except Exception as error:  # `call` is user code, which can raise anything on symbolic tensors.
        call.kept_whole = first_line(error).partition(". ")[0]
        return None
    if not _casts_alike(graph, call):
        call.kept_whole = "it casts its inputs"
        return None
    return graph


def _flat_graph_of_call(layer: keras.layers.Layer, args: list[Any], inputs: Any) -> Graph:
    """Traces the `call` of a layer, and returns its graph with nested models flattened.

    Args:
        layer: A layer or model.
        args: What to call it with.
        inputs: The symbolic tensors among the arguments, nested as the inputs of the graph are to be.
    """
    inside = {id(weight) for child in children(layer) for weight in child.weights}
    if any(id(weight) not in inside for weight in layer.weights):
        raise ValueError("it has weights of its own")
    inference = {"training": False} if "training" in signature(layer.call).parameters else {}
    with keras.StatelessScope():  # Drops what the call assigns to variables.
        outputs = layer.call(*args, **inference)
    known = {id(inner) for inner in walk(layer)}
    model = keras.Model(inputs, outputs)
    if any(inner.weights and id(inner) not in known for inner in model.layers):
        raise ValueError("it creates layers in its call")
    graph = _flat_graph(model)
    if any(
        map(_takes_functions, graph.calls)
    ):  # They may use tensors that are not among its inputs.
        raise ValueError("it has a branch or a loop, such as `keras.ops.cond`")
    return graph


def _takes_functions(call: Call) -> bool:
    """Whether an operation, which is not a layer, runs functions."""
    if isinstance(call.operation, keras.Layer):
        return False
    held = [call.args, call.kwargs, list(vars(call.operation).values())]
    return any(isinstance(value, FunctionType) for value in keras.tree.flatten(held))


def _inputs_of(model: keras.Model) -> Any:
    """Returns new inputs for a model whose class defines `call`."""
    if isinstance(model, keras.Sequential):
        model = functional_of(model)
    if is_functional(model):
        return keras.tree.map_structure(lambda x: input_like(model, x), model.input)
    seen = seen_inputs(model)
    flat = keras.tree.flatten(seen)
    taken = {layer.name for layer in walk(model)}
    # Keras requires inputs in a dict to be named after their keys.
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
        if isinstance(operation, keras.layers.Layer) and not _takes_training(operation):
            kwargs.pop("training", None)  # Keras drops it, too, when it calls the layer.
        outputs = _Recorder(operation)(*args, **kwargs)
        calls.append(Call(operation, args, kwargs, outputs))
        return outputs

    inputs = keras.tree.map_structure(lambda x: input_like(model, x), model.input)
    # Keras clones a model by its class's constructor.
    plain = keras.Model(model.input, model.output)
    walked = keras.models.clone_model(
        plain, input_tensors=inputs, clone_function=lambda layer: layer, call_function=record
    )
    return Graph(model, inputs, walked.output, calls)


def _input_like(tensor: Any) -> Any:
    if not isinstance(tensor, keras.KerasTensor):
        return tensor
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse)


def _takes_training(layer: keras.layers.Layer) -> bool:
    parameters = signature(layer.call).parameters
    return "training" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


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
