"""Keras's progress bar, as the argument ``verbose`` asks for it."""

import sys
import time
from typing import Any

import keras

from tfbn._support.checks import is_integer

PATIENCE = 1.0
"""The seconds after which "auto" shows a bar, so that short work stays silent."""


def check_verbose(verbose: Any) -> None:
    """Raises an error unless ``verbose`` is 0, 1, 2, "auto" or a bool."""
    if isinstance(verbose, bool) or (is_integer(verbose) and verbose in (0, 1, 2)):
        return
    if not isinstance(verbose, str) or verbose != "auto":
        raise ValueError(f'`verbose` must be 0, 1, 2 or "auto". Received: verbose={verbose!r}.')


class Progress:
    """Counts units of work.

    Args:
        verbose: 0 for silence, 1 for a bar, 2 for one line at the end, "auto" for a bar in a terminal if the
            work takes longer than a second.
        unit: What is counted.
        target: How many there will be, if that is known.

    Raises:
        ValueError: If ``verbose`` is anything else.
    """

    def __init__(self, verbose: int | str, unit: str = "step", target: int | None = None):
        check_verbose(verbose)
        self._target = target
        self._begin = time.monotonic()
        self._wait = PATIENCE if verbose == "auto" else 0.0
        level = int(sys.stdout.isatty()) if verbose == "auto" else int(verbose)
        self._bar = keras.utils.Progbar(None, verbose=level, unit_name=unit) if level else None
        self._done = 0

    def tick(self, target: int | None = None, units: int = 1) -> None:
        """Counts a unit.

        Args:
            target: How many there will be, if that is known only now.
            units: How many to count.
        """
        self._done += units
        if target is not None:
            self._target = target
        if self._bar is not None and time.monotonic() - self._begin >= self._wait:
            self._bar.target = self._target
            self._bar.update(self._done)


def prints_result(verbose: int | str) -> bool:
    """Whether ``verbose`` asks for the result, too."""
    return verbose != "auto" and bool(verbose)
