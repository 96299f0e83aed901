"""Tables for people: on the terminal, by rich where it is installed, and in Markdown."""

import io
from collections.abc import Sequence

Row = Sequence[str]


def text(title: str, header: Row, rows: Sequence[Row], left: int = 1) -> str:
    """A table for the terminal. The first columns, `left` of them, are aligned left, the others right.

    Without rich it is made of spaces.
    """
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError:
        return _plain(title, header, rows, left)
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        words = number < left
        table.add_column(
            name, justify="left" if words else "right", no_wrap=not words, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    width = max(100, rich.console.Console().width)
    page = io.StringIO()
    rich.console.Console(file=page, width=width, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def markdown(header: Row, rows: Sequence[Row], left: int = 1) -> str:
    """A table in Markdown, aligned likewise."""
    rule = ["---" if number < left else "---:" for number in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _plain(title: str, header: Row, rows: Sequence[Row], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
