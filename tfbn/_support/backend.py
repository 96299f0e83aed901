"""Keras must run on TensorFlow: checked before anything else has a chance to break."""

import json
import os
import sys
from pathlib import Path


def require_tensorflow() -> None:
    """Refuses any Keras backend but TensorFlow, with the cure.

    The choice is read before Keras is imported, since importing Keras fails when its backend is
    not installed, with an error that says nothing of tfbn.

    Raises:
        ImportError: If Keras runs, or would run, on another backend.
    """
    if "keras" not in sys.modules:
        _refuse_others(*_configured_backend())
    import keras

    _refuse_others(keras.config.backend(), "as Keras was imported")


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
