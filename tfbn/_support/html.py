"""One self-contained page for a report: text, tables with bars, and scatter plots as inline SVG.

Whatever a function here takes is plain text, which it escapes. What it returns is HTML.
"""

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Sequence[str]

_MOST_DOTS = 600

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #fff;
  --box: #f5f7f9; --bar: #2f7fb8; --bad: #c2410c; --good: #157f4a; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --soft: #9aa5b4; --line: #343c48; --paper: #14181e;
  --box: #1d232c; --bar: #58a6dc; --bad: #fb8c5a; --good: #4cc38a; --warn: #f0b429; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 48rem; }
.soft { color: var(--soft); }
.box { border: 1px solid var(--line); border-left: 4px solid var(--soft); border-radius: 6px; padding: 1rem 1.25rem;
  margin: 1rem 0; break-inside: avoid; }
.error { border-left-color: var(--bad); } .warning { border-left-color: var(--warn); }
.good { border-left-color: var(--good); }
.label { color: var(--soft); font-size: .85rem; margin: .75rem 0 .25rem; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; } th, td { padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; } tr { break-inside: avoid; }
td.name { overflow-wrap: anywhere; min-width: 9rem; }
.track { display: block; height: 5px; margin-top: 3px; min-width: 5rem; background: var(--box); border-radius: 3px; }
.track i { display: block; height: 5px; background: var(--bar); border-radius: 3px; }
tr.bad .track i { background: var(--bad); }
.plots { display: flex; flex-wrap: wrap; gap: 1.25rem; margin: .5rem 0 0; break-inside: avoid; }
figure { margin: 0; flex: 1 1 20rem; max-width: 27rem; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } .dot { fill: var(--bar); fill-opacity: .7; }
.frame { fill: none; stroke: var(--line); } .ideal { stroke: var(--good); stroke-dasharray: 4 3; }
.squares { display: flex; flex-wrap: wrap; gap: 3px; margin: .75rem 0; } .squares i { width: 16px; height: 16px;
  border-radius: 3px; } .legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: .4rem; }
@media print { body { padding: 0; font-size: 12px; } table { font-size: 10px; } .scroll { overflow: visible; }
  figure { flex: 1 1 40%; } h2 { break-after: avoid; } td.name { min-width: 5rem; } .track { min-width: 2.5rem; }
  th, td { padding-right: .5rem; } }
.c0 { background: #157f4a; } .c1 { background: #2f7fb8; } .c2 { background: #d99a1c; } .c3 { background: #c2410c; }
"""


def write(path: str | os.PathLike[str], title: str, parts: Sequence[str]) -> None:
    """Writes a page. It needs no other file, and no network.

    Args:
        path: The file.
        title: Its title, as plain text.
        parts: What it contains, as HTML.
    """
    body = "\n".join(parts)
    Path(path).write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )


def heading(text: str) -> str:
    """A heading within the page."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, style: str = "") -> str:
    """A paragraph; its style can be "soft"."""
    return f'<p class="{html.escape(style)}">{html.escape(text)}</p>'


def labelled(label: str, text: str, code: bool = False) -> str:
    """A short label, and what it announces: a paragraph, or code to copy."""
    content = f"<pre><code>{html.escape(text)}</code></pre>" if code else paragraph(text)
    return f'<p class="label">{html.escape(label)}</p>{content}'


def box(title: str, parts: Sequence[str], style: str = "") -> str:
    """A box with a title. Its style can be "error", "warning" or "good"."""
    content = "".join(parts)
    return f'<section class="box {html.escape(style)}"><h3>{html.escape(title)}</h3>{content}</section>'


def table(
    header: Row,
    rows: Sequence[Row],
    numeric: Sequence[bool],
    bars: Mapping[int, Sequence[float]] | None = None,
    marked: Sequence[bool] = (),
) -> str:
    """A table.

    Args:
        header: The names of the columns.
        rows: The cells.
        numeric: Which columns hold numbers.
        bars: By the number of a column: values to draw as bars, relative to the largest one.
        marked: Which rows are in trouble.
    """
    styles = ["number" if is_number else "name" for is_number in numeric]
    head = "".join(
        f'<th class="{style}">{html.escape(name)}</th>'
        for style, name in zip(styles, header, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        cells = ""
        for column, (style, cell) in enumerate(zip(styles, row, strict=True)):
            bar = _bar((bars or {}).get(column, ()), number)
            # A long path breaks behind a slash.
            text = html.escape(cell).replace("/", "/<wbr>")
            cells += f'<td class="{style}">{text}{bar}</td>'
        lines.append(f'<tr class="{"bad" if marked and marked[number] else ""}">{cells}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _bar(values: Sequence[float], number: int) -> str:
    if not values:
        return ""
    largest = max((value for value in values if math.isfinite(value)), default=0) or 1
    value = values[number]
    share = 100 * min(max(value / largest, 0), 1) if math.isfinite(value) else 100
    return f'<span class="track"><i style="width:{share:.1f}%"></i></span>'


def squares(kinds: Sequence[str], titles: Sequence[str], legend: Sequence[str]) -> str:
    """One small square for each thing, in order, colored by its kind.

    Args:
        kinds: The kind of each.
        titles: What the pointer shows over each.
        legend: All kinds, four at most, in the order of the colors: green, blue, yellow, red.
    """
    colors = {kind: f"c{number}" for number, kind in enumerate(legend)}
    cells = "".join(
        f'<i class="{colors[kind]}" title="{html.escape(title)}"></i>'
        for kind, title in zip(kinds, titles, strict=True)
    )
    names = "".join(
        f'<span><i class="{colors[kind]}"></i>{html.escape(kind)}: {kinds.count(kind)}</span>'
        for kind in legend
        if kind in kinds
    )
    return f'<div class="squares">{cells}</div><div class="legend">{names}</div>'


def plots(figures: Sequence[str]) -> str:
    """Pictures side by side."""
    return f'<div class="plots">{"".join(figures)}</div>'


def scatter(
    xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, log: bool = False
) -> str:
    """A scatter plot with the line on which both are equal."""
    points = [
        (x, y) for x, y in zip(xs, ys, strict=True) if _drawable(x, log) and _drawable(y, log)
    ]
    if not points:
        return ""
    points = points[:: math.ceil(len(points) / _MOST_DOTS)]
    scale = math.log10 if log else float
    values = [scale(value) for point in points for value in point]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    size, left, top = 260, 54, 8

    def at(value: float) -> float:
        return size * (scale(value) - low) / (high - low)

    dots = "".join(
        f'<circle class="dot" cx="{left + at(x):.1f}" cy="{top + size - at(y):.1f}" r="3"/>'
        for x, y in points
    )
    ticks = ""
    for tick in _log_ticks(low, high) if log else _ticks(low, high):
        place = size * (scale(tick) - low) / (high - low)
        ticks += (
            f'<text x="{left + place:.1f}" y="{top + size + 15}" text-anchor="middle">{tick:.3g}</text>'
            f'<text x="{left - 6}" y="{top + size - place + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    middle = top + size / 2
    return (
        f'<figure><svg viewBox="0 0 {left + size + 12} {top + size + 40}" role="img">'
        f"<title>{html.escape(y_label)} against {html.escape(x_label)}</title>"
        f'<rect class="frame" x="{left}" y="{top}" width="{size}" height="{size}"/>'
        f'<line class="ideal" x1="{left}" y1="{top + size}" x2="{left + size}" y2="{top}"/>{dots}{ticks}'
        f'<text x="{left + size / 2}" y="{top + size + 33}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text></svg></figure>"
    )


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers between two others."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers between 10**low and 10**high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [10.0**power * factor for power in powers for factor in factors]
        found = [number for number in found if low <= math.log10(number) <= high]
        if len(found) <= 6:
            return found
    return found[:: math.ceil(len(found) / 6)]
