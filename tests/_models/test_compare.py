"""Comparing the outputs of two models."""

import keras
import numpy as np
import pytest

from tfbn._models import compare


def dense(dtype: str = "float32") -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype=dtype)])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("mixed_float16", 3e-2), ("mixed_bfloat16", 2e-1)]
)
def test_the_tolerance_follows_the_compute_dtype(dtype, tolerance):
    assert compare.tolerance_for(dense(dtype), None) == tolerance
    assert compare.tolerance_for(dense(dtype), 0.5) == 0.5


@pytest.mark.parametrize("given", [-1, "a", float("nan")])
def test_a_tolerance_that_is_not_a_number_of_at_least_0_is_refused(given):
    with pytest.raises(ValueError, match=r"must be a number of at least 0\. Received: tolerance="):
        compare.tolerance_for(dense(), given)


def test_random_inputs_fill_open_axes_and_are_the_same_every_time():
    specs = {"x": keras.KerasTensor((None, None, 3)), "n": keras.KerasTensor((None,), "int32")}
    first, second = (compare.random_inputs(specs, batch_size=2) for _ in range(2))
    assert (first["x"].shape, first["n"].shape) == ((2, 32, 3), (2,))
    assert set(np.unique(first["n"])) <= {0, 1}
    keras.tree.map_structure(np.testing.assert_array_equal, first, second)


def test_random_inputs_cannot_be_strings():
    with pytest.raises(ValueError, match=r"Pass `inputs`\. Received: dtype=string"):
        compare.random_inputs(keras.KerasTensor((None,), "string"), batch_size=1)


def test_a_difference_is_relative_to_the_largest_expected_value_of_each_output():
    expected = [np.array([1.0, -4.0]), np.array([0.5])]
    assert compare.difference(expected, [np.array([1.0, -4.0]), np.array([0.25])]) == 0.5
    assert compare.difference(expected, [np.array([2.0, -4.0]), np.array([0.5])]) == 0.25
    assert compare.difference(expected, [np.zeros(3), np.array([0.5])]) == float("inf")
    assert not compare.difference([np.ones(2)], [np.array([1.0, np.nan])]) <= 1e9


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (np.array([np.nan]), "are not finite"),
        (np.zeros((0, 2)), r"are empty.*Received: .*\(0, 2\)"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(expected, message):
    with pytest.raises(ValueError, match=message):
        compare.difference(expected, expected)


def test_the_advice_tells_random_models_from_imprecise_ones():
    x = np.ones((64, 3), "float32")
    assert "resemble your data" in compare.advice(dense(), x, 1e-4)

    class Noise(keras.layers.Layer):
        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x))

    noisy = keras.Sequential([keras.Input((3,)), Noise()])
    assert "outputs of the model are random" in compare.advice(noisy, x, 1e-4)


def test_the_advice_names_models_that_amplify_rounding():
    """A small difference of large numbers."""
    image = keras.Input((3,))
    shift = keras.layers.Rescaling(1.0, -1e4)
    model = keras.Model(image, shift(image))
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 3)).astype("float32")
    assert "in the last bit change its outputs by" in compare.advice(model, x, 1e-4)
    assert "resemble your data" in compare.advice(model, x - 1e4, 1e-4)
