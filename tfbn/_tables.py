"""Tables for people: on the terminal, by rich where it is installed, and in Markdown."""

import io
from collections.abc import Sequence

Row = Sequence[str]


def text(title: str, header: Row, rows: Sequence[Row]) -> str:
    """A table for the terminal. The first column is aligned left, the others right.

    Without rich it is made of spaces.
    """
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError:
        return _plain(title, header, rows)
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    width = max(100, rich.console.Console().width)
    console = rich.console.Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(table)
    return console.file.getvalue().rstrip()


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """A table in Markdown, aligned likewise."""
    lines = [header, ["---" if not number else "---:" for number in range(len(header))], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _plain(title: str, header: Row, rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
