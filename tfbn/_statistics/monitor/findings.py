"""What a monitor is certain of while the model still trains: the causes of a diagnosis that show that early."""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np

from tfbn._models.signature import signature_of
from tfbn._statistics.diagnose import causes
from tfbn._statistics.diagnose.cause import Cause
from tfbn._statistics.diagnose.causes import CAUSES
from tfbn._statistics.diagnose.evidence import LayerEvidence, of_weights
from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.diagnose.model_evidence import LOG_VARIANCE_RATIO, MEAN_SHIFT, ModelEvidence
from tfbn._statistics.diagnose.signs import of_statistics, of_use, of_values
from tfbn._statistics.diagnose.signs.sign import Sign
from tfbn._statistics.diagnose.structure import Structure
from tfbn._statistics.monitor.estimate import BatchEstimate
from tfbn._statistics.monitor.snapshot import Snapshot, WatchedLayers
from tfbn._support.reports import count, percent

PATIENCE = 16
"""After this many updates without a change, it is not chance."""
CERTAIN = 2.0
"""How many times the limits of a diagnosis are certain. No healthy or short training reached them."""
MANY = 0.25
"""Behind a ReLU, networks that train well had 6 to 25 % of a layer's channels constant: a diagnosis reports that."""
IN_A_ROW = 3
"""How many observations in a row must show what depends on the data."""

STANDING = Cause(
    kind="statistics_stand_still",
    sign=lambda model: None,  # Only a training shows it.
    explanation="The moving statistics have not changed since the training began: {why}.",
    severity="warning",
    advice=f"{causes.IN_CALL}; or, if these statistics are meant to stay, tfbn.freeze(model)",
)
_BY_SIGN = {cause.sign: cause for cause in CAUSES}


class Findings:
    """Collects what is certain, each kind once.

    Args:
        model: The model.
        layers: Its layers.
        start: Their statistics when the training began.
        late: Whether they were created by the first step, and these statistics are those after it.
        found: What was found before.

    Attributes:
        found: The findings so far.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: WatchedLayers,
        start: Snapshot,
        late: bool,
        found: list[Finding],
    ):
        self._model = model
        self._layers = layers
        self._start = start
        self._fresh = late or _initial(layers, start)
        self._flat = np.zeros((2, len(start.mean)), int)
        self._lagging = np.zeros(len(layers.names), int)
        self._structure: Structure | None = None
        self._traced = False
        self.found = found

    def add(self, finding: Finding | None) -> None:
        """Adds a finding, if it is the first of its kind."""
        if finding is not None and finding.kind not in {one.kind for one in self.found}:
            self.found.append(finding)

    def observe(
        self,
        now: Snapshot,
        flat: tuple[np.ndarray, np.ndarray] | None,
        updates: np.ndarray,
        planned: np.ndarray | None,
    ) -> None:
        """Looks at the statistics after a step.

        Args:
            now: The statistics.
            flat: Which channels had a constant input since the last observation, and in which each batch had a
                constant of its own. None at the end of an epoch or of the training.
            updates: The number of updates since the training began, for each layer.
            planned: The number of updates in the whole training, for each layer, if that is known.
        """
        layers = self._layers
        last = flat is None
        if flat is not None:
            constant, alone = flat
            self._flat = np.where([constant, constant | alone], self._flat + 1, 0)
        moved = (self._start.mean != now.mean) | (self._start.spread != now.spread)
        moved_layers = layers.sums(moved) > 0
        long_enough = (updates >= PATIENCE) | (last & (updates > 1))
        if not np.isfinite(now.mean + now.spread).all():
            self._add(
                of_values.not_finite_statistics, of_values.not_finite_statistics(self._evidence())
            )
        self._standing_still(layers.learns & ~moved_layers & long_enough)
        constant, all_flat = (layers.sums(times >= 2).astype(int) for times in self._flat)
        # By chance, some channels have nearly the same value twice.
        mostly_alone = 2 * constant < layers.sizes
        alone = (all_flat == layers.sizes) & mostly_alone & layers.learns
        self._single_values(alone)
        # A single value is normalized to beta, so the layers after it are fed a constant.
        if not alone.any():
            self._constant_channels(constant)
        if planned is not None:
            since = BatchEstimate.between(layers, self._start, now, updates)
            self._lag(since, updates, planned, moved_layers & layers.learns, last)

    def _standing_still(self, stuck: np.ndarray) -> None:
        if not stuck.any() or {
            "statistics_stand_still",
            "never_updated",
            "training_not_passed_on",
        } & {one.kind for one in self.found}:
            return
        structure = self._seen()
        names = self._layers.names
        called = [not self._traced or name in structure.called for name in names]
        model = self._evidence(structure, lambda i: bool(stuck[i]) and called[i])
        initial = [layer for layer in model.layers if layer.never_updated]
        for sign in (of_use.training_not_passed_on, of_use.never_updated):
            found = sign(model)
            if found is not None:
                why = "training does not update them, or each batch was empty, masked or not finite"
                words = {**found.words, "why": why}
                self._add(sign, found._replace(numbers={"layers": len(found.layers)}, words=words))
                return
        if model.layers and not initial:
            ignored = all(layer.layer in structure.ignored for layer in model.layers)
            why = (
                "the model's `call` does not pass `training` on to these layers"
                if ignored
                else "their updates are lost, or each batch was empty, masked or not finite"
            )
            standing = Sign(model.layers, {"layers": len(model.layers)}, {"why": why})
            self.add(STANDING.finding(standing, STANDING.severity, ""))

    def _constant_channels(self, constant: np.ndarray) -> None:
        few = MANY * self._layers.sizes
        if not np.any(constant > few) or "constant_channels" in {one.kind for one in self.found}:
            return
        model = self._evidence(self._seen(), lambda i: constant[i] > few[i], constant)
        for sign in (of_values.constant_layer, of_values.constant_channels):
            self._add(sign, sign(model))

    def _single_values(self, alone: np.ndarray) -> None:
        if alone.any():
            model = self._evidence(chosen=lambda i: alone[i])
            sign = Sign(model.layers, {"layers": len(model.layers)}, {"size": 1.0})
            self._add(of_statistics.small_batches, sign)

    def _lag(
        self,
        since: BatchEstimate,
        updates: np.ndarray,
        planned: np.ndarray,
        moves: np.ndarray,
        last: bool,
    ) -> None:
        """Looks how far the statistics from before the training will still pull those at its end."""
        layers = self._layers
        weight = weight_after(layers, self._start, planned)
        per_channel = layers.to_channels(weight)
        variance = np.maximum(since.variance, 0) + layers.epsilon
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            pull = per_channel * (self._start.mean - since.mean) / np.sqrt(variance)
            old = np.maximum(layers.variance(self._start.spread), 0) + layers.epsilon
            ratio = np.log(per_channel * old / variance + 1 - per_channel)
            shift = np.sqrt(layers.means(np.square(pull), since.known))
            log_ratio = np.sqrt(layers.means(np.square(ratio), since.known))
            off = (shift > CERTAIN * MEAN_SHIFT) | (log_ratio > CERTAIN * LOG_VARIANCE_RATIO)
        averages = np.array([layer.momentum is not None for layer in layers.layers])
        off &= moves & averages & (weight > of_statistics.LEAST_WEIGHT)
        self._lagging = np.where(off, self._lagging + 1, 0)
        certain = off & (((self._lagging >= IN_A_ROW) & (updates >= PATIENCE / 2)) | last)
        if not certain.any():
            return
        model = self._evidence(chosen=lambda i: certain[i])
        steps = int(np.max(planned))
        momentum = max(layer.momentum or 0.0 for layer in model.layers)
        half = float(np.median(weight[certain]))
        fresh = np.all(self._fresh | ~certain)
        what = "will still be the initial values" if fresh else "will still be from before"
        numbers = {
            "mean_shift": float(np.nanmax(shift[certain])),
            "variance_ratio": math.exp(float(np.nanmax(log_ratio[certain]))),
            "old_weight": half,
        }
        words = {
            "part": percent(half),
            "what": f"{what} when this training ends",
            "steps": f"{count(steps, 'training step')} {'is' if steps == 1 else 'are'}",
            "momentum": momentum,
        }
        self._add(of_statistics.lagging_statistics, Sign(model.layers, numbers, words))

    def _add(self, sign: Callable[[ModelEvidence], Sign | None], found: Sign | None) -> None:
        if found is None:
            return
        cause = _BY_SIGN[sign]
        severity = "warning" if cause.severity == "by effect" else cause.severity
        cure = "tfbn.recalibrate(model, data)" if cause.recalibrate else ""
        self.add(cause.finding(found, severity, cure))

    def _evidence(
        self,
        structure: Structure | None = None,
        chosen: Callable[[int], bool] = lambda index: True,
        constant: np.ndarray | None = None,
    ) -> ModelEvidence:
        """What is known of the chosen layers, as a diagnosis puts it."""
        layers: list[LayerEvidence] = []
        for index, layer in enumerate(self._layers.layers):
            if chosen(index):
                known = of_weights(layer, calls=1)
                number = 0 if constant is None else int(constant[index])
                layers.append(dataclasses.replace(known, constant=number))
        return ModelEvidence(layers, structure=structure or Structure())

    def _seen(self) -> Structure:
        """How the model uses its layers: traced only when something is wrong, and once."""
        if self._structure is None:
            try:
                spec = (signature_of(self._model).structure,)
                structure = Structure(self._model, self._layers.layers, None, spec)
                structure.trace()
                self._structure, self._traced = structure, True
            except Exception:  # Without a trace, the findings are those that need none.
                self._structure = Structure()
        return self._structure


def weight_after(layers: WatchedLayers, start: Snapshot, updates: np.ndarray) -> np.ndarray:
    """The weight of the first statistics in the moving ones after so many updates, for each layer."""
    counts = layers.means(start.counts, np.ones(len(start.counts), bool))
    return np.array(
        [
            counts[index] / max(counts[index] + number, 1)
            if layer.momentum is None
            else layer.momentum**number
            for index, (layer, number) in enumerate(zip(layers.layers, updates, strict=True))
        ]
    )


def _initial(layers: WatchedLayers, start: Snapshot) -> np.ndarray:
    changed = (start.mean != 0) | (layers.variance(start.spread) != 1)
    return layers.sums(changed) == 0
