"""What a recalibration reports."""

import dataclasses
import math

from tfbn._statistics.measure import CacheUse
from tfbn._support import html
from tfbn._support.reports import TableReport, count


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """What `tfbn.recalibrate` did to one layer.

    Attributes:
        layer: The path of the layer.
        outcome: "recalibrated", or why the layer did not change: "frozen", "not called", or "masked" if the
            masks left no values.
        calls: How often the model calls the layer.
        values: The number of values per channel over all calls: the mean over the channels.
        mean_shift: How far the mean moved, in standard deviations of the new statistics: the root mean
            square over the channels.
        variance_ratio: The new variance divided by the old one: the geometric mean over the channels.

    Example:
        >>> [change.outcome for change in tfbn.recalibrate(model, images).layers]
        ['recalibrated']
    """

    layer: str
    outcome: str
    calls: int = 0
    values: float = 0.0
    mean_shift: float = 0.0
    variance_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Recalibration(TableReport):
    """What `tfbn.recalibrate` did. It prints as a table.

    Attributes:
        upstream: The argument of `tfbn.recalibrate`.
        levels: How many layers feed each other, one after the other, at most; 1 with ``upstream="batch"``.
        passes: How often the data was read.
        batches: The number of batches in a pass.
        examples: The number of examples in a pass.
        cache: How the tensors between levels were kept.
        layers: A `LayerChange` for each layer, in order of definition.

    Example:
        >>> result = tfbn.recalibrate(model, images)
        >>> result.passes, result.examples
        (1, 96)
        >>> result.to_html("recalibration.html")
    """

    _header = ("layer", "outcome", "calls", "values", "mean moved by", "variance times")

    upstream: str
    levels: int
    passes: int
    batches: int
    examples: int
    cache: CacheUse
    layers: tuple[LayerChange, ...]

    def _page(self) -> tuple[str, list[str]]:
        bars = {
            4: [change.mean_shift for change in self.layers],
            5: [abs(math.log(change.variance_ratio or math.inf)) for change in self.layers],
        }
        note = "Bars: how far the mean moved, and the logarithm of the variance's ratio, in either direction."
        numeric = [False, False, True, True, True, True]
        parts = [
            html.paragraph(self._title() + ".", "soft"),
            html.table(self._header, self._rows(), numeric, bars),
            html.paragraph(note, "soft"),
        ]
        return "Recalibration", parts

    def _title(self) -> str:
        return (
            f"Batch normalization recalibrated on {count(self.examples, 'example')} in "
            f"{count(self.batches, 'batch', 'batches')}, {count(self.passes, 'pass', 'passes')}"
            f"{self.cache.described()}"
        )

    def _rows(self) -> list[list[str]]:
        return [
            [
                change.layer,
                change.outcome,
                str(change.calls),
                f"{change.values:.0f}",
                f"{change.mean_shift:.3g} σ",
                f"{change.variance_ratio:.3g}",
            ]
            for change in self.layers
        ]
