"""Finding the linear layer that each batch normalization can be fused with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import keras

from tfbn._models.walk import BatchNormLayer, batch_norm_layers
from tfbn._shipping.fold.absorb import LINEAR, channel_axis, linear_reason, weights_of
from tfbn._shipping.fold.affine import CannotFold, of_batch_norm
from tfbn._shipping.fold.graph import Call, Graph
from tfbn._shipping.fold.search import batch_norm_of, inference_reason, is_timed
from tfbn._shipping.fuse.report import Outcome


class Found(NamedTuple):
    """What is to become of a batch normalization layer.

    Attributes:
        norm: The layer.
        within: The names of the models and layers that contain it, outermost first.
        outcome: What is to become of it.
        linear: The layer to fuse it with, or None.
        reason: Why it cannot be fused, or None.
    """

    norm: BatchNormLayer
    within: tuple[str, ...]
    outcome: Outcome
    linear: keras.layers.Layer | None = None
    reason: str | None = None


def search(graph: Graph) -> list[Found]:
    """Finds what is to become of each batch normalization layer of a graph, each once. Changes nothing."""
    found: dict[int, Found] = {}
    for call in graph.calls:
        norm = batch_norm_of(call)
        if norm is not None:
            found.setdefault(id(norm), _search_one(graph, norm, call.within))
        elif isinstance(call.operation, keras.layers.Layer):
            within = (*call.within, call.name)
            for inner in batch_norm_layers(call.operation):
                row = Found(inner, within, Outcome.FROZEN, reason=call.reason_inside)
                found.setdefault(id(inner), row)
    return list(found.values())


def _search_one(graph: Graph, norm: BatchNormLayer, within: tuple[str, ...]) -> Found:
    calls = _calls_of(graph, norm)
    for reason in filter(None, map(inference_reason, calls)):
        return Found(norm, within, Outcome.UNCHANGED, reason=reason)
    try:
        return Found(norm, within, Outcome.FUSED, linear=_linear(graph, norm, calls))
    except CannotFold as reason:
        return Found(norm, within, Outcome.FROZEN, reason=str(reason))


def _linear(graph: Graph, norm: BatchNormLayer, calls: Iterable[Call]) -> keras.layers.Layer:
    """Returns the linear layer whose output this layer alone normalizes, wherever one of the two is called.

    Raises:
        CannotFold: If there is none.
    """
    producers = [_producer(graph, call) for call in calls]
    linear: Any = producers[0].operation
    for producer in producers:
        if producer.operation is not linear:
            raise CannotFold(f"it follows several layers: {producers[0]}, {producer}")
    for call in _calls_of(graph, linear):
        if not any(call is producer for producer in producers):
            raise CannotFold(f"{call} is called elsewhere, too")
    _require_channels(linear, norm, producers[0])
    return linear


def _producer(graph: Graph, call: Call) -> Call:
    """Returns the call of a linear layer whose output goes to this call only."""
    if is_timed(call):
        raise CannotFold(f"it is inside {call}")
    producer = graph.only_producer(call.source)
    rule = LINEAR.get(type(producer.operation))
    if rule is None:
        raise CannotFold(f"{producer} is not linear")
    if rule.channels is None:
        raise CannotFold(f"{producer} has no fixed axis of output channels")
    reason = linear_reason(producer.operation)
    if reason is not None:
        raise CannotFold(reason)
    return producer


def _require_channels(linear: Any, norm: Any, producer: Call) -> None:
    """Raises `CannotFold` unless a layer normalizes the output channels of a linear layer, in its dtype."""
    if linear.activity_regularizer is not None:
        raise CannotFold(f"{producer} has an activity regularizer")
    if linear.compute_dtype != norm.compute_dtype:
        raise CannotFold(f"{producer} computes {linear.compute_dtype}, not {norm.compute_dtype}")
    weights_of(linear)  # Raises for LoRA and quantized weights.
    shape = producer.outputs.shape
    axis = channel_axis(linear)
    of_batch_norm(norm, len(shape)).along(axis, shape[axis])


def _calls_of(graph: Graph, layer: keras.layers.Layer) -> list[Call]:
    return [call for call in graph.calls if layer in (call.operation, batch_norm_of(call))]
