"""One thing that a diagnosis found wrong."""

import dataclasses
from collections.abc import Mapping

SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a model, and what to do about it.

    Attributes:
        severity: "error" if predictions are wrong, "warning" if they suffer, "note" if they do not.
        kind: The name of the cause, such as "lagging_statistics".
        layers: The paths of the layers concerned; empty if the finding concerns the model as a whole.
        explanation: What is wrong and why, in a sentence or two.
        evidence: The numbers that the finding rests on.
        cure: The code that repairs this model, where ``model`` and ``data`` are what was diagnosed. Empty if
            no code does. If losses could be computed, the cure lowers the loss on examples that it has not
            seen.
        advice: What to change in the code, the data or the next training.
        experiment: If other causes look the same: what tells them apart.

    Example:
        >>> finding = tfbn.diagnose(model, (images, labels)).findings[0]
        >>> finding.kind
        'lagging_statistics'
        >>> print(finding.explanation, finding.advice)
    """

    severity: str
    kind: str
    layers: tuple[str, ...]
    explanation: str
    evidence: Mapping[str, float]
    cure: str = ""
    advice: str = ""
    experiment: str = ""
