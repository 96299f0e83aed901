"""One thing that a diagnosis found wrong."""

import dataclasses
from collections.abc import Mapping

SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a model, and how to cure it.

    Attributes:
        severity: "error" if predictions are wrong, "warning" if they suffer, "note" if they do not.
        kind: The name of the cause, such as "lagging_statistics".
        layers: The paths of the layers concerned; empty if the finding concerns the model as a whole.
        explanation: What is wrong and why, in a sentence or two.
        evidence: The numbers that the finding rests on.
        cure: The code that cures it.
    """

    severity: str
    kind: str
    layers: tuple[str, ...]
    explanation: str
    evidence: Mapping[str, float]
    cure: str
