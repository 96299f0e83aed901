"""Sums of products under XLA: behind a selection where XLA would be slow, and the same numbers."""

import numpy as np
import pytest
import tensorflow as tf

from tfbn._moments.moments import sum_of_products

A = np.array([[1.5, -2.0, 0.0, 3.0], [np.inf, 1.0, 1.0, 1.0], [np.nan, 1.0, 0.0, 0.0]], np.float32)


def summed(reduced):
    return tf.function(lambda a, b: sum_of_products(a, b, reduced), jit_compile=True)


def test_nothing_but_the_speed_changes():
    b = np.array([2.0, 3.0, 5.0, -1.0], np.float32)
    np.testing.assert_array_equal(summed([1])(A, b), (A * b).sum(1))
    np.testing.assert_array_equal(summed([0])(A, b), (A * b).sum(0))


@pytest.mark.parametrize(("reduced", "behind"), [([0, 2], True), ([0], False), ([1], False)])
def test_products_are_selected_where_the_last_axis_is_summed(reduced, behind):
    x = tf.zeros([2, 3, 4])
    graph = summed(reduced).get_concrete_function(x, x).graph
    assert ("SelectV2" in {op.type for op in graph.get_operations()}) == behind


def test_outside_of_xla_nothing_is_selected():
    x = tf.zeros([2, 3, 4])
    function = tf.function(lambda a, b: sum_of_products(a, b, [0, 2]))
    graph = function.get_concrete_function(x, x).graph
    assert "SelectV2" not in {op.type for op in graph.get_operations()}
