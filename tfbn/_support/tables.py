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
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    page = io.StringIO()
    # As wide as the table needs: a name that is cut, or broken in two, is of no use.
    rich.console.Console(file=page, width=10_000, markup=False, highlight=False).print(table)
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    return "\n".join([title, *lines]).rstrip()


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
