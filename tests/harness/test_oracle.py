"""The oracle itself: Keras's layer agrees with it to float64, and its gradients are true."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from cases import LAYOUTS, MASKS, Case, table
from layer_runs import assert_agree, assign, expect, for_keras, observe
from oracle import BatchNorm

KERAS_CASES = [
    case
    for case in table(2, dtype=("float64",), mode=("eager",), unknown_batch=(False,))
    if case.keras_can
]


@pytest.mark.parametrize("case", KERAS_CASES, ids=str)
def test_keras_layer_agrees_with_the_oracle(case: Case) -> None:
    layer = keras.layers.BatchNormalization(**case.arguments, dtype=case.dtype)
    layer.build(case.input_shape)
    assign(layer, case.weights())
    batches = [for_keras(batch) for batch in case.batches()]
    # Keras adds 1e-7 to the number of unmasked values: by the formulas, it is that much off.
    expected = expect(case, batches, count_epsilon=keras.config.epsilon())
    assert_agree(observe(layer, batches, case.dtype), expected, case.dtype)


@pytest.mark.parametrize("variant", ["plain", "virtual"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[4], LAYOUTS[6]], ids=str)
def test_gradients_of_the_oracle_are_slopes(layout: tuple, mask: str | None, variant: str) -> None:
    case = Case(layout, "float64", mask=mask, variant=variant)
    batch = case.batches()[0]
    rng = np.random.default_rng(0)
    direction = {name: rng.normal(size=value.shape) for name, value in case.weights().items()}
    along_x = rng.normal(size=batch.x.shape)

    def loss(t: float) -> float:
        oracle = BatchNorm(case.input_shape, **case.numerics)
        oracle.state |= case.weights()
        for name in ("gamma", "beta"):
            oracle.state[name] = oracle.state[name] + t * direction[name]
        y = oracle.train(batch.x + t * along_x, batch.dy, batch.mask).y
        return float((y * batch.dy).sum())

    oracle = BatchNorm(case.input_shape, **case.numerics)
    oracle.state |= case.weights()
    got = oracle.train(batch.x, batch.dy, batch.mask)
    slope = (got.dx * along_x).sum()
    slope += (got.dgamma * direction["gamma"]).sum() + (got.dbeta * direction["beta"]).sum()
    h = 1e-5
    np.testing.assert_allclose((loss(h) - loss(-h)) / (2 * h), slope, rtol=1e-7)
