"""How the pictures look: one width, one set of colours, labelled axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.extras import from_extra
from examples.lectures.result import bands

with from_extra("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, which colour-blind readers tell apart. The dashes and marks serve in print.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
WITH = {"color": BLUE, "linestyle": "-", "marker": "o", "label": "with batch norm"}
WITHOUT = {"color": VERMILION, "linestyle": "--", "marker": "s", "label": "without"}
MAP = "cividis"  # of colours for numbers, as light in print as in colour

WIDTH = 9.0  # inches: a page shows it at about this size
DPI = 110


def figure(height: float = 3.6) -> Figure:
    """An empty picture of the width that all have; `height` is in inches."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Names the axes, with their units, and tidies them."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def band(axes: Axes, x: Sequence[float], values: Any, **style: Any) -> None:
    """The median over the seeds, the first axis of `values`, as a line; the quartiles as a band around it.

    Args:
        axes: Where.
        x: (places,).
        values: (seeds, places).
        style: `WITH`, `WITHOUT`, or like them.
    """
    low, median, high = bands(np.asarray(values, float))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(x, median, **{"markersize": 3.5, "linewidth": 1.6} | style)
