"""Replacing a directory as a whole, or not at all."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yields a directory to write to, and moves it to `path` if the block ends without an error.

    The directory to write to is inside a hidden one beside `path`, named `.NAME.*.tmp`. Two renames
    replace an existing directory: the old one moves into the hidden directory, then the new one takes its
    place. If anything raises, `KeyboardInterrupt` included, the old directory is moved back.

    A process that is killed leaves its hidden directory behind. The next call for the same path moves an
    old directory back that such a process had moved away, and removes the hidden one. A lock
    that ends with its process tells abandoned directories from those still in use. On a system
    without `fcntl` (Windows) there is no such lock, and abandoned directories stay.

    Args:
        path: Where the directory is to be. Missing parents are created.
        overwrite: Whether an existing directory may be replaced.
        is_ours: Tells whether an existing directory is of the kind that may be replaced.

    Raises:
        FileExistsError: If `path` exists and may not be replaced; usually before the block runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _recover_from_killed(path)
    _require_replaceable(path, overwrite, is_ours)
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    with _locked(hidden):
        try:
            new = hidden / "new"
            new.mkdir()
            yield new
            _require_replaceable(path, overwrite, is_ours)
            if os.path.lexists(path):
                path.rename(hidden / "old")
            new.rename(path)
        finally:
            _restore_and_remove(hidden, path)


def _require_replaceable(path: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_ours(str(path)):
        raise FileExistsError(
            f"The path exists and is not a SavedModel; it was not modified. Received: path='{path}'. "
            "Choose another path."
        )
    if not overwrite:
        raise FileExistsError(
            f"The path already contains a SavedModel. Received: path='{path}', overwrite=False. "
            "Choose another path, or pass overwrite=True to replace it."
        )


def _restore_and_remove(hidden: Path, path: Path) -> None:
    """Moves the old directory back unless a new one took its place, then removes the hidden one."""
    old = hidden / "old"
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _locked(hidden: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _recover_from_killed(path: Path) -> None:
    """Cleans up after calls for the same path whose process is gone."""
    if fcntl is None:
        return
    # Does not match `.NAME.more.*.tmp`.
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.tmp")
    for hidden in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        try:
            descriptor = os.open(hidden / "lock", os.O_RDWR)
        except OSError:  # Another process has just created it, or just removed it.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Still in use.
            continue
        else:
            _restore_and_remove(hidden, path)
        finally:
            os.close(descriptor)
