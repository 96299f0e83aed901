"""The callback that watches batch normalization while a model trains."""

import os
import warnings
from typing import Any

import keras
import numpy as np

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._models.walk import batch_norm_layers, strategy_of
from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.diagnose.report import finding_text
from tfbn._statistics.monitor.findings import Findings, weight_after
from tfbn._statistics.monitor.observation import BatchEstimate, LayerRecord, records
from tfbn._statistics.monitor.snapshot import Snapshot, WatchedLayers
from tfbn._statistics.monitor.validation import ValidationWatch
from tfbn._statistics.monitor.write import JsonLines, TensorBoardWriter, summary
from tfbn._support.checks import check_count
from tfbn._support.optimizers import unwrap_optimizer


class StatisticsMonitor(keras.callbacks.Callback):
    r"""Watches batch normalization during training, and warns as soon as something is certainly wrong.

    A callback for `keras.Model.fit` and `tfbn.TrainingLoop`, for Keras's layers and for tfbn's. At some steps
    (the first one, the 2nd, 3rd, 5th, 9th, ..., and then each ``interval``) it reads the moving statistics
    before and after the step. What they moved by says what statistics the batch had: with :math:`m` before,
    :math:`m'` after, and the momentum :math:`k`,

    .. math:: b = m + (m' - m) / (1 - k)

    So the compiled step does not change, and nothing is traced again.

    It warns, once for each kind of finding, with the cure that `tfbn.diagnose` would give, if

    - moving statistics stand still although their layers are meant to learn them;
    - the momentum is too slow for the length of the training: too much of the statistics from before will be
      left at the end;
    - all channels of a layer, or more than a quarter, are fed a constant input;
    - moving statistics are NaN or infinite;
    - training and validation are fed differently, if you pass ``validation_data``.

    Each epoch gets two more numbers in its logs, which History and the progress bar show: ``bn_mean_shift`` and
    ``bn_variance_ratio`` of the layer that is furthest off. If `keras.callbacks.CSVLogger` should write them,
    put this callback before it.

    A record of a layer has the attributes

    - ``layer``, its path, and ``state``: "learns", "frozen", or "refused" if the step did not update the statistics;
    - ``mean_shift``, the distance between the batch's mean and the moving mean, in standard deviations of the
      batch, and ``variance_ratio``, the moving variance divided by the batch's;
    - ``gamma_mean``, ``gamma_spread``, ``beta_mean`` and ``beta_spread``: means and standard deviations over channels;
    - ``dead_channels``: how many channels have had a constant input since the last record, or have a gamma of 0;
    - ``saturated_channels``: in how many channels practically all outputs have the same sign, because beta is
      large beside gamma. A ReLU after them is always off, or always on;
    - ``refused_updates``: how many of the recorded steps did not change the statistics;
    - ``initial_weight``, the weight that the statistics from before the training still have, and
      ``steps_to_catch_up``, the number of steps until it is 1 %.

    Limits: It knows neither how often a step calls a layer nor which updates were skipped between two recorded
    steps. For a layer that one step calls several times, distances are those of the sum of its calls. With
    ``steps_per_execution`` or accumulation, a record is about all batches in between, weighted. With
    ``virtual_batch_size`` and under replicas, the statistics of "the batch" are the averages that the moving
    statistics are updated with. Under a strategy, it reads one replica's copy.

    Args:
        interval: The number of steps between records.
        log_dir: A directory for TensorBoard: numbers for each layer, and a picture of the distances of all
            layers over time.
        path: A file to which each record is appended, as a line of JSON.
        validation_data: The data that validates, as `tfbn.recalibrate` takes it. What the first layer sees of
            its first batch is measured after each epoch, and compared with training.

    Attributes:
        findings: The findings so far, as `tfbn.Finding` objects.
        layers: The latest record of each layer, as a tuple of objects with the attributes listed above.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> monitor = tfbn.StatisticsMonitor(log_dir="logs")
        >>> model.fit(images, labels, epochs=100, callbacks=[monitor])
        >>> monitor.findings
        []
    """

    def __init__(
        self,
        interval: int = 100,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        validation_data: Any = None,
    ):
        super().__init__()
        check_count("interval", interval)
        self.findings: list[Finding] = []
        self.layers: tuple[LayerRecord, ...] = ()
        self._interval = interval
        self._log_dir = log_dir
        self._path = path
        self._validation = None if validation_data is None else ValidationWatch(validation_data)
        self._training = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts over, with the layers as they are now."""
        self._training = True
        self._step = 0  # batches since the training began
        self._due = 0
        self._epochs = 0
        self._window: tuple[int, Snapshot] | None = None
        self._previous: tuple[int, Snapshot] | None = None
        self._watched: WatchedLayers | None = None
        self._unbuilt = False
        self._warned = 0
        self.findings = []
        self.layers = ()
        optimizer = unwrap_optimizer(getattr(self.model, "optimizer", None))
        self._first_step = 0 if optimizer is None else int(optimizer.iterations.numpy())
        chief = _is_chief(strategy_of(self.model))
        self._lines = JsonLines(self._path) if self._path is not None and chief else None
        self._board = (
            TensorBoardWriter(self._log_dir) if self._log_dir is not None and chief else None
        )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Looks for layers that were built, frozen or unfrozen in the meantime."""
        self._epoch = epoch
        self._first_epoch = epoch - self._epochs
        self._epoch_start = self._step
        self._first_batch: int | None = None
        self._close(self._step)
        self._look()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Ends a record with the step before, and begins one with this step, if it is time."""
        if self._first_batch is None:
            self._first_batch = batch
        self._batch = batch
        self._step = self._epoch_start + batch - self._first_batch
        if self._step % self._accumulation:
            return
        if self._unbuilt:  # The first step builds what nothing built before.
            self._look()
        if self._window is not None and self._step > self._window[0]:
            self._close(self._step)
        if self._step >= self._due or self._is_last(batch):
            self._open()

    def on_test_begin(self, logs: Any = None) -> None:
        """Ends a record before a validation, and before other callbacks change something."""
        if self._training:
            self._end_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the numbers of the epoch to its logs."""
        self._end_epoch()
        self._epochs += 1
        if self._watched is None:
            return
        if self._validation is not None and self._recent is not None:
            self._findings.add(self._validation.compare(self.model, self._watched, self._recent))
            self._warn()
        if logs is not None and self.layers:
            logs.update(summary(self.layers))
        if self._board is not None:
            self._board.picture(self._first_step + self._step)

    def on_train_end(self, logs: Any = None) -> None:
        """Looks once more, and closes the files."""
        self._training = False
        if self._watched is not None and self._previous is not None:
            step, statistics = self._previous
            self._judge(statistics, None, step)
        if self._board is not None:
            self._board.close()

    @property
    def _accumulation(self) -> int:
        """How many batches `tfbn.TrainingLoop` takes for an update."""
        return int(self.params.get("accumulation_steps", 1))

    @property
    def _steps(self) -> int | None:
        """The number of batches in an epoch, if it is known."""
        steps = self.params.get("steps")
        if steps is None and self._epochs:
            steps = round(self._epoch_start / self._epochs)
        return steps

    def _is_last(self, batch: int) -> bool:
        """Whether the epoch ends with this batch, and the last record is old enough."""
        last = self.params.get("steps")
        recorded = (
            self._previous is not None and self._step - self._previous[0] < self._interval // 2
        )
        return last is not None and batch + self._accumulation >= last and not recorded

    def _look(self) -> None:
        """Looks for the layers, and begins with them if they are others than before."""
        known = self._watched
        layers = WatchedLayers(self.model)
        late = self._unbuilt
        self._unbuilt = self._step == 0 and not all(
            layer.built for layer in batch_norm_layers(self.model)
        )
        if known is not None and layers.key == known.key:
            return
        self._watched = layers if layers.layers else None
        self._window = self._previous = None
        if self._watched is None:
            return
        self._origin = self._step
        self._start = layers.snapshot()
        self._previous = (self._step, self._start)
        self._refused = np.zeros(len(layers.names), int)
        self._batch_mean = self._start.mean
        before = self.findings
        self._findings = Findings(self.model, layers, self._start, late)
        self._findings.found = before
        self._recent: BatchEstimate | None = None

    def _open(self) -> None:
        if self._watched is None:
            return
        self._window = (self._step, self._watched.snapshot())
        step = self._step
        self._due = (
            max(2 * step, step + 1)
            if 2 * step < self._interval
            else (step // self._interval + 1) * self._interval
        )

    def _end_epoch(self) -> None:
        """Ends a record behind the last batch of an epoch."""
        if self._first_batch is None:
            return
        done = self._batch + 1
        if getattr(self.model, "steps_per_execution", 1) not in (1, None):
            known = self.params.get("steps")
            done = done if known is None else known
        self._step = self._epoch_start + done - self._first_batch
        self._close(self._step)
        if self._watched is not None and self._previous is not None:
            step, statistics = self._previous
            self._judge(statistics, None, step)

    def _updates(self, steps: int) -> np.ndarray:
        """How many updates so many steps make, for each layer."""
        assert self._watched is not None
        merged = -(-steps // self._accumulation)
        return np.array(
            [
                merged if isinstance(layer, BatchNormalization) else steps
                for layer in self._watched.layers
            ]
        )

    def _close(self, step: int) -> None:
        """Ends a record: compares the statistics with those before."""
        if self._window is None or self._watched is None:
            self._window = None
            return
        layers, (opened, before) = self._watched, self._window
        self._window = None
        if step <= opened:
            return
        after = layers.snapshot()
        batch = BatchEstimate.between(layers, before, after, self._updates(step - opened))
        refused = (layers.sums(batch.moved) == 0) & layers.learns
        self._refused += refused
        constant = alone = np.zeros(len(before.mean), bool)
        if self._previous is not None and step > self._previous[0]:
            since = self._updates(step - self._previous[0])
            self._recent = BatchEstimate.between(layers, self._previous[1], after, since)
            flat = self._recent.constant(layers)
            same = np.square(batch.mean - self._batch_mean) <= layers.epsilon
            constant, alone = flat & same, flat & ~same
        self._batch_mean = batch.mean
        updates = self._updates(step - self._origin)
        self.layers = records(
            layers,
            before,
            batch,
            constant,
            self._refused,
            weight_after(layers, self._start, updates),
            (step - self._origin) / np.maximum(updates, 1),
        )
        self._previous = (step, after)
        self._judge(after, (constant, alone), step)
        if self._lines is not None:
            self._lines.write(self._first_step + opened, self._epoch, self.layers)
        if self._board is not None:
            self._board.write(self._first_step + opened, self.layers)

    def _judge(self, now: Snapshot, flat: tuple[np.ndarray, np.ndarray] | None, step: int) -> None:
        """Looks for findings in the statistics after a step."""
        epochs = self.params.get("epochs")
        planned = None
        if not self._training:
            planned = self._updates(self._step - self._origin)
        elif epochs is not None and self._steps is not None:
            rest = (epochs - self._first_epoch) * self._steps - self._origin
            planned = self._updates(max(rest, 1))
        updates = self._updates(step - self._origin)
        self._findings.observe(now, flat, updates, planned)
        self._warn()

    def _warn(self) -> None:
        self.findings = self._findings.found
        for finding in self.findings[self._warned :]:
            # The line that called `fit` is many frames up, and differs between Keras and TrainingLoop.
            warnings.warn_explicit(finding_text(finding), UserWarning, "tfbn.StatisticsMonitor", 1)
        self._warned = len(self.findings)


def _is_chief(strategy: Any) -> bool:
    """Whether this process writes the files."""
    resolver = strategy.cluster_resolver
    if resolver is None:
        return True
    first = not resolver.cluster_spec().as_dict().get("chief") and resolver.task_id == 0
    return resolver.task_type in (None, "", "chief") or (resolver.task_type == "worker" and first)
