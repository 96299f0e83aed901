"""Draws the results of a run."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results import select, value
from benchmarks.tables import title

NAMES = ("keras", "tf_keras", "torch", "tfbn", "identity", "floor", "floor_cached")
COLORS = {name: mpl.colormaps["tab10"](index) for index, name in enumerate(NAMES)}


def draw(run: dict[str, Any], path: Path) -> None:
    """Draws one row per mode, and one for the models, with a column per phase and bars by subject."""
    kinds = [("layers", mode) for mode in ("graph", "xla", "eager")]
    kinds += [("models", mode) for mode in ("graph", "xla", "eager")]
    rows = [
        (suite, mode, precision)
        for suite, mode in kinds
        for precision in ("float32", "bfloat16", "float16")
        if select(run, suite=suite, mode=mode, precision=precision)
    ]
    phases = [phase for phase in ("train", "infer") if select(run, phase=phase)]
    figure = Figure(figsize=(9 * len(phases), 3.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(phases), squeeze=False)
    for (suite, mode, precision), axes_row in zip(rows, grid, strict=True):
        for phase, axes in zip(phases, axes_row, strict=True):
            found = select(run, suite=suite, mode=mode, precision=precision, phase=phase)
            _bars(axes, run["contenders"], found)
            axes.set_title(f"{suite}: {phase}, {mode}, {precision}")
            axes.set_ylabel("ms a layer" if suite == "layers" else "ms a step")
            if suite == "layers":  # Shapes differ by orders of magnitude.
                axes.set_yscale("log")
    handles, labels = grid[0][0].get_legend_handles_labels()  # The layers' has all contenders.
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title(run))
    figure.savefig(path, dpi=80)


def _bars(axes: Any, contenders: list[str], results: list[dict[str, Any]]) -> None:
    contenders = [n for n in contenders if any(value(r, n) is not None for r in results)]
    width = 0.8 / max(1, len(contenders))
    for index, name in enumerate(contenders):
        at, heights, errors = [], [], []
        for place, result in enumerate(results):
            ms, q1, q3 = (value(result, name, key) for key in ("ms", "q1", "q3"))
            if ms is not None and q1 is not None and q3 is not None:
                at.append(place + (index - (len(contenders) - 1) / 2) * width)
                heights.append(ms)
                errors.append((max(ms - q1, 0.0), max(q3 - ms, 0.0)))
        spread = list(zip(*errors, strict=True))
        axes.bar(at, heights, width, yerr=spread, label=name, color=COLORS.get(name))
    axes.set_xticks(range(len(results)), [r["subject"] for r in results], fontsize="small")
    axes.grid(axis="y", alpha=0.3)
