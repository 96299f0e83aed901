"""What a diagnosis says, for people and for programs."""

import dataclasses
import math
import os
import textwrap
from collections.abc import Mapping
from typing import Any

from tfbn._statistics.diagnose.evidence import LayerEvidence
from tfbn._statistics.diagnose.findings import RATIO, SHIFT, Finding, as_dict
from tfbn._support import tables

LAYER_HEADER = (
    "layer",
    "state",
    "calls",
    "mean off by",
    "variance times",
    "batch noise",
    "findings",
)
WIDTH = 80
"""Of what is printed, but for tables and calls."""
MODE_ORDER = ("training", "inference", "recalibrated")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. It prints as tables; it is true if there is any finding.

    Attributes:
        findings: The `Finding`s, the worst first: ``severity``, ``kind``, ``layers``, ``what``,
            ``evidence``, ``cure``.
        layers: What was measured of each layer.
        modes: The loss and the metrics on this data, by mode: "training" (each batch normalized by itself,
            all else as in inference), "inference" (by the moving statistics) and "recalibrated" (by those
            of all data: what `tfbn.recalibrate` would give). Empty without labels or a compiled loss.
        passes: How many passes over the data it took.
        batches: How many batches a pass had.
        examples: How many examples they held.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerEvidence, ...]
    modes: Mapping[str, Mapping[str, float]]
    passes: int
    batches: int
    examples: int

    def __bool__(self) -> bool:
        return bool(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python, ready for JSON: a number that is not finite is None."""
        return _plain(
            {
                "findings": [as_dict(finding) for finding in self.findings],
                "layers": [dataclasses.asdict(layer) for layer in self.layers],
                "modes": {mode: dict(values) for mode, values in self.modes.items()},
                "passes": self.passes,
                "batches": self.batches,
                "examples": self.examples,
            }
        )

    def to_markdown(self) -> str:
        """The same as when printed, for a report."""
        parts = [f"{len(self.findings)} findings. {self._extent()}"]
        parts += [
            f"- **{finding.severity}, {finding.kind}** ({_of(finding)}): {finding.what} {_numbers(finding)}  \n"
            f"  Cure: `{finding.cure}`"
            for finding in self.findings
        ]
        parts.append(tables.markdown(LAYER_HEADER, self._layer_rows()))
        if self.modes:
            parts.append(tables.markdown(*self._mode_table()))
        return "\n\n".join(parts) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws how far each layer's moving statistics are off, beside the noise of its batches.

        Args:
            path: Of the picture, with the ending of its format.

        Raises:
            ImportError: Without matplotlib, which the extra ``plots`` brings.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Diagnosis.plot needs matplotlib: pip install 'tfbn[plots]' (in a checkout: pip install "
                f"'.[plots]'). Received: {error}."
            ) from error
        layers = [layer for layer in self.layers if layer.measured]
        suspects = {name for finding in self.findings for name in finding.layers}
        colors = ["#D55E00" if layer.layer in suspects else "#0072B2" for layer in layers]
        positions = list(range(len(layers)))
        figure = Figure(
            figsize=(10, 1.5 + 0.28 * max(len(layers), 4)), dpi=120, layout="constrained"
        )
        mean, variance = figure.subplots(1, 2, sharey=True)
        mean.barh(positions, [layer.mean_shift for layer in layers], color=colors)
        mean.plot(
            [layer.batch_noise for layer in layers],
            positions,
            "k|",
            markersize=9,
            label="noise of a batch",
        )
        mean.set_xlabel("moving mean off by (σ)")
        mean.legend(loc="best")
        variance.barh(
            positions, [layer.log_variance_ratio / math.log(2) for layer in layers], color=colors
        )
        variance.set_xlabel("moving variance: log₂ of its ratio to the true one")
        mean.set_yticks(positions, [layer.layer for layer in layers])
        mean.invert_yaxis()
        # On a scale on which what is healthy looks so.
        mean.set_xlim(0, max(2 * SHIFT, mean.get_xlim()[1]))
        reach = max(2 * RATIO / math.log(2), *map(abs, variance.get_xlim()))
        variance.set_xlim(-reach, reach)
        for axes in (mean, variance):
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
        figure.suptitle(f"{len(self.findings)} findings (orange: layers that they name)")
        figure.savefig(path)

    def __str__(self) -> str:
        parts = [_text(finding) for finding in self.findings]
        parts = parts or ["No findings: the moving statistics are those of the data."]
        title = f"Batch normalization layers. {self._extent()}"
        parts.append(tables.text(title, LAYER_HEADER, self._layer_rows()))
        if self.modes:
            parts.append(tables.text("Loss and metrics on the same data", *self._mode_table()))
        return "\n\n".join(parts)

    def _extent(self) -> str:
        return f"{self.examples} examples in {self.batches} batches, {self.passes} passes"

    def _layer_rows(self) -> list[list[str]]:
        rows = []
        for layer in self.layers:
            kinds = [finding.kind for finding in self.findings if layer.layer in finding.layers]
            measured = [
                f"{layer.mean_shift:.2f} σ",
                f"{math.exp(layer.log_variance_ratio):.2f}",
                f"{layer.batch_noise:.2f} σ",
            ]
            rows.append(
                [
                    layer.layer,
                    layer.state,
                    str(layer.calls),
                    *(measured if layer.measured and not layer.not_finite else ["", "", ""]),
                    ", ".join(kinds),
                ]
            )
        return rows

    def _mode_table(self) -> tuple[list[str], list[list[str]]]:
        names = list(self.modes["inference"])
        rows = [[m, *(f"{self.modes[m][name]:.4g}" for name in names)] for m in MODE_ORDER]
        return ["mode", *names], rows


def _text(finding: Finding) -> str:
    """A finding for the terminal. A call that cures it is not broken in two."""
    what = textwrap.wrap(f"{finding.what} {_numbers(finding)}", WIDTH - 4, break_long_words=False)
    cure = f"cure: {finding.cure}".split("; and ")
    cure = [*(f"{call}; and" for call in cure[:-1]), cure[-1]]
    head = f"{finding.severity}: {finding.kind} ({_of(finding)})"
    return "\n    ".join([head, *what, "\n          ".join(cure)])


def _of(finding: Finding) -> str:
    """Which layers, or how many."""
    if not finding.layers:
        return "the model"
    if len(finding.layers) <= 3:
        return ", ".join(finding.layers)
    return f"{finding.layers[0]}, {finding.layers[1]} and {len(finding.layers) - 2} more layers"


def _numbers(finding: Finding) -> str:
    return "; ".join(f"{name} {value:.3g}" for name, value in finding.evidence.items()) + (
        "." if finding.evidence else ""
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
