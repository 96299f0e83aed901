"""The program of a contender for a case, and how it is timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WARM_STEPS = 3
# Steps shorter than this are timed in groups: such a short time measures the clock, or on a GPU the
# round trip, rather than the work.
SAMPLE_SECONDS = {"cpu": 0.005, "gpu": 0.05}
# A step that takes longer is one sample a turn: caches do not matter to it.
LONG_SECONDS = 0.1


class LeftOut(Exception):
    """Raised if a contender skips a case, or all cases; the message says why."""


@dataclass
class Program:
    """A program that a worker times.

    Attributes:
        step: Runs one step on data that is already on the device; returns all results.
        wait: Blocks until the device has finished all work.
        values: Some of the results of a step, by name, for comparing contenders.
        parts: How many layers (or passes) a step has: times are divided by it.
        device: "cpu" or "gpu".
        trace_seconds: How long tracing took, if there is any.
        peak: Runs a function and returns the program's peak memory in megabytes.
    """

    step: Callable[[], Any]
    wait: Callable[[], None]
    values: Callable[[Any], dict[str, np.ndarray]]
    parts: int
    device: str
    trace_seconds: float | None = None
    peak: Callable[[Callable[[], Any]], float | None] | None = None
    _steps: int = 1
    _step_seconds: float = 0.0

    def start(self, warm_seconds: float) -> dict[str, Any]:
        """Runs the first step, which compiles, then warms up; returns the results of the first step."""
        begin = time.perf_counter()
        result = self.step()
        self.wait()
        first = time.perf_counter() - begin
        values = self.values(result)
        del result
        times: list[float] = []
        while len(times) < WARM_STEPS or sum(times) < warm_seconds:
            times.append(self._timed(1))
            if times[-1] > LONG_SECONDS:
                break
        self._step_seconds = float(np.median(times))
        self._steps = max(1, round(SAMPLE_SECONDS[self.device] / self._step_seconds))
        return {
            "trace_seconds": self.trace_seconds,
            "first_step_seconds": first,
            "values": values,
        }

    def memory(self) -> dict[str, float]:
        """Returns the peak memory, if the program measures it."""
        megabytes = self.peak(lambda: self._timed(1)) if self.peak else None
        return {} if megabytes is None else {"peak_mb": megabytes}

    def turn(self, seconds: float) -> list[float]:
        """Returns milliseconds per part, from at least two samples that take about ``seconds`` in total.

        From one, if a step takes longer than `LONG_SECONDS`.
        """
        if self._step_seconds > LONG_SECONDS:
            return [1e3 * self._timed(1) / self.parts]
        self._timed(1)  # Refill the caches, which other contenders have used since the last turn.
        count = max(2, round(seconds / (self._steps * self._step_seconds)))
        return [1e3 * self._timed(self._steps) / self.parts for _ in range(count)]

    def _timed(self, steps: int) -> float:
        """Returns the seconds per step."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        return (time.perf_counter() - begin) / steps


def some(values: np.ndarray, count: int = 512) -> np.ndarray:
    """Returns about ``count`` of the values, spread over the array."""
    flat = np.asarray(values).astype(np.float64).reshape(-1)
    # An odd stride meets every channel, however many there are (they are mostly a power of 2).
    return flat[:: max(1, flat.size // count) | 1]
