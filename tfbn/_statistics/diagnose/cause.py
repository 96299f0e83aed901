"""One row of the table of causes."""

import dataclasses
from collections.abc import Callable

from tfbn._statistics.diagnose.finding import Finding
from tfbn._statistics.diagnose.model_evidence import ModelEvidence
from tfbn._statistics.diagnose.signs.sign import Sign


@dataclasses.dataclass(frozen=True)
class Cause:
    """What can be wrong with a model, how it shows, and what to do about it.

    Attributes:
        kind: The name of the cause.
        sign: Looks for the cause; returns None where it does not apply.
        explanation: What the finding says. Names in braces are filled in from the sign.
        severity: "error", "warning", "note"; or "by effect", as the losses or the distances show.
        recalibrate: Whether `tfbn.recalibrate` is the cure. It is printed unless the losses contradict.
        advice: What to change in the code, the data or the next training. Filled in likewise.
        experiment: What tells similar causes apart. That of the sign replaces it.
        groups: Of the causes in a group, only the first that applies becomes a finding.
        last_resort: Whether it becomes a finding only if nothing else does.
    """

    kind: str
    sign: Callable[[ModelEvidence], Sign | None]
    explanation: str
    severity: str = "by effect"
    recalibrate: bool = False
    advice: str = ""
    experiment: str = ""
    groups: tuple[str, ...] = ()
    last_resort: bool = False

    def finding(self, sign: Sign, severity: str, cure: str) -> Finding:
        """Returns what to say if the sign was found."""
        return Finding(
            severity=severity,
            kind=self.kind,
            layers=tuple(layer.layer for layer in sign.layers),
            explanation=f"{self.explanation.format_map(sign.words)} {sign.remark}".strip(),
            evidence=sign.numbers,
            cure=cure,
            advice=self.advice.format_map(sign.words),
            experiment=sign.experiment or self.experiment,
        )
