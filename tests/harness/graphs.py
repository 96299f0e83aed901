"""Random small Functional graphs with batch normalization, for the properties of tools that rebuild models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st

import tfbn

layers = keras.layers


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
    """Gives every weight a value that matters: no statistics of 0 and 1, γ of both signs."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if "float" not in weight.dtype:
            continue
        if "variance" in weight.name or "stddev" in weight.name:
            value = rng.uniform(0.5, 1.5, shape)
        elif weight.name == "gamma":
            value = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1, 1, 1], shape)
        elif len(shape) < 2:
            value = rng.normal(0, 0.3, shape)
        else:
            value = rng.normal(0, 1, shape) / np.sqrt(max(1, np.prod(shape[:-1])))
        weight.assign(value)
    return model


def random_model(draw: Any) -> keras.Model:
    """A model of images of 8×8×4: a chain with branches, shared layers and nested models.

    Args:
        draw: Of hypothesis, as in `data.draw`.
    """
    builder = _Builder(draw)
    image = keras.Input((8, 8, 4))
    tensors = [image]
    for _ in range(draw(st.integers(2, 9))):
        tensors.append(builder.step(tensors))
    outputs = [builder.head(tensors[-1])]
    if draw(st.booleans()):
        outputs.append(draw(st.sampled_from(tensors[1:])))
    return randomize(keras.Model(image, outputs), draw(st.integers(0, 99)))


class _Builder:
    def __init__(self, draw: Any) -> None:
        self._draw = draw
        self._shared: dict[Any, keras.layers.Layer] = {}

    def step(self, tensors: list[Any]) -> Any:
        kind = self._draw(
            st.sampled_from(
                ["norm"] * 5
                + ["conv"] * 3
                + ["depthwise", "separable", "transpose", "dense", "nested", "relu", "pool", "pad"]
                + ["crop", "dropout", "add", "concatenate", "upsample", "again"]
            )
        )
        # Mostly the last one; now and then a branch.
        x = tensors[-1] if self._draw(st.integers(0, 3)) else self._draw(st.sampled_from(tensors))
        return getattr(self, f"_{kind}")(x, tensors)

    def head(self, x: Any) -> Any:
        kind = self._draw(st.sampled_from(["none", "flatten", "average", "maximum"]))
        if kind == "none":
            return x
        pooling = {
            "flatten": layers.Flatten,
            "average": layers.GlobalAveragePooling2D,
            "maximum": layers.GlobalMaxPooling2D,
        }[kind]
        x = pooling()(x)
        if self._draw(st.booleans()):
            x = self._norm(x, [])
        return layers.Dense(3)(x)

    def _once(self, key: Any, make: Any) -> Any:
        """A layer that may have been called before."""
        if key not in self._shared or not self._draw(st.booleans()):
            self._shared[key] = make()
        return self._shared[key]

    def _linear(self, **extra: Any) -> dict[str, Any]:
        return {
            "use_bias": self._draw(st.booleans()),
            "activation": self._draw(st.sampled_from([None, None, None, "relu"])),
            **extra,
        }

    def _window(self) -> dict[str, Any]:
        padding = self._draw(st.sampled_from(["valid", "same"]))
        kernel, stride, dilation = self._draw(
            st.sampled_from([(1, 1, 1), (1, 2, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1), (2, 1, 2)])
        )
        return {
            "kernel_size": kernel,
            "strides": stride,
            "dilation_rate": dilation,
            "padding": padding,
        }

    def _fits(self, x: Any, window: dict[str, Any]) -> dict[str, Any]:
        return window if min(x.shape[1:3]) >= 3 else {**window, "padding": "same"}

    def _norm(self, x: Any, tensors: list[Any]) -> Any:
        kind = self._draw(
            st.sampled_from([keras.layers.BatchNormalization, tfbn.BatchNormalization])
        )
        center, scale = self._draw(st.tuples(st.booleans(), st.booleans()))
        return self._once(
            ("norm", len(x.shape), x.shape[-1]),
            lambda: kind(center=center, scale=scale, epsilon=1e-2),
        )(x)

    def _conv(self, x: Any, tensors: list[Any]) -> Any:
        arguments = self._linear(**self._fits(x, self._window()))
        groups = self._draw(st.sampled_from([1, 1, 2])) if x.shape[-1] % 2 == 0 else 1
        return (
            self._once(("conv", x.shape[-1]), lambda: layers.Conv2D(4, groups=groups, **arguments))(
                x
            )
            if min(x.shape[1:3]) >= 3
            else layers.Conv2D(4, groups=groups, **arguments)(x)
        )

    def _depthwise(self, x: Any, tensors: list[Any]) -> Any:
        arguments = self._linear(**self._fits(x, self._window()))
        return layers.DepthwiseConv2D(depth_multiplier=self._draw(st.integers(1, 2)), **arguments)(
            x
        )

    def _separable(self, x: Any, tensors: list[Any]) -> Any:
        return layers.SeparableConv2D(4, **self._linear(**self._fits(x, self._window())))(x)

    def _transpose(self, x: Any, tensors: list[Any]) -> Any:
        window = self._window() | {"dilation_rate": 1}
        if max(x.shape[1:3]) > 12:
            window["strides"] = 1
        return layers.Conv2DTranspose(4, **self._linear(**window))(x)

    def _dense(self, x: Any, tensors: list[Any]) -> Any:
        if self._draw(st.booleans()):
            return layers.Dense(4, **self._linear())(x)
        return layers.EinsumDense("bhwc,cd->bhwd", (*x.shape[1:3], 4), bias_axes="d")(x)

    def _nested(self, x: Any, tensors: list[Any]) -> Any:
        inner = keras.Input(x.shape[1:])
        return keras.Model(inner, self._norm(self._dense(inner, []), []))(x)

    def _relu(self, x: Any, tensors: list[Any]) -> Any:
        return self._draw(st.sampled_from([layers.ReLU(), keras.ops.relu]))(x)

    def _pool(self, x: Any, tensors: list[Any]) -> Any:
        kind = self._draw(st.sampled_from([layers.MaxPooling2D, layers.AveragePooling2D]))
        return (
            kind(2, 1, padding=self._draw(st.sampled_from(["valid", "same"])))(x)
            if min(x.shape[1:3]) > 1
            else x + 0.5
        )

    def _pad(self, x: Any, tensors: list[Any]) -> Any:
        return layers.ZeroPadding2D(1)(x)

    def _crop(self, x: Any, tensors: list[Any]) -> Any:
        return layers.Cropping2D(((1, 0), (0, 1)))(x) if min(x.shape[1:3]) > 2 else 2.0 * x

    def _dropout(self, x: Any, tensors: list[Any]) -> Any:
        return layers.Dropout(0.5)(x)

    def _upsample(self, x: Any, tensors: list[Any]) -> Any:
        interpolation = self._draw(st.sampled_from(["nearest", "bilinear", "bicubic"]))
        return layers.UpSampling2D(2, interpolation=interpolation)(x) if x.shape[1] < 9 else -x

    def _add(self, x: Any, tensors: list[Any]) -> Any:
        like = [other for other in tensors if other.shape == x.shape]
        kind = self._draw(st.sampled_from([layers.Add, layers.Average, layers.Multiply]))
        return kind()([x, self._draw(st.sampled_from(like))])

    def _concatenate(self, x: Any, tensors: list[Any]) -> Any:
        like = [other for other in tensors if other.shape[:-1] == x.shape[:-1]]
        return layers.Concatenate()([x, self._draw(st.sampled_from(like))])

    def _again(self, x: Any, tensors: list[Any]) -> Any:
        """Two branches from one tensor, added up."""
        return layers.Add()([self._dense(x, tensors), self._norm(self._dense(x, tensors), tensors)])
