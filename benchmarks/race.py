"""Runs contenders against each other, in turns, each in its own process."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment, worker
from benchmarks.cases import Case, described
from benchmarks.program import LeftOut

IMPORT_SECONDS, START_SECONDS, TURN_SECONDS = 180.0, 300.0, 120.0
"""The time limit in seconds for a worker's answer."""


class Failed(Exception):
    """A contender's program raised, ended or took too long; the message says which."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        turns: Number of turns per contender.
        network_turns: Number of turns per contender of a network's training step.
        seconds: Approximate seconds per turn; at least two samples.
        threads: Number of threads per contender.
        keep_memory: Whether the C library keeps freed memory, for every contender.
    """

    turns: int
    seconds: float
    threads: int
    keep_memory: bool = True
    network_turns: int = 30

    def turns_of(self, case: Case) -> int:
        return (
            self.network_turns if case.suite == "models" and case.phase == "train" else self.turns
        )


class Worker:
    """The handle of a contender's process."""

    def __init__(self, name: str, settings: Settings):
        # TensorFlow logs much at startup; it is shown only if the worker fails.
        self._messages = tempfile.NamedTemporaryFile()  # noqa: SIM115
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.serve,
            args=(theirs, name, settings.threads, self._messages.name),
            daemon=True,
        )
        variables = environment.of_workers(settings.threads, settings.keep_memory)
        with environment.variables(variables):
            self._process.start()
        theirs.close()

    def ask(self, verb: str, argument: Any, limit: float) -> Any:
        """Sends a request and waits for the answer."""
        try:
            self._connection.send((verb, argument))
        except OSError as error:
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from error
        return self.answer(limit)

    def answer(self, limit: float) -> Any:
        """Waits for an answer.

        Raises:
            LeftOut: If the contender does not do what it was asked for.
            Failed: If it cannot, or not within ``limit`` seconds.
        """
        try:
            if not self._connection.poll(limit):
                self._process.kill()
                raise Failed(f"took longer than {limit:.0f} s and was ended")
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(10)
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from error
        if kind == "left out":
            raise LeftOut(value)
        if kind == "failed":
            raise Failed(value)
        return value

    def messages(self) -> str:
        """Returns what the process wrote to standard error."""
        return Path(self._messages.name).read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._messages.close()


class Race:
    """Measures cases. As a context manager, it ends every process that it started.

    Attributes:
        left_out: Why a contender does not take part, by name.
        device: What the contenders run on.
    """

    def __init__(self, contenders: Sequence[str], settings: Settings):
        self.settings = settings
        self.left_out: dict[str, str] = {}
        self.device: dict[str, Any] = {}
        self._names = list(contenders)
        self._workers: dict[str, Worker] = {}
        self._at = ""

    def __enter__(self) -> "Race":
        self._start(self._names)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def run(
        self,
        cases: Iterable[Case],
        report: Callable[[dict], None],
        names: Callable[[Case], Sequence[str] | None] = lambda case: None,
    ) -> list[dict[str, Any]]:
        """Measures the cases in order, and passes each result to ``report`` at once.

        ``names`` gives the contenders of a case; None stands for all.
        """
        results = []
        for case in cases:
            if self._at not in ("", case.worker):
                self._end()
            self._at = case.worker
            taking_part = names(case) or self._names
            self._start(taking_part)
            result = described(case) | {"contenders": self._measure(case, taking_part)}
            report(result)
            results.append(result)
        return results

    def _measure(self, case: Case, names: Sequence[str]) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[list[float]]] = {}
        for name in [n for n in self._names if n in self._workers and n in names]:
            answer = self._ask(name, "start", (case, self.settings.seconds), START_SECONDS, found)
            if answer is not None:
                found[name] = answer
                samples[name] = []
        for place in range(self.settings.turns_of(case)):
            # The first contender of one turn is the last of the next.
            running = [name for name in samples if "failed" not in found[name]]
            for name in np.roll(running, -place).tolist():
                answer = self._ask(name, "turn", self.settings.seconds, TURN_SECONDS, found)
                samples[name].append(answer or [])
        for name, turns in samples.items():
            if "failed" not in found[name]:
                times = [sample for turn in turns for sample in turn]
                quartiles = np.percentile(times, [25, 50, 75])
                found[name]["turns"] = [float(np.median(turn)) for turn in turns]
                found[name] |= dict(zip(("q1", "ms", "q3"), quartiles.tolist(), strict=True))
                found[name]["samples"] = len(times)
                peak = self._ask(name, "memory", None, START_SECONDS, found)
                found[name] |= peak or {}
        _compare(found)
        return found

    def _ask(self, name: str, verb: str, argument: Any, limit: float, found: dict) -> Any:
        """Returns the answer, or None with the reason in ``found``."""
        try:
            return self._workers[name].ask(verb, argument, limit)
        except LeftOut as reason:
            found[name] = {"left_out": str(reason)}
        except Failed as reason:
            found[name] = {"failed": str(reason)}
            print(self._workers[name].messages(), file=sys.stderr, flush=True)
        return None

    def _start(self, names: Sequence[str]) -> None:
        """Starts missing processes in parallel, while nothing is measured."""
        for name, old in list(self._workers.items()):
            if not old.alive:
                old.end()
                del self._workers[name]
        missing = [n for n in names if n not in self._workers and n not in self.left_out]
        started = {name: Worker(name, self.settings) for name in missing}
        self._workers |= started
        for name, new in started.items():
            try:
                device = new.answer(IMPORT_SECONDS)
                self.device = self.device or device
                if device["device"] != self.device["device"]:
                    raise LeftOut(f"runs on {device}, those before it on {self.device}")
            except (LeftOut, Failed) as reason:
                self.left_out[name] = str(reason)
                self._workers.pop(name).end()

    def _end(self) -> None:
        for old in self._workers.values():
            old.end()
        self._workers = {}


def _compare(found: dict[str, dict[str, Any]]) -> None:
    """Replaces each contender's values by their largest difference from the first contender's that has the same.

    Relative to the largest of the values. Contenders without values, and Identity, which computes
    something else on purpose, have no difference.
    """
    values = {name: entry.pop("values", {}) for name, entry in found.items()}
    first: dict[str, Any] = next((v for name, v in values.items() if v and name != "identity"), {})
    for name, mine in values.items():
        if mine and name != "identity":
            found[name]["difference"] = {
                key: float(np.max(np.abs(mine[key] - value)) / max(np.max(np.abs(value)), 1e-30))
                for key, value in first.items()
            }
