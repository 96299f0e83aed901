"""What folding did, for people and for programs."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tfbn._support import html
from tfbn._support.reports import TableReport, plain


class Outcome(enum.StrEnum):
    """What can become of a batch normalization layer."""

    INTO_PRECEDING = "folded into the preceding layer"
    INTO_FOLLOWING = "folded into the following layer"
    MULTIPLY_ADD = "multiply-add"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class FoldedCall:
    """What became of one call of a batch normalization layer.

    Attributes:
        layer: The name of the layer.
        within: The names of the models and layers that contain it, outermost first.
        outcome: What became of the call.
        into: The names of the layers that absorbed it, or None.
        reason: Why it could not be folded, or None.

    Example:
        >>> call = tfbn.fold(model).report.rows[0]
        >>> str(call.outcome)
        'folded into the preceding layer'
    """

    layer: str
    within: tuple[str, ...]
    outcome: enum.StrEnum
    into: str | None
    reason: str | None

    @property
    def path(self) -> str:
        """The name of the layer after the names of what contains it, as `block/norm`."""
        return "/".join((*self.within, self.layer))


@dataclass(frozen=True)
class FoldReport(TableReport):
    """What became of each batch normalization layer, and the difference it makes to the outputs.

    `tfbn.fold` stores one in the attribute `report` of the model that it returns. `print(report)` shows a table, and
    so does a notebook.

    Attributes:
        rows: One entry for each call of a batch normalization layer, with the attributes `layer`,
            `within`, `path`, `outcome`, `into` and `reason`.
        difference: The largest difference between outputs of the folded and of the original model,
            relative to the largest output.
        tolerance: The largest difference that was allowed.
        shared: The names of layers that cannot be created from their config. The folded model uses the
            layers of the original model, with the same weights.

    Example:
        >>> report = tfbn.fold(model).report
        >>> print(report)
        >>> report.left  # what could not be folded
        ()
    """

    _heading: ClassVar[str] = "Folded batch normalization"
    _header = ("layer", "outcome", "into, or why not")
    _outcomes: ClassVar[type[enum.StrEnum]] = Outcome

    rows: tuple[FoldedCall, ...]
    difference: float
    tolerance: float
    shared: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[FoldedCall, ...]:
        """The rows of the calls that were not folded into other layers."""
        folded = (Outcome.INTO_PRECEDING, Outcome.INTO_FOLLOWING)
        return tuple(row for row in self.rows if row.outcome not in folded)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in plain types that JSON can represent; a number that is not finite is None."""
        return plain(
            {
                "layers": [{**asdict(row), "outcome": row.outcome.value} for row in self.rows],
                "difference": self.difference,
                "tolerance": self.tolerance,
                "shared": self.shared,
            }
        )

    def _page(self) -> tuple[str, list[str]]:
        kinds = [row.outcome.value for row in self.rows]
        titles = [f"{row.path}: {row.into or row.reason or row.outcome.value}" for row in self.rows]
        left = [row in self.left for row in self.rows]
        parts = [
            html.paragraph(self.summary()),
            html.squares(kinds, titles, [outcome.value for outcome in self._outcomes]),
            html.heading("Layers, in order"),
            html.table(self._header, self._rows(), [False] * 3, marked=left),
        ]
        return self._heading, parts

    def summary(self) -> str:
        """Returns how many calls had which outcome, and the difference, in a sentence."""
        counts = Counter(row.outcome for row in self.rows)
        parts = [
            f"{counts[outcome]} {outcome.value}" for outcome in self._outcomes if counts[outcome]
        ]
        parts = parts or ["no batch normalization layers"]
        text = (
            f"{', '.join(parts)}; outputs differ by at most {self.difference:.1e} of the largest."
        )
        if self.shared:
            text += f" Shared with the original model: {', '.join(self.shared)}."
        return text

    def _title(self) -> str:
        return self.summary()

    def _rows(self) -> list[list[str]]:
        return [[row.path, row.outcome.value, row.into or row.reason or ""] for row in self.rows]
