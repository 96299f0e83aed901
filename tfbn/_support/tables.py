"""Tables for people: on the terminal, drawn by rich where it is installed, and in Markdown.

Columns of numbers are aligned right, columns of text left.
"""

import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

Row = Sequence[str]
_NUMBER = re.compile(r"[-+−]?(\d|inf\b|nan\b)|$")
"""What a cell in a column of numbers begins with. It may be empty."""
_UNLIMITED = 10_000
_NARROWEST = 12


def text(title: str, header: Row, rows: Sequence[Row]) -> str:
    """Returns a table for the terminal, with spaces as rules if rich is not installed.

    In a terminal, text that is too long for a line continues below in the same column. Elsewhere, a row
    takes one line however long it is, so that programs can search it.
    """
    width = line_width()
    try:
        table = _rich(header, rows, width)
    except ImportError:
        table = _plain(header, rows, width)
    return "\n".join([textwrap.fill(title, width), *table])


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """Returns a table in Markdown."""
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(header, rows)]
    lines = [header, rule, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def line_width(stream: TextIO | None = None) -> int:
    """The width of the terminal; practically unlimited if the stream (stdout) is not a terminal."""
    stream = stream or sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else _UNLIMITED


def _numeric_columns(header: Row, rows: Sequence[Row]) -> list[bool]:
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return [any(column) and all(map(_NUMBER.match, column)) for column in columns]


def _rich(header: Row, rows: Sequence[Row], width: int) -> list[str]:
    import rich.box
    import rich.console
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name, numeric in zip(header, _numeric_columns(header, rows), strict=True):
        table.add_column(
            name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric
        )
    for row in rows:
        table.add_row(*row)
    page = io.StringIO()
    # In a notebook, rich would display the table by itself instead of writing it to the page.
    console = rich.console.Console(
        file=page, width=width, markup=False, highlight=False, force_jupyter=False
    )
    console.print(table)
    return [line.rstrip() for line in page.getvalue().splitlines() if line.strip()]


def _plain(header: Row, rows: Sequence[Row], width: int) -> list[str]:
    numeric = _numeric_columns(header, rows)
    widths = _fitting_widths([header, *rows], numeric, width)
    lines = [line for row in [header, *rows] for line in _aligned(row, widths, numeric)]
    head = len(_aligned(header, widths, numeric))
    return [*lines[:head], "-" * max(map(len, lines)), *lines[head:]]


def _fitting_widths(rows: Sequence[Row], numeric: Sequence[bool], width: int) -> list[int]:
    """The width of each column. The widest columns of text become narrower until a line fits."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [index for index, is_numeric in enumerate(numeric) if not is_numeric]
    while texts and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(texts, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _aligned(row: Row, widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        "  ".join(
            part.rjust(width) if is_numeric else part.ljust(width)
            for part, width, is_numeric in zip(parts, widths, numeric, strict=True)
        ).rstrip()
        for parts in itertools.zip_longest(*cells, fillvalue="")
    ]
