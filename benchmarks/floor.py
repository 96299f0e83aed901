"""The floor: passes over tensors in place, each value read once and written once."""

import numpy as np
import tensorflow as tf

from benchmarks.cases import DEPTH, LayerCase
from benchmarks.keras_layers import device
from benchmarks.program import Program


def program(case: LayerCase) -> Program:
    """Multiplies a tensor of as many bytes as the case's by a number, in place, as often as the stack has layers.

    Half-precision arithmetic would cost more than the memory; so these passes are over float32 of as
    many bytes. TensorFlow writes the result of an operation over its input where nobody else holds
    it: that is all passes but the first, which writes to fresh memory.
    """
    values = int(np.prod(case.shape)) * tf.as_dtype(case.precision).size // 4
    x = tf.random.normal([values])
    factors = [tf.constant(1.0 + 1e-3 * (-1) ** layer) for layer in range(DEPTH)]

    @tf.function(autograph=False)
    def passes(x: tf.Tensor, *factors: tf.Tensor) -> tf.Tensor:
        for factor in factors:
            x = tf.multiply(x, factor)
        return x

    return Program(
        step=lambda: passes(x, *factors),
        wait=tf.test.experimental.sync_devices,
        values=lambda result: {},
        parts=DEPTH,
        device=device(),
    )
