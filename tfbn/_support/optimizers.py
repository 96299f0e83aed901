"""The optimizer inside an optimizer."""

from typing import Any


def unwrap_optimizer(optimizer: Any) -> Any:
    """The one that takes the step: in half precision, Keras has wrapped it. `None` where there is none."""
    return getattr(optimizer, "inner_optimizer", optimizer)
