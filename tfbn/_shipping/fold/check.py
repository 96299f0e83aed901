"""Comparing the outputs of a model with those of what was made of it."""

from typing import Any

import keras

from tfbn._models import compare


class FoldError(ValueError):
    """Raised by `tfbn.fold` and `tfbn.fuse` when the new model gives other outputs than the model.

    Example:
        >>> try:
        ...     folded = tfbn.fold(model, images, tolerance=1e-5)
        ... except tfbn.FoldError as error:
        ...     print(error)
    """


def difference_of(
    model: keras.Model, new: keras.Model, inputs: Any, tolerance: float, what: str
) -> float:
    """Returns the largest difference between the outputs of two models, relative to the largest output.

    Args:
        model: The original model.
        new: What was made of it.
        inputs: What to call both with.
        tolerance: The largest allowed difference.
        what: What the new model is called in errors.

    Raises:
        FoldError: If the difference is larger than the tolerance.
    """
    difference = compare.difference(*(compare.outputs(m, inputs) for m in (model, new)))
    if not difference <= tolerance:
        raise FoldError(
            f"The {what} model gives other outputs than the model. "
            f"Received: a difference of {difference:.2g} relative to the largest output, "
            f"tolerance={tolerance:.2g}. " + compare.advice(model, inputs, tolerance)
        )
    return difference
