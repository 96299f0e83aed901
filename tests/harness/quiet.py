"""What a process writes beside its output, without what nothing can silence."""

from __future__ import annotations

import os

BEFORE_ITS_LOG_BEGINS = (
    "All log messages before absl::InitializeLog()",
    "oneDNN custom operations are on",
    "Could not find cuda drivers on your machine",
    "Unable to register cu",  # before TensorFlow 2.20
)
"""TensorFlow prints these while it is imported, before it reads its log level."""


def environment() -> dict[str, str]:
    """The environment of a user, who has not heard of TensorFlow's log level."""
    return {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}


def noise(errors: str) -> list[str]:
    """The lines of a standard error stream that should not be there."""
    return [
        line
        for line in errors.splitlines()
        if line.strip() and not any(known in line for known in BEFORE_ITS_LOG_BEGINS)
    ]
