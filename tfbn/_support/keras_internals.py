"""Every use of something that Keras or TensorFlow does not promise, in one place.

Each function falls back on public behaviour when the private name is gone, and
`tests/_support/test_keras_internals.py` fails on that day, so that somebody looks.

Of Keras: ``Layer._layers``, ``_tracker`` and ``_losses``, ``Model._initial_epoch``, ``_keras_mask`` of tensors,
``Optimizer._all_reduce_sum_gradients``, the functions that scale losses in ``keras.src.losses.loss``, and the
current call in ``global_state``; each function below names its own. Of TensorFlow:
``Graph._get_control_flow_context``, and the stack frame ``inner_recompute_grad``.
"""

import contextlib
import functools
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

_SUM_GRADIENTS = "_all_reduce_sum_gradients"


def compiling_with_xla() -> bool:
    """Whether the graph that is being traced belongs to a ``tf.function(jit_compile=True)``.

    TensorFlow has no public way to ask. While it traces such a function, it enters an XLA control-flow
    context, which ``tf.Graph._get_control_flow_context`` returns. Without that method the answer is
    always False: results stay right, and XLA programs get the kernels of plain graphs, which are slower.
    """
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        context = getattr(graph, "_get_control_flow_context", lambda: None)()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def tracked_layers(layer: keras.layers.Layer) -> Iterable[keras.layers.Layer]:
    """The layers that a plain Keras layer tracks, in order of definition.

    Keras keeps them in ``layer._layers``. (Its ``_flatten_layers`` reverses siblings.) Without that
    attribute they are collected from the layer's own attributes.
    """
    tracked = getattr(layer, "_layers", None)
    if tracked is not None:
        return tracked
    # Keras's own lists come first among the attributes, so the last occurrence counts.
    return reversed(dict.fromkeys(reversed(list(layers_in(vars(layer).values())))))


def layers_in(values: Iterable[object]) -> Iterator[keras.layers.Layer]:
    """The layers among these values, and in lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, keras.layers.Layer):
            yield value
        elif isinstance(value, dict):
            yield from layers_in(value.values())
        elif isinstance(value, list | tuple):
            yield from layers_in(value)


def replace_tracked_layer(
    parent: keras.layers.Layer, old: keras.layers.Layer, new: keras.layers.Layer
) -> None:
    """Makes a layer track ``new`` in the place of ``old``.

    Setting the attribute is not enough: Keras keeps tracking the old layer, and tracks no new one once
    the parent is built. Without the tracker only the attributes change.
    """
    tracker = getattr(parent, "_tracker", None)
    if tracker is not None and tracker.is_in_store("layers", old):
        tracker.replace_tracked_value("layers", old, new)


def mask_of(tensor: Any) -> tf.Tensor | None:
    """The mask that Keras attached to a tensor, if there is one."""
    return getattr(tensor, "_keras_mask", None)


def take_restored_epoch(model: keras.Model) -> int | None:
    """The epoch that a callback restored in ``on_train_begin``, if one did; forgotten once it is taken.

    Keras's own callbacks tell `keras.Model.fit` by this attribute of the model.
    """
    epoch = getattr(model, "_initial_epoch", None)
    model._initial_epoch = None  # The next run must not see it.
    return epoch


def sums_gradients_over_replicas(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `gradients_summed` can keep this (unwrapped) optimizer from summing gradients itself."""
    return hasattr(optimizer, _SUM_GRADIENTS)


@contextlib.contextmanager
def gradients_summed(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """While open, this (unwrapped) optimizer takes gradients that are already summed over the replicas.

    Keras's optimizers clip gradients and check them for overflow on each replica's share, and only then
    sum them. Nothing public makes them take the sum. Without the private method this does nothing.
    """
    if not hasattr(optimizer, _SUM_GRADIENTS):
        yield
        return
    setattr(optimizer, _SUM_GRADIENTS, list)
    try:
        yield
    finally:
        delattr(optimizer, _SUM_GRADIENTS)


# Keras's functions that multiply and divide losses by the number of replicas, and where they live.
_LOSSES = "keras.src.losses.loss"
_SCALINGS = ("scale_loss_for_distribution", "unscale_loss_for_distribution")
_this_thread = threading.local()


@contextlib.contextmanager
def losses_unscaled() -> Iterator[bool]:
    """While open, Keras does not divide the losses that this thread computes by the number of replicas.

    It divides the mean of a loss that has a value per example, and what layers add; it does not divide a loss
    that is a scalar already. So a sum of losses holds both kinds, and nothing public tells them apart.

    Yields:
        Whether it can. Without the private functions Keras keeps dividing.
    """
    if not _scaling_is_ours():
        yield False
        return
    before = getattr(_this_thread, "losses_unscaled", False)
    _this_thread.losses_unscaled = True
    try:
        yield True
    finally:
        _this_thread.losses_unscaled = before


@functools.cache
def _scaling_is_ours() -> bool:
    """Replaces Keras's functions, once, by functions that ask `losses_unscaled` first."""
    try:
        module = importlib.import_module(_LOSSES)
        functions = [getattr(module, name) for name in _SCALINGS]
    except (ImportError, AttributeError):
        return False
    for name, function in zip(_SCALINGS, functions, strict=True):
        setattr(module, name, _unless_unscaled(function))
    return True


def _unless_unscaled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def scale(value: Any) -> Any:
        return value if getattr(_this_thread, "losses_unscaled", False) else function(value)

    return scale


def is_recomputing() -> bool:
    """Whether the current call repeats a forward pass for the backward pass (rematerialization).

    `tf.recompute_grad`, which `keras.remat` and `keras.RematScope` use, runs a function again inside of its
    gradient, and says so nowhere but on the stack. Without that frame the answer is always False.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "inner_recompute_grad":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def added_losses_kept(layer: keras.layers.Layer) -> Iterator[None]:
    """Keeps the losses that this replica has added to the model so far, while replicas meet inside.

    Keras collects the losses of `add_loss` and of activity regularizers in one list for each layer, which
    the replica threads of a `tf.distribute.MirroredStrategy` share. A thread that waits for the others in
    its forward pass would find the losses of another replica there, or none. Without the private names
    nothing is kept.
    """
    replica = tf.distribute.get_replica_context()
    alone = replica is None or replica.num_replicas_in_sync == 1
    entry = None if alone else getattr(_call_context(), "entry_layer", None)
    if entry is None or not hasattr(entry, "_losses"):
        yield
        return
    layers = _with_all_inside(entry)
    before = [list(inner._losses) for inner in layers]
    yield
    for inner, losses in zip(layers, before, strict=True):
        inner._losses[:] = losses


def _call_context() -> Any:
    """Keras's record of the outermost call that is running, or None.

    Its method `layer._get_call_context` begins a call if none is running. Nothing would end that call, and every
    later one would inherit its `training`.
    """
    state = sys.modules.get("keras.src.backend.common.global_state")
    return getattr(state, "get_global_attribute", lambda name: None)("current_call_ctx")


def _with_all_inside(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    found = {id(layer): layer}
    waiting = [layer]
    while waiting:
        for child in tracked_layers(waiting.pop()):
            if id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


@contextlib.contextmanager
def calls_forgotten(layers: Iterable[keras.layers.Layer]) -> Iterator[None]:
    """While open, symbolic calls of these layers are recorded; then the records are removed.

    Keras records each symbolic call in two lists of the layer, from which `layer.output` and
    `model.summary` read. Without these lists, the records stay: `layer.output` is that of the first call.
    """
    records = [
        vars(layer)[name]
        for layer in layers
        for name in ("_inbound_nodes", "_outbound_nodes")
        if isinstance(vars(layer).get(name), list)
    ]
    lengths = list(map(len, records))
    try:
        yield
    finally:
        for record, length in zip(records, lengths, strict=True):
            del record[length:]


def replace_in_graph(
    model: keras.Model, swaps: Iterable[tuple[keras.layers.Layer, keras.layers.Layer]]
) -> None:
    """Makes the graph of a Functional model call other layers, with the same arguments and outputs.

    Keras records a call in a node that both layers and tensors refer to, and can only clone graphs. Its
    own clone of a model of a custom class is a plain `keras.Model`.

    Raises:
        ValueError: If Keras no longer keeps the graph where this function expects it.
    """
    swaps = list(swaps)
    for old, new in swaps:
        nodes = getattr(old, "_inbound_nodes", None)
        if nodes is None or not hasattr(model, "_inputs_struct"):
            raise ValueError(
                f"tfbn cannot replace layers in a graph of Keras {keras.__version__}. Received: model "
                f"'{model.name}' of class {type(model).__name__}."
            )
        for index, node in enumerate(nodes, start=len(new._inbound_nodes)):
            node.operation = new
            for tensor in node.outputs:
                history = tensor._keras_history._replace(operation=new, node_index=index)
                tensor._keras_history = history
        for name in ("_inbound_nodes", "_outbound_nodes"):
            vars(new)[name], vars(old)[name] = [*vars(new)[name], *vars(old)[name]], []
    mapped = keras.Function(model._inputs_struct, model._outputs_struct)
    for name in ("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth"):
        # Past Keras's tracking of layers, and known to `tf.train.Checkpoint`.
        tf.Module.__setattr__(model, name, vars(mapped)[name])
    if type(layers := vars(model).get("_layers")).__name__ == "ListWrapper":
        # Before 3.15: `tf.train.Checkpoint` refuses a list of which items were replaced, so it gets another.
        replaced = {id(old): new for old, new in swaps}
        tf.Module.__setattr__(model, "_layers", [replaced.get(id(x), x) for x in layers])


def copy_path(old: Any, new: Any) -> None:
    """Gives a layer or a variable the path of another; without the private attribute it keeps its own."""
    if hasattr(old, "_path") and hasattr(new, "_path"):
        new._path = old._path
