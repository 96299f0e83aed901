"""One thing that a diagnosis found wrong."""

import dataclasses
import functools
import textwrap
from collections.abc import Mapping

SEVERITIES = ("error", "warning", "note")
WIDTH = 80
"""The width of printed text, except for code."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a model, and what to do about it. It prints as a short text.

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
        >>> print(finding)
    """

    severity: str
    kind: str
    layers: tuple[str, ...]
    explanation: str
    evidence: Mapping[str, float]
    cure: str = ""
    advice: str = ""
    experiment: str = ""

    def __str__(self) -> str:
        wrap = functools.partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
        lines = wrap(sentence(self), WIDTH - 4)
        for label, text in what_to_do(self):
            width = len(label) + 2
            parts = [text] if label == "cure" else wrap(text, WIDTH - 4 - width)
            lines.append(f"{label}: " + ("\n" + " " * (4 + width)).join(parts))
        head = f"{self.severity}: {self.kind} ({concerned(self)})"
        return "\n    ".join([head, *lines])


def concerned(finding: Finding) -> str:
    """The layers concerned, or how many there are."""
    if not finding.layers:
        return "the model"
    if len(finding.layers) <= 3:
        return ", ".join(finding.layers)
    return f"{finding.layers[0]}, {finding.layers[1]} and {len(finding.layers) - 2} more layers"


def sentence(finding: Finding) -> str:
    """The explanation, with its numbers."""
    return f"{finding.explanation} {numbers(finding)}." if finding.evidence else finding.explanation


def numbers(finding: Finding) -> str:
    """The evidence as text."""
    return "; ".join(f"{name} {value:.3g}" for name, value in finding.evidence.items())


def what_to_do(finding: Finding) -> list[tuple[str, str]]:
    """The cure, the advice and the experiment, each with its label, where there is one."""
    parts = (("cure", finding.cure), ("advice", finding.advice), ("to be sure", finding.experiment))
    return [(label, text) for label, text in parts if text]
