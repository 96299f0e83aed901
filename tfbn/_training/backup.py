"""What a killed run leaves behind, so that the next one goes on as if nothing had happened.

Keras's own `BackupAndRestore` writes weights and epoch into two files, one after the other, in place; in
the middle of an epoch it saves weights that are ahead of the epoch which it restores; and it knows
nothing of the state of other callbacks. Here all of it is one file, and replaced in one piece.
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

# What these callbacks remember from one epoch to the next, by their public names.
_MEMORY: dict[type[keras.callbacks.Callback], tuple[str, ...]] = {
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.EarlyStopping: (
        "wait",
        "best",
        "best_epoch",
        "best_weights",
        "stopped_epoch",
    ),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best",),
}


@dataclasses.dataclass
class Progress:
    """Where in the training a run is."""

    seed: int
    """What the order of the data follows from."""
    epoch: int
    """The number of the epoch that is being trained, or comes next."""
    batches: int = 0
    """How many of its batches were trained on."""
    position: Position = (0, 0)
    """The place in the training data."""
    validation_position: Position = (0, 0)
    """The place in the validation data."""
    stopped: bool = False
    """Whether a callback has ended the training."""


class Backup:
    """Does the work of a `keras.callbacks.BackupAndRestore`, where and as often as that one says."""

    def __init__(self, settings: keras.callbacks.BackupAndRestore, chief: bool = True):
        self._chief = chief
        self._directory = str(settings.backup_dir)
        self._path = tf.io.gfile.join(self._directory, "training.npz")
        self._every = settings.save_freq
        self._delete = settings.delete_checkpoint
        self._unsaved = 0

    def read(self) -> "Saved | None":
        """What the interrupted run saved last, or `None` if there was none."""
        if not tf.io.gfile.exists(self._path):
            return None
        with tf.io.gfile.GFile(self._path, "rb") as file:
            stored = np.load(io.BytesIO(file.read()), allow_pickle=False)
        arrays = [stored[f"array_{index}"] for index in range(len(stored.files) - 1)]
        return Saved(self._path, json.loads(str(stored["state"])), arrays)

    def after_batch(self) -> bool:
        """Counts a batch, and says whether a backup is due."""
        self._unsaved += 1
        return self._every != "epoch" and bool(self._every) and self._unsaved >= self._every

    def after_epoch(self) -> bool:
        """Says whether a backup is due at the end of an epoch."""
        return self._every == "epoch"

    def write(
        self,
        progress: Progress,
        variables: Sequence[Any],
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> None:
        """Saves all of it; whenever the process is killed, the file is the last one or this one, whole.

        Of several workers the chief writes. All of them read: some variables are sums over replicas.
        """
        arrays = [variable.numpy() for variable in variables]
        self._unsaved = 0
        if not self._chief:
            return
        own = len(arrays)

        def encode(value: Any) -> Any:
            if isinstance(value, np.generic):
                return value.item()
            arrays.append(np.asarray(value))
            return {"array": len(arrays) - 1}

        memory = [
            (type(callback).__name__, {name: getattr(callback, name) for name in names})
            for callback, names in _with_memory(callbacks)
        ]
        state = json.dumps(
            {"progress": dataclasses.asdict(progress), "variables": own, "callbacks": memory},
            default=encode,
        )
        buffer = io.BytesIO()
        np.savez(buffer, state=state, **{f"array_{i}": array for i, array in enumerate(arrays)})
        tf.io.gfile.makedirs(self._directory)
        with tf.io.gfile.GFile(self._path + ".new", "wb") as file:
            file.write(buffer.getvalue())
        tf.io.gfile.rename(self._path + ".new", self._path, overwrite=True)

    def finish(self) -> None:
        """The run is complete: the next one begins anew."""
        if self._chief and self._delete and tf.io.gfile.exists(self._directory):
            tf.io.gfile.rmtree(self._directory)


class Saved:
    """The state of an interrupted run."""

    def __init__(self, path: str, state: dict[str, Any], arrays: list[np.ndarray]):
        self.progress = Progress(**state["progress"])
        self._path = path
        self._values = arrays[: state["variables"]]
        self._memory = _decoded(state["callbacks"], arrays)

    def restore_variables(self, variables: Sequence[Any]) -> None:
        """Gives all variables the values that they had.

        Raises:
            ValueError: if they are not those of the interrupted run; then nothing is changed.
        """
        wanted = [tuple(variable.shape) for variable in variables]
        found = [value.shape for value in self._values]
        if wanted != found:
            raise ValueError(
                f"The backup in {self._path} is not of this training: the model, the optimizer, the "
                "metrics or accumulation_steps were others. Restore them, or delete the backup to begin "
                f"anew. Received: a backup of {len(found)} variables of shapes {found}, for "
                f"{len(wanted)} variables of shapes {wanted}."
            )
        for variable, value in zip(variables, self._values, strict=True):
            dtype = tf.as_dtype(variable.dtype).as_numpy_dtype
            # NumPy's files keep the bits of a bfloat16, but not its name.
            variable.assign(value.view(dtype) if value.dtype.kind == "V" else value)

    def restore_callbacks(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Lets the callbacks remember what they knew; to be called after their `on_train_begin`."""
        remembering = [callback for callback, _ in _with_memory(callbacks)]
        for name, memory in self._memory:
            # Not every worker has all callbacks of the chief.
            callback = next((c for c in remembering if type(c).__name__ == name), None)
            if callback is not None:
                remembering.remove(callback)
                for attribute, value in memory.items():
                    setattr(callback, attribute, value)


def _with_memory(
    callbacks: Sequence[keras.callbacks.Callback],
) -> list[tuple[keras.callbacks.Callback, tuple[str, ...]]]:
    return [
        (callback, names)
        for callback in callbacks
        for kind, names in _MEMORY.items()
        if isinstance(callback, kind)
    ]


def _decoded(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"array"} and isinstance(value["array"], int):
            return arrays[value["array"]]
        return {name: _decoded(part, arrays) for name, part in value.items()}
    return [_decoded(part, arrays) for part in value] if isinstance(value, list) else value
