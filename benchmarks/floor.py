"""The floor: passes over tensors in place, each value read once and written once."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from benchmarks.cases import DEPTH, LayerCase
from benchmarks.keras_layers import device
from benchmarks.program import LeftOut, Program

# Passes a step: so many values that starting the threads does not show, within reason.
LEAST_VALUES, MOST_ROUNDS = 2**22, 100


def program(case: LayerCase, *, tensors: int = DEPTH) -> Program:
    """Multiplies ``tensors`` tensors of as many bytes as the case's, one after the other, in place.

    As many as the stack has layers take as much room as the stack's activations do, which the
    caches may not have. One alone, over and over, shows what the caches make of it.

    Half-precision arithmetic would cost more than the memory does: these are float32 of as many
    bytes.

    Raises:
        LeftOut: For one tensor alone on a GPU, whose caches are smaller than the tensors here.
    """
    values = int(np.prod(case.shape)) * tf.as_dtype(case.precision).size // 4
    if device() == "cpu":
        return _in_threads(values, tensors)
    if tensors == 1:
        raise LeftOut("a GPU's caches are smaller than the tensors")
    return _in_tensorflow(values)


def _in_threads(values: int, tensors: int) -> Program:
    """By NumPy, on as many threads as the other contenders have: TensorFlow has no such operation.

    One that reads a tensor and writes another takes new memory for it each time.
    """
    threads = int(os.environ["OMP_NUM_THREADS"])
    parts = [
        [np.ones(-(-values // threads), np.float32) for _ in range(tensors)] for _ in range(threads)
    ]
    rounds = min(MOST_ROUNDS, -(-LEAST_VALUES // (values * tensors)))
    pool = ThreadPoolExecutor(threads)
    factor = np.float32(-1)

    def work(mine: list[np.ndarray]) -> None:
        for _ in range(rounds):
            for part in mine:
                np.multiply(part, factor, out=part)

    return _program(lambda: list(pool.map(work, parts)), rounds * tensors)


def _in_tensorflow(values: int) -> Program:
    """By operations that TensorFlow runs in place, since nobody else holds their input.

    That is all but the first, which writes to fresh memory. Multiplications alone would be folded
    into one.
    """

    @tf.function(autograph=False)
    def passes(x: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        for _ in range(DEPTH):
            x = tf.multiply(x, factor)
            x = tf.add(x, factor)
        return x

    x, factor = tf.random.normal([values]), tf.constant(0.5)
    return _program(lambda: passes(x, factor), 2 * DEPTH)


def _program(step: Callable[[], object], parts: int) -> Program:
    return Program(
        step=step,
        wait=tf.test.experimental.sync_devices,
        values=lambda result: {},
        parts=parts,
        device=device(),
    )
