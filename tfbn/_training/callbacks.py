"""Keras callbacks as they are: what they are given, and what they need."""

from collections.abc import Sequence
from typing import TypeAlias

import keras

from tfbn._training.backup import Backup

Callback: TypeAlias = keras.callbacks.Callback

# They write files or speak to a server, and decide nothing that the training follows.
_WRITERS = (
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)


def split_backup(
    callbacks: Callback | Sequence[Callback] | None, chief: bool
) -> tuple[Backup | None, list[Callback]]:
    """Takes `BackupAndRestore` out of the callbacks: the loop does its work itself.

    A subclass of it stays, and does what it does. Those that only write files stay on the chief.
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
            "Training can be backed up in one place. "
            f"Received: {len(backups)} BackupAndRestore callbacks."
        )
    remain = [c for c in given if c not in backups and (chief or not isinstance(c, _WRITERS))]
    return (Backup(backups[0], chief) if backups else None), remain


def any_overrides(callbacks: Sequence[Callback], *methods: str) -> bool:
    """Whether one of the callbacks does anything in one of these methods."""
    return any(
        getattr(getattr(callback, method), "__func__", None) is not getattr(Callback, method)
        for callback in callbacks
        for method in methods
    )
