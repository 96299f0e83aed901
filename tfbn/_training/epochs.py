"""The epochs of a training run: batches through their steps, evaluation, callbacks, backups."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from tfbn._training.backup import Backup, Progress
from tfbn._training.callbacks import any_overrides
from tfbn._training.guard import StatisticsWatch
from tfbn._training.step import Steps
from tfbn._training.stream import Stream
from tfbn._training.workers import Workers


@dataclasses.dataclass
class Run:
    """What one call of `fit` trains with, and how far it has come."""

    train: Stream
    validation: Stream | None
    epochs: int
    validation_freq: int
    class_weight: Mapping[int, float] | None
    hooks: keras.callbacks.CallbackList
    backup: Backup | None
    progress: Progress


class Epochs:
    """Runs epochs, on this worker as on all others.

    Args:
        model: The model.
        steps: Its compiled steps.
        workers: This process and the others that train the model.
        accumulation_steps: The number of batches per update.
    """

    def __init__(self, model: keras.Model, steps: Steps, workers: Workers, accumulation_steps: int):
        self._model = model
        self._steps = steps
        self._workers = workers
        self._accumulation_steps = accumulation_steps

    def train(self, run: Run) -> dict[str, Any] | None:
        """Trains to the last epoch and returns its logs."""
        progress, hooks = run.progress, run.hooks
        watch: StatisticsWatch | None = StatisticsWatch(self._model)
        logs: dict[str, Any] | None = None
        while progress.epoch < run.epochs and not self._model.stop_training:
            first_batch = progress.batches
            if first_batch == 0:
                self._steps.reset_metrics()
            hooks.on_epoch_begin(progress.epoch)
            # A callback may have frozen a layer, which takes another trace.
            self._steps.prepare(run.train.spec, run.class_weight)
            last_batch = self._train_epoch(run)
            ran_out = not self._model.stop_training and progress.batches < (run.train.steps or 1)
            if ran_out:
                _warn_that_data_ran_out(run)
                if progress.batches == 0:
                    break
            if watch is not None and last_batch is not None:
                self._check_statistics(watch, progress.batches - first_batch, last_batch, run)
                watch = None
            logs = as_numbers(self._steps.results())
            if run.validation is not None and (progress.epoch + 1) % run.validation_freq == 0:
                run.validation.restart()
                results = self.evaluate(run.validation, hooks)
                logs |= {f"val_{name}": value for name, value in results.items()}
                progress.validation_position = run.validation.position
            hooks.on_epoch_end(progress.epoch, logs)
            progress.epoch += 1
            progress.batches = 0
            progress.position = run.train.position
            progress.stopped = self._workers.any(self._model.stop_training or ran_out)
            if run.backup is not None and run.backup.is_due_after_epoch():
                run.backup.write(progress, self._steps.state, hooks.callbacks)
            self._model.stop_training = progress.stopped
        return logs

    def evaluate(self, stream: Stream, hooks: keras.callbacks.CallbackList) -> dict[str, float]:
        """Evaluates one epoch and returns its metrics."""
        report_batches = self._any_reads_logs(hooks, "on_test_batch_end")
        self._steps.reset_metrics()
        self._model.stop_evaluating = False
        hooks.on_test_begin()
        for step, batch in enumerate(stream.epoch()):
            hooks.on_test_batch_begin(step)
            self._steps.test(batch, stream.spec)
            if report_batches:
                hooks.on_test_batch_end(step, self._steps.logs())
            if self._model.stop_evaluating:
                break
        results = as_numbers(self._steps.results())
        hooks.on_test_end(results)
        return results

    def _train_epoch(self, run: Run) -> Any:
        """Trains on the rest of the epoch and returns its last batch."""
        progress, hooks = run.progress, run.hooks
        batch = None
        report_batches = self._any_reads_logs(hooks, "on_train_batch_end", "on_batch_end")
        for batch in run.train.epoch(progress.batches):
            hooks.on_train_batch_begin(progress.batches)
            self._steps.train(batch, run.train.spec)
            progress.batches += 1
            if self._accumulation_steps > 1 and self._is_update_complete(progress):
                self._steps.update()
            if report_batches:
                hooks.on_train_batch_end(progress.batches - 1, self._steps.logs())
            self._back_up_after_batch(run)
            if self._model.stop_training:
                break
        if not self._is_update_complete(progress):
            self._steps.update()
        return batch

    def _check_statistics(self, watch: StatisticsWatch, steps: int, batch: Any, run: Run) -> None:
        if not self._workers.any(watch.is_suspicious):
            return
        try:
            healthy = self._steps.run_once(watch.probe, batch, run.train.spec)
        except Exception:  # A model that cannot be probed is judged by its unchanged statistics.
            healthy = {}
        watch.check(steps, healthy)

    def _back_up_after_batch(self, run: Run) -> None:
        if run.backup is None or not run.backup.is_due_after_batch():
            return
        if self._model.stop_training:
            return  # The epoch ends here, and is not over until its callbacks have run.
        if self._at_update_boundary(run.progress):
            run.progress.position = run.train.position
            run.backup.write(run.progress, self._steps.state, run.hooks.callbacks)

    def _at_update_boundary(self, progress: Progress) -> bool:
        """Whether a backup here is complete: each replica accumulates in variables of its own."""
        return self._workers.replicas == 1 or self._is_update_complete(progress)

    def _is_update_complete(self, progress: Progress) -> bool:
        return progress.batches % self._accumulation_steps == 0

    def _any_reads_logs(self, hooks: keras.callbacks.CallbackList, *methods: str) -> bool:
        """Whether a callback of any worker reads the logs of a batch: all workers compute them together."""
        # Logs cost a transfer from the device, so they are computed only if somebody reads them.
        return self._workers.any(any_overrides(hooks.callbacks, *methods))


def as_numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Converts metrics to Python numbers, or to arrays where they are not scalars."""
    values = {name: keras.ops.convert_to_numpy(value) for name, value in logs.items()}
    return {name: value.item() if value.ndim == 0 else value for name, value in values.items()}


def _warn_that_data_ran_out(run: Run) -> None:
    warnings.warn(
        f"The training data ran out after {run.progress.batches} batches of epoch "
        f"{run.progress.epoch + 1} of {run.epochs}, so training ends here. Pass more data, or data that can "
        "be read more than once.",
        stacklevel=4,  # the caller of `fit`
    )
