r"""tfbn's layer with a fixed kernel, to check the choice that the layer makes.

    python -m benchmarks layers --phases train --modes graph \
        --contenders keras tfbn benchmarks.kernels:Formula benchmarks.kernels:Compiled floor

On a GPU TensorFlow's fused kernel, channels last, transposes each tensor to channels first and back, as its
source has it: 18 passes over memory a step where 8 would do. Compiled by XLA, the formula has no need to.
"""

from typing import Any
from unittest import mock

import tensorflow as tf

import tfbn
from tfbn._normalize import dispatch, formula, reshape
from tfbn._normalize.by_hand import trained_by
from tfbn._normalize.kernel import Normalization


class CompiledFormula(formula.Formula):
    """Uses the formula, with each pass compiled by XLA separately."""

    def forward(self, *inputs: Any) -> Any:
        return tf.function(super().forward, jit_compile=True, autograph=False)(*inputs)

    def backward(self, *inputs: Any) -> Any:
        return tf.function(super().backward, jit_compile=True, autograph=False)(*inputs)


class _Chosen(tfbn.BatchNormalization):
    kernel: Any

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        def by_kernel(x: tf.Tensor, over: Normalization) -> Any:
            return reshape.merged(x, over), trained_by(self.kernel)

        def by_formula(x: tf.Tensor, over: Normalization) -> Any:
            return reshape.unchanged(over), formula.infer

        with mock.patch.multiple(dispatch, _training=by_kernel, _inference=by_formula):
            return super().call(inputs, training=training, mask=mask)


class Formula(_Chosen):
    """Uses ordinary operations with a hand-written gradient."""

    kernel = formula.Formula


class Compiled(_Chosen):
    """Uses the same operations, with each pass compiled by XLA even if the surrounding graph is not."""

    kernel = CompiledFormula
