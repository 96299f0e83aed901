"""Keeps TensorFlow's log free of lines that nobody can do anything about."""

import os
from pathlib import Path

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")


def quiet() -> None:
    """Sets TF_CPP_MIN_LOG_LEVEL, unless it is set. Call it before TensorFlow is imported.

    Where there is a GPU, its errors are logged. Where there is none, TensorFlow calls that an error.
    """
    has_gpu = any(Path(driver).exists() for driver in DRIVERS)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")
