"""One pass over batches: each goes through its step, and the callbacks hear of it."""

from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfbn._training.backup import Progress
from tfbn._training.callbacks import any_overrides
from tfbn._training.step import Steps
from tfbn._training.stream import Stream
from tfbn._training.workers import Workers


class Passes:
    """The passes of a model over data, on this worker as on all others.

    Args:
        model: The model.
        steps: Its compiled steps.
        workers: This process and the others that train the model.
        group: How many batches make one update.
    """

    def __init__(self, model: keras.Model, steps: Steps, workers: Workers, group: int):
        self._model = model
        self._steps = steps
        self._workers = workers
        self._group = group

    def train(
        self,
        stream: Stream,
        hooks: keras.callbacks.CallbackList,
        progress: Progress,
        after_batch: Callable[[], None],
    ) -> None:
        """Trains on the rest of the epoch."""
        reports = self._reports(hooks, "on_train_batch_end", "on_batch_end")
        for batch in stream.epoch(progress.batches):
            hooks.on_train_batch_begin(progress.batches)
            self._steps.train(batch, stream.spec)
            progress.batches += 1
            if self._group > 1 and progress.batches % self._group == 0:
                self._steps.update()
            if reports:
                hooks.on_train_batch_end(progress.batches - 1, self._steps.logs())
            after_batch()
            if self._model.stop_training:
                break
        if progress.batches % self._group != 0:
            self._steps.update()

    def at_update_boundary(self, progress: Progress) -> bool:
        """Whether what is in variables here is all of it: each replica adds up a group in its own."""
        return self._workers.replicas == 1 or progress.batches % self._group == 0

    def evaluate(self, stream: Stream, hooks: keras.callbacks.CallbackList) -> dict[str, float]:
        """Evaluates the model on an epoch."""
        reports = self._reports(hooks, "on_test_batch_end")
        self._model.reset_metrics()
        self._model.stop_evaluating = False
        hooks.on_test_begin()
        for step, batch in enumerate(stream.epoch()):
            hooks.on_test_batch_begin(step)
            self._steps.test(batch, stream.spec)
            if reports:
                hooks.on_test_batch_end(step, self._steps.logs())
            if self._model.stop_evaluating:
                break
        results = floats(self._steps.results())
        hooks.on_test_end(results)
        return results

    def _reports(self, hooks: keras.callbacks.CallbackList, *methods: str) -> bool:
        """Whether a callback of any worker reads the logs of a batch: it takes all workers to make them."""
        # They cost a transfer from the device: they are made for who reads them only.
        return self._workers.any(any_overrides(hooks.callbacks, *methods))


def floats(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Results of metrics as numbers (as arrays, where they are no scalars)."""
    values = {name: keras.ops.convert_to_numpy(value) for name, value in logs.items()}
    return {name: value.item() if value.ndim == 0 else value for name, value in values.items()}
