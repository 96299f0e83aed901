"""What the installed Keras does: the oldest that we promise (`tests/oldest.txt`) lacks some of it."""

import keras

# Before 3.15, files lack the weights of layers in containers of containers, a Functional model of a custom class tracks
# nothing outside of its graph, and regularizers are no plain functions.
HAS_3_15 = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 15)
