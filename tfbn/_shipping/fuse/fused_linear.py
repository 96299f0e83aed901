"""A linear layer and the batch normalization after it as one layer."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfbn._layer.affine_weights import affine_weights
from tfbn._models.fused_part import FusedPart
from tfbn._models.walk import BatchNormLayer
from tfbn._moments.moments import statistics_dtype
from tfbn._shipping.fold.absorb import LINEAR, channel_axis
from tfbn._shipping.fold.affine import inference_map


@keras.saving.register_keras_serializable(package="tfbn")
class FusedLinear(FusedPart):
    r"""Computes a linear layer and batch normalization with frozen statistics in one pass.

    For the kernel :math:`W` and the bias :math:`b` of the linear layer, it computes the linear layer with the
    kernel :math:`s W` and the bias :math:`s b + t`, where :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` and
    :math:`t = \beta - \mu s`. It makes them anew in each call, so all four are trained, each by its own switch.
    The layer itself has no weights.

    Args:
        linear: A layer of a class that `tfbn.fold` can fold into, without activation.
        norm: A batch normalization layer for its output.
        pair: What the `FusedNorm` in the place of `norm` has in common with this layer.
    """

    def __init__(
        self, linear: keras.layers.Layer, norm: BatchNormLayer, pair: str, **kwargs: Any
    ) -> None:
        # In the dtype of the weights, and without casting: the kernel is scaled in full precision. The linear
        # layer casts its inputs and the scaled kernel itself.
        kwargs |= {"dtype": linear.variable_dtype, "autocast": False}
        super().__init__(activity_regularizer=norm.activity_regularizer, **kwargs)
        self.linear = linear
        self.norm = norm
        self.pair = pair
        self.norm.has_fused_statistics = True
        self.supports_masking = linear.supports_masking

    def original(self) -> keras.layers.Layer:
        return self.linear

    def build(self, input_shape: Any) -> None:
        if not self.linear.built:
            self.linear.build(input_shape)
        if not self.norm.built:
            self.norm.build(tuple(self.linear.compute_output_shape(input_shape)))

    def call(self, inputs: Any) -> Any:
        channels: Any = LINEAR[type(self.linear)].channels
        weights = {weight.name: weight for weight in self.linear.weights}
        kernel = weights[channels.kernel]
        dtype = statistics_dtype(tf.as_dtype(kernel.dtype))
        scale, shift = _inference_map(self.norm, dtype)
        old_bias = tf.cast(weights["bias"], dtype) if "bias" in weights else 0.0
        new_kernel, bias = channels.scaled(
            tf.cast(kernel, dtype), old_bias, scale, shift, reshape=tf.reshape
        )
        values = [(kernel, tf.cast(new_kernel, kernel.dtype))]
        if "bias" in weights:
            values.append((weights["bias"], tf.cast(bias, kernel.dtype)))
        with keras.StatelessScope(values):
            outputs = self.linear(inputs)
        if "bias" in weights:
            return outputs
        shape = [1] * len(outputs.shape)
        shape[channel_axis(self.linear)] = -1
        return outputs + tf.cast(tf.reshape(bias, shape), outputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.linear.compute_output_shape(input_shape)

    def compute_output_spec(self, inputs: Any) -> Any:
        return self.linear.compute_output_spec(inputs)

    def get_config(self) -> dict[str, Any]:
        layers = {name: getattr(self, name) for name in ("linear", "norm")}
        saved = {n: keras.saving.serialize_keras_object(layer) for n, layer in layers.items()}
        return {**super().get_config(), **saved, "pair": self.pair}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FusedLinear:
        layers = {n: keras.saving.deserialize_keras_object(config[n]) for n in ("linear", "norm")}
        return cls(**{**config, **layers})


@keras.saving.register_keras_serializable(package="tfbn")
class FusedNorm(FusedPart):
    """Stands in the place of a batch normalization layer that became part of a `FusedLinear`; changes nothing.

    Args:
        pair: What it has in common with the `FusedLinear`.
    """

    def __init__(self, pair: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pair = pair
        self.supports_masking = True

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pair": self.pair}


def _inference_map(layer: Any, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The scale and the shift of a layer, as vectors of this dtype."""
    mean, variance = (tf.cast(w, dtype) for w in (layer.moving_mean, layer.moving_variance))
    gamma, beta = affine_weights(layer, dtype)
    scale, shift = inference_map(gamma, beta, mean, variance, layer.epsilon, sqrt=tf.sqrt)
    return tf.reshape(scale, [-1]), tf.reshape(shift, [-1])
