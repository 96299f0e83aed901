"""What folding did, for people and for programs."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from tfbn._support import tables
from tfbn._support.reports import Report, plain


class Outcome(enum.StrEnum):
    """What became of a batch normalization layer."""

    INTO_PRECEDING = "folded into what it follows"
    INTO_FOLLOWING = "folded into what it precedes"
    MULTIPLY_ADD = "multiply-add"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Row:
    """What became of one call of a batch normalization layer.

    Attributes:
        layer: Its name.
        within: The names of the models that it is inside of, outermost first.
        outcome: What became of it.
        into: The names of the layers that took it up.
        reason: Why it could not be folded.
    """

    layer: str
    within: tuple[str, ...]
    outcome: Outcome
    into: str | None
    reason: str | None

    @property
    def path(self) -> str:
        return "/".join((*self.within, self.layer))


@dataclass(frozen=True)
class FoldReport(Report):
    """What became of each batch normalization layer, and what difference it makes.

    `print(report)` shows a table.

    Attributes:
        rows: One for each call of a batch normalization layer.
        difference: The largest difference between outputs of the folded model and of the original one,
            relative to the largest output.
        tolerance: What the difference was allowed to be.
    """

    rows: tuple[Row, ...]
    difference: float
    tolerance: float

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of what could not be folded away."""
        gone = (Outcome.INTO_PRECEDING, Outcome.INTO_FOLLOWING)
        return tuple(row for row in self.rows if row.outcome not in gone)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types, fit for JSON."""
        return plain(
            {
                "layers": [{**asdict(row), "outcome": row.outcome.value} for row in self.rows],
                "difference": self.difference,
                "tolerance": self.tolerance,
            }
        )

    def to_markdown(self) -> str:
        """A sentence and a table in Markdown."""
        return f"{self.summary()}\n\n{tables.markdown(_HEADER, self._cells())}\n"

    def summary(self) -> str:
        """One sentence."""
        counts = Counter(row.outcome for row in self.rows)
        parts = [f"{counts[outcome]} {outcome.value}" for outcome in Outcome if counts[outcome]]
        parts = parts or ["no batch normalization layers"]
        return (
            f"{', '.join(parts)}; largest difference {self.difference:.1e} of the largest output."
        )

    def __str__(self) -> str:
        return tables.text(self.summary(), _HEADER, self._cells())

    def _cells(self) -> list[list[str]]:
        return [[r.path, r.outcome.value, r.into or r.reason or ""] for r in self.rows]


_HEADER = ["batch normalization", "what became of it", "where, or why not"]
