"""Backups from which an interrupted run resumes exactly.

Keras's own `BackupAndRestore` writes the weights and the epoch to two files in place. In mid-epoch it saves
weights that are ahead of the epoch that it restores, and it does not save the state of other callbacks. Here
everything is in one file, which is replaced atomically.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._training.stream import Position

# The public attributes in which these callbacks keep state between epochs.
_CALLBACK_STATE: dict[type[keras.callbacks.Callback], tuple[str, ...]] = {
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.EarlyStopping: ("wait", "best", "best_epoch", "best_weights", "stopped_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best",),
}


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    seed: int
    """The seed of the order of the data."""
    epoch: int
    """The number of the current epoch, or of the next one between two epochs."""
    batches: int = 0
    """How many of its batches were trained on."""
    position: Position = (0, 0)
    """The position in the training data."""
    validation_position: Position = (0, 0)
    """The position in the validation data."""
    stopped: bool = False
    """Whether a callback has ended the training."""


class Backup:
    """Does the work of a `keras.callbacks.BackupAndRestore`, as configured by that callback.

    Args:
        settings: The callback.
        chief: Whether this process writes. All processes read.
    """

    def __init__(self, settings: keras.callbacks.BackupAndRestore, chief: bool = True):
        self._chief = chief
        self._directory = str(settings.backup_dir)
        self._path = tf.io.gfile.join(self._directory, "training.npz")
        self._every = settings.save_freq
        self._delete = settings.delete_checkpoint
        self._unsaved_batches = 0

    def read(self) -> "Saved | None":
        """Returns the state of the interrupted run, or `None` if there is none."""
        if not tf.io.gfile.exists(self._path):
            return None
        with tf.io.gfile.GFile(self._path, "rb") as file:
            stored = np.load(io.BytesIO(file.read()), allow_pickle=False)
        arrays = [stored[f"array_{index}"] for index in range(len(stored.files) - 1)]
        return Saved(self._path, json.loads(str(stored["state"])), arrays)

    def is_due_after_batch(self) -> bool:
        """Counts a batch and returns whether to back up now."""
        self._unsaved_batches += 1
        return self._every != "epoch" and bool(self._every) and self._unsaved_batches >= self._every

    def is_due_after_epoch(self) -> bool:
        """Returns whether to back up at the end of an epoch."""
        return self._every == "epoch"

    def write(
        self,
        progress: Progress,
        variables: Sequence[Any],
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> None:
        """Writes a backup. A process killed at any time leaves the previous one or this one, complete.

        Only the chief writes, but every worker must call this: reading some variables sums them over the
        replicas.
        """
        arrays = [variable.numpy() for variable in variables]
        self._unsaved_batches = 0
        if not self._chief:
            return
        number_of_variables = len(arrays)

        def encode(value: Any) -> Any:
            if isinstance(value, np.generic):
                return value.item()
            arrays.append(np.asarray(value))
            return {"array": len(arrays) - 1}

        callback_states = [
            (type(callback).__name__, {name: getattr(callback, name) for name in names})
            for callback, names in _with_state(callbacks)
        ]
        state = json.dumps(
            {
                "progress": dataclasses.asdict(progress),
                "variables": number_of_variables,
                "callbacks": callback_states,
            },
            default=encode,
        )
        buffer = io.BytesIO()
        np.savez(buffer, state=state, **{f"array_{i}": array for i, array in enumerate(arrays)})
        tf.io.gfile.makedirs(self._directory)
        with tf.io.gfile.GFile(self._path + ".new", "wb") as file:
            file.write(buffer.getvalue())
        tf.io.gfile.rename(self._path + ".new", self._path, overwrite=True)

    def finish(self) -> None:
        """Deletes the backup of a completed run, unless the callback is set to keep it."""
        if self._chief and self._delete and tf.io.gfile.exists(self._directory):
            tf.io.gfile.rmtree(self._directory)


class Saved:
    """The state of an interrupted run."""

    def __init__(self, path: str, state: dict[str, Any], arrays: list[np.ndarray]):
        self.progress = Progress(**state["progress"])
        self._path = path
        self._values = arrays[: state["variables"]]
        self._callback_states = _decoded(state["callbacks"], arrays)

    def restore_variables(self, variables: Sequence[Any]) -> None:
        """Assigns the saved values.

        Raises:
            ValueError: If the variables are not those of the interrupted run. None is changed then.
        """
        expected = [tuple(variable.shape) for variable in variables]
        found = [value.shape for value in self._values]
        if expected != found:
            raise ValueError(
                f"The backup in {self._path} belongs to another training run: its model, optimizer, metrics "
                "or accumulation_steps differ. Use the same ones, or delete the backup to start over. "
                f"Received: a backup of {len(found)} variables of shapes {found}, for {len(expected)} "
                f"variables of shapes {expected}."
            )
        for variable, value in zip(variables, self._values, strict=True):
            dtype = tf.as_dtype(variable.dtype).as_numpy_dtype
            # NumPy files keep the bits of a bfloat16, but not the name of its dtype.
            variable.assign(value.view(dtype) if value.dtype.kind == "V" else value)

    def restore_callbacks(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Restores the state of the callbacks, after their `on_train_begin` has reset it."""
        remaining = [callback for callback, _ in _with_state(callbacks)]
        for name, attributes in self._callback_states:
            # Some callbacks run on the chief only.
            callback = next((c for c in remaining if type(c).__name__ == name), None)
            if callback is not None:
                remaining.remove(callback)
                for attribute, value in attributes.items():
                    setattr(callback, attribute, value)


def _with_state(
    callbacks: Sequence[keras.callbacks.Callback],
) -> list[tuple[keras.callbacks.Callback, tuple[str, ...]]]:
    return [
        (callback, names)
        for callback in callbacks
        for kind, names in _CALLBACK_STATE.items()
        if isinstance(callback, kind)
    ]


def _decoded(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"array"} and isinstance(value["array"], int):
            return arrays[value["array"]]
        return {name: _decoded(part, arrays) for name, part in value.items()}
    return [_decoded(part, arrays) for part in value] if isinstance(value, list) else value
