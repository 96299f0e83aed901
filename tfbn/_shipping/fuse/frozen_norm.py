"""Batch normalization with frozen statistics, for the layers that cannot be fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfbn._layer.affine_weights import affine_weights
from tfbn._layer.arguments import resolved_axes
from tfbn._models.fused_part import FusedPart
from tfbn._models.walk import BatchNormLayer
from tfbn._moments.moments import statistics_dtype
from tfbn._normalize.dispatch import normalize
from tfbn._normalize.kernel import Normalization


@keras.saving.register_keras_serializable(package="tfbn")
class FrozenNorm(FusedPart):
    """Normalizes by the moving statistics of a layer, whatever ``training`` says, and trains its gamma and beta.

    Args:
        norm: A batch normalization layer of Keras's class or ours.
    """

    def __init__(self, norm: BatchNormLayer, **kwargs: Any) -> None:
        kwargs["dtype"] = norm.dtype_policy
        super().__init__(activity_regularizer=norm.activity_regularizer, **kwargs)
        self.norm = norm
        self.norm.has_fused_statistics = True
        self.supports_masking = True

    def original(self) -> keras.layers.Layer:
        return self.norm

    def build(self, input_shape: Sequence[int | None]) -> None:
        if not self.norm.built:
            self.norm.build(input_shape)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> tf.Tensor:
        x, layer = tf.convert_to_tensor(inputs), self.norm
        over = Normalization(resolved_axes(layer.axis, x.shape), layer.epsilon)
        dtype = statistics_dtype(x.dtype)
        mean, variance = (tf.cast(w, dtype) for w in (layer.moving_mean, layer.moving_variance))
        gamma, beta = affine_weights(layer, dtype)
        return tf.cast(normalize(x, mean, variance, gamma, beta, over), x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        norm = keras.saving.serialize_keras_object(self.norm)
        return {**super().get_config(), "norm": norm}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FrozenNorm:
        return cls(**{**config, "norm": keras.saving.deserialize_keras_object(config["norm"])})
