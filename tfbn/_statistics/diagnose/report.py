"""The result of a diagnosis: text for people, plain types for programs, and a picture."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfbn._statistics.diagnose.comparison import Comparison
from tfbn._statistics.diagnose.evidence import LayerEvidence
from tfbn._statistics.diagnose.finding import Finding, concerned, numbers, sentence, what_to_do
from tfbn._statistics.diagnose.model_evidence import LOG_VARIANCE_RATIO, MEAN_SHIFT
from tfbn._support import html, tables
from tfbn._support.reports import Report, count, plain

LAYER_HEADER = (
    "layer",
    "state",
    "calls",
    "mean off by",
    "variance times",
    "batch noise",
    "findings",
)
MOST_PICTURES = 12
"""For how many layers a page shows the channels."""

AsCommand = Callable[[str], str]
"""Writes the code of a cure as a command; empty if none does the same."""


class ChannelStatistics(NamedTuple):
    """What the picture of a layer shows: a value for each channel."""

    moving_mean: Sequence[float]
    true_mean: Sequence[float]
    moving_variance: Sequence[float]
    true_variance: Sequence[float]

    @classmethod
    def of(cls, comparison: Comparison) -> "ChannelStatistics":
        """Returns means in standard deviations of the data, and variances."""
        sigma = np.sqrt(comparison.true_variance + comparison.layer.epsilon)
        arrays = (
            comparison.mean / sigma,
            comparison.true_mean / sigma,
            comparison.variance,
            comparison.true_variance,
        )
        return cls(*(array.tolist() for array in arrays))


@dataclasses.dataclass(frozen=True)
class Diagnosis(Report):
    """What `tfbn.diagnose` found. It is true if there are findings; printed, it shows tables.

    Attributes:
        findings: The findings, the most severe first.
        layers: What was measured of each layer.
        modes: The loss and the metrics by mode, on batches that were set aside: "training" (each batch is
            normalized by its own statistics; everything else runs as in inference), "inference" (moving
            statistics), and "recalibrated" (statistics of the other batches, as `tfbn.recalibrate` would set
            them with ``include_frozen=True``). Empty if the data has no labels, or for the reason in ``no_losses``.
        no_losses: Why there are no losses, although the data has labels; empty otherwise.
        passes: How many passes over the data it took.
        batches: The number of batches in a pass.
        examples: The number of examples in a pass.
        channels: For pictures: the moving and the true statistics of each channel, by layer.

    Example:
        >>> diagnosis = tfbn.diagnose(model, (images, labels))
        >>> if diagnosis:
        ...     print(diagnosis)
        >>> diagnosis.to_html("diagnosis.html")
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerEvidence, ...]
    modes: Mapping[str, Mapping[str, float]]
    passes: int
    batches: int
    examples: int
    no_losses: str = ""
    channels: Mapping[str, ChannelStatistics] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __bool__(self) -> bool:
        return bool(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Returns the diagnosis in plain types that JSON can represent; numbers that are not finite are None."""
        return plain(
            {
                "findings": [dict(vars(finding)) for finding in self.findings],
                "layers": [dict(vars(layer)) for layer in self.layers],
                "modes": self.modes,
                "no_losses": self.no_losses,
                "passes": self.passes,
                "batches": self.batches,
                "examples": self.examples,
            }
        )

    def to_markdown(self) -> str:
        """Returns the same content as `str`, as Markdown."""
        parts = [f"{count(len(self.findings), 'finding')}. {self._extent()}."]
        parts += [_markdown(finding) for finding in self.findings]
        parts.append(tables.markdown(LAYER_HEADER, self._layer_rows()))
        if self.modes:
            parts.append(tables.markdown(*self._mode_table()))
        if self.no_losses:
            parts.append(self._without_losses())
        return "\n\n".join(parts) + "\n"

    def _page(self, as_command: AsCommand = lambda cure: "") -> tuple[str, list[str]]:
        """The page. Where a cure can be written as a command, it shows that, too."""
        parts = [html.paragraph(f"{self._extent()}.", "soft")]
        if self.no_losses:
            parts.append(html.paragraph(self._without_losses(), "soft"))
        parts += [_box(finding, as_command) for finding in self.findings]
        if not self.findings:
            parts.append(html.box("No findings", [html.paragraph(f"{self._verdict()}.")], "good"))
        if self.modes:
            header, rows = self._mode_table()
            losses = [values["loss"] for values in self.modes.values() if "loss" in values]
            lowest = min([0.0, *losses])
            bars = {1: [loss - lowest for loss in losses]} if losses else {}
            parts.append(html.heading("Loss and metrics on batches set aside, by statistics"))
            numeric = [False, *[True] * (len(header) - 1)]
            parts.append(html.table(header, rows, numeric, bars))
        parts.append(html.heading("Layers"))
        named = {name for finding in self.findings for name in finding.layers}
        layers, ratio = self.layers, [abs(layer.log_variance_ratio) for layer in self.layers]
        bars = {3: [layer.mean_shift for layer in layers], 4: ratio}
        numeric = [False, False, True, True, True, True, False]
        marked = [layer.layer in named for layer in layers]
        parts.append(html.table(LAYER_HEADER, self._layer_rows(), numeric, bars, marked))
        furthest = sorted(
            (layer for layer in layers if layer.layer in named & self.channels.keys()),
            key=lambda layer: layer.mean_shift + layer.log_variance_ratio_rms,
        )
        shown = [layer.layer for layer in layers if layer in furthest[-MOST_PICTURES:]]
        if shown:
            parts.append(html.heading("Layers in trouble, channel by channel"))
            note = "One dot for each channel. On the dashed line, the moving statistics are those of the data."
            if len(shown) < len(furthest):
                note += f" These are the {len(shown)} layers that are furthest off."
            parts.append(html.paragraph(note, "soft"))
        parts += [html.box(name, [_picture(self.channels[name])]) for name in shown]
        title = count(len(self.findings), "finding") if self.findings else "No findings"
        return f"Batch normalization: {title.lower()}", parts

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws how far each layer's moving statistics are off, beside the noise of its batches.

        Args:
            path: The file to write. Its suffix selects the format.

        Raises:
            ImportError: If matplotlib is not installed; the extra ``plots`` installs it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Diagnosis.plot needs matplotlib: pip install 'tfbn[plots]' (in a checkout: pip install "
                f"'.[plots]'). Received: {error}."
            ) from error
        layers = [layer for layer in self.layers if layer.measured]
        named = {name for finding in self.findings for name in finding.layers}
        colors = ["#D55E00" if layer.layer in named else "#0072B2" for layer in layers]
        positions = list(range(len(layers)))
        figure = Figure(
            figsize=(10, 1.5 + 0.28 * max(len(layers), 4)), dpi=120, layout="constrained"
        )
        mean, variance = figure.subplots(1, 2, sharey=True)
        mean.barh(positions, [layer.mean_shift for layer in layers], color=colors)
        noise = [layer.batch_noise for layer in layers]
        mean.plot(noise, positions, "k|", markersize=9, label="noise of a batch")
        mean.set_xlabel("distance of the moving mean (σ)")
        mean.legend(loc="best")
        doublings = [layer.log_variance_ratio / math.log(2) for layer in layers]
        variance.barh(positions, doublings, color=colors)
        variance.set_xlabel("log₂ of moving variance / true variance")
        mean.set_yticks(positions, [layer.layer for layer in layers])
        mean.invert_yaxis()
        # On this scale, healthy layers look healthy.
        mean.set_xlim(0, max(2 * MEAN_SHIFT, mean.get_xlim()[1]))
        reach = max(2 * LOG_VARIANCE_RATIO / math.log(2), *map(abs, variance.get_xlim()))
        variance.set_xlim(-reach, reach)
        for axes in (mean, variance):
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
        figure.suptitle(f"{count(len(self.findings), 'finding')} (orange: the layers concerned)")
        figure.savefig(path)

    def __str__(self) -> str:
        parts = [str(finding) for finding in self.findings]
        parts = parts or [f"No findings: {self._verdict()}."]
        title = f"Batch normalization layers. {self._extent()}"
        parts.append(tables.text(title, LAYER_HEADER, self._layer_rows()))
        if self.modes:
            parts.append(tables.text("Loss and metrics on batches set aside", *self._mode_table()))
        if self.no_losses:
            parts.append(self._without_losses())
        return "\n\n".join(parts)

    def _without_losses(self) -> str:
        return f"Losses were not compared: {self.no_losses}."

    def _verdict(self) -> str:
        if self.modes:
            return "inference is as good as the statistics of this data allow"
        return "the moving statistics match the data"

    def _extent(self) -> str:
        examples, batches = count(self.examples, "example"), count(self.batches, "batch", "batches")
        return f"{examples} in {batches}, {count(self.passes, 'pass', 'passes')}"

    def _layer_rows(self) -> list[list[str]]:
        rows = []
        for layer in self.layers:
            kinds = [finding.kind for finding in self.findings if layer.layer in finding.layers]
            measured = [
                f"{layer.mean_shift:.2f} σ",
                f"{math.exp(layer.log_variance_ratio):.2f}",
                f"{layer.batch_noise:.2f} σ",
            ]
            if not layer.examples:  # There was nothing to compare.
                measured = [""] * len(measured)
            rows.append([layer.layer, layer.state, str(layer.calls), *measured, ", ".join(kinds)])
        return rows

    def _mode_table(self) -> tuple[list[str], list[list[str]]]:
        names = list(self.modes["inference"])
        rows = [
            [mode, *(f"{values[name]:.4g}" for name in names)]
            for mode, values in self.modes.items()
        ]
        return ["mode", *names], rows


def _box(finding: Finding, as_command: AsCommand) -> str:
    parts = [html.paragraph(finding.explanation)]
    if finding.evidence:
        parts.append(html.paragraph(numbers(finding), "soft"))
    parts += [
        html.labelled(label.capitalize(), text, code=label == "cure")
        for label, text in what_to_do(finding)
    ]
    if command := as_command(finding.cure):
        parts.append(html.labelled("The cure as a command", command, code=True))
    head = f"{finding.severity.capitalize()}: {finding.kind} ({concerned(finding)})"
    return html.box(head, parts, finding.severity)


def _picture(channels: ChannelStatistics) -> str:
    mean, true_mean, variance, true_variance = channels
    return html.plots(
        [
            html.scatter(true_mean, mean, "mean of the data (σ)", "moving mean (σ)"),
            html.scatter(
                true_variance, variance, "variance of the data", "moving variance", log=True
            ),
        ]
    )


def _markdown(finding: Finding) -> str:
    head = f"- **{finding.severity}, {finding.kind}** ({concerned(finding)}): {sentence(finding)}"
    lines = [
        f"{label.capitalize()}: " + (f"`{text}`" if label == "cure" else text)
        for label, text in what_to_do(finding)
    ]
    return "  \n  ".join([head, *lines])
