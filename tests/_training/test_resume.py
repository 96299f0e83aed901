"""A run that is killed and started again ends like one that was never killed, to the bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# For the processes that are killed: it imports Keras in half the time.
import quick_start  # noqa: F401

# isort: split
import keras
import numpy as np
import pytest
import tensorflow as tf

from tfbn._layer.batch_normalization import BatchNormalization
from tfbn._training.loop import TrainingLoop

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS = 4, 5


@pytest.fixture(autouse=True)
def no_tensor_is_small() -> None:
    """Not here: the runs that are killed are other processes, and have to take the same kernels."""


class At(keras.callbacks.Callback):
    """Does something after a batch (or, with batch None, at the end) of an epoch."""

    def __init__(self, epoch: int, batch: int | None, action: Callable[[], None]):
        super().__init__()
        self.when, self.action = (epoch, batch), action

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.when:
            self.action()

    def on_epoch_end(self, epoch, logs=None):
        if (epoch, None) == self.when:
            self.action()


def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (STEPS * 8 - 3, 4)), rng.normal(size=(STEPS * 8 - 3, 1))


def shuffled() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(arrays()).shuffle(40, seed=5).batch(8).prefetch(1)


def train(
    directory: Path,
    make_data: Callable[[], object],
    callbacks: list = (),
    save_freq: object = 3,
    **fit: object,
) -> tuple[list[np.ndarray], dict]:
    """A run that has everything which must survive: all its weights at the end, and its history."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6), BatchNormalization()])
    model.add(keras.layers.Activation("tanh"))
    model.add(keras.layers.Dropout(0.3))
    model.add(keras.layers.Dense(1))
    backup = keras.callbacks.BackupAndRestore(directory / "backup", save_freq=save_freq)
    kept = [
        backup,
        keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1, min_delta=1e6),
        keras.callbacks.EarlyStopping(monitor="loss", patience=9, restore_best_weights=True),
    ]
    loop = TrainingLoop(model, "adam", "mse", ["mae"], accumulation_steps=2)
    fit = {"epochs": EPOCHS, "validation_data": arrays(), "verbose": 0} | fit
    history = loop.fit(make_data(), callbacks=[*kept, *callbacks], **fit)
    values = [v.numpy() for v in (*model.variables, *loop.optimizer.variables)]
    return values, history.history


def small(units: int = 1, shape: tuple[int | None, ...] = (4,)) -> TrainingLoop:
    model = keras.Sequential([keras.Input(shape), BatchNormalization(), keras.layers.Dense(units)])
    return TrainingLoop(model, "sgd", "mse")


def train_small(
    backup: keras.callbacks.Callback,
    make_data: Callable[[], object],
    *callbacks: keras.callbacks.Callback,
    shape: tuple[int | None, ...] = (4,),
    **fit: object,
) -> tuple[list[np.ndarray], dict]:
    """A run that is quick to trace."""
    keras.utils.set_random_seed(3)
    loop = small(shape=shape)
    fit = {"epochs": 3, "verbose": 0} | fit
    history = loop.fit(make_data(), callbacks=[backup, *callbacks], **fit)
    return loop.model.get_weights(), history.history


def killed(directory: Path, epoch: int, batch: int | None) -> None:
    """Runs the training in a process of its own, which kills itself at this place."""
    done = subprocess.run(
        [sys.executable, __file__, str(directory), str(epoch), str(batch)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'harness'}"},
        timeout=240,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_same(seen: tuple[list[np.ndarray], dict], wanted: tuple[list[np.ndarray], dict]) -> None:
    for one, other in zip(seen[0], wanted[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert seen[1] == wanted[1]


@pytest.mark.no_cover
def test_a_run_killed_twice_by_sigkill_ends_like_an_undisturbed_run(tmp_path):
    """In the middle of an epoch and of a group, and between two epochs; arrays shuffled by default."""
    kill_at = [(1, 3), (2, None)]
    for epoch, batch in kill_at:
        killed(tmp_path, epoch, batch)
        assert (tmp_path / "backup").exists()
    resumed = train(tmp_path, arrays, batch_size=8)
    assert not (tmp_path / "backup").exists()
    assert_same(resumed, train(tmp_path / "undisturbed", arrays, batch_size=8))


class Interrupted(BaseException):
    """Ends a run as abruptly as a process can be ended from inside."""


def interrupt() -> None:
    raise Interrupted


class Counted(keras.utils.PyDataset):
    """Batches that depend on how many passes were made."""

    def __init__(self):
        super().__init__(workers=2)
        self.passes = 0

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        x, y = arrays()
        return x[index * 7 : index * 7 + 7] + self.passes, y[index * 7 : index * 7 + 7]

    def on_epoch_end(self):
        self.passes += 1


class Padded(Counted):
    """Batches of sequences, each padded to a length of its own."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        length = 1 + (3 * self.passes + index) % 4
        return tuple(np.repeat(part[:, None], length, axis=1) for part in (x, y))


KINDS = {
    "arrays": (arrays, "epoch", {"batch_size": 8}),
    "shuffled anew in each pass": (shuffled, 2, {}),
    "of unknown length": (lambda: shuffled().filter(lambda x, y: True), 3, {}),
    "several epochs a pass": (shuffled, 2, {"steps_per_epoch": 3}),
    "endless": (lambda: shuffled().repeat(), 1, {"steps_per_epoch": 3}),
    "generator": (lambda: iter(shuffled().repeat()), 2, {"steps_per_epoch": 3}),
    "PyDataset": (Counted, 2, {}),
    "padded": (Padded, 2, {"shape": (None, 4)}),
}


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_resumes_at_the_right_batch(kind, tmp_path):
    make, save_freq, fit = KINDS[kind]
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq)
    for place in ((1, 2), (1, None)):
        with pytest.raises(Interrupted):
            train_small(backup, make, At(*place, interrupt), **fit)
    assert_same(train_small(backup, make, **fit), train_small(backup, make, **fit))


def test_evaluations_after_a_resume_begin_with_the_first_batch(tmp_path):
    """Of data that an evaluation does not exhaust."""
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    fit = {"batch_size": 8, "validation_data": arrays(), "validation_steps": 2}
    with pytest.raises(Interrupted):
        train_small(backup, arrays, At(1, 2, interrupt), **fit)
    assert_same(train_small(backup, arrays, **fit), train_small(backup, arrays, **fit))


def test_a_run_killed_while_writing_a_backup_resumes_from_the_previous_one(tmp_path, monkeypatch):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    rename, writes = tf.io.gfile.rename, []

    def killed_at_the_second(*args: object, **kwargs: object) -> None:
        writes.append(args)
        if len(writes) == 2:
            interrupt()
        rename(*args, **kwargs)

    monkeypatch.setattr(tf.io.gfile, "rename", killed_at_the_second)
    with pytest.raises(Interrupted):
        train_small(backup, shuffled)
    monkeypatch.undo()
    assert_same(train_small(backup, shuffled), train_small(backup, shuffled))


@pytest.mark.parametrize("begin", [0, 2])
def test_a_subclass_of_backup_and_restore_does_its_own_work(begin, tmp_path):
    class Mine(keras.callbacks.BackupAndRestore):
        pass

    backup = Mine(tmp_path / "backup")
    fit = {"initial_epoch": begin, "epochs": begin + 3}
    with pytest.raises(Interrupted):
        train_small(backup, shuffled, At(begin + 2, 1, interrupt), **fit)
    resumed, undisturbed = (train_small(backup, shuffled, **fit) for _ in range(2))
    assert_same((resumed[0], {}), (undisturbed[0], {}))
    assert len(resumed[1]["loss"]) == 1  # as with Keras: the history of what was left to do


def test_training_that_a_callback_ended_stays_ended_after_a_resume(tmp_path):
    """Killed after EarlyStopping has spoken, but before the training's end."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

        def on_train_end(self, logs=None):
            if self.kill:
                interrupt()

    callbacks = [keras.callbacks.BackupAndRestore(tmp_path / "backup"), Stop()]
    callbacks[1].kill = True
    with pytest.raises(Interrupted):
        small().fit(arrays(), epochs=5, callbacks=callbacks, verbose=0)
    callbacks[1].kill = False
    history = small().fit(arrays(), epochs=5, callbacks=callbacks, verbose=0)
    assert history.epoch == [0]


def test_an_epoch_that_a_callback_cut_short_is_finished_after_a_resume(tmp_path):
    """Though a backup was due at the batch after which the callback spoke."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 3

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=2)
    with pytest.raises(Interrupted):
        train_small(backup, shuffled, Stop(), At(0, None, interrupt))
    assert (tmp_path / "backup").exists()
    resumed, undisturbed = (train_small(backup, shuffled, Stop()) for _ in range(2))
    assert_same(resumed, undisturbed)
    assert len(resumed[1]["loss"]) == 1


def test_callbacks_keep_their_state_across_an_interruption(tmp_path):
    """Best weights and patience, across an interruption."""
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)

    def callbacks() -> list[keras.callbacks.Callback]:
        return [
            keras.callbacks.EarlyStopping(
                monitor="loss", mode="max", patience=3, restore_best_weights=True
            ),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "best.keras", monitor="loss", mode="max", save_best_only=True
            ),
            backup,
        ]

    first = callbacks()
    with pytest.raises(Interrupted):
        small().fit(arrays(), epochs=9, callbacks=[*first, At(2, 0, interrupt)], seed=1, verbose=0)
    saved_at = (tmp_path / "best.keras").stat().st_mtime_ns
    second = callbacks()
    loop = small()
    history = loop.fit(arrays(), epochs=9, callbacks=second, verbose=0)
    assert history.epoch == [0, 1, 2, 3]  # the loss falls, so epoch 0 stays the best
    assert history.history["loss"] == sorted(history.history["loss"], reverse=True)
    assert second[0].best == first[0].best == history.history["loss"][0] == second[1].best
    for restored, best in zip(loop.model.get_weights(), first[0].best_weights, strict=True):
        np.testing.assert_array_equal(restored, best)
    assert (tmp_path / "best.keras").stat().st_mtime_ns == saved_at
    assert (tmp_path / "backup").exists()


def test_a_backup_of_another_run_raises_and_changes_nothing(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    small().fit(arrays(), callbacks=backup, verbose=0)
    other = small(units=2)
    before = other.model.get_weights()
    with pytest.raises(ValueError, match=r"another training run.* Received: a backup of \d+ var"):
        other.fit(arrays(), epochs=2, callbacks=backup, verbose=0)
    for weight, same in zip(other.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, same)


def test_data_that_ends_before_the_position_of_the_backup_raises(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=4)
    with pytest.raises(Interrupted):
        small().fit(arrays(), callbacks=[backup, At(0, 4, interrupt)], batch_size=8, verbose=0)
    with pytest.raises(
        ValueError, match=r"ended before the position .* Received: 2 batches in pass 0"
    ):
        small().fit(arrays(), callbacks=backup, batch_size=20, verbose=0)


def test_half_precision_variables_survive_a_backup(tmp_path):
    def loop() -> TrainingLoop:
        layer = keras.layers.Dense(1, dtype="bfloat16")
        return TrainingLoop(keras.Sequential([keras.Input((4,)), layer]), "adam", "mse")

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    first, second = loop(), loop()
    first.fit(arrays(), epochs=2, callbacks=backup, verbose=0)
    second.fit(arrays(), epochs=2, callbacks=backup, verbose=0)
    for one, other in zip(first.model.variables, second.model.variables, strict=True):
        assert one.dtype == "bfloat16"
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_two_backups_raise(tmp_path):
    backups = [keras.callbacks.BackupAndRestore(tmp_path / name) for name in "ab"]
    with pytest.raises(
        ValueError, match=r"to one directory only\. Received: 2 BackupAndRestore callbacks"
    ):
        small().fit(arrays(), callbacks=backups, verbose=0)


if __name__ == "__main__":
    place, epoch, batch = sys.argv[1:]
    when = (int(epoch), None if batch == "None" else int(batch))
    act = At(*when, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(Path(place), arrays, [act], batch_size=8)
