"""Imports TensorFlow and Keras in half the CPU time, and spends less on what no test is about. Import it first.

Tracing makes millions of small objects that live as long as their graph. With Python's thresholds, looking
through them again and again took a quarter of the time of the tests.

A thread tunes the parallelism of each `tf.data` iterator, and sleeps longer and longer, up to a minute. On busy
processors it misses the end of the iterator, whose deletion then waits for it: nothing here tunes.
"""

import atexit
import gc
import sys

__all__ = ["keras", "tf"]

gc.disable()
# Keras imports scikit-learn where it is installed: a second that no test needs.
missing = "sklearn" not in sys.modules
if missing:
    sys.modules["sklearn"] = None  # type: ignore[assignment]
try:
    import keras
    import tensorflow as tf
finally:
    if missing:
        del sys.modules["sklearn"]
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 10)
    atexit.register(gc.freeze)  # Or the end of the process looks through everything once more.

_iterate = tf.data.Dataset.__iter__


def _iterate_untuned(dataset: tf.data.Dataset) -> object:
    options = tf.data.Options()
    options.autotune.enabled = False
    return _iterate(dataset.with_options(options))


tf.data.Dataset.__iter__ = _iterate_untuned
