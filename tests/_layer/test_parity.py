"""The layer's numbers are the oracle's and Keras's: outputs, gradients, statistics, inference."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

import tfbn
from cases import LAYOUTS, MODES, Case, table
from layer_runs import assert_agree, assign, expect, for_keras, observe, stepper, weights
from oracle import BatchNorm
from tfbn._normalize.dispatch import SMALL

EVERY_PAIR = [case for case in table(2) if case.mode != "eager"]
# A mask, float64 and XLA take the same kernels at every size (`_normalize/test_kernels.py`); gamma and beta
# are tensors for all of them.
WHERE_SIZE_MATTERS = table(
    2,
    mode=("graph",),
    mask=(None,),
    dtype=("float32", "float16", "bfloat16"),
    affine=((True, True),),
    variant=("plain", "virtual"),
)
EVERY_TRIPLE = table(3, mode=("eager",), unknown_batch=(False,))


@pytest.mark.parametrize("case", EVERY_TRIPLE, ids=str)
@pytest.mark.usefixtures("device")
def test_eager_numbers_are_the_oracles_and_keras_s(case: Case) -> None:
    check_parity(case)


@pytest.mark.parametrize("case", EVERY_PAIR, ids=str)
@pytest.mark.usefixtures("device")
def test_compiled_numbers_are_the_oracles_and_keras_s(case: Case) -> None:
    check_parity(case)


@pytest.mark.parametrize("case", WHERE_SIZE_MATTERS, ids=str)
@pytest.mark.usefixtures("device")
def test_numbers_are_the_oracles_at_the_size_where_graphs_change_kernels(case, monkeypatch) -> None:
    """All other tests run as if no tensor were small (`no_tensor_is_small`)."""
    monkeypatch.setattr("tfbn._normalize.dispatch.SMALL", SMALL)
    check_against_the_oracle(case)


def check_against_the_oracle(case: Case) -> dict[str, np.ndarray]:
    batches = case.batches()
    layer = tfbn.BatchNormalization(**case.arguments, dtype=case.dtype)
    layer.build(case.input_shape)
    assign(layer, case.weights())
    ours = observe(layer, batches, case.dtype, case.mode, case.unknown_batch)
    assert_agree(ours, expect(case, batches), case.dtype)
    return ours


def check_parity(case: Case) -> None:
    ours = check_against_the_oracle(case)
    batches = case.batches()
    if not case.keras_can:
        return
    stock = keras.layers.BatchNormalization(**case.arguments, dtype=keras_policy(case.dtype))
    stock.build(case.input_shape)
    assign(stock, case.weights())
    theirs = observe(stock, [for_keras(batch) for batch in batches], case.dtype)
    # Keras adds 1e-7 to the number of unmasked values; test_oracle.py shows that this is all that
    # parts it from the oracle, and so, in float64, from us.
    masked = case.mask is not None and case.dtype == "float64"
    # In half precision both have rounded once, perhaps away from each other.
    assert_agree(ours, theirs, case.dtype, tolerance=1e-7 if masked else None, roundings=2)


def keras_policy(dtype: str) -> str:
    # Under "float16" Keras would round the weights as well; ours are never below float32.
    return f"mixed_{dtype}" if dtype in ("float16", "bfloat16") else dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5], LAYOUTS[6]], ids=str)
@pytest.mark.usefixtures("device")
def test_closer_to_the_oracle_than_keras_at_mean_1e4(layout: tuple, mode: str) -> None:
    ours = errors_at_mean_1e4(tfbn.BatchNormalization, layout, mode)
    theirs = errors_at_mean_1e4(keras.layers.BatchNormalization, layout, mode)
    for name, (error, rounding) in ours.items():
        # Below the rounding of the largest value of its kind, who is closer is chance.
        assert error <= max(theirs[name][0], rounding), (name, error, theirs[name][0])
    for name in ("training/y", "inference/y"):
        assert ours[name][0] < theirs[name][0], (name, ours[name][0], theirs[name][0])


def errors_at_mean_1e4(
    layer_class: type[keras.layers.Layer], layout: tuple, mode: str, seeds: int = 8
) -> dict[str, tuple[float, float]]:
    """Root mean square error over all seeds, and what rounding alone may cost, of each result.

    That is one float32 rounding of the largest value. For dbeta, a sum of dy in which the mean of x
    has no part, it is what adding n numbers one after the other leaves: about the root of n roundings.
    """
    case = Case(layout)
    rng = np.random.default_rng(8)
    layer = layer_class(**case.arguments)
    layer.build(case.input_shape)
    feed = None
    differences: dict[str, list[np.ndarray]] = {}
    largest: dict[str, float] = {}
    for _ in range(seeds):
        batch = case.batches(mean=1e4)[0]
        batch.x = (1e4 + rng.normal(size=batch.x.shape)).astype(np.float32).astype(np.float64)
        start = case.weights()
        start["moving_mean"] = start["moving_mean"] + 1e4
        oracle = BatchNorm(case.input_shape, **case.numerics)
        assign(layer, start)
        oracle.state |= weights(layer)
        feed = feed or stepper(layer, batch, case.dtype, mode)
        seen = feed(batch)
        training = vars(oracle.train(batch.x, batch.dy))
        expected = {f"training/{k}": v for k, v in training.items()} | dict(oracle.state)
        oracle.state |= weights(layer)  # inference is judged by the statistics that were stored
        expected |= {f"inference/{k}": v for k, v in vars(oracle.infer(batch.x, batch.dy)).items()}
        for name, value in seen.items():
            differences.setdefault(name, []).append(value - expected[name])
            largest[name] = max(largest.get(name, 0.0), float(np.max(np.abs(expected[name]))))
    summed = math.sqrt(batch.x.size / layer.beta.shape.num_elements())
    return {
        name: (
            float(np.sqrt(np.mean(np.square(values)))),
            2.0**-24 * largest[name] * (summed if name.endswith("dbeta") else 1),
        )
        for name, values in differences.items()
    }
