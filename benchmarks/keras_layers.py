"""A stack of Keras layers, of Keras 3 or 2, on TensorFlow."""

import time
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import data, memory
from benchmarks.cases import DEPTH, LayerCase
from benchmarks.program import Program, some


def program(layer_class: type, library: Any, case: LayerCase) -> Program:
    """Trains, or infers with, a stack of ``layer_class`` (of ``library``: keras or tf_keras).

    A training step returns the output and the gradients of input, gammas and betas, so that nothing
    is pruned as unused. The upstream gradient is an input, so that no loss adds a pass.
    """
    policy = case.precision if case.precision == "float32" else f"mixed_{case.precision}"
    x, dy = (tf.cast(tensor, case.precision) for tensor in data.tensors(case))
    layers = [
        layer_class(
            axis=case.axis,
            momentum=data.MOMENTUM,
            epsilon=data.EPSILON,
            # Keras 2 does not accept the name of a policy here.
            dtype=library.mixed_precision.Policy(policy),
        )
        for _ in range(DEPTH)
    ]
    for layer, weights in zip(layers, data.parameters(case), strict=True):
        layer.build(x.shape)
        if layer.weights:
            layer.set_weights(
                [weights.gamma, weights.beta, weights.moving_mean, weights.moving_variance]
            )
    variables = [variable for layer in layers for variable in layer.trainable_variables]

    def stack(x: tf.Tensor, training: bool) -> tf.Tensor:
        for layer in layers:
            x = layer(x, training=training)
        return x

    def train(x: tf.Tensor, dy: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = stack(x, training=True)
        return y, tape.gradient(y, [x, *variables], output_gradients=dy)

    def infer(x: tf.Tensor, dy: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        del dy
        return stack(x, training=False), []

    function: Any = train if case.phase == "train" else infer
    trace_seconds = None
    if case.mode != "eager":
        function = tf.function(function, jit_compile=case.mode == "xla", autograph=False)
        begin = time.perf_counter()
        function.get_concrete_function(x, dy)
        trace_seconds = time.perf_counter() - begin

    def values(result: tuple[tf.Tensor, list[tf.Tensor]]) -> dict[str, np.ndarray]:
        y, gradients = result
        found = {"y": y}
        if gradients:
            found["dx"] = gradients[0]
        if len(gradients) > 1:
            # Each layer undoes the gamma and beta of the previous one, so only the last ones matter.
            found.update(dgamma=gradients[-2], dbeta=gradients[-1], mean=layers[-1].moving_mean)
        return {name: some(tf.cast(value, tf.float32).numpy()) for name, value in found.items()}

    return Program(
        step=lambda: function(x, dy),
        wait=tf.test.experimental.sync_devices,
        values=values,
        parts=DEPTH,
        device=device(),
        trace_seconds=trace_seconds,
        peak=memory.peak_on_gpu if device() == "gpu" else None,
    )


def device() -> str:
    """Returns the default device of TensorFlow."""
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
