"""Building a model of new layers from a folded graph."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import keras
import numpy as np

from tfbn._models.copy_layer import copy_operation
from tfbn._models.functional import input_like
from tfbn._models.rebuild import Copies
from tfbn._shipping.fold.absorb import Weights
from tfbn._shipping.fold.affine import Affine
from tfbn._shipping.fold.graph import Call, Graph, Substitution, tensors


def assemble(graph: Graph, model: keras.Model) -> tuple[keras.Model, tuple[str, ...]]:
    """Builds a Functional model that makes the calls of the graph with layers of its own.

    A layer that cannot be copied, because its config does not tell how to create it, is used in both models.

    Args:
        graph: A graph of the model, folded or not.
        model: The model. It is not modified.

    Returns:
        The new model, and the names of the layers that it shares with the model.
    """
    inputs = keras.tree.map_structure(
        lambda tensor: input_like(graph.model, tensor), graph.model.input
    )
    new = Substitution(graph.inputs, inputs)
    layers = _Layers(model, graph.calls, names=[tensor.name for tensor in tensors(inputs)])
    for call in graph.calls:
        layer = layers.for_call(call)
        if call.affine is not None:
            outputs = layer(new(call.source))
        else:
            args, kwargs = keras.tree.map_structure(new, (call.args, call.kwargs))
            outputs = layer(*args, **kwargs)
        new.add(call.outputs, outputs)
    layers.assign_weights()
    outputs = keras.tree.map_structure(new, graph.outputs)
    return keras.Model(inputs, outputs, name=model.name), layers.shared


class _Layers:
    """The layers of the new model. Calls of one original layer share a new one if their weights are equal.

    Args:
        model: The model that the original layers belong to.
        calls: The calls to create layers for.
        names: Names that are in use already.

    Attributes:
        shared: The names of original layers that cannot be copied.
    """

    def __init__(self, model: keras.Model, calls: Sequence[Call], names: Sequence[str]) -> None:
        self._copies = Copies(model, {})
        self._weights: list[tuple[keras.layers.Layer, Weights]] = []
        firsts = {_key(call): call for call in reversed(calls)}  # The first call of each layer.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About lambdas in configs, and classes of models.
            self._layers = {key: self._create(call) for key, call in reversed(firsts.items())}
        is_copy = {key: self._layers[key] is not call.operation for key, call in firsts.items()}
        self.shared = tuple(layer.name for key, layer in self._layers.items() if not is_copy[key])
        self._names = {*names, *self.shared}
        for key, layer in self._layers.items():
            if is_copy[key]:
                layer.name = self._unique_name(firsts[key])

    def for_call(self, call: Call) -> keras.Operation:
        """Returns the layer that makes this call in the new model."""
        return self._layers[_key(call)]

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
            try:
                return self._copies.copy_and_build(call.operation)
            except ValueError:
                return call.operation
        old, weights = call.operation, call.weights
        if type(old) is keras.layers.TimeDistributed:
            inner = _copy_linear(old.layer, weights.config)
            base = {k: v for k, v in old.get_config().items() if k != "layer"}
            new = keras.layers.TimeDistributed(inner, **base)
        else:
            new = _copy_linear(old, weights.config)
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


def _key(call: Call) -> Hashable:
    """Equal for calls that one layer of the new model can make."""
    return id(call.operation), _fingerprint(call.affine or call.weights)


def _copy_linear(layer: keras.layers.Layer, changes: dict[str, Any]) -> keras.Operation:
    """Copies a layer whose weights are going to be assigned."""
    try:
        return copy_operation(layer, **changes)
    except ValueError:  # Without what only training needs, and may be a function of the user.
        for name in layer.get_config():
            if name.endswith(("_initializer", "_regularizer", "_constraint")):
                changes = {**changes, name: "zeros" if "initializer" in name else None}
        return copy_operation(layer, **changes)


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
