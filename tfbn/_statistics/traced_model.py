"""A model traced on every replica, and the functions that run parts of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._data import sharding
from tfbn._models.intercept import isolated_tracing
from tfbn._models.walk import BatchNormLayer
from tfbn._moments.moments import Moments
from tfbn._normalize.by_hand import without_gradients
from tfbn._statistics.cut_graph import DATA, CutGraph
from tfbn._statistics.layer_call import LayerCall, normalize_by_batch, values
from tfbn._statistics.packed_moments import pack
from tfbn._support.eager_run import run_once

Forward = Callable[[keras.layers.Layer, Any], Any]
Summary = Callable[[tf.Tensor, Sequence[int], tf.Tensor | None, Moments], Moments]
"""Computes moments of something else from the inputs of a call, its axes and mask, and their moments."""
Segment = Callable[..., list[tf.Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class TracedModel:
    """The graphs of a model for batches of one kind.

    Attributes:
        spec: The nested `tf.TypeSpec` of a batch.
        strategy: The strategy whose replicas share a batch.
        graphs: The graph of each replica in this process, by the number of the replica.
        devices: The device of each replica; None if there is only one.
    """

    spec: Any
    strategy: tf.distribute.Strategy
    graphs: dict[int, CutGraph] = dataclasses.field(default_factory=dict)
    devices: dict[int, str | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def trace(
        cls,
        model: keras.layers.Layer,
        layers: Sequence[BatchNormLayer],
        forward: Forward,
        spec: Any,
        strategy: tf.distribute.Strategy,
    ) -> TracedModel:
        """Traces the model on each replica."""
        traced = cls(spec, strategy)

        def run(batch: Any) -> Any:
            return forward(model, sharding.local_shard(batch))

        @without_gradients()  # Once more: strategy.run may start a thread for each replica.
        def trace() -> None:
            several = strategy.num_replicas_in_sync > 1
            traced.devices[replica_number()] = tf.zeros([]).device if several else None
            traced.graphs[replica_number()] = CutGraph(layers, run, spec)

        with isolated_tracing():
            run_once(strategy, trace)
        return traced

    @property
    def layers(self) -> list[BatchNormLayer]:
        """The layers that the model calls, in order."""
        return [cut.layer for cut in self._any_graph.cuts]

    @property
    def written(self) -> list[tf.Variable]:
        """The variables that the model changes in inference."""
        return [variable for graph in self.graphs.values() for variable in graph.written]

    @property
    def levels(self) -> list[int]:
        """The level of each call."""
        return self._any_graph.levels

    def segments(
        self,
        start: int,
        level: int,
        calls: Sequence[LayerCall],
        summaries: Sequence[Summary],
        keeping: bool,
    ) -> dict[int, Segment]:
        """Compiles the part of the model from one cut to another, for each replica.

        Args:
            start: The level of the first cut, or `DATA`.
            level: The level of the second cut.
            calls: All calls. Those of lower levels were measured.
            summaries: What else to measure.
            keeping: Whether to return what crosses the second cut.

        Returns:
            For each replica, a function of the tensors that cross the first cut. It returns those that cross
            the second one, and the packed moments of the calls there.
        """
        return {
            replica: _segment(graph, start, level, calls, summaries, keeping)
            for replica, graph in self.graphs.items()
        }

    def batch_step(
        self, calls: Sequence[LayerCall], summaries: Sequence[Summary]
    ) -> Callable[[Any], Any]:
        """Compiles the whole model, normalizing by the statistics of the batch.

        Returns:
            A function of a batch that returns the packed moments of all calls on each replica.
        """

        @without_gradients()
        def run(batch: Any) -> tf.Tensor:
            graph = self.graphs[replica_number()]
            measured: dict[int, list[Moments]] = {}

            def normalize(number: int, x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
                axes = graph.cuts[number].axes
                y, moments = normalize_by_batch(calls[number].layer, x, axes, mask)
                measured[number] = _with_summaries(summaries, x, axes, mask, moments)
                return y

            known = dict(zip(graph.crossing(DATA), flat(batch), strict=True))
            known = graph.run(
                known, [name for cut in graph.cuts for name in cut.sources], normalize
            )
            for number in range(len(calls)):
                if number not in measured:  # Its output feeds no other call.
                    normalize(number, *graph.inputs(number, known))
            return pack([m for number in range(len(calls)) for m in measured[number]])

        def step(batch: Any) -> Any:
            return self.strategy.run(run, args=(batch,))

        with isolated_tracing():
            return tf.function(step, autograph=False).get_concrete_function(self.spec)

    @property
    def _any_graph(self) -> CutGraph:
        return next(iter(self.graphs.values()))


def replica_number() -> int:
    """The number of the replica that runs the current code."""
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    return int(tf.get_static_value(number) if tf.is_tensor(number) else number)


def flat(batch: Any) -> list[tf.Tensor]:
    """Returns the tensors in a batch."""
    return [part for part in tf.nest.flatten(batch, expand_composites=True) if part is not None]


def _segment(
    graph: CutGraph,
    start: int,
    level: int,
    calls: Sequence[LayerCall],
    summaries: Sequence[Summary],
    keeping: bool,
) -> Segment:
    numbers = [number for number, call in enumerate(calls) if call.level == level]
    given = graph.crossing(start)
    crossing = graph.crossing(level) if keeping else []

    def normalize(number: int, x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        return calls[number].normalize(x, graph.cuts[number].axes)

    def run(*tensors: tf.Tensor) -> list[tf.Tensor]:
        targets = [*crossing, *(name for number in numbers for name in graph.cuts[number].sources)]
        known = graph.run(dict(zip(given, tensors, strict=True)), targets, normalize, level)
        moments = []
        for number in numbers:
            x, mask = graph.inputs(number, known)
            axes = graph.cuts[number].axes
            moments += _with_summaries(summaries, x, axes, mask, values(x, axes, mask))
        return [*(known[name] for name in crossing), pack(moments)]

    with isolated_tracing():
        return tf.function(run, autograph=False).get_concrete_function(*map(graph.spec, given))


def _with_summaries(
    summaries: Sequence[Summary],
    x: tf.Tensor,
    axes: Sequence[int],
    mask: tf.Tensor | None,
    moments: Moments,
) -> list[Moments]:
    return [moments, *(summary(x, axes, mask, moments) for summary in summaries)]
