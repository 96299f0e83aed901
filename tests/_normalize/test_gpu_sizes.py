"""At sizes for a GPU: within 1e-5 of the oracle, and nowhere further from it than Keras's layer.

There cuDNN takes other kernels than at the sizes of the other tests, and it refuses more than 65,535
examples in inference and 880,801 in training (pytorch#19911).
"""

from __future__ import annotations

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbn
from cases import Batch
from layer_runs import array, assert_agree, assign, stepper, weights
from oracle import BatchNorm
from replicas import rounded

pytestmark = pytest.mark.gpu

SHAPES = [
    ((900_000, 4), -1),
    ((70_000, 2, 2, 4), -1),
    ((2048, 1024), -1),
    ((64, 56, 56, 16), -1),
    ((32, 64, 40, 40), 1),
    ((70_000, 4, 8), 1),
]
POLICIES = {"float32": "float32", "mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
NUMERICS = {"momentum": 0.7, "epsilon": 2e-3}


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with tf.device("GPU:0"):
        yield


@functools.lru_cache(maxsize=1)  # The tests of a batch follow each other.
def expected(shape, axis, dtype, mean):
    """A batch, the weights before it, and all that the oracle sees of it."""
    rng = np.random.default_rng(3)
    batch = Batch(
        rounded(mean + rng.normal(0.5, 2.0, shape), dtype),
        rounded(rng.normal(size=shape), dtype),
        None,
    )
    oracle = BatchNorm(shape, axis, **NUMERICS)
    channels = shape[axis]
    oracle.state |= {
        "gamma": np.float32(rng.uniform(0.5, 1.5, channels)).astype("float64"),
        "beta": np.float32(rng.normal(0, 0.5, channels)).astype("float64"),
        "moving_mean": np.full(channels, mean),
    }
    start = dict(oracle.state)
    training = oracle.train(batch.x, batch.dy)
    inference = oracle.infer(batch.x, batch.dy)
    seen = {f"training/{name}": value for name, value in vars(training).items()}
    seen |= {f"inference/{name}": value for name, value in vars(inference).items()}
    return batch, start, seen | oracle.state


def observed(layer_class, shape, axis, policy, mode, batch, start):
    layer = layer_class(axis, **NUMERICS, dtype=policy)
    layer.build(shape)
    assign(layer, start)
    return stepper(layer, batch, POLICIES[policy], mode)(batch)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_no_further_from_the_oracle_than_keras(shape, axis, policy, mean):
    batch, start, truth = expected(shape, axis, POLICIES[policy], mean)
    for mode in ("graph", "xla") if policy == "float32" else ("graph",):
        ours, theirs = (
            observed(kind, shape, axis, policy, mode, batch, start)
            for kind in (tfbn.BatchNormalization, keras.layers.BatchNormalization)
        )
        if mean == 0:
            assert_agree(ours, truth, POLICIES[policy])
        for name, value in truth.items():
            error, keras_s = (root_mean_square(seen[name] - value) for seen in (ours, theirs))
            # Who is closer by less than a tenth of the tolerance is chance; in a sum of n numbers, by
            # less than the root of n roundings.
            summed = name.endswith(("dgamma", "dbeta"))
            roundings = math.sqrt(batch.x.size / shape[axis]) if summed else 1
            chance = max(1e-6, 2.0**-24 * roundings) * np.max(np.abs(value))
            assert error <= max(1.01 * keras_s, chance), (mode, name, error, keras_s)


def root_mean_square(values):
    return float(np.sqrt(np.mean(np.square(values))))


def test_a_batch_that_lies_on_the_cpu_is_normalized_alike():
    """As batches of `tf.data` do: where the input is says nothing of where the kernel runs."""
    with tf.device("CPU:0"):
        x = tf.random.normal((64, 8), 3.0, 2.0, seed=1)
    results = []
    for values in (x, tf.identity(x)):
        layer = tfbn.BatchNormalization()
        y = layer(values, training=True)
        results.append({"y": array(y), **weights(layer)})
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_layer_on_the_cpu_beside_a_gpu_takes_the_cpu_s_kernel(axis, compiled):
    layer = tfbn.BatchNormalization(axis)
    layer.build((8, 3, 3))

    def step(x):
        return layer(x, training=True)

    with tf.device("CPU:0"):
        run = tf.function(step) if compiled else step
        y = run(tf.random.normal((8, 3, 3), seed=1))
    assert np.all(np.isfinite(y))
