"""Training runs that must not depend on the number of replicas: their models, data and losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A training run: what is created in the scope of the strategy, and how it is trained."""

    id: str
    model: Callable[[], Any]
    data: Callable[[], Any]
    loop: Callable[[], dict[str, Any]]
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 8
    epochs: int = 2
    replicas: int = 2


def dense(synchronized: bool = True, **kwargs: Any) -> Any:
    import keras

    import tfbn

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.01)),
            tfbn.BatchNormalization(synchronized=synchronized),
            layers.ReLU(),
            layers.Dense(6, use_bias=False),
            tfbn.BatchNormalization(synchronized=synchronized, momentum=0.9),
            layers.Dense(3, kernel_constraint=keras.constraints.MaxNorm(1.5)),
        ]
    )


def masked() -> Any:
    import keras

    import tfbn

    return keras.Sequential(
        [
            keras.Input((6, 2)),
            keras.layers.Masking(),
            keras.layers.Dense(4, use_bias=False, kernel_regularizer="l2"),
            tfbn.BatchNormalization(synchronized=True),
            keras.layers.Dense(1),
        ]
    )


def two_headed() -> Any:
    import keras

    import tfbn

    left, right = keras.Input((4,), name="left"), keras.Input((2,), name="right")
    x = keras.layers.Concatenate()([left, right])
    x = tfbn.BatchNormalization(synchronized=True)(keras.layers.Dense(4, use_bias=False)(x))
    return keras.Model(
        {"left": left, "right": right},
        {"a": keras.layers.Dense(1, name="a")(x), "b": keras.layers.Dense(3, name="b")(x)},
    )


def with_scalar_losses() -> dict[str, Any]:
    """Losses that are means already, beside one that Keras averages."""
    import keras

    class Scalar(keras.losses.Loss):
        def call(self, y: Any, y_pred: Any) -> Any:
            return keras.ops.mean(keras.ops.abs(y - y_pred))

    return {
        "optimizer": "sgd",
        "loss": {"a": lambda y, p: keras.ops.mean((y - p) ** 2), "b": Scalar(), "c": "mae"},
        "loss_weights": {"a": 0.5, "b": 0.25, "c": 2.0},
    }


def three_headed() -> Any:
    import keras

    inputs = keras.Input((4,))
    return keras.Model(inputs, {name: keras.layers.Dense(1, name=name)(inputs) for name in "abc"})


def of_three_heads(number: int) -> tuple[np.ndarray, dict]:
    rng = np.random.default_rng(number)
    x = rng.normal(2, 3, (number, 4)).astype("float32")
    return x, {name: rng.normal(0, 1, (number, 1)).astype("float32") for name in "abc"}


def computing_its_loss() -> Any:
    """A model whose own `compute_loss` adds a scalar to Keras's loss, and tracks it."""
    import keras

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3, kernel_regularizer="l2")
            self.tracker = keras.metrics.Mean(name="extra")

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
            extra = keras.ops.mean(y_pred**2)
            self.tracker.update_state(extra)
            return super().compute_loss(x, y, y_pred, sample_weight) + extra

        def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
            logs = super().compute_metrics(x, y, y_pred, sample_weight)
            return logs | {"largest": keras.ops.mean(keras.ops.max(y_pred, axis=-1))}

    return Model()


def adding_losses() -> Any:
    """A model that adds all its losses itself, before and after layers that all-reduce."""
    import keras

    import tfbn

    @keras.saving.register_keras_serializable(package="test")
    class Add(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(keras.ops.mean((x - 1) ** 2))
            return x

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activity_regularizer="l2", kernel_regularizer="l2"),
            Add(),
            tfbn.BatchNormalization(synchronized=True),
            layers.Dense(3, activity_regularizer="l1"),
            tfbn.BatchNormalization(synchronized=True, gamma_regularizer="l1"),
            Add(),
        ]
    )


def labelled(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    return rng.normal(2, 3, (number, 4)).astype("float32"), rng.integers(0, 3, number)


def sequences(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of different lengths, some of them empty, as is the only one of the last batch."""
    rng = np.random.default_rng(number)
    x = rng.normal(2, 3, (number, 6, 2)).astype("float32")
    lengths = rng.integers(0, 7, number)
    lengths[-1] = 0
    x *= (np.arange(6) < lengths[:, None])[..., None]
    return x, rng.normal(0, 1, (number, 6, 1)).astype("float32")


def of_two_heads(number: int) -> tuple[dict, dict, dict]:
    rng = np.random.default_rng(number)
    x = {
        "left": rng.normal(2, 3, (number, 4)).astype("float32"),
        "right": rng.normal(0, 1, (number, 2)).astype("float32"),
    }
    y = {"a": rng.normal(0, 1, (number, 1)).astype("float32"), "b": rng.integers(0, 3, number)}
    return x, y, {name: rng.random(number).astype("float32") for name in y}


def classification(**kwargs: Any) -> dict[str, Any]:
    import keras

    return {
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")],
    } | kwargs


def clipped() -> dict[str, Any]:
    import keras

    return classification(optimizer=keras.optimizers.AdamW(0.01, global_clipnorm=0.1, use_ema=True))


def halves() -> Any:
    """A layer in half precision, whose gradients may overflow."""
    import keras

    dense = keras.layers.Dense(3, dtype="mixed_float16")
    return keras.Sequential([keras.Input((4,)), dense, keras.layers.Activation("linear")])


def overflowing() -> tuple[np.ndarray, np.ndarray]:
    """The scaled gradients of the last example of each batch of 8 are infinite, of no other."""
    x, y = labelled(32)
    x[7::8] *= 2**12
    return x, y


def scaled() -> dict[str, Any]:
    import keras

    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(2.0**-16), initial_scale=2.0**12
    )
    return classification(optimizer=optimizer)


def keras_sgd(rate: float) -> Any:
    import keras

    return keras.optimizers.SGD(rate)


def regression(**kwargs: Any) -> dict[str, Any]:
    import keras

    return {"optimizer": keras.optimizers.SGD(0.02), "loss": "mse", "metrics": ["mae"]} | kwargs


SCENARIOS = [
    # 50 updates, on batches of 8 and a last one of 1.
    Scenario("uneven", dense, lambda: labelled(193), clipped, replicas=4),
    Scenario("masked", masked, lambda: sequences(33), regression, {"shuffle": False}, replicas=3),
    Scenario(
        "heads",
        two_headed,
        lambda: of_two_heads(33),
        lambda: {
            "optimizer": "sgd",
            "loss": {"a": "mae", "b": "sparse_categorical_crossentropy"},
            "loss_weights": {"a": 0.25, "b": 0.05},
            "metrics": {"a": ["mae"], "b": ["accuracy"]},
            "weighted_metrics": {"a": ["mse"]},
        },
    ),
    Scenario(
        "accumulated",
        dense,
        lambda: labelled(77),
        lambda: classification(accumulation_steps=3),
        {"class_weight": {0: 0.5, 2: 3.0}},
    ),
    Scenario("scalar losses", three_headed, lambda: of_three_heads(33), with_scalar_losses),
    Scenario("own loss", computing_its_loss, lambda: labelled(33), classification),
    Scenario(
        "added losses",
        adding_losses,
        lambda: labelled(33)[0],
        lambda: {"optimizer": keras_sgd(0.05)},
    ),
    Scenario("overflowing", halves, overflowing, scaled, {"shuffle": False}),
]
