r"""What batch normalization layers see over a whole data set, in as few passes over it as it takes.

Normalizing by the statistics of all data needs them first, and those of a layer depend on what the
layers before it do with theirs. So the calls are sorted into levels by what feeds what, and each
level takes one pass: calls that do not feed each other share it. Calls of earlier levels normalize
by what their passes found.

The model is traced once, into a function that returns the moments of all calls. A pass asks it for
those of its level, and TensorFlow drops what these do not need: only the part of the model before
them runs. A call in a branch or a loop cannot return tensors from there; it pools its moments where
it is, and the model is then traced once for each pass.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._data import sharding
from tfbn._layer import arguments
from tfbn._models.intercept import intercept_calls, isolated_tracing
from tfbn._models.walk import BatchNormLayer, name_of, strategy_of
from tfbn._moments.moments import Moments
from tfbn._normalize.by_hand import without_gradients
from tfbn._statistics.layer_call import LayerCall, MomentAccumulator, normalize_by_batch, values
from tfbn._statistics.levels import Call, levels

Forward = Callable[[keras.layers.Layer, Any], Any]
# Of the inputs of a call, its axes and mask, and the moments that it is measured or normalized by.
Summary = Callable[[tf.Tensor, Sequence[int], tf.Tensor | None, Moments], Moments]
ONCE = Moments(1.0, 0.0, 0.0)


class StatisticsPasses:
    """Measures what every call of some layers sees over a data set.

    Everything in the model runs in inference mode, except these layers: they normalize by the
    statistics of all data or, with ``upstream="batch"``, by those of each batch. Nothing of the
    model changes.

    Args:
        model: A built model.
        layers: Built batch normalization layers of it.
        forward: Runs the model on a batch, in inference mode.
        spec: The nested `tf.TypeSpec` of a batch.
        upstream: "population" or "batch".
        summaries: What else to pool for each call, beside the moments of its inputs.

    Attributes:
        sites: The calls, in their order.
        passes: How many passes over the data it takes.
        forward: As given.
        strategy: Over whose replicas each batch is shared out.
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
    ):
        self._model = model
        self._layers = layers
        self.forward = forward
        self._exact = upstream == "population"
        self._summaries = summaries
        self.strategy = strategy_of(model)
        calls = self._calls(spec)
        steps = levels([call for _, call in calls]) if self._exact else [0] * len(calls)
        self.passes = 1 + max(steps, default=-1)
        with self.strategy.scope():
            self.sites = [
                LayerCall(layer, level, call.nested)
                for (layer, call), level in zip(calls, steps, strict=True)
            ]
            # One for all calls of a level, and one for each nested call, which counts its runs too.
            self._pools = {
                level: MomentAccumulator([shape for site in sites for shape in self._shapes(site)])
                for level in range(self.passes)
                if (sites := self._side_by_side(level))
            }
            self._nested = {
                site: MomentAccumulator([*self._shapes(site), ()])
                for site in self.sites
                if site.nested
            }
        self._observe = tf.function(self._observed, autograph=False)
        self._compiled: dict[Any, Callable[[Any], None]] = {}
        self._running = threading.local()

    def measure(self, batches: Callable[[int], Iterable[tuple[Any, Any]]]) -> None:
        """Runs all passes.

        Args:
            batches: Gives the batches of the pass of this number, each with its spec.

        Raises:
            NotFiniteError: If the inputs of a layer are not finite.
            ValueError: If a call runs in a loop, so that its statistics depend on what it does to
                itself, or if the model calls other layers for some batches than for the first.
        """
        for level in range(self.passes):
            count = 0
            for batch, spec in batches(level):
                self._step(spec, level)(batch)
                count += 1
            with self.strategy.scope():
                self._conclude(level, count)

    def _side_by_side(self, level: int) -> list[LayerCall]:
        """The calls of a level that can return their moments."""
        return [site for site in self.sites if site.level == level and not site.nested]

    def _shapes(self, site: LayerCall) -> list[Sequence[int]]:
        """Those of what is pooled for a call."""
        return [site.layer.moving_mean.shape] * (1 + len(self._summaries))

    def _calls(self, spec: Any) -> list[tuple[BatchNormLayer, Call]]:
        """All calls of the layers, in the order in which the model makes them."""
        calls: list[tuple[BatchNormLayer, Call]] = []

        def trace(batch: Any) -> None:
            graph = tf.compat.v1.get_default_graph()

            def record(
                layer: BatchNormLayer,
                infer: Any,
                inputs: Any,
                training: Any = None,
                mask: Any = None,
            ) -> tf.Tensor:
                output = tf.identity(infer(inputs, training=False, mask=mask))
                read = [tf.convert_to_tensor(part) for part in (inputs, mask) if part is not None]
                calls.append((layer, Call(read, output, output.graph is not graph)))
                return output

            with intercept_calls(self._layers, record):
                self.forward(self._model, batch)

        with isolated_tracing():
            tf.function(trace, autograph=False).get_concrete_function(spec)
        return calls

    def _step(self, spec: Any, level: int) -> Callable[[Any], None]:
        """The compiled function that takes a batch into the pools of this level."""
        key = (level, *tf.nest.flatten(spec))
        if key not in self._compiled:

            def step(batch: Any) -> None:
                with self._replaced():
                    self.strategy.run(self._take, args=(batch, level))

            with isolated_tracing():
                function = tf.function(step, autograph=False).get_concrete_function(spec)
            self._compiled[key] = function
        return self._compiled[key]

    @without_gradients()  # once more: strategy.run may start a thread for each replica
    def _take(self, batch: Any, level: int) -> None:
        """One replica's part of a batch."""
        arguments = (sharding.local_shard(batch), level if self._nested else None)
        observe: Callable[..., list[list[Moments]]] = self._observed
        # Traced once for all passes. By batches there is one pass, in which replicas may meet.
        if self._exact:
            observe = self._observe.get_concrete_function(*arguments)
        seen = dict(zip(self.sites, observe(*arguments), strict=True))
        if level in self._pools:
            sites = self._side_by_side(level)
            self._pools[level].add([summary for site in sites for summary in seen[site]])

    def _observed(self, batch: Any, level: int | None) -> list[list[Moments]]:
        """Runs the model on a batch; what its calls see."""
        seen: list[list[Moments]] = []

        def observe(site: LayerCall, x: tf.Tensor, axes: Sequence[int], mask: Any) -> tf.Tensor:
            if self._exact:
                y, moments = site.normalize(x, axes, mask), values(x, axes, mask)
            else:
                y, moments = normalize_by_batch(site.layer, x, axes, mask)
            summaries = [moments, *(summary(x, axes, mask, moments) for summary in self._summaries)]
            if site.nested and site.level == level:
                self._nested[site].add([*summaries, ONCE])
            seen.append([] if site.nested else summaries)
            return y

        self._run(batch, observe)
        return seen

    def predict(self, batch: Any, upstream: str) -> Any:
        """What the model gives for a batch if its layers normalize by what was found, or by the batch.

        Called while a graph is traced, after `measure`.
        """

        def normalize(site: LayerCall, *inputs: Any) -> tf.Tensor:
            if upstream == "population":
                return site.normalize(*inputs)
            return normalize_by_batch(site.layer, *inputs)[0]

        with self._replaced():
            return self._run(batch, normalize)

    def _run(self, batch: Any, normalize: Callable[..., tf.Tensor]) -> Any:
        """Runs the model on a batch, with ``normalize(site, x, axes, mask)`` in place of the layers' calls."""
        called: list[BatchNormLayer] = []
        expected = [site.layer for site in self.sites]

        def call(layer: BatchNormLayer, infer: Callable, inputs: Any, mask: Any) -> tf.Tensor:
            called.append(layer)
            if called != expected[: len(called)]:  # An error, once Keras is out of the way.
                return infer(inputs, training=False, mask=mask)
            x = tf.convert_to_tensor(inputs)
            axes = arguments.resolved_axes(layer.axis, x.shape)
            mask = None if mask is None else arguments.fitted_mask(mask, x)
            return normalize(self.sites[len(called) - 1], x, axes, mask)

        self._running.call = call
        outputs = self.forward(self._model, batch)
        if called != expected:
            raise ValueError(
                "The model calls other batch normalization layers for this batch than for the first: "
                "it must run alike on all. Group the data by what the model does with it, and pass "
                f"each part alone. Received: calls of {[name_of(layer) for layer in called]} in place of "
                f"{[name_of(layer) for layer in expected]}."
            )
        return outputs

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """While open, the layers' calls are what the `_run` of their thread makes of them.

        Open around all replicas: where synchronized layers meet, they take turns in threads of their own.
        """

        def run(
            layer: BatchNormLayer, infer: Any, inputs: Any, training: Any = None, mask: Any = None
        ) -> tf.Tensor:
            return self._running.call(layer, infer, inputs, mask)

        with intercept_calls(self._layers, run):
            yield

    def _conclude(self, level: int, batches: int) -> None:
        """Tells the calls of a level what was found about them."""
        if level in self._pools:
            found = iter(self._pools[level].read())
            for site in self._side_by_side(level):
                site.conclude(list(itertools.islice(found, 1 + len(self._summaries))))
        for site, pool in self._nested.items():
            if site.level == level:
                *own, turns = pool.read()
                self._check_runs_once(site, int(turns.count), batches)
                site.conclude(own)

    def _check_runs_once(self, site: LayerCall, turns: int, batches: int) -> None:
        """Raises if a call whose turns each have statistics of their own has several in a batch."""
        if self._exact and turns > batches * self.strategy.num_replicas_in_sync:
            raise ValueError(
                "A batch normalization layer runs in a loop of the graph, as tf.while_loop, tf.map_fn and "
                "recurrent layers make them. What it sees in one turn depends on what it did in the one "
                "before, and there is no telling the turns apart. Unroll the loop (`unroll=True` in "
                'Keras\'s recurrent layers), or pass upstream="batch". '
                f"Received: layer {name_of(site.layer)!r}, {turns} turns in {batches} batches."
            )
