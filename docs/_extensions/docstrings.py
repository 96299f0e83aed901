"""Lets `Returns:` begin with a sentence that has a colon, which napoleon would take for the end of a type."""

import re
import textwrap
from typing import Any

RETURNS = re.compile(r"^(Returns|Yields):\n((?:[ \t]+\S.*\n|\n)+)", re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = returns_as_field("\n".join(lines) + "\n").splitlines()


def returns_as_field(text: str) -> str:
    """The docstring with a reStructuredText field in place of its section `Returns:`."""

    def field(match: re.Match[str]) -> str:
        body = textwrap.indent(textwrap.dedent(match[2]).strip(), "    ").strip()
        return f":{match[1].lower()}: {body}\n\n"

    return RETURNS.sub(field, text)
