"""The first line of an error is the one that tells what went wrong."""

import keras
import pytest
import tensorflow as tf

from tfbn._support.checks import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("shapes differ\nand more"), "ValueError: shapes differ"),
        (ValueError("\n  indented"), "ValueError: indented"),
        (NotImplementedError(), "NotImplementedError"),
        (ValueError("\n"), "ValueError"),
    ],
)
def test_an_error_is_shown_by_its_type_and_its_first_line(error, line):
    assert first_line(error) == line


def test_an_error_that_keras_wrapped_is_shown_by_its_own_message():
    class Failing(keras.layers.Layer):
        def call(self, x):
            raise TypeError("no such thing")

    with pytest.raises(TypeError) as raised:
        Failing()(tf.zeros((1, 1)))
    assert first_line(raised.value) == "TypeError: no such thing"
