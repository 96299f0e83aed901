"""The training loop that users meet."""

import dataclasses
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfbn._data.sources import as_source
from tfbn._support.checks import check_count
from tfbn._support.keras_internals import take_restored_epoch
from tfbn._training.backup import Backup, Progress
from tfbn._training.callbacks import split_backup
from tfbn._training.checks import check_batch_size, check_sums
from tfbn._training.epochs import Passes, floats
from tfbn._training.guard import StatisticsWatch
from tfbn._training.step import Steps
from tfbn._training.strategy import check_strategy, scope_of
from tfbn._training.stream import Stream
from tfbn._training.workers import Workers

Callback: TypeAlias = keras.callbacks.Callback


class TrainingLoop:
    r"""A custom training loop that treats batch normalization right, and Keras users as they expect.

    Each batch is one call of a compiled step: forward under a `tf.GradientTape` with ``training=True``,
    the gradients of loss and regularization, one step of the optimizer, the metrics. The model is
    compiled by Keras's own `compile`, so losses, metrics, loss weights and mixed precision (its loss is
    scaled) are all that they are for `model.fit`, and the trained model saves its optimizer too.

    With ``accumulation_steps=k``, k consecutive batches make one update, with the gradient of the mean
    loss over all their examples:

    .. math:: g = \sum_i n_i g_i / \sum_i n_i

    where :math:`g_i` is the gradient of the mean loss of batch i, and :math:`n_i` the number of its
    examples (of its unmasked steps, where the output has a Keras mask). `tfbn.BatchNormalization` pools
    the moments of the k batches exactly, by Chan's formula, and moves its averages once, as it would for
    one batch of all their examples. Keras's own layer moves its averages k times. In the forward pass
    either normalizes each of the k batches by its own statistics. The last group of an epoch may be
    short, and is an update too.

    With a ``strategy``, every worker process runs the same program and reads the same batches in the same
    order; each replica trains on its share of them, so that batch sizes are those of all replicas
    together. Shares differ by at most one example and may be empty: nothing is dropped, and what one
    device would train on whole batches comes out, with ``synchronized=True`` to rounding (of a loss that
    is a mean; of other layers that mix the examples of a batch, each replica sees its own). A step takes
    one all-reduce for the gradients, one for all statistics that are not synchronized, and, where a
    callback or the progress bar reads logs after each batch, one for each variable of the metrics. The
    optimizer clips, checks and applies the gradients of the whole batch. To read all data costs every
    worker what it costs one; where that is too much, `keras.Model.fit` takes a distributed data set.

    Callbacks run on every worker, and get the same logs of all replicas everywhere; one that stops the
    training after a batch has to decide by them. Those of Keras that only write (ModelCheckpoint,
    TensorBoard, CSVLogger, RemoteMonitor) run on the chief, the first worker, and so do the progress bar
    and the writing of backups. All workers read the backup: without a file system that they share, copy
    it to each of them. When a worker is lost, TensorFlow raises `tf.errors.UnavailableError` on the others
    as soon as the connection breaks; all workers are to be started again, and go on from the last
    backup, which is never one from the middle of an accumulated group.

    After the first epoch the loop raises if batch normalization layers have learned no moving statistics,
    the mistake that custom loops make most; layers that are to stand still (``trainable=False``, or
    ``momentum=1``) are left alone.

    Args:
        model: A `keras.Model`. It is compiled for this loop.
        optimizer: A Keras optimizer: an instance, its name or its config.
        loss: A loss, as in `keras.Model.compile`: a name, a function, a `keras.losses.Loss`, or a list or
            dict of them for several outputs. `None` if the model adds all its losses itself.
        metrics: Metrics, as in `keras.Model.compile`.
        strategy: A `tf.distribute.MirroredStrategy`, `MultiWorkerMirroredStrategy` or
            `OneDeviceStrategy`, in whose scope the model, the optimizer and the metrics were made; `None`:
            one device.
        jit_compile: Whether XLA compiles the step, on one replica. ``"auto"`` is as in
            `keras.Model.compile`.
        accumulation_steps: The number of consecutive batches that make one update.
        loss_weights: As in `keras.Model.compile`.
        weighted_metrics: As in `keras.Model.compile`.

    Raises:
        TypeError: if the model is no Keras model, or the strategy of another kind.
        ValueError: if an argument has no meaning, or contradicts another; if something was made outside the
            scope of the strategy.

    Reference:
        Chan, Golub, LeVeque. Algorithms for computing the sample variance. The American Statistician
        37(3), 1983.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: Any,
        loss: Any = None,
        metrics: Any = (),
        strategy: tf.distribute.Strategy | None = None,
        jit_compile: bool | str = False,
        accumulation_steps: int = 1,
        *,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
    ):
        if not isinstance(model, keras.Model):
            raise TypeError(
                "TrainingLoop trains a keras.Model: Functional, Sequential or subclassed. "
                f"Received: model={model!r} of type {type(model).__name__}."
            )
        check_count("accumulation_steps", accumulation_steps)
        with scope_of(strategy):
            optimizer = keras.optimizers.get(optimizer)
        check_strategy(strategy, model, optimizer, (metrics, weighted_metrics), jit_compile)
        check_sums(optimizer, loss, accumulation_steps, strategy)
        settings = {
            "loss": loss,
            "loss_weights": loss_weights,
            "metrics": (list(metrics) if isinstance(metrics, tuple) else metrics) or None,
            "weighted_metrics": weighted_metrics,
            "jit_compile": jit_compile,
        }
        with scope_of(strategy):
            # What Keras refuses, it refuses here, before the model is touched.
            keras.Sequential().compile("sgd", **settings)
            model.compile(optimizer, **settings)
        self.model = model
        self.accumulation_steps = accumulation_steps
        # In half precision, Keras has wrapped it.
        self.optimizer = model.optimizer
        self._strategy = strategy
        self._workers = Workers(strategy)
        self._steps = Steps(model, accumulation_steps > 1, strategy)
        self._passes = Passes(model, self._steps, self._workers, accumulation_steps)

    def fit(
        self,
        data: Any,
        *,
        validation_data: Any = None,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        batch_size: int | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        class_weight: Mapping[int, float] | None = None,
        validation_steps: int | None = None,
        validation_freq: int = 1,
        initial_epoch: int = 0,
        verbose: int | str = "auto",
    ) -> keras.callbacks.History:
        """Trains the model.

        Killed at any moment and started again with a `keras.callbacks.BackupAndRestore` among its
        callbacks, it goes on from the last backup, in the middle of an epoch or of a group of accumulated
        batches if that is where it was, and ends with the weights of a run that was never killed: the
        same bits where the device computes the same bits twice (a CPU does). The loop does that
        callback's work itself, from its `backup_dir`, `save_freq` and `delete_checkpoint`, and keeps in
        one file that is replaced in one piece: weights, optimizer, metrics, the seeds of the layers, the
        place in the data, and what History, EarlyStopping, ReduceLROnPlateau and ModelCheckpoint
        remember. Needed for it: data that comes in the same order again (arrays do; a `tf.data.Dataset`
        or generator is read again up to the place, so it must be seeded and deterministic), and no other
        source of chance, such as `tf.random` in a layer or a callback's own memory.

        Args:
            data: A `tf.data.Dataset`; arrays ``x``, ``(x, y)`` or ``(x, y, sample_weight)``, where each
                may be a tuple or dict of arrays; a `keras.utils.PyDataset`; or an iterable of batches,
                such as a generator. Where the batches of these two differ in a size, such as the length
                to which they are padded, the step is compiled once more, with that size left open.
            validation_data: Data to evaluate on after each epoch; likewise.
            epochs: The number of the epoch to end with.
            steps_per_epoch: How many batches make an epoch, by default one pass over the data. Endless
                data needs it. A pass goes on in the next epoch, and is followed by another one.
            callbacks: Keras callbacks.
            batch_size: For arrays, 32 by default; of all replicas together.
            shuffle: Whether arrays (their examples) and a PyDataset (its batches) are shuffled.
            seed: The order of each epoch follows from it. By default it is drawn from Python's `random`,
                which `keras.utils.set_random_seed` seeds.
            class_weight: Weight of each class in the loss; a class not named has weight 1.
            validation_steps: How many batches to evaluate on, by default all.
            validation_freq: Evaluate every so many epochs.
            initial_epoch: The number of the epoch to begin with.
            verbose: 0 is silent, 1 or "auto" a progress bar, 2 a line an epoch.

        Returns:
            The Keras History of losses and metrics; of the whole training, if it was interrupted.

        Raises:
            StatisticsNotUpdatedError: (a `RuntimeError`) if batch normalization did not learn its moving
                statistics in the first epoch. The trained weights stay.
            TypeError: if the data is of no kind that is known.
            ValueError: if the data is empty, or an argument has no meaning; if workers would begin with
                different data, or at different places. Nothing is changed then.
            tf.errors.UnavailableError: if another worker was lost.
        """
        check_count("epochs", epochs)
        check_count("validation_freq", validation_freq)
        check_count("initial_epoch", initial_epoch, least=0)
        check_count("steps_per_epoch", steps_per_epoch, optional=True)
        check_count("validation_steps", validation_steps, optional=True)
        check_count("batch_size", batch_size, optional=True)
        self._check_compiled()
        backup, given = split_backup(callbacks, self._workers.chief)
        saved = None if backup is None else backup.read()
        seed = self._workers.from_chief(random.randrange(2**31) if seed is None else seed)
        progress = Progress(seed, initial_epoch) if saved is None else saved.progress

        train = _stream("data", data, steps_per_epoch, batch_size, shuffle, progress.seed)
        validation = None
        if validation_data is not None:
            validation = _stream("validation_data", validation_data, validation_steps, batch_size)
            times = epochs // validation_freq - initial_epoch // validation_freq
            if times > 1 and not validation.can_restart:
                raise ValueError(
                    "`validation_data` can be read only once, and is needed in several epochs: pass "
                    "a data set, arrays, or validation_steps. "
                    f"Received: validation_data of type {type(validation_data).__name__}."
                )
        check_batch_size(batch_size, train, validation)
        train.open(progress.position)
        if validation is not None:
            validation.open(progress.validation_position)
        self._workers.check_alike(
            place=(*dataclasses.astuple(progress), epochs, train.steps),
            data=train.ahead,
            validation_data=None if validation is None else validation.ahead,
        )

        self._steps.prepare(train.spec, class_weight)
        self._steps.forget()
        hooks = keras.callbacks.CallbackList(
            given,
            add_history=True,
            add_progbar=verbose != 0 and self._workers.chief,
            verbose=verbose,
            epochs=epochs,
            steps=train.steps,
            model=self.model,
        )
        self.model.stop_training = progress.stopped
        if saved is not None:
            saved.restore_variables(self._state())
        hooks.on_train_begin()
        if saved is not None:
            saved.restore_callbacks(hooks.callbacks)
        restored = take_restored_epoch(self.model)
        if restored:
            train.skip_epochs(restored - progress.epoch)
            progress.epoch = restored

        with self._workers.explain_lost_worker():
            logs = self._train(
                train, validation, hooks, progress, backup, epochs, class_weight, validation_freq
            )
        self.optimizer.finalize_variable_values(self.model.trainable_variables)
        hooks.on_train_end(logs)
        if backup is not None:
            backup.finish()
        return next(c for c in hooks.callbacks if isinstance(c, keras.callbacks.History))

    def evaluate(
        self,
        data: Any,
        *,
        steps: int | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
    ) -> dict[str, float]:
        """The loss and the metrics of the model in inference mode.

        Args:
            data: As in `fit`.
            steps: How many batches to evaluate on, by default all.
            callbacks: Keras callbacks.
            batch_size: For arrays, 32 by default.
            verbose: 0 is silent, 1 or "auto" a progress bar, 2 a line.

        Returns:
            Each value by its name, ``"loss"`` among them.

        Raises:
            TypeError: if the data is of no kind that is known.
            ValueError: if the data is empty, or an argument has no meaning.
        """
        check_count("steps", steps, optional=True)
        check_count("batch_size", batch_size, optional=True)
        self._check_compiled()
        _, given = split_backup(callbacks, self._workers.chief)
        stream = _stream("data", data, steps, batch_size)
        check_batch_size(batch_size, stream)
        stream.open()
        self._workers.check_alike(data=stream.ahead)
        self._steps.build(stream.spec)
        hooks = keras.callbacks.CallbackList(
            given,
            add_progbar=verbose != 0 and self._workers.chief,
            verbose=verbose,
            epochs=1,
            steps=stream.steps,
            model=self.model,
        )
        with self._workers.explain_lost_worker():
            return self._passes.evaluate(stream, hooks)

    def _train(
        self,
        train: Stream,
        validation: Stream | None,
        hooks: keras.callbacks.CallbackList,
        progress: Progress,
        backup: Backup | None,
        epochs: int,
        class_weight: Mapping[int, float] | None,
        validation_freq: int,
    ) -> dict[str, Any] | None:
        """Trains up to the last epoch, and returns its logs."""

        def after_batch() -> None:
            if backup is None or not backup.after_batch() or self.model.stop_training:
                return  # Where a callback ends the training, the end of the epoch is still to come.
            if self._passes.at_update_boundary(progress):
                progress.position = train.position
                backup.write(progress, self._state(), hooks.callbacks)

        watch: StatisticsWatch | None = StatisticsWatch(self.model)
        logs: dict[str, Any] | None = None
        while progress.epoch < epochs and not self.model.stop_training:
            began_at = progress.batches
            if began_at == 0:
                self.model.reset_metrics()
            hooks.on_epoch_begin(progress.epoch)
            self._steps.prepare(train.spec, class_weight)  # A callback may have frozen something.
            self._passes.train(train, hooks, progress, after_batch)
            ran_out = not self.model.stop_training and progress.batches < (train.steps or 1)
            if ran_out:
                warnings.warn(
                    f"The training data ran out after {progress.batches} batches of epoch "
                    f"{progress.epoch + 1} of {epochs}: training ends here. Pass data that can be read "
                    "again, or enough of it.",
                    stacklevel=3,  # where `fit` is called
                )
                if progress.batches == 0:
                    break
            if watch is not None and progress.batches > began_at:
                watch.check(progress.batches - began_at)
                watch = None
            logs = floats(self._steps.results())
            if validation is not None and (progress.epoch + 1) % validation_freq == 0:
                validation.restart()
                results = self._passes.evaluate(validation, hooks)
                logs |= {f"val_{name}": value for name, value in results.items()}
                progress.validation_position = validation.position
            hooks.on_epoch_end(progress.epoch, logs)
            progress.epoch += 1
            progress.batches = 0
            progress.position = train.position
            progress.stopped = self._workers.any(self.model.stop_training or ran_out)
            if backup is not None and backup.after_epoch():
                backup.write(progress, self._state(), hooks.callbacks)
            self.model.stop_training = progress.stopped
        return logs

    def _state(self) -> list[Any]:
        """All variables that decide how the training goes on."""
        model = self.model
        return [
            *model.variables,
            *self.optimizer.variables,
            *model.metrics_variables,
            *self._steps.variables,
        ]

    def _check_compiled(self) -> None:
        if self.model.optimizer is not self.optimizer:
            raise RuntimeError(
                "The model was compiled again after this TrainingLoop was made, by `model.compile` or "
                "another loop: make a new TrainingLoop. "
                f"Received: a model with optimizer {self.model.optimizer!r}."
            )


def _stream(
    name: str,
    data: Any,
    steps: int | None,
    batch_size: int | None,
    shuffle: bool = False,
    seed: int = 0,
) -> Stream:
    return Stream(name, as_source(name, data, batch_size or 32, shuffle, seed), steps)
