r"""tfbn's layer by other kernels than those that it chooses, to see whether it chooses well.

    python -m benchmarks layers --phases train --modes graph \
        --contenders keras tfbn benchmarks.kernels:Formula benchmarks.kernels:Compiled floor

On a GPU TensorFlow's fused kernel, channels last, transposes each tensor to channels first and back, as its
source has it: 18 passes over memory a step where 8 would do. Compiled by XLA, the formula has no need to.
"""

from typing import Any
from unittest import mock

import tensorflow as tf

import tfbn
from tfbn._normalize import dispatch, formula

COMPILED = {
    name: tf.function(getattr(formula, name), jit_compile=True, autograph=False)
    for name in ("forward", "backward")
}


class Formula(tfbn.BatchNormalization):
    """By ordinary operations, with a gradient written by hand."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        never = mock.Mock(return_value=False)
        choices = ("_fused_is_best", "_fused_is_best_transposed", "_is_joined_to_convolution")
        with mock.patch.multiple(dispatch, **dict.fromkeys(choices, never)):
            return super().call(inputs, training=training, mask=mask)


class Compiled(Formula):
    """By the same operations, each pass compiled by XLA on its own, also where the graph around it is not."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        with mock.patch.multiple(formula, **COMPILED):
            return super().call(inputs, training=training, mask=mask)
