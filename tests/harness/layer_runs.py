"""Runs a layer, ours or Keras's, and brings back all that can be seen of it as float64 arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cases import Batch, Case
from oracle import BatchNorm, align

# Half of the distance between neighbours, relative: the rounding of one stored result.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "float16": 1e-5, "bfloat16": 1e-5}


def compiled(function: Callable[..., Any], mode: str, signature: Any = None) -> Callable[..., Any]:
    """The function run eagerly, in a graph, or by XLA."""
    if mode == "eager":
        return function
    return tf.function(function, input_signature=signature, jit_compile=(mode == "xla"))


def assign(layer: keras.layers.Layer, values: dict[str, np.ndarray]) -> None:
    """Gives the layer's weights the values that bear their names."""
    for weight in layer.weights:
        if weight.name in values:
            weight.assign(values[weight.name])


def weights(layer: keras.layers.Layer) -> dict[str, np.ndarray]:
    """All weights of the layer by name."""
    return {weight.name: array(weight.value) for weight in layer.weights}


def array(value: Any) -> np.ndarray:
    return tf.cast(value, tf.float64).numpy()


def stepper(
    layer: keras.layers.Layer, like: Batch, dtype: str, mode: str, unknown_batch: bool = False
) -> Callable[[Batch], dict[str, np.ndarray]]:
    """A function that feeds one batch, in training and then in inference mode, both backward too.

    It is compiled once, for batches of `like`'s shape (of any size if `unknown_batch`), and returns
    outputs, gradients and the weights after the batch by name: `training/dx`, `inference/y`,
    `moving_mean`, ...
    """

    def step(
        x: tf.Tensor, dy: tf.Tensor, mask: tf.Tensor | None = None
    ) -> dict[str, dict[str, tf.Tensor]]:
        seen = {}
        for name, training in (("training", True), ("inference", False)):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training, mask=mask)
            sources = {"dx": x} | {"d" + v.name: v.value for v in layer.trainable_variables}
            seen[name] = {"y": y, **tape.gradient(y, sources, output_gradients=dy)}
        return seen

    def tensors(batch: Batch) -> list[tf.Tensor]:
        mask = [] if batch.mask is None else [tf.constant(batch.mask)]
        return [tf.cast(batch.x, dtype), tf.cast(batch.dy, dtype), *mask]

    def spec(tensor: tf.Tensor) -> tf.TensorSpec:
        size = None if unknown_batch else tensor.shape[0]
        return tf.TensorSpec([size, *tensor.shape[1:]], tensor.dtype)

    run = compiled(step, mode, [spec(tensor) for tensor in tensors(like)])

    def feed(batch: Batch) -> dict[str, np.ndarray]:
        seen = {}
        for phase, results in run(*tensors(batch)).items():
            for name, value in results.items():
                if name in ("y", "dx"):
                    assert value.dtype == dtype, f"{phase} {name} is {value.dtype}, not {dtype}"
                seen[f"{phase}/{name}"] = array(value)
        return seen | weights(layer)

    return feed


def observe(
    layer: keras.layers.Layer,
    batches: list[Batch],
    dtype: str,
    mode: str = "eager",
    unknown_batch: bool = False,
) -> dict[str, np.ndarray]:
    """What `stepper` sees of each batch: `0/training/dx`, `1/moving_mean`, ..."""
    feed = stepper(layer, batches[0], dtype, mode, unknown_batch)
    return {f"{i}/{name}": v for i, batch in enumerate(batches) for name, v in feed(batch).items()}


def for_keras(batch: Batch) -> Batch:
    """The batch with its mask in the only shape that Keras's layer takes: one axis fewer."""
    if batch.mask is None:
        return batch
    return dataclasses.replace(batch, mask=align(batch.mask, batch.x)[..., 0])


def expect(case: Case, batches: list[Batch], count_epsilon: float = 0.0) -> dict[str, np.ndarray]:
    """What the oracle sees where `observe` looks."""
    oracle = BatchNorm(case.input_shape, **case.numerics, count_epsilon=count_epsilon)
    oracle.state |= case.weights()
    seen = {}
    for i, batch in enumerate(batches):
        passes = {"training": oracle.train(batch.x, batch.dy, batch.mask)}
        passes["inference"] = oracle.infer(batch.x, batch.dy)
        for phase, result in passes.items():
            seen |= {f"{i}/{phase}/{name}": value for name, value in vars(result).items()}
        seen |= {f"{i}/{name}": value for name, value in oracle.state.items()}
        seen[f"{i}/update_count"] = oracle.updates
    return seen


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value."""
    if not expected.size:
        return 0.0
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


def assert_agree(
    actual: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    dtype: str,
    tolerance: float | None = None,
    roundings: int = 1,
) -> None:
    """Every result seen is near the expected one.

    Near is an error within `tolerance` of the largest expected value and, for outputs and input
    gradients of half precision, `roundings` to that precision more.
    """
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    far = []
    for name, value in actual.items():
        reference = expected[name]
        assert value.shape == reference.shape, f"{name}: shape {value.shape}, not {reference.shape}"
        rounded = dtype in ROUNDING and name.rsplit("/")[-1] in ("y", "dx")
        rounding = roundings * ROUNDING[dtype] if rounded else 0.0
        scale = max(float(np.max(np.abs(reference), initial=0.0)), 1e-30)
        bound = tolerance * scale + rounding * np.abs(reference)
        if not np.all(np.abs(value - reference) <= bound):  # NaN is far from everything
            far.append(f"{name}: error {error(value, reference):.2g} of the largest value")
    assert not far, f"beyond {tolerance:g}: " + "; ".join(far)
