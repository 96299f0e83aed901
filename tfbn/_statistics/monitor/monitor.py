"""The callback that watches batch normalization while a model trains."""

import os
import warnings
from typing import Any

import keras

from tfbn._models.walk import batch_norm_layers, strategy_of
from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.monitor.record import LayerRecord
from tfbn._statistics.monitor.recorder import Recorder
from tfbn._statistics.monitor.snapshot import WatchedLayers
from tfbn._statistics.monitor.validation import ValidationWatch
from tfbn._statistics.monitor.write import JsonLines, TensorBoardWriter, summary, writes_files
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
    - each batch has a single value for each channel of a layer;
    - moving statistics are NaN or infinite;
    - training and validation are fed differently, if you pass ``validation_data``.

    Each epoch gets two more numbers in its logs, which History and the progress bar show: ``bn_mean_shift`` and
    ``bn_variance_ratio``, each of the layer where it is furthest off. If `keras.callbacks.CSVLogger` should write them,
    put this callback before it.

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
        layers: The latest `tfbn.LayerRecord` of each layer.

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
        self._recorder: Recorder | None = None
        self._unbuilt = False
        self._warned = 0
        self.findings = []
        self.layers = ()
        optimizer = unwrap_optimizer(getattr(self.model, "optimizer", None))
        self._first_step = 0 if optimizer is None else int(optimizer.iterations.numpy())
        self._lines: JsonLines | None = None
        self._board: TensorBoardWriter | None = None
        if writes_files(strategy_of(self.model)):
            if self._path is not None:
                self._lines = JsonLines(self._path)
            if self._log_dir is not None:
                self._board = TensorBoardWriter(self._log_dir, self.model.name)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Looks for layers that were built, frozen or unfrozen in the meantime."""
        self._epoch = epoch
        self._first_epoch = epoch - self._epochs
        self._epoch_start = self._step
        self._first_batch: int | None = None
        self._close()
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
        self._close()
        if self._recorder is None:
            return
        step = self._step
        if step >= self._due or self._is_last(batch, self._recorder):
            self._recorder.open(step)
            early = 2 * step < self._interval
            self._due = (
                max(2 * step, step + 1) if early else (step // self._interval + 1) * self._interval
            )

    def on_test_begin(self, logs: Any = None) -> None:
        """Ends a record before a validation, and before other callbacks change something."""
        if self._training:
            self._end_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the numbers of the epoch to its logs."""
        self._end_epoch()
        self._epochs += 1
        recorder = self._recorder
        if recorder is None:
            return
        if self._validation is not None and recorder.recent is not None:
            recorder.findings.add(
                self._validation.compare(self.model, recorder.layers, recorder.recent)
            )
            self._warn()
        if logs is not None and self.layers:
            logs.update(summary(self.layers))
        if self._board is not None:
            self._board.picture(self._first_step + self._step)

    def on_train_end(self, logs: Any = None) -> None:
        """Looks once more, and closes the files."""
        self._training = False
        self._judge()
        if self._board is not None:
            self._board.close()

    @property
    def _accumulation(self) -> int:
        """How many batches `tfbn.TrainingLoop` takes for an update."""
        return int(self.params.get("accumulation_steps", 1))

    @property
    def _planned(self) -> int | None:
        """The number of batches in the whole training, if it is known."""
        if not self._training:
            return self._step
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        if steps is None and self._epochs:
            steps = round(self._epoch_start / self._epochs)
        return None if epochs is None or steps is None else (epochs - self._first_epoch) * steps

    def _is_last(self, batch: int, recorder: Recorder) -> bool:
        """Whether the epoch ends with this batch, and the last record is old enough."""
        steps = self.params.get("steps")
        recorded = self._step - recorder.latest[0] < self._interval // 2
        return steps is not None and batch + self._accumulation >= steps and not recorded

    def _look(self) -> None:
        """Looks for the layers, and begins with them if they are others than before."""
        layers = WatchedLayers(self.model)
        late = self._unbuilt
        self._unbuilt = self._step == 0 and not all(
            layer.built for layer in batch_norm_layers(self.model)
        )
        if self._recorder is not None and layers.key == self._recorder.layers.key:
            return
        self._recorder = None
        if layers.layers:
            self._recorder = Recorder(
                self.model, layers, self._step, self._accumulation, late, self.findings
            )

    def _end_epoch(self) -> None:
        """Ends a record after the last batch of an epoch."""
        if self._first_batch is None:
            return
        done = self._batch + 1
        if getattr(self.model, "steps_per_execution", 1) not in (1, None):
            known = self.params.get("steps")
            done = done if known is None else known
        self._step = self._epoch_start + done - self._first_batch
        self._close()
        self._judge()

    def _close(self) -> None:
        """Ends a record, if one is open, and writes it."""
        if self._recorder is None:
            return
        closed = self._recorder.close(self._step, self._planned)
        if closed is None:
            return
        opened, self.layers = closed
        self._warn()
        if self._lines is not None:
            self._lines.write(self._first_step + opened, self._epoch, self.layers)
        if self._board is not None:
            self._board.write(self._first_step + opened, self.layers)

    def _judge(self) -> None:
        """Looks for what shows at the end of an epoch or of the training."""
        if self._recorder is not None:
            self._recorder.judge(self._planned)
            self._warn()

    def _warn(self) -> None:
        for finding in self.findings[self._warned :]:
            # The line that called `fit` is many frames up, and differs between Keras and TrainingLoop.
            warnings.warn_explicit(str(finding), UserWarning, "tfbn.StatisticsMonitor", 1)
        self._warned = len(self.findings)
