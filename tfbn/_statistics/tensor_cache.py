"""Tensors of many batches, kept in memory up to a limit, and in temporary files beyond it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfbn._support.checks import check_count

KINDS = ("auto", "memory", "disk", "none")
SHARE = 0.5
"""How much of the free memory, and of the free space for temporary files, is used by default."""


class CacheFullError(Exception):
    """The tensors do not fit into the cache. The message says why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the cache holds of one batch: tensors, or a file of their values."""

    size: int
    tensors: Sequence[tf.Tensor] = ()
    path: Path | None = None
    specs: Sequence[tf.TensorSpec] = ()


class TensorCache:
    """Holds lists of tensors. A context manager: its files are deleted on exit.

    Args:
        kind: "memory", "disk" (temporary files), "auto" (memory, then files) or "none".
        limit: The number of bytes in memory or, if `kind` is "disk", in files. By default, half of what is
            free.

    Attributes:
        kind: The argument.
        peak_memory: The most bytes that it held in memory.
        peak_disk: The most bytes that it held in files.
    """

    def __init__(self, kind: str = "auto", limit: int | None = None):
        if kind not in KINDS:
            raise ValueError(f"`cache` must be one of {KINDS}. Received: cache={kind!r}.")
        check_count("cache_limit", limit, optional=True)
        self.kind = kind
        self._given = limit
        self._memory_limit = self._disk_limit = 0
        self._memory = self._disk = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self.peak_memory = self.peak_disk = 0

    def __enter__(self) -> TensorCache:
        folder = shutil.disk_usage(tempfile.gettempdir())
        if self.kind in ("auto", "memory"):
            self._memory_limit = self._given or int(SHARE * free_memory())
        if self.kind in ("auto", "disk"):
            self._disk_limit = int(SHARE * folder.free)
        if self.kind == "disk" and self._given:
            self._disk_limit = self._given
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def check(self, batch: Iterable[Sequence[tf.Tensor]], times: float) -> None:
        """Checks whether this many times the tensors of a batch can be kept.

        Raises:
            CacheFullError: If they cannot.
        """
        size = times * sum(size_of(tensor) for tensors in batch for tensor in tensors)
        if size > self._memory_limit + self._disk_limit:
            limits = {"memory": self._memory_limit, "temporary files": self._disk_limit}
            allowed = " and ".join(f"{in_bytes(v)} in {k}" for k, v in limits.items() if v)
            raise CacheFullError(f"{in_bytes(size)} needed, {allowed or 'nothing'} allowed")

    def put(self, tensors: Sequence[tf.Tensor]) -> Entry:
        """Keeps tensors.

        Raises:
            CacheFullError: If they do not fit, or cannot be written.
        """
        size = sum(map(size_of, tensors))
        if self._memory + size <= self._memory_limit:
            self._memory += size
            self.peak_memory = max(self.peak_memory, self._memory)
            with tf.device("CPU:0"):  # The memory of a GPU is for the model.
                return Entry(size, tensors=[tf.identity(tensor) for tensor in tensors])
        if self._disk + size > self._disk_limit:
            raise CacheFullError(
                f"{in_bytes(self._memory + self._disk + size)} needed at once, "
                f"{in_bytes(self._memory_limit + self._disk_limit)} allowed"
            )
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tfbn-")
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        try:
            with path.open("wb") as file:
                for tensor in tensors:
                    file.write(np.ascontiguousarray(tensor.numpy()).tobytes())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise CacheFullError(f"writing a temporary file failed: {error}") from error
        self._disk += size
        self.peak_disk = max(self.peak_disk, self._disk)
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        return Entry(size, path=path, specs=specs)

    def get(self, entry: Entry) -> list[tf.Tensor]:
        """Returns the tensors of an entry."""
        if entry.path is None:
            return list(entry.tensors)
        tensors = []
        with tf.device("CPU:0"), entry.path.open("rb") as file:
            for spec in entry.specs:
                dtype = np.dtype(spec.dtype.as_numpy_dtype)
                values = file.read(spec.shape.num_elements() * dtype.itemsize)
                tensors.append(tf.constant(np.frombuffer(values, dtype).reshape(spec.shape)))
        return tensors

    def free(self, entry: Entry) -> None:
        """Drops an entry. Its tensors are freed once nothing else refers to them."""
        if entry.path is None:
            self._memory -= entry.size
        else:
            self._disk -= entry.size
            entry.path.unlink(missing_ok=True)


def size_of(tensor: tf.Tensor) -> int:
    """Returns the number of bytes in a tensor.

    Raises:
        CacheFullError: If its values have no fixed size.
    """
    if tensor.dtype in (tf.string, tf.resource, tf.variant):
        raise CacheFullError(f"tensors of dtype {tensor.dtype.name} cannot be kept")
    return tensor.shape.num_elements() * tensor.dtype.size


def free_memory() -> int:
    """Returns how many bytes of memory are free for this process, or an estimate."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
    except OSError:  # Not Linux: half of what there is.
        pages = os.sysconf_names.get("SC_PHYS_PAGES") if hasattr(os, "sysconf_names") else None
        free.append(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // 2 if pages else 2**30)
    # A container may have less. Version 2 of control groups, then version 1.
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            free.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # No such file, or "max".
            continue
    return max(min(free, default=2**30), 0)


def in_bytes(size: float) -> str:
    """Returns a number of bytes for people: ``412 MB``."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
