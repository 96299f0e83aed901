"""Deciding where each batch normalization goes: into what made its input, or into what takes its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tfbn._models.walk import CLASSES, BatchNormLayer, batch_norm_layers
from tfbn._shipping.fold.absorb import LINEAR, Linear, Weights, linear_reason, weights_of
from tfbn._shipping.fold.affine import Affine, CannotFold, of_batch_norm
from tfbn._shipping.fold.commute import COMMUTING, Commutation
from tfbn._shipping.fold.graph import Call, Graph, tensors
from tfbn._shipping.fold.report import Outcome, Row

Plan = list[tuple[Call, Weights | Affine]]
"""What calls are to hold from now on."""


def fold_graph(graph: Graph) -> list[Row]:
    """Folds what can be folded, and says of every batch normalization what became of it.

    Calls of batch normalization that are folded are gone from the graph; those that become a
    multiply-add have an `affine`.
    """
    for call in graph.calls:
        if _batch_norm(call) is not None and _inference_reason(call) is None:
            affine = of_batch_norm(_batch_norm(call), len(_shape(call, call.source)))
            call.affine = _outside(call, affine)
    rows = []
    for call in list(graph.calls):
        if _batch_norm(call) is not None:
            rows.append(_fold_one(graph, call))
        elif isinstance(call.operation, keras.layers.Layer):
            within = (*call.within, call.name)
            reason = f"it is inside of {call}, which stays whole"
            rows += [
                Row(layer.name, within, Outcome.UNCHANGED, None, reason)
                for layer in batch_norm_layers(call.operation)
            ]
    return rows


def _fold_one(graph: Graph, call: Call) -> Row:
    def row(outcome: Outcome, into: Sequence[Call] = (), reason: str | None = None) -> Row:
        names = ", ".join(dict.fromkeys(target.name for target in into)) or None
        return Row(call.name, call.within, outcome, names, reason)

    if call.affine is None:
        return row(Outcome.UNCHANGED, reason=_inference_reason(call))
    search = _Search(graph, call.outputs.dtype)
    reasons = []
    for way, outcome in (
        (lambda: search.up(call.source, call.affine), Outcome.INTO_PRECEDING),
        (lambda: search.down(call.outputs, call.affine), Outcome.INTO_FOLLOWING),
    ):
        try:
            plan = way()
        except CannotFold as stays:
            reasons.append(str(stays))
            continue
        for target, state in plan:
            if isinstance(state, Affine):
                target.affine = state
            else:
                target.weights = state
        graph.bypass(call)
        return row(outcome, [target for target, _ in plan])
    return row(Outcome.MULTIPLY_ADD, reason="; ".join(reasons))


def _batch_norm(call: Call) -> BatchNormLayer | None:
    """The batch normalization layer that is called, be it once for every step in time."""
    layer = call.operation.layer if _is_timed(call) else call.operation
    return layer if isinstance(layer, CLASSES) else None


def _inference_reason(call: Call) -> str | None:
    """Why the call is not the map that batch normalization is in inference, or None."""
    layer: Any = _batch_norm(call)
    if type(layer).call not in [kind.call for kind in CLASSES]:
        return f"its class {type(layer).__name__} has a behaviour of its own"
    if call.kwargs.get("training"):
        return "its call says training=True"
    return None


class _Search:
    """Looks for the layers that take up a map. Changes nothing: it returns a plan, or raises `CannotFold`.

    All that is on the way has to compute in one dtype, that of the map: what is float32 for good reasons is
    not to become float16.
    """

    def __init__(self, graph: Graph, dtype: str) -> None:
        self._graph = graph
        self._dtype = dtype

    def up(self, tensor: Any, affine: Affine) -> Plan:
        """Puts a map of a tensor into what made the tensor."""
        call = self._graph.producer(tensor)
        if call is None:
            raise CannotFold("its input is an input of the model")
        if self._graph.is_output(tensor):
            raise CannotFold(f"the model outputs {call}, too")
        takers = self._graph.consumers(tensor)
        if len(takers) > 1:
            raise CannotFold(f"{call} feeds {len(takers)} layers")
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
            raise CannotFold(f"the call of {call} says training=True")
        sources = keras.tree.flatten(call.source)
        shapes = [_shape(call, source) for source in sources]
        maps = rule.backward(layer, affine, shapes, _shape(call, tensor))
        plan: Plan = []
        for source, map_of_source in zip(sources, maps, strict=True):
            plan += self.up(source, _outside(call, map_of_source))
        return plan

    def down(self, tensor: Any, affine: Affine) -> Plan:
        """Puts a map of a tensor into all that takes the tensor."""
        if self._graph.is_output(tensor):
            raise CannotFold("the model outputs it")
        plan: Plan = []
        for call in self._graph.consumers(tensor):
            plan += self._into(call, tensor, affine)
        return plan

    def _into(self, call: Call, tensor: Any, affine: Affine) -> Plan:
        self._require_same_dtype(call)
        if call.affine is not None:
            return [(call, call.affine.after(affine))]
        if sum(source is tensor for source in call.inputs) > 1 or call.source is not tensor:
            raise CannotFold(f"it goes into {call} beside other inputs")
        layer, rule, inner = _rule(call, affine)
        shape = _shape(call, tensor)
        if isinstance(rule, Linear):
            return [(call, rule.absorb_input(layer, _weights(call, layer), inner, shape))]
        if call.kwargs.get("training"):
            raise CannotFold(f"the call of {call} says training=True")
        after = rule.forward(layer, inner, shape, _shape(call, call.outputs))
        return self.down(call.outputs, _outside(call, after))

    def _require_same_dtype(self, call: Call) -> None:
        for output in tensors(call.outputs):
            if output.dtype != self._dtype:
                raise CannotFold(f"{call} gives {output.dtype}, and it gives {self._dtype}")


def _weights(call: Call, layer: keras.layers.Layer) -> Weights:
    return call.weights or weights_of(layer)


# TimeDistributed calls the layer inside without the axis of time.


def _is_timed(call: Call) -> bool:
    return type(call.operation) is keras.layers.TimeDistributed


def _rule(call: Call, affine: Affine) -> tuple[keras.layers.Layer, Linear | Commutation, Affine]:
    """The layer that does the work, its rule, and the map as that layer sees it."""
    layer = call.operation.layer if _is_timed(call) else call.operation
    rule = LINEAR.get(type(layer)) or COMMUTING.get(type(layer))
    if rule is None:
        raise CannotFold(f"{call} is no linear map")
    if _is_timed(call):
        if affine.scale.shape[1] > 1 or affine.shift.shape[1] > 1:
            raise CannotFold(f"it varies along the time of {call}")
        affine = affine.map_arrays(lambda array: array[:, 0])
    return layer, rule, affine


def _shape(call: Call, tensor: Any) -> Sequence[int | None]:
    return (tensor.shape[0], *tensor.shape[2:]) if _is_timed(call) else tensor.shape


def _outside(call: Call, affine: Affine) -> Affine:
    return affine.map_arrays(lambda array: array[:, None]) if _is_timed(call) else affine
