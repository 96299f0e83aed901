"""Records the layers of a model: snapshots before and after some steps, and what they say."""

import keras
import numpy as np

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.monitor.estimate import BatchEstimate
from tfbn._statistics.monitor.findings import Findings, weight_after
from tfbn._statistics.monitor.record import LayerRecord, records
from tfbn._statistics.monitor.snapshot import Snapshot, WatchedLayers


class Recorder:
    """Records the same layers, from one step on.

    Args:
        model: The model.
        layers: Its layers, at least one.
        step: The number of the step.
        accumulation: How many batches tfbn's layers merge for an update.
        late: Whether the layers were created by the first step.
        found: What was found before.

    Attributes:
        layers: The argument.
        findings: What is certain so far.
        latest: The number of the step before which the latest snapshot was taken, and the snapshot.
        recent: What the batches between the latest two snapshots had; None before the second one.
    """

    def __init__(
        self,
        model: keras.Model,
        layers: WatchedLayers,
        step: int,
        accumulation: int,
        late: bool,
        found: list[Finding],
    ):
        start = layers.snapshot()
        self.layers = layers
        self.findings = Findings(model, layers, start, late, found)
        self.latest = step, start
        self.recent: BatchEstimate | None = None
        self._origin = step
        self._start = start
        self._accumulation = accumulation
        self._opened: tuple[int, Snapshot] | None = None
        self._refused = np.zeros(len(layers.names), int)
        self._batch_mean = start.mean

    def open(self, step: int) -> None:
        """Begins a record with this step."""
        self._opened = step, self.layers.snapshot()

    def close(self, step: int, planned: int | None) -> tuple[int, tuple[LayerRecord, ...]] | None:
        """Ends the record before this step, and looks for findings.

        Args:
            step: The number of the step.
            planned: The number of steps in the whole training, if that is known.

        Returns:
            The number of the step that the record began with, and the record of each layer; None if no record was
            open.
        """
        opened, self._opened = self._opened, None
        if opened is None or step <= opened[0]:
            return None
        layers, before, after = self.layers, opened[1], self.layers.snapshot()
        batch = BatchEstimate.between(layers, before, after, self._updates(step - opened[0]))
        self._refused += (layers.sums(batch.moved) == 0) & layers.learns
        constant = alone = np.zeros(len(before.mean), bool)
        last, previous = self.latest
        if step > last:
            self.recent = BatchEstimate.between(layers, previous, after, self._updates(step - last))
            flat = self.recent.constant(layers)
            same = np.square(batch.mean - self._batch_mean) <= layers.epsilon
            constant, alone = flat & same, flat & ~same
        self._batch_mean = batch.mean
        self.latest = step, after
        self.judge(planned, (constant, alone))
        updates = self._updates(step - self._origin)
        return opened[0], records(
            layers,
            before,
            batch,
            constant,
            self._refused,
            weight_after(layers, self._start, updates),
            (step - self._origin) / np.maximum(updates, 1),
        )

    def judge(self, planned: int | None, flat: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Looks for findings in the latest snapshot.

        Args:
            planned: The number of steps in the whole training, if that is known.
            flat: As in `Findings.observe`.
        """
        step, statistics = self.latest
        rest = None if planned is None else self._updates(max(planned - self._origin, 1))
        self.findings.observe(statistics, flat, self._updates(step - self._origin), rest)

    def _updates(self, steps: int) -> np.ndarray:
        """How many updates so many steps make, for each layer."""
        merged = -(-steps // self._accumulation)
        return np.array(
            [
                merged if isinstance(layer, BatchNormalization) else steps
                for layer in self.layers.layers
            ]
        )
