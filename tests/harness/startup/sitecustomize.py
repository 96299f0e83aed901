"""Python runs this as it starts each process of the tests: conftest.py puts this folder on PYTHONPATH.

To look for garbage in what TensorFlow and Keras import, again and again, and once more when the process ends,
took 2 of the 5 seconds of CPU time that a process needs before it does anything.
"""

import atexit
import gc

gc.set_threshold(50_000, 20, 10)
atexit.register(gc.freeze)
