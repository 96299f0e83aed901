"""Keras must run on TensorFlow, and both be new enough: checked before anything else can break."""

import json
import os
import sys
from pathlib import Path

# The oldest that are tested. Before 3.14, Keras's layer has no renorm, and Keras adds up activity regularization
# over the batch: two replicas, with half a batch each, train with half of what one device does.
OLDEST = {"Keras": (3, 14), "TensorFlow": (2, 18)}
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")


def quiet_command() -> None:
    """In a process of the command line, keeps TensorFlow's log free of lines that nobody can do anything about.

    TensorFlow reads the level when it is imported, which ``python -m tfbn`` does before any module of the command
    line runs. In any other process, the level is not ours to set. Where there is no GPU, TensorFlow logs that as an
    error; where there is one, its errors stay.
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python has yet to replace it by the path of the module.
        program = sys.orig_argv[-len(sys.argv)]
    if Path(program).name in ("tfbn", "tfbn.exe"):
        has_gpu = any(Path(driver).exists() for driver in GPU_DRIVERS)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if has_gpu else "3")


def require_tensorflow() -> None:
    """Refuses any Keras backend but TensorFlow, and versions that are too old, with the cure.

    The choice is read before Keras is imported, since importing Keras fails when its backend is
    not installed, with an error that says nothing of tfbn.

    Raises:
        ImportError: If Keras runs, or would run, on another backend, or if Keras or TensorFlow is
            too old.
    """
    if "keras" not in sys.modules:
        _refuse_others(*_configured_backend())
    import keras

    _refuse_older("Keras", keras.__version__)
    _refuse_others(keras.config.backend(), "as Keras was imported")
    import tensorflow as tf

    _refuse_older("TensorFlow", tf.__version__)


def _configured_backend() -> tuple[str, str]:
    """The backend that Keras will take, by the rules of Keras, and where that was said."""
    named = os.environ.get("KERAS_BACKEND")
    if named:
        return named, "from the environment variable KERAS_BACKEND"
    path = _keras_home() / "keras.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        config = {}
    return config.get("backend", "tensorflow"), f"from {path}"


def _keras_home() -> Path:
    home = os.environ.get("KERAS_HOME")
    if home is not None:
        return Path(home).expanduser()
    user = Path("~").expanduser()
    return (user if os.access(user, os.W_OK) else Path("/tmp")) / ".keras"


def _refuse_others(backend: str, source: str) -> None:
    if backend != "tensorflow":
        raise ImportError(
            "tfbn works on Keras's TensorFlow backend only. "
            f"Received: backend {backend!r}, {source}. "
            "Choose TensorFlow before Keras is first imported: set the environment variable "
            'KERAS_BACKEND=tensorflow, or "backend": "tensorflow" in keras.json.'
        )


def _refuse_older(package: str, version: str) -> None:
    oldest = OLDEST[package]
    if tuple(int(number) for number in version.split(".")[:2]) < oldest:
        needed = ".".join(map(str, oldest))
        raise ImportError(
            f"tfbn needs {package} {needed} or newer. Received: {package} {version}. "
            f"Upgrade it: pip install --upgrade '{package.lower()}>={needed}'."
        )
