"""The style of the figures: one width, one set of colours, labelled axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.extras import from_extra
from examples.lectures.result import bands

with from_extra("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart. Dashes and markers help in print.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
WITH = {"color": BLUE, "linestyle": "-", "marker": "o", "label": "with batch norm"}
WITHOUT = {"color": VERMILION, "linestyle": "--", "marker": "s", "label": "without"}
MAP = "cividis"  # a colormap that also works in black and white

WIDTH = 9.0  # inches, about the size on the page
DPI = 110


def figure(height: float = 3.6) -> Figure:
    """Creates an empty figure of the common width and a height in inches."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def label(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Labels the axes, with their units, and removes clutter."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def band(axes: Axes, x: Sequence[float], values: Any, **style: Any) -> None:
    """Plots the median over the seeds as a line, and the quartiles as a band around it.

    Args:
        axes: The axes to plot on.
        x: The positions, of shape (positions,).
        values: The values, of shape (seeds, positions).
        style: Line properties, such as `WITH` or `WITHOUT`.
    """
    low, median, high = bands(np.asarray(values, float))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(x, median, **{"markersize": 3.5, "linewidth": 1.6} | style)
