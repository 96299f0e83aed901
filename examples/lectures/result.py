"""Numbers over seeds, claims about them, and whether the numbers bear a claim out."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a lecture claims, as a number for each seed and the range where the claim wants it.

    It is borne out where the median and both quartiles over the seeds lie in the range, not borne out where
    none of them does, and undecided otherwise. NaN lies in no range, infinity in each that has no upper end.
    To compare with and without, take the difference or ratio within each seed.

    Attributes:
        lecture: As "L9".
        claim: What the lecture claims, in half a sentence.
        measured: What the number is, in half a sentence.
        values: One for each seed.
        unit: Of the values, as they are printed: "%", "steps", "×", or "" for none.
        above: The number is to be larger than this.
        at_most: And at most this.
    """

    lecture: str
    claim: str
    measured: str
    values: Sequence[float]
    unit: str = ""
    above: float = -math.inf
    at_most: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", [float(value) for value in self.values])
        if self.above == -math.inf and self.at_most == math.inf:
            raise ValueError(
                "A claim that no number could contradict is none. "
                f"Received: {self.measured!r} with neither `above` nor `at_most`."
            )

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """25 %, median, 75 % over the seeds."""
        low, median, high = bands(self.values)
        return float(low), float(median), float(high)

    @property
    def verdict(self) -> str:
        """As the numbers have it."""
        inside = [self.above < value <= self.at_most for value in self.quartiles]
        if all(inside):
            return "borne out"
        return "undecided" if any(inside) else "not borne out"


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        title: Of the picture and on the page.
        claims: With their numbers.
        seen: Two sentences on what is seen, made of the numbers.
        numbers: All that the picture is drawn from: nested dicts and lists of numbers and texts. Arrays become
            lists. What is measured for each seed has the seeds as its first axis.
        setting: `Setting.to_dict()`.
    """

    title: str
    claims: Sequence[Claim]
    seen: str
    numbers: dict[str, Any]
    setting: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes it as JSON, with the quartiles and the verdict of each claim beside its values."""
        content = dataclasses.asdict(self)
        for claim, entry in zip(self.claims, content["claims"], strict=True):
            entry |= {"quartiles": claim.quartiles, "verdict": claim.verdict}
        path.write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Reads it back; the verdicts are computed anew."""
        content = _parsed(json.loads(path.read_text()))
        names = {field.name for field in dataclasses.fields(Claim)}
        content["claims"] = [
            Claim(**{name: value for name, value in entry.items() if name in names})
            for entry in content["claims"]
        ]
        return cls(**content)


def bands(values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """25 %, median, 75 % over the seeds, the first axis, for each place on the other axes.

    Of the order statistics, with no value in between, so that one of them may be infinite.
    """
    values = np.asarray(values, float)
    low, median, high = np.percentile(values, (25, 50, 75), axis=0, method="nearest")
    return low, median, high


def ratio(dividend: Any, divisor: Any) -> np.ndarray:
    """Of steps until something happened, which may be ∞: 1 where it happened in neither."""
    dividend, divisor = np.broadcast_arrays(np.asarray(dividend, float), np.asarray(divisor, float))
    neither = np.isinf(dividend) & np.isinf(divisor)
    return np.where(neither, 1.0, dividend / np.where(neither, 1.0, divisor))


def first_step(steps: Sequence[int], accuracy: Any, goal: float) -> np.ndarray:
    """The first of the recorded steps at which each network has the accuracy, or ∞.

    Args:
        steps: When it was recorded, (records,).
        accuracy: (networks, records).
        goal: From 0 to 1.
    """
    there = np.asarray(accuracy) >= goal
    return np.where(there.any(-1), np.asarray(steps, float)[there.argmax(-1)], np.inf)


def number(value: float) -> str:
    """As text: three digits, fewer where they say nothing."""
    if math.isinf(value) or math.isnan(value):
        return str(value).replace("inf", "∞").replace("-", "−")
    if value == round(value) and abs(value) < 1e5:
        return f"{value:.0f}".replace("-", "−")
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10^{int(exponent)}".replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}".replace("-", "−")


def _plain(content: Any) -> Any:
    """As JSON can hold it: ∞ and NaN as text, numbers with six digits."""
    if isinstance(content, dict):
        return {str(name): _plain(value) for name, value in content.items()}
    if isinstance(content, np.ndarray):
        return _plain(content.tolist())
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, np.generic):
        return _plain(content.item())
    if isinstance(content, float):
        return float(f"{content:.6g}") if math.isfinite(content) else str(content)
    return content


def _parsed(value: Any) -> Any:
    """Turns the texts of ∞ and NaN back."""
    if isinstance(value, dict):
        return {name: _parsed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value
