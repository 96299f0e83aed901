"""What the installed Keras does: the oldest that we promise (`tests/oldest.txt`) lacks some of it."""

import keras

VERSION = tuple(map(int, keras.__version__.split(".")[:2]))

# Before 3.14, activity regularization adds up the activities of a batch, so that half of it has half the loss.
ACTIVITY_LOSS_IS_A_MEAN = VERSION >= (3, 14)

# Before 3.15, files lack the weights of layers in containers of containers, a Functional model of a custom class tracks
# nothing outside of its graph, and regularizers are no plain functions.
HAS_3_15 = VERSION >= (3, 15)
