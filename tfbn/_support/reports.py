"""What every report of a tool has in common: text, Markdown, a notebook cell, and JSON."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tfbn._support import html, tables


class Report:
    """A result that shows itself.

    A subclass defines `__str__` for the terminal, `to_markdown` for notebooks and documents, `to_dict` for
    programs, and `_page` for `to_html`. A notebook calls `_repr_markdown_`.
    """

    def to_markdown(self) -> str:
        """Returns the report as Markdown."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in plain types that JSON can represent."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report to one HTML file, with pictures. It needs no other file, and no network.

        Args:
            path: The file to write.
        """
        html.write(path, *self._page())

    def _page(self) -> tuple[str, list[str]]:
        """Returns the title of the page, and what it contains, as HTML."""
        raise NotImplementedError

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


class TableReport(Report):
    """A dataclass that shows itself as a title and a table. A subclass defines what stands in them, and `_page`."""

    _header: ClassVar[Sequence[str]]

    def _title(self) -> str:
        raise NotImplementedError

    def _rows(self) -> list[list[str]]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in plain types that JSON can represent. Numbers that are not finite become None."""
        return plain(dataclasses.asdict(self))  # type: ignore[call-overload]

    def to_markdown(self) -> str:
        """Returns the report as Markdown."""
        rows = self._rows()
        return "\n\n".join(
            [self._title(), *([tables.markdown(self._header, rows)] if rows else ())]
        )

    def __str__(self) -> str:
        rows = self._rows()
        return tables.text(self._title(), self._header, rows) if rows else self._title()


def plain(value: Any) -> Any:
    """Converts nested values to types that JSON can represent.

    JSON has no NaN and no Infinity: a number that is not finite becomes None.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(fraction: float) -> str:
    """Returns "70%" or "1.1%": small fractions with a second digit."""
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{100 * fraction:.2g}%"


def count(number: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun: ``1 batch``, ``2 batches``, ``1,437 examples``.

    Args:
        number: How many.
        one: The singular.
        many: The plural; by default the singular with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
