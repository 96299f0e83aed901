"""Building a model of new layers from a folded graph."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

import keras
import numpy as np

from tfbn._models.copy_layer import copy_operation
from tfbn._models.functional import input_like
from tfbn._models.rebuild import Copies
from tfbn._shipping.fold.absorb import Weights
from tfbn._shipping.fold.affine import Affine
from tfbn._shipping.fold.graph import Call, Graph, Substitution, tensors


def assemble(graph: Graph, model: keras.Model) -> keras.Model:
    """Returns a Functional model that makes the calls of the graph with layers of its own.

    Args:
        graph: A graph of the model, folded or not.
        model: The model. It is not modified.
    """
    inputs = keras.tree.map_structure(
        lambda tensor: input_like(graph.model, tensor), graph.model.input
    )
    new = Substitution(graph.inputs, inputs)
    layers = _Layers(model, [tensor.name for tensor in tensors(inputs)])
    for call in graph.calls:
        layer = layers.for_call(call)
        if call.affine is not None:
            outputs = layer(new(call.source))
        else:
            args, kwargs = keras.tree.map_structure(new, (call.args, call.kwargs))
            outputs = layer(*args, **kwargs)
        new.add(call.outputs, outputs)
    layers.assign_weights()
    return keras.Model(inputs, keras.tree.map_structure(new, graph.outputs), name=model.name)


class _Layers:
    """Creates the layers. Calls of one original layer share a new one if their weights are equal.

    Args:
        model: The model that the original layers belong to.
        names: Names that are in use already.
    """

    def __init__(self, model: keras.Model, names: list[str]) -> None:
        self._copies = Copies(model, {})
        self._layers: dict[Hashable, keras.Operation] = {}
        self._weights: list[tuple[keras.layers.Layer, Weights]] = []
        self._names = set(names)

    def for_call(self, call: Call) -> keras.Operation:
        """Returns the layer that makes this call in the new model."""
        key = (id(call.operation), _fingerprint(call.affine or call.weights))
        if key not in self._layers:
            layer = self._create(call)
            layer.name = self._unique_name(call)
            self._layers[key] = layer
        return self._layers[key]

    def assign_weights(self) -> None:
        """Assigns the weights, once calls have built the layers."""
        self._copies.transfer_state()
        for layer, weights in self._weights:
            for weight in layer.weights:
                weight.assign(weights.arrays[weight.name].reshape(weight.shape))

    def _create(self, call: Call) -> keras.Operation:
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

    def _unique_name(self, call: Call) -> str:
        """The name of the original layer, with those of the models that contain it if it is in use already."""
        name = call.name
        for outer in reversed(call.within):
            if name not in self._names:
                break
            name = f"{outer}_{name}"
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        name = next(candidate for candidate in candidates if candidate not in self._names)
        self._names.add(name)
        return name


def _fingerprint(state: Weights | Affine | None) -> Hashable:
    if state is None:
        return None
    if isinstance(state, Affine):
        return state.scale.tobytes(), state.shift.tobytes()
    return tuple((name, array.tobytes()) for name, array in sorted(state.arrays.items()))


def _multiply_add(call: Call, affine: Affine) -> tuple[keras.layers.Layer, Weights | None]:
    """Returns a layer of Keras that computes scale · x + shift, and its weights if it has any."""
    policy = call.operation.dtype_policy
    if affine.rank == 2 and keras.config.image_data_format() == "channels_first":
        # With this setting, `Rescaling` applies a vector to axis 1 of images.
        size = call.source.shape[-1]
        layer = keras.layers.EinsumDense("bc,c->bc", size, bias_axes="c", dtype=policy)
        scale, shift = affine.along(-1, size)
        return layer, Weights({"kernel": scale, "bias": shift})
    # A vector for rank 2, and an array of full rank otherwise: then the image format does not matter.
    arrays = (array[0] if affine.rank == 2 else array for array in affine)
    scale, shift = (
        np.asarray(array, np.result_type(policy.variable_dtype, "float32")) for array in arrays
    )
    return keras.layers.Rescaling(scale, shift, dtype=policy), None
