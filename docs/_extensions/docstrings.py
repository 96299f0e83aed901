"""What autodoc and napoleon get wrong in our docstrings.

- `Returns:` may begin with a sentence that has a colon; napoleon would take its beginning for a type.
- Keras's classes show the arguments of `__init__`, not those of their base's `__new__`.
"""

import inspect
import re
import textwrap
from typing import Any

RETURNS = re.compile(r"^(Returns|Yields):\n((?:[ \t]+\S.*\n|\n)+)", re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = returns_as_field("\n".join(lines) + "\n").splitlines()


def signature(
    app: Any, what: str, name: str, obj: Any, options: Any, shown: str | None, returns: str | None
) -> tuple[str, None] | None:
    return (arguments(obj), None) if shown == "(*args, **kwargs)" else None


def arguments(cls: type) -> str:
    """The arguments of a class's `__init__`, without annotations."""
    own = inspect.signature(cls.__init__)
    parameters = list(own.parameters.values())[1:]
    plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))


def returns_as_field(text: str) -> str:
    """The docstring with a reStructuredText field in place of its section `Returns:`."""

    def field(match: re.Match[str]) -> str:
        body = textwrap.indent(textwrap.dedent(match[2]).strip(), "    ").strip()
        return f":{match[1].lower()}: {body}\n\n"

    return RETURNS.sub(field, text)
