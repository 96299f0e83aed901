"""The inference graph of a model, cut at its batch normalization layers so that its parts run separately.

What a layer makes of its inputs depends on statistics that are not known when the model is traced. So
the graph leaves it open: the output of each call is a tensor without a source, and whoever runs a part of
the graph provides it. One trace serves all passes.

The calls are sorted into levels. Calls of level 0 are computed from the data alone, and those of level n
from the outputs of calls of lower levels. The graph between two levels is a segment. It starts from the
tensors that cross the cut between them: the inputs of the layers, and whatever passes them by, such as
the other branch of a residual block.

A model may change variables in inference: the seed of a random layer, the state of a recurrent layer. A
segment that reads such a variable also updates it, so that the next batch finds what it would find in the model.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfbn._layer import arguments
from tfbn._models.intercept import intercept_calls
from tfbn._models.walk import BatchNormLayer, name_of
from tfbn._statistics.changed_variables import ChangedVariables
from tfbn._statistics.stages import find_stages, op_of

DATA = -1
"""The level before the first: nothing has run, and what crosses the cut is the batch."""

Normalize = Callable[[int, tf.Tensor, tf.Tensor | None], tf.Tensor]
"""Computes the output of the call with this number from its inputs and mask."""
Call = tuple[BatchNormLayer, tf.Tensor, tf.Tensor | None, tf.Tensor]
"""A layer, and its inputs, mask and output while the model is traced."""


class Cut(NamedTuple):
    """One call of a layer, as names of tensors in the graph."""

    layer: BatchNormLayer
    axes: Sequence[int]
    inputs: str
    mask: str | None
    output: str

    @property
    def sources(self) -> list[str]:
        """What the call is computed from."""
        return [self.inputs] if self.mask is None else [self.inputs, self.mask]


class CutGraph:
    """Traces a model in inference mode and cuts the graph at the calls of some layers.

    Args:
        layers: The layers to cut at.
        run: Runs the model on a batch.
        spec: The nested `tf.TypeSpec` of a batch.

    Attributes:
        cuts: The calls, in order.
        levels: The level of each call.
        written: The variables that the model changes in inference.

    Raises:
        ValueError: If a layer is called inside of a graph loop or branch, or on other channels than it was
            built for.
    """

    def __init__(self, layers: Iterable[BatchNormLayer], run: Callable[[Any], Any], spec: Any):
        traced, calls = _trace(layers, run, spec)
        self._graph = traced.graph
        self._definition = traced.graph.as_graph_def()
        self._nodes = {node.name: node for node in self._definition.node}
        self._outputs = {op.name: len(op.outputs) for op in traced.graph.get_operations()}
        captured = traced.captured_inputs
        inputs = [tensor.name for tensor in traced.inputs]
        self._batch = inputs[: len(inputs) - len(captured)]
        self._captured = dict(zip(inputs[len(self._batch) :], captured, strict=True))
        self.cuts = [
            Cut(layer, _axes(layer, x), x.name, None if mask is None else mask.name, output.name)
            for layer, x, mask, output in calls
        ]
        self._number = {op_of(cut.output): number for number, cut in enumerate(self.cuts)}
        self._inputs = {
            name: [_tensor(i) for i in node.input if not i.startswith("^")]
            for name, node in self._nodes.items()
        }
        self._inputs |= {op_of(cut.output): cut.sources for cut in self.cuts}
        self._changed = ChangedVariables.of(self._definition, self._captured)
        changed = {id(self._captured[handle]) for handle in self._changed.writers}
        self.written = [v for v in traced.variables if id(v.handle) in changed]
        order = {
            op: [i[1:] for i in self._nodes[op].input if i.startswith("^")]
            for op in self._changed.users
        }
        self._stages = find_stages(self._inputs, order, self._batch, self._number, self._changed)
        self.levels = [self._stages[op_of(cut.output)] - 1 for cut in self.cuts]
        self._last_use = self._find_last_uses()

    def crossing(self, level: int) -> list[str]:
        """Returns the tensors that later levels need of this one and those before it."""
        if level == DATA:
            return self._batch
        return [
            tensor for tensor, last in self._last_use.items() if self._stage(tensor) <= level < last
        ]

    def spec(self, tensor: str) -> tf.TensorSpec:
        """Returns the static shape and the dtype of a tensor."""
        symbolic = self._graph.get_tensor_by_name(tensor)
        return tf.TensorSpec(symbolic.shape, symbolic.dtype)

    def run(
        self,
        known: Mapping[str, tf.Tensor],
        targets: Sequence[str],
        normalize: Normalize,
        level: int | None = None,
    ) -> dict[str, tf.Tensor]:
        """Computes tensors from others; called while a function is traced.

        Args:
            known: Values of tensors, by name.
            targets: What to compute, and nothing that it does not need.
            normalize: Provides the outputs of the calls on the way.
            level: That of the first calls that `normalize` does not know. By default, it knows all.

        Returns:
            The values of the targets, of what was known, and of what was computed on the way.

        Raises:
            ValueError: If a variable that is read is updated from what cannot be computed here.
        """
        values = dict(known)
        needed = self._with_updates(self._needed(targets, values), values, level)
        ops = {op_of(tensor) for tensor in needed}
        segments: dict[int, list[str]] = {}
        for op in self._nodes:  # In the order of the graph.
            if op in ops:
                segments.setdefault(self._stages.get(op, DATA), []).append(op)
        for _, segment in sorted(segments.items()):
            for op in segment:
                if op in self._number:
                    number = self._number[op]
                    cut = self.cuts[number]
                    values[cut.output] = normalize(number, *self.inputs(number, values))
            self._import([op for op in segment if op not in self._number], needed, values)
        return values

    def inputs(
        self, number: int, values: Mapping[str, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns the inputs of a call and its mask, fitted to them."""
        cut = self.cuts[number]
        x = values[cut.inputs]
        x.set_shape(self.spec(cut.inputs).shape)  # Not all of it can be inferred again.
        return x, None if cut.mask is None else arguments.fitted_mask(values[cut.mask], x)

    def _with_updates(self, needed: set[str], known: Container[str], level: int | None) -> set[str]:
        """Adds all updates of the variables that are read or changed for these tensors."""
        done: set[str] = set()
        while handles := self._handles(needed) - done:
            done |= handles
            for op in (op for handle in handles for op in self._changed.writers[handle]):
                if level is not None and self._stages[op] > level:
                    raise ValueError(
                        "The model updates a variable in inference from what it computes after a batch "
                        "normalization layer, and reads it before. So the layers cannot be measured one after the "
                        'other. Pass upstream="batch", or do not update the variable in inference. Received: an '
                        f"update by the operation '{op}'."
                    )
                needed |= self._needed([_tensor(op), *self._inputs[op]], known)
        return needed

    def _handles(self, tensors: Iterable[str]) -> set[str]:
        """The variables that change among those that are read or changed for these tensors."""
        users = self._changed.users
        return {handle for op in map(op_of, tensors) if op in users for handle in users[op]}

    def _stage(self, tensor: str) -> int:
        return self._stages[op_of(tensor)]

    def _find_last_uses(self) -> dict[str, int]:
        """The last stage in which each tensor is used, for those that some call depends on."""
        last: dict[str, int] = {}

        def use(tensors: Iterable[str], stage: int) -> None:
            for tensor in tensors:
                if op_of(tensor) in self._stages:
                    last[tensor] = max(last.get(tensor, stage), stage)

        for cut, level in zip(self.cuts, self.levels, strict=True):
            use(cut.sources, level)
        needed = self._needed([t for cut in self.cuts for t in cut.sources], ())
        for op in {op_of(tensor) for tensor in needed}:
            use(self._inputs[op], self._stages.get(op, DATA))
            for handle in self._changed.users.get(op, ()):  # Whatever reads it updates it, too.
                for writer in self._changed.writers[handle]:
                    use(self._inputs[writer], max(self._stages[op], self._stages[writer]))
        return {tensor: last[tensor] for tensor in sorted(last)}

    def _needed(self, targets: Iterable[str], known: Container[str]) -> set[str]:
        """All tensors that the targets depend on, up to what is known."""
        needed: set[str] = set()
        waiting = list(targets)
        while waiting:
            tensor = waiting.pop()
            if tensor not in needed and tensor not in known:
                needed.add(tensor)
                waiting += self._inputs[op_of(tensor)]
        return needed

    def _import(
        self, ops: Sequence[str], needed: Iterable[str], values: dict[str, tf.Tensor]
    ) -> None:
        """Copies operations into the current graph, and adds those of their outputs that are needed."""
        part = tf.compat.v1.GraphDef(versions=self._definition.versions)
        part.library.CopyFrom(self._definition.library)
        copied: dict[str, None] = {}  # In order.
        feeds: dict[str, tf.Tensor] = {}
        for op in ops:
            if _tensor(op) in self._captured:
                values[_tensor(op)] = tf.identity(self._captured[_tensor(op)])
            else:
                copied[op] = None
        for op in copied:
            node = part.node.add()
            node.CopyFrom(self._nodes[op])
            # It may be colocated with an operation of another segment.
            node.attr.pop("_class", None)
            feeds |= {t: values[t] for t in self._inputs[op] if op_of(t) not in copied}
            # Control edges order side effects, and a segment runs only what its outputs need.
            edges = [i for i in node.input if not i.startswith("^") or i[1:] in copied]
            node.ClearField("input")
            node.input.extend(edges)
        outputs = [t for t in needed if op_of(t) in copied and self._outputs[op_of(t)]]
        found = tf.graph_util.import_graph_def(part, feeds, return_elements=outputs, name="")
        values |= zip(outputs, found, strict=True)


def _trace(
    layers: Iterable[BatchNormLayer], run: Callable[[Any], Any], spec: Any
) -> tuple[Any, list[Call]]:
    """Traces the model with the outputs of the layers left open. Returns the function, and the layers' calls."""
    calls: list[Call] = []
    nested: list[Call] = []

    def trace(batch: Any) -> None:
        graph = tf.compat.v1.get_default_graph()

        def record(
            layer: BatchNormLayer, call: Any, inputs: Any, training: Any = None, mask: Any = None
        ) -> tf.Tensor:
            x = tf.convert_to_tensor(inputs)
            mask = None if mask is None else tf.convert_to_tensor(mask)
            output = tf.identity(tf.cast(x, layer.compute_dtype))
            (calls if output.graph is graph else nested).append((layer, x, mask, output))
            return output

        with intercept_calls(layers, record):
            run(batch)

    traced = tf.function(trace, autograph=False).get_concrete_function(spec)
    if nested:
        raise ValueError(
            "A batch normalization layer is called inside of a loop or a branch of the graph "
            "(tf.while_loop, tf.map_fn, tf.cond, a recurrent layer), where its inputs cannot be "
            "collected. Unroll the loop (recurrent layers take `unroll=True`), or choose the branch in "
            'Python. The limit holds for upstream="batch", too. '
            f"Received: {', '.join(sorted({name_of(layer) for layer, *_ in nested}))}."
        )
    return traced, calls


def _axes(layer: BatchNormLayer, x: tf.Tensor) -> Sequence[int]:
    """Returns the channel axes of the inputs of a layer, after checking the channels."""
    axes = arguments.resolved_axes(layer.axis, x.shape)
    channels = tf.TensorShape([x.shape[axis] for axis in axes])
    if not channels.is_compatible_with(layer.moving_mean.shape):
        raise ValueError(
            "The model calls a batch normalization layer on other channels than it was built for. Pass data of "
            f"the shape that the model was built for. Received: layer {name_of(layer)!r} with statistics of "
            f"shape {tuple(layer.moving_mean.shape)}, inputs of shape {tuple(x.shape)}."
        )
    return axes


def _tensor(name: str) -> str:
    """The name of a tensor, from that of an input of a node."""
    return name if ":" in name else f"{name}:0"
