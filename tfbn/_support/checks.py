"""Checks and error texts that several rooms share."""

import numbers
import re
from typing import Any

_WRAPPED = "Exception encountered when calling"


def check_count(name: str, value: Any, least: int = 1, optional: bool = False) -> None:
    """Raises an error unless ``value`` is an integer of at least ``least``, or None where that is optional."""
    if optional and value is None:
        return
    if not is_integer(value) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, after its type: ``ValueError: shapes differ``.

    An error without a message gives its type alone.
    """
    # Keras wraps errors: the original message follows, in bold.
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(_WRAPPED)]
    # TensorFlow describes where in a graph it happened, what, and the node again.
    nodes = [number for number, line in enumerate(lines) if line.startswith("[[{{node")]
    if lines and lines[0].startswith("Graph execution error") and nodes:
        lines = lines[nodes[0] - 1 :]
    return ": ".join([type(error).__name__, *lines[:1]])


def is_integer(value: Any) -> bool:
    """Whether ``value`` is a whole number; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
