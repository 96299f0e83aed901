"""Putting a directory in its place whole, or not at all."""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of Linux: relative to the current directory; and both names must exist, and are swapped."""


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """A directory to write into, which is moved to its place when the block ends without an error.

    It lies in a hidden directory beside the place, named `.NAME.*.tmp`. If the block raises, all of it is
    removed. If the process is killed, it is left behind, and the next call for the same place removes it.

    Where the system can swap two directories at once, there is one in the place at any time. Elsewhere old
    and new are exchanged by two renames; should a kill hit in between, the next call puts the old one back.

    Args:
        path: The place.
        overwrite: Whether what is there may be replaced.
        is_ours: Whether a directory is of the kind that may be replaced.

    Raises:
        FileExistsError: before the block runs, if something is there that may not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed(path)
    _require_free(path, overwrite, is_ours)
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _locked(hidden):
            new, old = hidden / "new", hidden / "old"
            new.mkdir()
            yield new
            _require_free(path, overwrite, is_ours)
            if not (path.exists() and _swap(new, path)):
                if path.exists():
                    path.rename(old)
                try:
                    new.rename(path)
                except OSError:
                    if old.exists():
                        old.rename(path)
                    raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _require_free(path: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not is_ours(str(path)):
        raise FileExistsError(
            f"Something else than a SavedModel is there already, and stays. Received: path='{path}'. "
            "Choose another path."
        )
    if not overwrite:
        raise FileExistsError(
            f"A SavedModel is there already. Received: path='{path}', overwrite=False. "
            "Choose another path, or pass overwrite=True to replace it."
        )


def _swap(one: Path, other: Path) -> bool:
    """Exchanges two directories at once, if the system and the file system can; whether they did."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2  # Python has no name for it.
    except (AttributeError, OSError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clean_up_after_killed(path: Path) -> None:
    name = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.tmp")  # Not of NAME.more.
    for hidden in filter(lambda entry: name.fullmatch(entry.name), path.parent.iterdir()):
        try:
            descriptor = os.open(hidden / "lock", os.O_RDWR)
        except OSError:  # Just made, or just removed, by a process that lives.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (hidden / "old").exists() and not path.exists():
                (hidden / "old").rename(path)
            shutil.rmtree(hidden, ignore_errors=True)
        except BlockingIOError:  # It is being written now.
            continue
        finally:
            os.close(descriptor)
