"""Where values come from that are not finite."""

import dataclasses

import keras
import numpy as np

from tfbn._models.walk import batch_norm_layers, walk
from tfbn._support.reports import count


@dataclasses.dataclass(frozen=True)
class NotFinite:
    """Values that are NaN or infinite.

    Attributes:
        layer: The first layer whose inputs contain them.
        source: "data", "weights", "overflow" (of half precision), or "unknown".
        what: What was found, in a sentence.
        advice: What to do.
    """

    layer: str
    source: str
    what: str
    advice: str


def trace_not_finite(model: keras.layers.Layer, layer: str, data_is_finite: bool) -> NotFinite:
    """Finds out where values that are not finite come from.

    Args:
        model: The model.
        layer: The first batch normalization layer whose inputs contain such values.
        data_is_finite: Whether all inputs of the model are finite.
    """
    statistics = {id(v) for bn in batch_norm_layers(model) for v in bn.non_trainable_variables}
    bad = [
        weight.path
        for weight in model.weights
        if id(weight) not in statistics and not np.all(np.isfinite(_numbers(weight)))
    ]
    if bad:
        others = f", and {count(len(bad) - 1, 'other weight')} too" if bad[1:] else ""
        what = f"The weight {bad[0]!r} does, too{others}."
        return NotFinite(
            layer, "weights", what, "load weights from before, with a lower learning rate"
        )
    if not data_is_finite:
        what = "The data does, too."
        return NotFinite(layer, "data", what, "remove these examples, or repair what reads them")
    if any(part.compute_dtype == "float16" for part in walk(model)):
        return NotFinite(layer, "overflow", "", "")
    what = "The data and the weights are finite, so a layer on the way makes them."
    advice = "tf.debugging.enable_check_numerics() names the operation"
    return NotFinite(layer, "unknown", what, advice)


def _numbers(weight: keras.Variable) -> np.ndarray:
    values = keras.ops.convert_to_numpy(weight)
    return values if values.dtype.kind == "f" else np.zeros(1)
