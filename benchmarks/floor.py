"""The floor: passes over tensors in place, each value read once and written once."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from benchmarks.cases import DEPTH, LayerCase
from benchmarks.keras_layers import device
from benchmarks.program import LeftOut, Program

# Passes per step: enough values that the cost of starting threads does not show.
LEAST_VALUES, MOST_ROUNDS = 2**22, 100


def program(case: LayerCase, *, tensors: int = DEPTH) -> Program:
    """Multiplies ``tensors`` tensors of as many bytes as the case's, one after the other, in place.

    As many tensors as the stack has layers need as much memory as its activations, which may exceed the
    caches. A single tensor shows what the caches contribute.

    The tensors are float32 with the same number of bytes, since half-precision arithmetic would cost more than
    the memory traffic.

    Raises:
        LeftOut: For a single tensor on a GPU, whose caches are smaller than the tensors here.
    """
    values = int(np.prod(case.shape)) * tf.as_dtype(case.precision).size // 4
    if device() == "cpu":
        return _in_threads(values, tensors)
    if tensors == 1:
        raise LeftOut("a GPU's caches are smaller than the tensors")
    return _in_tensorflow(values)


def _in_threads(values: int, tensors: int) -> Program:
    """Runs in NumPy on as many threads as the other contenders use: TensorFlow has no such operation.

    A TensorFlow operation that writes another tensor allocates new memory each time.
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
    """Runs operations that TensorFlow executes in place, since nothing else references their input.

    The first one is an exception: it writes to new memory. Multiplications alone would be merged
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
