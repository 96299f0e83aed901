r"""What batch normalization layers see over a whole data set.

To normalize by the statistics of all data, a layer needs them first, and they depend on what the layers
before it do with theirs. So the calls are measured level by level (see `cut_graph`): the part of the
model before a level runs on all batches, and from then on the calls of that level normalize by what was
found. What crosses the cut at a level is kept for the next one, so that each part of the model runs once.
If it does not fit into the cache, the next level starts from the last cut that was kept, or from the data.

With ``upstream="batch"``, each layer normalizes by the statistics of the batch, and all of it runs at once.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._layer import arguments
from tfbn._models.intercept import intercept_calls
from tfbn._models.walk import BatchNormLayer, name_of, strategy_of
from tfbn._statistics.checkpoint import Batch, Checkpoint
from tfbn._statistics.cut_graph import DATA
from tfbn._statistics.layer_call import LayerCall
from tfbn._statistics.packed_moments import Merger, unpack
from tfbn._statistics.tensor_cache import CacheFullError, TensorCache, in_bytes
from tfbn._statistics.traced_model import Forward, Summary, TracedModel, flat, replica_number
from tfbn._support.checks import first_line
from tfbn._support.eager_run import run_once
from tfbn._support.reports import count


@dataclasses.dataclass(frozen=True)
class CacheUse:
    """How `tfbn.recalibrate` kept the tensors between the levels of a model.

    Attributes:
        memory: The most bytes that it held in memory.
        disk: The most bytes that it held in temporary files.
        recomputed: For how many levels it could not keep them, so that the next level computed a larger
            part of the model again.
        reason: Why, if there are any.
    """

    memory: int = 0
    disk: int = 0
    recomputed: int = 0
    reason: str = ""

    def described(self) -> str:
        """Returns what to add to the title of a report."""
        held = {"memory": self.memory, "files": self.disk}
        parts = [f"; {in_bytes(size)} kept in {place}" for place, size in held.items() if size]
        if self.recomputed:
            parts.append(f"; {count(self.recomputed, 'level')} not kept: {self.reason}")
        return "".join(parts)


Totals = collections.defaultdict[int, Merger]
"""The moments of all batches, by the number of the replica."""


class StatisticsPasses:
    """Measures what every call of some layers sees over a data set.

    Everything in the model runs in inference mode, except for these layers. They normalize by the
    statistics of all data or, with ``upstream="batch"``, by those of each batch. The model does not change.

    Args:
        model: A built model.
        layers: Built batch normalization layers of it.
        forward: Runs the model on a batch in inference mode.
        spec: The nested `tf.TypeSpec` of a batch.
        upstream: "population" or "batch".
        summaries: What else to measure of each call, beside the moments of its inputs.
        cache: Keeps the tensors between levels.
        prior: How many examples the moving statistics count for.

    Attributes:
        calls: The calls, in order.
        levels: How many levels are measured one after the other: 1 with ``upstream="batch"``.
        passes: How often `measure` has read the data.
        weight: The weight of the data against the moving statistics: 1 without a prior.
        cache_use: How it has used the cache.
        forward: The argument.
        strategy: The strategy whose replicas share each batch.

    Raises:
        ValueError: If a layer is called inside of a graph loop or branch.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        layers: Sequence[BatchNormLayer],
        *,
        forward: Forward,
        spec: Any,
        upstream: str,
        summaries: Sequence[Summary] = (),
        cache: TensorCache | None = None,
        prior: int = 0,
    ):
        self._model = model
        self._layers = layers
        self._exact = upstream == "population"
        self._summaries = summaries
        self._cache = TensorCache() if cache is None else cache
        self._prior = prior
        self._traced: dict[Any, TracedModel] = {}
        self._initial: dict[int, tuple[tf.Variable, tf.Tensor]] = {}
        self.forward = forward
        self.strategy = strategy_of(model)
        self.passes = 0
        self.weight = 1.0
        self.cache_use = CacheUse()
        first = self._trace(spec)
        self.calls = [LayerCall(*pair) for pair in zip(first.layers, first.levels, strict=True)]
        self.levels = 1 + max(first.levels, default=0) if self._exact else 1

    def measure(self, reader: MultiPassReader) -> None:
        """Measures all calls.

        Raises:
            NotFiniteError: If the inputs of a layer are not finite.
            ValueError: If the model calls other layers for some batches than for the first, or if the data
                must be read again but cannot, or has changed.
        """
        if not self._exact:
            with self.variables_restored():
                self._measure_by_batch(reader)
            return
        with self._cache:
            checkpoint = None
            for level in range(self.levels):
                with self.variables_restored():  # Each level sees the same random numbers.
                    checkpoint = self._measure_level(level, reader, checkpoint)
        self.cache_use = dataclasses.replace(
            self.cache_use, memory=self._cache.peak_memory, disk=self._cache.peak_disk
        )

    def predict(self, batch: Any) -> Any:
        """Returns the outputs of the model if its layers normalize by what was measured.

        Call it while tracing a function, after `measure`.
        """
        numbers = itertools.count()

        def run(
            layer: BatchNormLayer, call: Any, inputs: Any, training: Any = None, mask: Any = None
        ) -> tf.Tensor:
            x = tf.convert_to_tensor(inputs)
            axes = arguments.resolved_axes(layer.axis, x.shape)
            return self.calls[next(numbers)].normalize(x, axes)

        with intercept_calls(self._layers, run):
            return self.forward(self._model, batch)

    @contextlib.contextmanager
    def variables_restored(self) -> Iterator[None]:
        """Restores on exit the variables that the model changes in inference, as they were before the first run."""
        try:
            yield
        finally:
            for variable, value in self._initial.values():
                variable.assign(value)

    def _trace(self, spec: Any) -> TracedModel:
        """Traces the model once for each kind of batch."""
        key = tuple(tf.nest.flatten(spec))
        if key not in self._traced:
            traced = TracedModel.trace(self._model, self._layers, self.forward, spec, self.strategy)
            if self._traced:
                self._check_calls(traced)
            self._traced[key] = traced
            for variable in traced.written:
                self._initial.setdefault(id(variable), (variable, tf.identity(variable)))
        return self._traced[key]

    def _check_calls(self, traced: TracedModel) -> None:
        """Raises unless the model calls the same layers as for the first batch."""
        expected = [call.layer for call in self.calls]
        if traced.layers != expected:
            raise ValueError(
                "The model called different batch normalization layers than on the first batch; every batch "
                "must call the same layers in the same order. Group the data by what the model does with "
                "it, and pass each group separately. "
                f"Received: calls of {[name_of(layer) for layer in traced.layers]} instead of "
                f"{[name_of(layer) for layer in expected]}."
            )

    def _read(self, reader: MultiPassReader) -> Iterator[Batch]:
        """Reads the data once more."""
        self.passes += 1
        for batch, spec in reader.read(self.passes - 1, compare=self.levels > 1):
            traced = self._trace(spec)
            parts = dict.fromkeys(traced.graphs, flat(batch))
            yield Batch(traced, reader.size(batch), parts)

    def _measure_by_batch(self, reader: MultiPassReader) -> None:
        totals: Totals = collections.defaultdict(Merger)
        steps: dict[TracedModel, Any] = {}
        self.passes = 1
        for batch, spec in reader.read(0):
            traced = self._trace(spec)
            if traced not in steps:
                steps[traced] = traced.batch_step(self.calls, self._summaries)
            with _explained():
                moments = self.strategy.experimental_local_results(steps[traced](batch))
            for replica, part in zip(traced.graphs, moments, strict=True):
                totals[replica].add(part)
        self._finish(self.calls, totals)

    def _measure_level(
        self, level: int, reader: MultiPassReader, source: Checkpoint | None
    ) -> Checkpoint | None:
        """Measures the calls of a level.

        Returns:
            Where the next level can start; None for the data.
        """
        start = DATA if source is None else source.level
        keeping = level < self.levels - 1 and self._cache.kind != "none"
        kept = Checkpoint(self._cache, level)
        totals: Totals = collections.defaultdict(Merger)

        @functools.cache
        def segments(traced: TracedModel) -> dict[int, Any]:
            return traced.segments(start, level, self.calls, self._summaries, keeping)

        for number, batch in enumerate(self._read(reader) if source is None else source):
            crossing: dict[int, list[tf.Tensor]] = {}
            for replica, segment in segments(batch.traced).items():
                with tf.device(batch.traced.devices[replica]), _explained():
                    *crossing[replica], moments = segment(*batch.parts[replica])
                totals[replica].add(moments)
            if source is not None:
                reader.tick()
            if not keeping:
                continue
            try:
                if number == 0:
                    self._cache.check(crossing.values(), reader.multiple_of(batch.examples))
                if source is not None:
                    source.free(number)  # Before the next one takes its place.
                kept.append(dataclasses.replace(batch, parts=crossing))
            except CacheFullError as error:
                keeping = False
                kept.clear()
                self._note(str(error))
        if self._prior:
            self.weight = reader.examples / (self._prior + reader.examples)
        self._finish([call for call in self.calls if call.level == level], totals)
        if keeping:
            return kept
        if source is None or source.intact:
            return source
        source.clear()  # What is left of it would fill the cache.
        return None

    def _note(self, reason: str) -> None:
        self.cache_use = dataclasses.replace(
            self.cache_use,
            recomputed=self.cache_use.recomputed + 1,
            reason=self.cache_use.reason or reason,
        )

    def _finish(self, calls: Sequence[LayerCall], totals: Totals) -> None:
        """Merges the moments of all replicas, and hands them to the calls."""
        with self.strategy.scope():
            here = run_once(self.strategy, lambda: totals[replica_number()].total()[tf.newaxis])
            of_all = Merger()
            for part in tf.unstack(self.strategy.gather(here, axis=0)):
                of_all.add(part)
            each = 1 + len(self._summaries)
            shapes = [call.layer.moving_mean.shape for call in calls for _ in range(each)]
            found = iter(unpack(of_all.total(), shapes))
            for call in calls:
                call.set_moments(list(itertools.islice(found, each)), self.weight)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Explains an error of the model that shows only when it runs."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            "The model cannot run on a batch, although batches like it can be traced. Some models take one batch "
            "size only, such as stateful ones: batch the data with `drop_remainder=True`. "
            f"Received: {first_line(error)}"
        ) from error
