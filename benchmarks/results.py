"""The results of a run, stored as JSON, and ratios between them."""

import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def save(run: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(run), indent=1)
    # A list of numbers is one line.
    text = re.sub(r"\[[\s\d.,e+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(text + "\n")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def by_network(path: Path) -> dict[str, dict[str, Any]]:
    """Loads results by network; the file may be missing."""
    return {r["network"]: r for r in load(path)["results"]} if path.exists() else {}


def resumed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns a run that starts with the results of an earlier one.

    Raises:
        ValueError: If they would not belong together: another machine, other versions, other settings.
    """
    for key in ("settings", "environment"):
        there, here = before[key], json.loads(json.dumps(_rounded(now[key])))
        different = {k: (there.get(k), v) for k, v in here.items() if there.get(k) != v}
        different.pop(
            "memory_gib", None
        )  # The memory that is available varies a little from boot to boot.
        if different:
            raise ValueError(
                f"The results that are there were found in another way: {different}. "
                "Choose another --output, or leave out --resume to begin anew."
            )
    names = dict.fromkeys([*before["contenders"], *now["contenders"]])
    return now | {
        "contenders": list(names),
        "left_out": before["left_out"] | now["left_out"],
        "results": before["results"],
    }


def has(run: dict[str, Any], case: dict[str, Any]) -> bool:
    """Returns whether the run has a result of the case, given as stored in JSON."""
    return bool(select(run, **json.loads(json.dumps(case))))


def select(run: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Returns the results whose cases have these values."""
    return [r for r in run["results"] if all(r.get(key) == v for key, v in wanted.items())]


def value(result: dict[str, Any], contender: str, key: str = "ms") -> float | None:
    """Returns a contender's value in a case; None if it did not run."""
    return result["contenders"].get(contender, {}).get(key)


def ratios(
    results: Iterable[dict[str, Any]], over: str, under: str, key: str = "ms"
) -> dict[str, float]:
    """Returns the ratio of ``over`` to ``under`` by subject, for cases that both ran.

    That of times is the median of the ratios turn by turn: what slows the machine for a while slows both.
    """
    found = {}
    for result in results:
        above, below = value(result, over, key), value(result, under, key)
        if above is not None and below is not None:
            found[result["subject"]] = above / below
            turns = [result["contenders"][name].get("turns", []) for name in (over, under)]
            if key == "ms" and turns[0] and len(turns[0]) == len(turns[1]):
                pairs = zip(*turns, strict=True)
                found[result["subject"]] = statistics.median(a / b for a, b in pairs)
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(v) for v in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _rounded(value: Any) -> Any:
    """Rounds to four digits: more are noise, and make diffs hard to read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
