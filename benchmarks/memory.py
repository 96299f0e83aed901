"""The peak memory of a process: on the host (Linux), or on a GPU."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTE = 2**20
# glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL = 64 * 1024


def resident() -> float | None:
    """Returns the resident megabytes of this process; None without Linux's /proc."""
    return _status("VmRSS")


def peak(run: Callable[[], Any]) -> float | None:
    """Returns this process's peak megabytes while ``run`` runs; None if they cannot be measured.

    The C library keeps memory that was freed, for the next to ask. Here it gives each larger block
    back at once, so that what is held is what is used. That is slow: time something else. What the
    environment said about it holds again afterwards.
    """
    c_library = ctypes.CDLL(None)
    if not hasattr(c_library, "mallopt") or not hasattr(c_library, "malloc_trim"):
        return None
    gc.collect()
    c_library.mallopt(M_MMAP_THRESHOLD, SMALL)
    c_library.mallopt(M_TRIM_THRESHOLD, SMALL)
    try:
        run()  # Blocks that persist between steps move out of the retained memory.
        c_library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Resets the peak to the current value.
        run()
        return _status("VmHWM")
    except OSError:
        return None
    finally:
        # By default, glibc reaches these limits when large blocks are freed.
        for option, variable, default in (
            (M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_", 32 * MEGABYTE),
            (M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_", 64 * MEGABYTE),
        ):
            c_library.mallopt(option, int(os.environ.get(variable, default)))


def peak_on_gpu(run: Callable[[], Any]) -> float:
    """Returns the peak megabytes that TensorFlow allocates on the first GPU while ``run`` runs."""
    import tensorflow as tf  # Not every contender has the module.

    tf.config.experimental.reset_memory_stats("GPU:0")
    run()
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / MEGABYTE


def _status(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 / MEGABYTE if found else None
