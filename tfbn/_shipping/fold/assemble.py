"""From a folded graph to a model of new layers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import keras
import numpy as np

from tfbn._models.copy_layer import copy_operation
from tfbn._models.functional import input_like
from tfbn._models.rebuild import Copies
from tfbn._shipping.fold.absorb import Weights
from tfbn._shipping.fold.affine import Affine
from tfbn._shipping.fold.graph import Call, Graph, tensors


def assemble(graph: Graph, model: keras.Model) -> keras.Model:
    """A Functional model that makes the calls of the graph with layers of its own.

    Args:
        graph: A graph of the model, folded or not.
        model: The model. It stays as it is.
    """
    inputs = keras.tree.map_structure(
        lambda tensor: input_like(graph.holder, tensor), graph.holder.input
    )
    made = dict(zip(map(id, tensors(graph.inputs)), tensors(inputs), strict=True))

    def now(x: Any) -> Any:
        return made.get(id(x), x)

    layers = _Layers(model, [tensor.name for tensor in tensors(inputs)])
    for call in graph.calls:
        args = keras.tree.map_structure(now, call.args)
        kwargs = keras.tree.map_structure(now, call.kwargs)
        if call.affine is not None:
            outputs = layers.for_call(call)(now(call.source))
        else:
            outputs = layers.for_call(call)(*args, **kwargs)
        made |= dict(zip(map(id, tensors(call.outputs)), tensors(outputs), strict=True))
    layers.finish()
    return keras.Model(inputs, keras.tree.map_structure(now, graph.outputs), name=model.name)


class _Layers:
    """Makes the layers, one for all calls of an old one that hold the same weights."""

    def __init__(self, model: keras.Model, taken: list[str]) -> None:
        self._copies = Copies(model, {})
        self._made: dict[Hashable, keras.Operation] = {}
        self._weights: list[tuple[keras.layers.Layer, Weights]] = []
        self._taken = set(taken)

    def for_call(self, call: Call) -> keras.Operation:
        state = call.affine or call.weights
        key = (id(call.operation), _fingerprint(state))
        if key not in self._made:
            layer = self._make(call)
            layer.name = self._free_name(call)
            self._made[key] = layer
        return self._made[key]

    def finish(self) -> None:
        """Assigns the weights, now that the calls have built the layers."""
        self._copies.transfer_state()
        for layer, weights in self._weights:
            for weight in layer.weights:
                weight.assign(weights.arrays[weight.name].reshape(weight.shape))

    def _make(self, call: Call) -> keras.Operation:
        if call.affine is not None:
            new, own_weights = _multiply_add(call, call.affine)
            if own_weights is not None:
                self._weights.append((new, own_weights))
            return new
        if call.weights is None:
            return self._copies.copy_and_build(call.operation)
        old, weights = call.operation, call.weights
        if type(old) is keras.layers.TimeDistributed:
            inner = copy_operation(old.layer, **weights.config)
            base = {k: v for k, v in old.get_config().items() if k != "layer"}
            new = keras.layers.TimeDistributed(inner, **base)
        else:
            new = copy_operation(old, **weights.config)
        self._weights.append((new, weights))
        return new

    def _free_name(self, call: Call) -> str:
        """The name of the old layer, or one that begins with the models that it was inside of."""
        name = call.name
        for outer in reversed(call.within):
            if name not in self._taken:
                break
            name = f"{outer}_{name}"
        number, stem = 1, name
        while name in self._taken:
            name = f"{stem}_{number}"
            number += 1
        self._taken.add(name)
        return name


def _fingerprint(state: Weights | Affine | None) -> Hashable:
    if state is None:
        return None
    if isinstance(state, Affine):
        return state.scale.tobytes(), state.shift.tobytes()
    return tuple((name, array.tobytes()) for name, array in sorted(state.arrays.items()))


def _multiply_add(call: Call, affine: Affine) -> tuple[keras.layers.Layer, Weights | None]:
    """A layer of Keras's own that computes scale · x + shift: files of the model need no tfbn."""
    policy = call.operation.dtype_policy
    if affine.rank == 2 and keras.config.image_data_format() == "channels_first":
        # There `Rescaling` takes a vector for the channels of images.
        size = call.source.shape[-1]
        layer = keras.layers.EinsumDense("bc,c->bc", size, bias_axes="c", dtype=policy)
        scale, shift = affine.along(-1, size)
        return layer, Weights({"kernel": scale, "bias": shift})
    # A vector for rank 2, and all axes for others: then no image format matters.
    arrays = (array[0] if affine.rank == 2 else array for array in affine)
    scale, shift = (
        np.asarray(array, np.result_type(policy.variable_dtype, "float32")) for array in arrays
    )
    return keras.layers.Rescaling(scale, shift, dtype=policy), None
