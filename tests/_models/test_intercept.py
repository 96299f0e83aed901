"""Tracing in isolation, in several threads."""

import threading

import keras
import pytest
import tensorflow as tf

from tfbn._models.intercept import intercept_calls, isolated_tracing


def test_the_switch_of_tensorflow_is_as_before_when_two_threads_overlap():
    """The first to enter leaves first: the second one must not restore what it found."""
    entered, left = threading.Event(), threading.Event()
    seen = []

    def second():
        with isolated_tracing():
            entered.set()
            left.wait(timeout=30)
            seen.append(tf.config.functions_run_eagerly())

    thread = threading.Thread(target=second)
    with isolated_tracing():
        thread.start()
        entered.wait(timeout=30)
    left.set()
    thread.join()
    assert seen == [True]
    assert not tf.config.functions_run_eagerly()


def test_an_error_turns_it_off():
    with pytest.raises(KeyboardInterrupt), isolated_tracing():
        raise KeyboardInterrupt
    assert not tf.config.functions_run_eagerly()


def test_an_inner_replacement_is_given_the_outer_one():
    layer = keras.layers.Identity()

    def adding(number):
        return lambda layer, call, inputs, **options: call(inputs, **options) + number

    with intercept_calls([layer], adding(1)), intercept_calls([layer], adding(10)):
        assert float(layer(tf.constant(100.0))) == 111
    assert float(layer(tf.constant(100.0))) == 100
    assert "call" not in vars(layer)


@pytest.mark.parametrize(("all_threads", "expected"), [(False, 100), (True, 101)])
def test_other_threads_run_the_layer_as_before_unless_asked_for(all_threads, expected):
    layer = keras.layers.Identity()
    seen = []

    def run(layer, call, inputs, **options):
        return call(inputs, **options) + 1

    with intercept_calls([layer], run, all_threads=all_threads):
        thread = threading.Thread(target=lambda: seen.append(float(layer(tf.constant(100.0)))))
        thread.start()
        thread.join()
        assert float(layer(tf.constant(100.0))) == 101
    assert seen == [expected]
