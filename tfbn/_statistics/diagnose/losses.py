"""The loss and the metrics of a model on the batches set aside, run in several ways."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._data.multi_pass import MultiPassReader
from tfbn._data.sources import spec_of
from tfbn._models.compiled_loss import compute_loss
from tfbn._models.intercept import traced_once
from tfbn._models.restored import variables_restored
from tfbn._statistics.diagnose.held_out import Batch
from tfbn._statistics.plan import unpacked
from tfbn._support.checks import first_line

LEARNED = 1e-3
"""By which fraction of the loss a model must be better than a constant output, to have learned something."""

Predict = Callable[[Any], Any]
"""Computes the model's outputs for a batch."""


class NoLossError(ValueError):
    """Raised if a model was compiled without a loss. Its own `train_step` may have one."""


def has_labels(model: keras.layers.Layer, spec: Any) -> bool:
    """Whether batches of this spec have labels."""
    parts = tf.nest.flatten(unpacked(model, spec)[1])
    return any(part is not None and part != tf.type_spec_from_value(None) for part in parts)


class Losses:
    """Losses and metrics by mode, all on the same batches.

    Differences between losses are given in units of what the model has learned: the difference between
    the best loss and that of the best constant output. They do not depend on the scale of the loss, on
    constants added to it, or on its sign.

    Attributes:
        modes: The loss and the metrics of each mode.
    """

    def __init__(self, model: keras.Model, batches: Sequence[Batch]):
        self._model = model
        self._batches = batches
        self._sizes = np.array([MultiPassReader.size(batch) for batch, _ in batches], float)
        self._by_batch: dict[str, np.ndarray] = {}
        self._of_constant = math.nan
        self.modes: dict[str, Mapping[str, float]] = {}

    def add(
        self,
        mode: str,
        predict: Predict,
        context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Computes the losses of a mode. The metrics of the model end up with the counts that they had.

        Args:
            mode: What to call it.
            predict: Computes the outputs for a batch.
            context: A context that is open around `predict`.
        """

        def step(batch: Any) -> tuple[tf.Tensor, Any]:
            with context():
                outputs = predict(batch)
            return self._loss(batch, outputs), _means(outputs)

        with _metrics_restored(self._model):
            losses, mean_outputs = zip(*self._run(step), strict=True)
            metrics = _flat(self._model.get_metrics_result())
            self.modes[mode] = {
                **metrics,
                "loss": float(np.average(losses, weights=self._sizes)),
            }
            self._by_batch[mode] = np.array(losses, float)
            if mode == "recalibrated" and None not in mean_outputs:
                self._add_constant(mean_outputs)

    @property
    def are_finite(self) -> bool:
        """Whether any mode has a finite loss. Otherwise, the losses say nothing of the statistics."""
        return any(math.isfinite(values["loss"]) for values in self.modes.values())

    @property
    def show_learning(self) -> bool:
        """Whether the model is better than a constant output in any mode; True if that is unknown."""
        best = min(
            values["loss"] for values in self.modes.values() if not math.isnan(values["loss"])
        )
        return not self._of_constant - best <= LEARNED * abs(best)

    def works(self, mode: str) -> bool:
        """Whether the loss is a tenth lower than that of a constant output; True if that is unknown."""
        better = self._of_constant - self.modes[mode]["loss"]
        return not better <= 0.1 * abs(self._of_constant)

    def gain(self, mode: str, over: str) -> float:
        """How much lower the loss is in one mode than in another, as a fraction of what was learned."""
        better, worse = self.modes[mode]["loss"], self.modes[over]["loss"]
        if math.isnan(worse) and math.isfinite(better):
            return math.inf
        return (worse - better) / self._learned()

    def skill(self, mode: str) -> float:
        """How much of what was learned a mode shows: 1 for the best mode, 0 for the best constant output.

        1 if that is unknown, because there is no constant output.
        """
        loss = self.modes[mode]["loss"]
        if not math.isfinite(loss):
            return 0.0
        if math.isnan(self._of_constant):
            return 1.0
        return (self._of_constant - loss) / self._learned()

    def is_better(self, mode: str, over: str) -> bool:
        """Whether the loss is lower in one mode than in another, by more than chance.

        Of fewer than three batches, chance is not known, and any difference counts.
        """
        better, worse = self._by_batch[mode], self._by_batch[over]
        if not np.isfinite(better).all():
            return False
        if not np.isfinite(worse).all():
            return True
        gains = worse - better
        mean = np.average(gains, weights=self._sizes)
        error = np.std(gains, ddof=1) / math.sqrt(len(gains)) if len(gains) > 2 else 0.0
        return bool(mean > 2 * error and mean > 0)

    def _learned(self) -> float:
        finite = [v["loss"] for v in self.modes.values() if math.isfinite(v["loss"])]
        best = min(finite, default=math.nan)
        learned = self._of_constant - best
        # Without a model that has learned anything, a difference is large if it is large relative to the loss.
        return learned if learned > LEARNED * abs(best) else max(0.3 * abs(best), 1e-6)

    def _add_constant(self, means: Sequence[Any]) -> None:
        weights = self._sizes / self._sizes.sum()
        constant = tf.nest.map_structure(
            lambda *parts: sum(w * part for w, part in zip(weights, parts, strict=True)), *means
        )

        def step(batch: Any) -> tf.Tensor:
            examples = tf.shape(tf.nest.flatten(unpacked(self._model, batch)[1])[0])[0]
            outputs = tf.nest.map_structure(
                lambda part: tf.repeat(part[tf.newaxis], examples, axis=0), constant
            )
            return self._loss(batch, outputs)

        try:
            losses = list(self._run(step))
        except Exception:  # No constant output makes sense for this loss.
            return
        self._of_constant = float(np.average(np.array(losses, float), weights=self._sizes))

    def _run(self, step: Callable[[Any], Any]) -> Iterator[Any]:
        self._model.reset_metrics()
        try:
            yield from itertools.starmap(traced_once(step), self._batches)
        except tf.errors.InvalidArgumentError as error:  # Such as labels that are out of range.
            raise self._explained(error, unpacked(self._model, self._batches[0][0])[1]) from error

    def _loss(self, batch: Any, outputs: Any) -> tf.Tensor:
        x, y, weight = unpacked(self._model, batch)
        try:
            if any(part.dtype == tf.string for part in tf.nest.flatten(y) if part is not None):
                raise TypeError("Strings must be encoded as numbers.")
            self._model.compute_metrics(x, y, outputs, weight)
            loss = compute_loss(self._model, x, y, outputs, weight, training=False)
            return tf.reduce_mean(loss)  # With reduction="none", it has a value for each example.
        except Exception as error:
            raise self._explained(error, y) from error

    def _explained(self, error: Exception, y: Any) -> ValueError:
        if getattr(self._model, "loss", None) is None:
            return NoLossError(first_line(error))
        return ValueError(
            "The compiled loss and metrics cannot be computed on these labels. Pass labels as in `fit`, "
            "or pass data without labels to compare the statistics alone. "
            f"Received: labels {spec_of(y)}, {first_line(error)}"
        )


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as numbers. The result of one may be a dict."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: float(np.mean(value))}
    return flat


def _means(outputs: Any) -> Any:
    """The mean output of the examples, or None if examples may have different shapes."""
    parts = tf.nest.flatten(outputs)
    if not all(tf.is_tensor(p) and p.shape.rank and p.shape[1:].is_fully_defined() for p in parts):
        return None
    return tf.nest.map_structure(lambda part: tf.reduce_mean(part, axis=0), outputs)


@contextlib.contextmanager
def _metrics_restored(model: keras.Model) -> Iterator[None]:
    """On exit, restores the counts of all metrics; those of metrics built since become 0."""
    with variables_restored(model.metrics_variables):
        try:
            yield
        finally:
            model.reset_metrics()
