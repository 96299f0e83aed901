"""Finding the layers that can absorb each batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tfbn._models.walk import BATCH_NORM_CLASSES, BatchNormLayer, batch_norm_layers
from tfbn._shipping.fold.absorb import LINEAR, Linear, Weights, linear_reason, weights_of
from tfbn._shipping.fold.affine import Affine, CannotFold, of_batch_norm
from tfbn._shipping.fold.commute import COMMUTING, Commutation
from tfbn._shipping.fold.graph import Call, Graph, tensors
from tfbn._shipping.fold.report import FoldedCall, Outcome

Plan = list[tuple[Call, Weights | Affine]]
"""New weights or a new map for each of these calls."""


def fold_graph(graph: Graph) -> list[FoldedCall]:
    """Folds every batch normalization that can be folded, and returns what became of each.

    Folded calls are removed from the graph. Calls that become a multiply-add stay, with an `affine`.
    """
    for call in graph.calls:
        if batch_norm_of(call) is not None and inference_reason(call) is None:
            affine = of_batch_norm(batch_norm_of(call), len(_shape(call, call.source)))
            call.affine = _with_time_axis(call, affine)
    rows = []
    for call in list(graph.calls):
        if batch_norm_of(call) is not None:
            rows.append(_fold_one(graph, call))
        elif isinstance(call.operation, keras.layers.Layer):
            within = (*call.within, call.name)
            rows += [
                FoldedCall(layer.name, within, Outcome.UNCHANGED, None, call.reason_inside)
                for layer in batch_norm_layers(call.operation)
            ]
    return rows


def _fold_one(graph: Graph, call: Call) -> FoldedCall:
    def result(outcome: Outcome, into: Plan | None = None, reason: str | None = None) -> FoldedCall:
        names = ", ".join(dict.fromkeys(target.name for target, _ in into or [])) or None
        return FoldedCall(call.name, call.within, outcome, names, reason)

    if call.affine is None:
        return result(Outcome.UNCHANGED, reason=inference_reason(call))
    search = _Search(graph, call.outputs.dtype)
    reasons = []
    for absorb, tensor, outcome in (
        (search.into_preceding, call.source, Outcome.INTO_PRECEDING),
        (search.into_following, call.outputs, Outcome.INTO_FOLLOWING),
    ):
        try:
            plan = absorb(tensor, call.affine)
        except CannotFold as reason:
            reasons.append(str(reason))
            continue
        for target, state in plan:
            if isinstance(state, Affine):
                target.affine = state
            else:
                target.weights = state
        graph.bypass(call)
        return result(outcome, into=plan)
    return result(Outcome.MULTIPLY_ADD, reason="; ".join(reasons))


def batch_norm_of(call: Call) -> BatchNormLayer | None:
    """The batch normalization layer that is called, directly or by `TimeDistributed`; otherwise None."""
    layer = call.operation.layer if is_timed(call) else call.operation
    return layer if isinstance(layer, BATCH_NORM_CLASSES) else None


def inference_reason(call: Call) -> str | None:
    """Why a call of a batch normalization layer does not compute batch normalization in inference mode, or None."""
    layer: Any = batch_norm_of(call)
    if type(layer).call not in [kind.call for kind in BATCH_NORM_CLASSES]:
        return f"its class {type(layer).__name__} overrides call"
    if call.kwargs.get("training"):
        return "it is called with training=True"
    return None


class _Search:
    """Searches for the layers that can absorb a map. Returns a plan or raises `CannotFold`; changes nothing.

    Every layer on the way must compute in the dtype of the map, so that what is computed in float32 on
    purpose does not move into a float16 layer.
    """

    def __init__(self, graph: Graph, dtype: str) -> None:
        self._graph = graph
        self._dtype = dtype

    def into_preceding(self, tensor: Any, affine: Affine) -> Plan:
        """Finds what can absorb a map of a tensor before the tensor is computed."""
        call = self._graph.only_producer(tensor)
        self._require_same_dtype(call)
        if call.affine is not None:
            return [(call, affine.after(call.affine))]
        layer, rule, affine = _rule(call, affine)
        shapes = [_shape(call, source) for source in call.inputs]
        if isinstance(rule, Linear):
            reason = linear_reason(layer)
            if reason is not None:
                raise CannotFold(reason)
            return [(call, rule.absorb_output(layer, _weights(call, layer), affine, shapes[0]))]
        if call.kwargs.get("training"):
            raise CannotFold(f"{call} is called with training=True")
        sources = keras.tree.flatten(call.source)
        shapes = [_shape(call, source) for source in sources]
        maps = rule.backward(layer, affine, shapes, _shape(call, tensor))
        plan: Plan = []
        for source, map_of_source in zip(sources, maps, strict=True):
            plan += self.into_preceding(source, _with_time_axis(call, map_of_source))
        return plan

    def into_following(self, tensor: Any, affine: Affine) -> Plan:
        """Finds what can absorb a map of a tensor in every call that takes the tensor."""
        if self._graph.is_output(tensor):
            raise CannotFold("the model outputs it")
        plan: Plan = []
        for call in self._graph.consumers(tensor):
            plan += self._into_consumer(call, tensor, affine)
        return plan

    def _into_consumer(self, call: Call, tensor: Any, affine: Affine) -> Plan:
        self._require_same_dtype(call)
        if call.affine is not None:
            return [(call, call.affine.after(affine))]
        if sum(source is tensor for source in call.inputs) > 1 or call.source is not tensor:
            raise CannotFold(f"{call} has other inputs, too")
        layer, rule, inner = _rule(call, affine)
        shape = _shape(call, tensor)
        if isinstance(rule, Linear):
            return [(call, rule.absorb_input(layer, _weights(call, layer), inner, shape))]
        if call.kwargs.get("training"):
            raise CannotFold(f"{call} is called with training=True")
        map_of_output = rule.forward(layer, inner, shape, _shape(call, call.outputs))
        return self.into_following(call.outputs, _with_time_axis(call, map_of_output))

    def _require_same_dtype(self, call: Call) -> None:
        for output in tensors(call.outputs):
            if output.dtype != self._dtype:
                raise CannotFold(f"{call} computes {output.dtype}, not {self._dtype}")


def _weights(call: Call, layer: keras.layers.Layer) -> Weights:
    return call.weights or weights_of(layer)


# TimeDistributed calls the layer inside it without the time axis.


def is_timed(call: Call) -> bool:
    """Whether the call is one of `TimeDistributed`."""
    return type(call.operation) is keras.layers.TimeDistributed


def _rule(call: Call, affine: Affine) -> tuple[keras.layers.Layer, Linear | Commutation, Affine]:
    """Returns the layer that computes, its rule, and the map without the time axis that `TimeDistributed` hides."""
    layer = call.operation.layer if is_timed(call) else call.operation
    rule = LINEAR.get(type(layer)) or COMMUTING.get(type(layer))
    if rule is None:
        raise CannotFold(f"{call} is not linear")
    if is_timed(call):
        if affine.scale.shape[1] > 1 or affine.shift.shape[1] > 1:
            raise CannotFold(f"it varies along the time axis of {call}")
        affine = affine.map_arrays(lambda array: array[:, 0])
    return layer, rule, affine


def _shape(call: Call, tensor: Any) -> Sequence[int | None]:
    return (tensor.shape[0], *tensor.shape[2:]) if is_timed(call) else tensor.shape


def _with_time_axis(call: Call, affine: Affine) -> Affine:
    return affine.map_arrays(lambda array: array[:, None]) if is_timed(call) else affine
