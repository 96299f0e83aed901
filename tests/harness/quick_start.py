"""Imports TensorFlow and Keras in half the CPU time, and collects garbage less often. Import it first.

Tracing makes millions of small objects that live as long as their graph. With Python's thresholds, looking
through them again and again took a quarter of the time of the tests.
"""

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
