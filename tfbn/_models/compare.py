"""Whether two models give the same outputs, and on what inputs to ask."""

import numbers
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._models.walk import walk

TOLERANCES = {"float16": 3e-2, "bfloat16": 2e-1}
"""For models that compute in half precision: their outputs are that uncertain after some ten layers."""
DEFAULT_TOLERANCE = 1e-4


def tolerance_for(model: keras.layers.Layer, given: float | None) -> float:
    """How far outputs may be apart, relative to the largest, for models that are the same but for rounding.

    Args:
        model: The model.
        given: What the user says; None for what the precision of the model allows.

    Raises:
        ValueError: if what is given is no number of at least 0.
    """
    if given is not None:
        if not (isinstance(given, numbers.Real) and given >= 0):
            raise ValueError(f"`tolerance` must be a number, at least 0. Received: {given!r}.")
        return given
    used = {layer.compute_dtype for layer in walk(model, set())}
    return max([TOLERANCES[dtype] for dtype in used & set(TOLERANCES)] or [DEFAULT_TOLERANCE])


def random_inputs(specs: Any, batch_size: int, unknown: int = 32) -> Any:
    """Inputs for a model: normal numbers, zeros and ones for integers and truth values; the same every time.

    Args:
        specs: What has a shape and a dtype for each input, nested.
        batch_size: The size of the first axis, where it is open.
        unknown: The size of every other axis of which it is not known.

    Raises:
        ValueError: for an input of strings.
    """
    rng = np.random.default_rng(0)

    def draw(spec: Any) -> tf.Tensor:
        dtype = tf.as_dtype(spec.dtype)
        first, *others = spec.shape
        shape = [first or batch_size, *(unknown if size is None else size for size in others)]
        if dtype.is_floating:
            return tf.cast(rng.normal(size=shape), dtype)
        if dtype.is_integer or dtype.is_bool:
            return tf.cast(rng.integers(0, 2, size=shape), dtype)
        raise ValueError(
            f"No random inputs can be made of this type: pass some. Received: {dtype.name}."
        )

    return keras.tree.map_structure(draw, specs)


def difference(expected: Any, actual: Any) -> float:
    """The largest difference between outputs, each relative to the largest value expected of it.

    Raises:
        ValueError: if an expected output is not finite, or nothing is expected.
    """
    outputs = [[_as_array(x) for x in keras.tree.flatten(nest)] for nest in (expected, actual)]
    if not any(output.size for output in outputs[0]):
        raise ValueError(
            "The outputs are empty, so nothing can be compared: pass inputs with an example at least. "
            f"Received: outputs of the shapes {[output.shape for output in outputs[0]]}."
        )
    return max(_difference(*pair) for pair in zip(*outputs, strict=True))


def advice(model: keras.Model, inputs: Any, tolerance: float) -> str:
    """What to do where another model gave other outputs than this one."""
    apart = difference(*(model(inputs, training=False) for _ in range(2)))
    if apart > tolerance:
        return (
            f"Two calls of the model itself are {apart:.2g} apart: its outputs are random. Take the randomness out of "
            "it, or pass tolerance=float('inf') to compare nothing."
        )
    return (
        "Pass a larger tolerance if the model computes in low precision or its outputs are very small on "
        "random inputs; or pass inputs like those of your data."
    )


def _as_array(value: Any) -> np.ndarray:
    return np.asarray(tf.cast(value, tf.float64))


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if not np.all(np.isfinite(expected)):
        raise ValueError(
            "Outputs of the model are not finite, so nothing can be compared with them. Pass inputs for which "
            "they are, or look for a weight that is not finite."
        )
    if not expected.size:
        return 0.0
    largest = float(np.max(np.abs(expected)))
    apart = float(np.max(np.abs(actual - expected)))  # NaN stays NaN, and is within no tolerance.
    return apart / largest if largest else apart
