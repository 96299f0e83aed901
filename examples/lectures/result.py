"""Numbers over seeds, claims about them, and the verdict on each claim."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a lecture: a number for each seed, and the range that the claim predicts.

    The claim is borne out if the median and both quartiles over the seeds lie in the range, not borne out if
    none of them does, and undecided otherwise. NaN lies in no range; infinity lies in every range without an
    upper bound. To compare with and without, take the difference or ratio within each seed.

    Attributes:
        lecture: The claim's label, such as "L9".
        claim: The claim, in half a sentence.
        measured: What is measured, in half a sentence.
        values: The number for each seed.
        unit: The printed unit of the values: "%", "steps", "×", or "" for none.
        above: The claim predicts a number above this.
        at_most: The claim predicts a number of at most this.
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
                "A claim must have a range that a number could miss. Pass `above`, `at_most`, or both. "
                f"Received: {self.measured!r} with neither `above` nor `at_most`."
            )

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The first quartile, the median and the third quartile over the seeds."""
        low, median, high = bands(self.values)
        return float(low), float(median), float(high)

    @property
    def verdict(self) -> str:
        """The verdict that follows from the numbers."""
        inside = [self.above < value <= self.at_most for value in self.quartiles]
        if all(inside):
            return "borne out"
        return "undecided" if any(inside) else "not borne out"


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of an experiment.

    Attributes:
        title: The title of the figure and of its section on the page.
        claims: The claims, with their numbers.
        seen: Two sentences that state the numbers.
        numbers: Everything that the figure is drawn from: nested dicts and lists of numbers and strings. Arrays
            become lists. Measurements for each seed have the seeds as their first axis.
        setting: The result of `Setting.to_dict()`.
    """

    title: str
    claims: Sequence[Claim]
    seen: str
    numbers: dict[str, Any]
    setting: dict[str, Any]

    def save(self, path: Path) -> None:
        """Saves the results as JSON, with the quartiles and the verdict of each claim beside its values."""
        content = dataclasses.asdict(self)
        for claim, entry in zip(self.claims, content["claims"], strict=True):
            entry |= {"quartiles": claim.quartiles, "verdict": claim.verdict}
        path.write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Loads saved results. The verdicts are computed again."""
        content = _parsed(json.loads(path.read_text()))
        names = {field.name for field in dataclasses.fields(Claim)}
        content["claims"] = [
            Claim(**{name: value for name, value in entry.items() if name in names})
            for entry in content["claims"]
        ]
        return cls(**content)


def bands(values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the first quartile, the median and the third quartile over the first axis, the seeds.

    They are order statistics, without interpolation, so that values may be infinite.
    """
    values = np.asarray(values, float)
    low, median, high = np.percentile(values, (25, 50, 75), axis=0, method="nearest")
    return low, median, high


def ratio(dividend: Any, divisor: Any) -> np.ndarray:
    """Divides numbers of steps, which may be ∞. The ratio of ∞ to ∞ is 1."""
    dividend, divisor = np.broadcast_arrays(np.asarray(dividend, float), np.asarray(divisor, float))
    neither = np.isinf(dividend) & np.isinf(divisor)
    return np.where(neither, 1.0, dividend / np.where(neither, 1.0, divisor))


def first_step(steps: Sequence[int], accuracy: Any, goal: float) -> np.ndarray:
    """Returns the first recorded step at which each network reaches the accuracy, or ∞.

    Args:
        steps: The recorded steps, of shape (records,).
        accuracy: The accuracies, of shape (networks, records).
        goal: The accuracy to reach, from 0 to 1.
    """
    there = np.asarray(accuracy) >= goal
    return np.where(there.any(-1), np.asarray(steps, float)[there.argmax(-1)], np.inf)


def number(value: float) -> str:
    """Formats a number with at most three significant digits."""
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
    """Converts to JSON's types: ∞ and NaN to strings, and numbers to six digits."""
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
    """Converts the strings for ∞ and NaN back to numbers."""
    if isinstance(value, dict):
        return {name: _parsed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value
