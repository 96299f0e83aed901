"""The public training loop."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._support.checks import check_count
from tfbn._support.keras_internals import take_restored_epoch
from tfbn._training.backup import Progress
from tfbn._training.callbacks import Callback, split_backup
from tfbn._training.checks import check_batch_size, check_mean_loss, check_own_steps
from tfbn._training.epochs import Epochs, Run
from tfbn._training.step import Steps
from tfbn._training.strategy import check_scope, check_strategy, scope_of
from tfbn._training.stream import stream_of, with_targets
from tfbn._training.workers import Workers


class TrainingLoop:
    r"""Trains a Keras model with `tf.GradientTape`, and treats batch normalization correctly.

    Losses, metrics, callbacks, mixed precision and saving work as in `keras.Model.fit`, and so do the results:
    the model is compiled with `keras.Model.compile`, and each batch is one compiled step. On top of that:

    - Accumulation. With ``accumulation_steps=k``, k consecutive batches make one update, with the gradient of
      the mean loss over all their examples, :math:`\sum_i n_i g_i / \sum_i n_i`. `tfbn.BatchNormalization`
      merges the moments of the k batches and updates its moving statistics once, as for one large batch.
      (`keras.layers.BatchNormalization` updates them k times.) Each batch is still normalized by its own
      statistics.
    - Distribution. Under a ``strategy``, each replica trains on its shard of every batch, and batch sizes are
      global. Synchronized training (``synchronized=True`` in the layers) matches one device training on the
      whole batches. Every worker process runs the same program on the same data in the same order.
    - Exact resumption. With a `keras.callbacks.BackupAndRestore`, a run that was killed and started again ends
      with the same weights as a run that was never interrupted.
    - A check. After the first epoch the loop raises `StatisticsNotUpdatedError` if batch normalization layers
      that are not frozen have learned no moving statistics.

    Args:
        model: A `keras.Model`. The loop compiles it.
        optimizer: A Keras optimizer: an instance, a name or a config.
        loss: A loss, as in `keras.Model.compile`. `None` if the model adds all its losses itself.
        metrics: Metrics, as in `keras.Model.compile`.
        strategy: A `tf.distribute.MirroredStrategy`, `MultiWorkerMirroredStrategy` or `OneDeviceStrategy`. The
            model, the optimizer and the metrics must be created in its scope. `None` trains on one device.
        jit_compile: Whether to compile the step with XLA, which works on one replica only. ``"auto"`` as in
            `keras.Model.compile`.
        accumulation_steps: The number of batches per update.
        loss_weights: As in `keras.Model.compile`.
        weighted_metrics: As in `keras.Model.compile`.

    Raises:
        TypeError: If `model` is not a Keras model, or `strategy` is of an unsupported type.
        ValueError: If an argument is invalid or contradicts another, or if something was created outside the
            scope of the strategy. The model is not changed then.

    Example:
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras.layers.Dense(8), tfbn.BatchNormalization(), keras.layers.Dense(1)]
        ... )
        >>> loop = tfbn.TrainingLoop(model, optimizer="adam", loss="mse", metrics=["mae"])
        >>> history = loop.fit(x, y, validation_data=(x_val, y_val), epochs=10)
        >>> loop.evaluate(x_test, y_test)
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
        check_own_steps(model)
        check_count("accumulation_steps", accumulation_steps)
        check_strategy(strategy)
        with scope_of(strategy):
            optimizer = keras.optimizers.get(optimizer)
        check_scope(strategy, model, optimizer, (metrics, weighted_metrics), jit_compile)
        check_mean_loss(optimizer, loss, accumulation_steps, strategy)
        settings = {
            "loss": loss,
            "loss_weights": loss_weights,
            "metrics": (list(metrics) if isinstance(metrics, tuple) else metrics) or None,
            "weighted_metrics": weighted_metrics,
            "jit_compile": jit_compile,
        }
        with scope_of(strategy):
            # Keras sets the optimizer before it checks the rest. If it refuses something, it should do so here.
            keras.Sequential().compile("sgd", **settings)
            own_metrics = model.metrics
            model.compile(optimizer, **settings)
        # A model may have a metric of its own that is named "loss".
        created = (m for m in model.metrics if m.name == "loss" and m not in own_metrics)
        self.model = model
        self.accumulation_steps = accumulation_steps
        self.optimizer = model.optimizer  # Keras wraps it in half precision.
        self._workers = Workers(strategy)
        self._steps = Steps(model, next(created, None), accumulation_steps > 1, strategy)
        self._epochs = Epochs(model, self._steps, self._workers, accumulation_steps)

    def fit(
        self,
        data: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
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

        With a `keras.callbacks.BackupAndRestore` among the callbacks, an interrupted run resumes from its last
        backup, also in mid-epoch. It ends with the same bits as an uninterrupted run wherever the device is
        deterministic (a CPU is). This needs data that comes in the same order again: arrays do; a
        `tf.data.Dataset` or a generator must be seeded, and is read up to the position again. The loop uses the
        callback's `backup_dir`, `save_freq` and `delete_checkpoint`, and also saves the metrics, the position in
        the data, and the state of History, EarlyStopping, ReduceLROnPlateau and ModelCheckpoint.

        Args:
            data: The inputs, if `y` is given. Otherwise a `tf.data.Dataset`; arrays ``x``, ``(x, y)`` or
                ``(x, y, sample_weight)``, each of which may be a tuple or dict of arrays; a
                `keras.utils.PyDataset`; or an iterable of batches, such as a generator.
            y: The targets, for arrays.
            sample_weight: The weights of the examples, with `y`.
            validation_data: Data to evaluate after each epoch, in any of these forms.
            epochs: The number of epochs in all; it trains ``epochs - initial_epoch`` of them.
            steps_per_epoch: The number of batches per epoch, one pass over the data by default. Required for
                endless data. The next epoch continues where this one ended.
            callbacks: Keras callbacks.
            batch_size: The batch size for arrays, 32 by default, over all replicas.
            shuffle: Whether to shuffle the examples of arrays and the batches of a PyDataset.
            seed: The seed of the order of the data. By default it is drawn from Python's `random`, which
                `keras.utils.set_random_seed` seeds.
            class_weight: The weight of each class in the loss, 1 for a class that is not listed.
            validation_steps: The number of batches to evaluate, all by default.
            validation_freq: The number of epochs between evaluations.
            initial_epoch: How many epochs were trained before.
            verbose: 0 for silence, 1 or "auto" for a progress bar, 2 for one line per epoch.

        Returns:
            The Keras `History` of losses and metrics, including those of before an interruption.

        Raises:
            RuntimeError: If the model was compiled again after the loop was created.
            StatisticsNotUpdatedError: If batch normalization layers learned no moving statistics in the first
                epoch. The trained weights are kept.
            TypeError: If the data is of an unsupported type.
            ValueError: If the data is empty, an argument is invalid, or the workers of a strategy have
                different data. The model is not changed then.
            tf.errors.UnavailableError: If another worker is lost.
        """
        check_count("epochs", epochs)
        check_count("validation_freq", validation_freq)
        check_count("initial_epoch", initial_epoch, least=0)
        check_count("steps_per_epoch", steps_per_epoch, optional=True)
        check_count("validation_steps", validation_steps, optional=True)
        check_count("batch_size", batch_size, optional=True)
        self._check_compiled()
        backup, other_callbacks = split_backup(callbacks, self._workers.chief)
        saved = None if backup is None else backup.read()
        seed = self._workers.from_chief(random.randrange(2**31) if seed is None else seed)
        progress = Progress(seed, initial_epoch) if saved is None else saved.progress

        data = with_targets(data, y, sample_weight)
        train = stream_of("data", data, steps_per_epoch, batch_size, shuffle, progress.seed)
        validation = None
        if validation_data is not None:
            validation = stream_of("validation_data", validation_data, validation_steps, batch_size)
            evaluations = epochs // validation_freq - initial_epoch // validation_freq
            if evaluations > 1 and not validation.can_restart:
                raise ValueError(
                    "`validation_data` can be read only once, but several epochs evaluate it. Pass a data "
                    "set, arrays, or validation_steps. "
                    f"Received: validation_data of type {type(validation_data).__name__}."
                )
        check_batch_size(batch_size, train, validation)
        train.open(progress.position)
        if validation is not None:
            validation.open(progress.validation_position)
        self._workers.check_equal(
            position=(*dataclasses.astuple(progress), epochs, train.steps),
            data=train.ahead,
            validation_data=None if validation is None else validation.ahead,
        )

        self._steps.prepare(train.spec, class_weight)
        self._steps.reset()
        hooks = self._callback_list(other_callbacks, verbose, epochs, train.steps, history=True)
        self.model.stop_training = progress.stopped
        if saved is not None:
            saved.restore_variables(self._steps.state)
        hooks.on_train_begin()
        if saved is not None:
            saved.restore_callbacks(hooks.callbacks)
        restored_epoch = take_restored_epoch(self.model)
        if restored_epoch:
            train.skip_epochs(restored_epoch - progress.epoch)
            progress.epoch = restored_epoch

        run = Run(train, validation, epochs, validation_freq, class_weight, hooks, backup, progress)
        with self._workers.explain_lost_worker():
            logs = self._epochs.train(run)
        self.optimizer.finalize_variable_values(self.model.trainable_variables)
        hooks.on_train_end(logs)
        if backup is not None:
            backup.finish()
        return next(c for c in hooks.callbacks if isinstance(c, keras.callbacks.History))

    def evaluate(
        self,
        data: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
    ) -> dict[str, float]:
        """Computes the loss and the metrics of the model in inference mode.

        Args:
            data: As in `fit`.
            y: As in `fit`.
            sample_weight: As in `fit`.
            steps: The number of batches to evaluate, all by default.
            callbacks: Keras callbacks.
            batch_size: The batch size for arrays, 32 by default.
            verbose: 0 for silence, 1 or "auto" for a progress bar, 2 for one line.

        Returns:
            The value of each metric by name, including ``"loss"``.

        Raises:
            RuntimeError: If the model was compiled again after the loop was created.
            TypeError: If the data is of an unsupported type.
            ValueError: If the data is empty, or an argument is invalid.
        """
        check_count("steps", steps, optional=True)
        check_count("batch_size", batch_size, optional=True)
        self._check_compiled()
        _, other_callbacks = split_backup(callbacks, self._workers.chief)
        stream = stream_of("data", with_targets(data, y, sample_weight), steps, batch_size)
        check_batch_size(batch_size, stream)
        stream.open()
        self._workers.check_equal(data=stream.ahead)
        self._steps.build(stream.spec)
        hooks = self._callback_list(other_callbacks, verbose, 1, stream.steps)
        with self._workers.explain_lost_worker():
            return self._epochs.evaluate(stream, hooks)

    def _check_compiled(self) -> None:
        if self.model.optimizer is not self.optimizer:
            raise RuntimeError(
                "The model was compiled again after this TrainingLoop was created, by `model.compile` or "
                "another loop. Create a new TrainingLoop. "
                f"Received: a model with optimizer {self.model.optimizer!r}."
            )

    def _callback_list(
        self,
        callbacks: Sequence[Callback],
        verbose: int | str,
        epochs: int,
        steps: int | None,
        history: bool = False,
    ) -> keras.callbacks.CallbackList:
        return keras.callbacks.CallbackList(
            callbacks,
            add_history=history,
            add_progbar=verbose != 0 and self._workers.chief,
            verbose=verbose,
            epochs=epochs,
            steps=steps,
            model=self.model,
            accumulation_steps=self.accumulation_steps,  # A callback's `params` may tell it.
        )
