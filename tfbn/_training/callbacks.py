"""Keras callbacks: which of them run here, and what they read."""

from collections.abc import Sequence
from typing import TypeAlias

import keras

from tfbn._training.backup import Backup

Callback: TypeAlias = keras.callbacks.Callback

# They only write files or talk to a server. Training does not depend on them.
_WRITERS = (
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def split_backup(
    callbacks: Callback | Sequence[Callback] | None, chief: bool
) -> tuple[Backup | None, list[Callback]]:
    """Separates `BackupAndRestore`, whose work the loop does itself, from the other callbacks.

    A subclass of `BackupAndRestore` stays a callback. Callbacks that only write files stay on the chief only.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    given = (
        [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks or ())
    )
    for callback in given:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(
                "`callbacks` must be Keras callbacks. "
                f"Received: {callback!r} of type {type(callback).__name__}."
            )
    backups = [c for c in given if type(c) is keras.callbacks.BackupAndRestore]
    if len(backups) > 1:
        raise ValueError(
            "Training can be backed up to one directory only. "
            f"Received: {len(backups)} BackupAndRestore callbacks."
        )
    others = [c for c in given if c not in backups and (chief or not isinstance(c, _WRITERS))]
    return (Backup(backups[0], chief) if backups else None), others


def any_overrides(callbacks: Sequence[Callback], *methods: str) -> bool:
    """Returns whether any of the callbacks overrides any of these methods."""
    return any(
        getattr(getattr(callback, method), "__func__", None) is not getattr(Callback, method)
        for callback in callbacks
        for method in methods
    )
