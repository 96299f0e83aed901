"""What fusing did, for people and for programs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from tfbn._shipping.fold.report import FoldedCall, FoldReport


class Outcome(enum.StrEnum):
    """What can become of a batch normalization layer."""

    FUSED = "fused with the preceding layer"
    FROZEN = "frozen"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class FuseReport(FoldReport):
    """What became of each batch normalization layer, and the difference it makes to the outputs.

    `tfbn.fuse` stores one in the attribute `report` of the model that it returns. `print(report)` shows a table,
    and so does a notebook. The attributes are those of `tfbn.FoldReport`, with one row for each layer.

    Example:
        >>> report = tfbn.fuse(model).report
        >>> print(report)
        >>> report.left  # what could not be fused
        ()
    """

    _heading: ClassVar[str] = "Fused batch normalization"
    _outcomes: ClassVar[type[enum.StrEnum]] = Outcome

    @property
    def left(self) -> tuple[FoldedCall, ...]:
        """The rows of the layers that were not fused."""
        return tuple(row for row in self.rows if row.outcome != Outcome.FUSED)
