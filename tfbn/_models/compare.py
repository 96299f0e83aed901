"""Comparing the outputs of two models, and drawing the inputs to compare them on."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbn._models.intercept import isolated_tracing
from tfbn._models.restored import variables_restored
from tfbn._models.tensorflow_state import tensorflow_variables
from tfbn._models.walk import walk
from tfbn._support.checks import is_number

TOLERANCES = {"float16": 3e-2, "bfloat16": 2e-1}
"""Tolerances for half precision: roughly the rounding error that ten layers accumulate."""
DEFAULT_TOLERANCE = 1e-4


def tolerance_for(model: keras.layers.Layer, given: float | None) -> float:
    """The largest difference that rounding may cause between equivalent models, relative to the largest output.

    Args:
        model: The model.
        given: The tolerance that the user passed. `None` chooses one from the compute dtypes of the model.

    Raises:
        ValueError: If `given` is not a number of at least 0.
    """
    if given is not None:
        if not (is_number(given) and given >= 0):
            raise ValueError(
                f"`tolerance` must be a number of at least 0. Received: tolerance={given!r}."
            )
        return given
    used = {layer.compute_dtype for layer in walk(model)}
    return max([TOLERANCES[dtype] for dtype in used & set(TOLERANCES)] or [DEFAULT_TOLERANCE])


def random_inputs(specs: Any, batch_size: int) -> Any:
    """Draws inputs for a model: normal numbers, or zeros and ones for integers and booleans.

    Open axes other than the first get a size of 32.

    The seed is fixed, so every call returns the same inputs.

    Args:
        specs: A nested structure with a `shape` and a `dtype` for each input.
        batch_size: The size of the first axis where the shape leaves it open.

    Raises:
        ValueError: If an input is neither numeric nor boolean.
    """
    rng = np.random.default_rng(0)

    def draw(spec: Any) -> tf.Tensor:
        dtype = tf.as_dtype(spec.dtype)
        sizes = enumerate(spec.shape)
        open_sizes = [32 if axis else batch_size for axis in range(len(spec.shape))]
        shape = [open_sizes[axis] if size is None else size for axis, size in sizes]
        if dtype.is_floating:
            return tf.cast(rng.normal(size=shape), dtype)
        if dtype.is_integer or dtype.is_bool:
            return tf.cast(rng.integers(0, 2, size=shape), dtype)
        raise ValueError(
            f"Cannot draw random inputs of this dtype. Pass `inputs`. Received: dtype={dtype.name}."
        )

    return keras.tree.map_structure(draw, specs)


def outputs(model: keras.Model, inputs: Any) -> Any:
    """Calls a model in inference, and changes nothing."""
    return _call(model, inputs)[0]


def changes_variables(model: keras.Model, inputs: Any) -> bool:
    """Whether calls in inference change variables: seeds of random layers, states of recurrent layers."""
    return _call(model, inputs)[1]


def _call(model: keras.Model, inputs: Any) -> tuple[Any, bool]:
    variables = _tensorflow_variables(model)
    with variables_restored(variables) as before:
        with isolated_tracing(), keras.StatelessScope() as scope:
            found = model(inputs, training=False)
        same = map(np.array_equal, variables, before)
        return found, bool(scope.state_mapping) or not all(same)


def _tensorflow_variables(model: keras.Model) -> list[tf.Variable]:
    return [variable for layer in walk(model) for variable in tensorflow_variables(layer)]


def difference(expected: Any, actual: Any) -> float:
    """The largest difference between two nests of outputs, each relative to its largest expected value.

    Raises:
        ValueError: If an expected output is not finite, or all of them are empty.
    """
    outputs = [[_as_array(x) for x in keras.tree.flatten(nest)] for nest in (expected, actual)]
    if not any(output.size for output in outputs[0]):
        raise ValueError(
            "The outputs are empty, so they cannot be compared. Pass inputs with at least one example. "
            f"Received: outputs of shapes {[output.shape for output in outputs[0]]}."
        )
    return max(_difference(*pair) for pair in zip(*outputs, strict=True))


def advice(model: keras.Model, inputs: Any, tolerance: float) -> str:
    """What to do when the outputs of a model differ from those of its copy by more than the tolerance."""
    with variables_restored([*model.non_trainable_variables, *_tensorflow_variables(model)]):
        apart = difference(*(model(inputs, training=False) for _ in range(2)))
    if apart > tolerance:
        return (
            f"The outputs of the model are random: two calls on the same inputs differ by {apart:.2g}. Draw the "
            "random numbers from a `keras.random.SeedGenerator`, which can start alike in both models, or pass "
            "tolerance=float('inf') to skip the comparison."
        )
    nudged = keras.tree.map_structure(_nudged, inputs)
    rounding = difference(outputs(model, inputs), outputs(model, nudged))
    if 10 * rounding > tolerance:  # Each layer rounds, so there is more of it than from one.
        return (
            f"The model amplifies rounding: inputs that differ in the last bit change its outputs by {rounding:.2g}. "
            "Pass a larger `tolerance`, or `inputs` that resemble your data."
        )
    return (
        "If the model computes in low precision, pass a larger `tolerance`. If its outputs are very small on random "
        "inputs, pass `inputs` that resemble your data."
    )


def _nudged(x: Any) -> tf.Tensor:
    """Returns float32 or float64 inputs with their last bit changed, up or down, and others as they are."""
    x = tf.convert_to_tensor(x)
    if x.dtype not in (tf.float32, tf.float64):
        return x
    towards = np.random.default_rng(0).choice([-np.inf, np.inf], x.shape)
    return tf.math.nextafter(x, tf.cast(towards, x.dtype))


def _as_array(value: Any) -> np.ndarray:
    return np.asarray(tf.cast(value, tf.float64))


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if not np.all(np.isfinite(expected)):
        raise ValueError(
            "The outputs of the model are not finite, so they cannot be compared. Pass inputs that give finite "
            "outputs, or look for weights that are not finite."
        )
    if not expected.size:
        return 0.0
    largest = float(np.max(np.abs(expected)))
    apart = float(np.max(np.abs(actual - expected)))  # NaN stays: it exceeds every tolerance.
    return apart / largest if largest else apart
