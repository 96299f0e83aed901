"""Trains with `tfbn.TrainingLoop` on several replicas, in separate processes, and records the results.

    python tests/harness/trained.py OUT.npz --devices 4                    # virtual devices of one process
    python tests/harness/trained.py OUT.npz --addresses A:1,B:2 --index 0  # one of several workers

The processes train and the tests compare. Every scenario is also trained with `strategy=None`, in the same
process, which uses the same kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import replicas
from examples.clusters import free_ports

Observed = replicas.Observed
EVALUATED = 29  # How many examples are evaluated.


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


# In the process that trains


def main(arguments: Sequence[str] | None = None) -> None:
    parser = replicas.parser()
    parser.add_argument("--scenario")
    parser.add_argument("--backup", type=Path)
    parser.add_argument("--killed", type=int, help="the worker that kills itself")
    options = parser.parse_args(arguments)
    strategies = replicas.started(options.devices, options.addresses, options.index)
    observed: Observed = {}
    for scenario in SCENARIOS:
        if options.scenario not in (None, scenario.id):
            continue
        # A scenario that is asked for by name is trained on all workers, however many.
        number = max(strategies) if options.scenario else scenario.replicas
        if options.index == 0 and not options.backup:
            seen = train(scenario, None)
            observed |= {f"{scenario.id}/alone/{name}": value for name, value in seen.items()}
        seen = train(scenario, strategies[number], interrupting(options))
        observed |= {f"{scenario.id}/together/{name}": value for name, value in seen.items()}
    for name, experiment in EXPERIMENTS.items() if options.devices > 1 else ():
        observed |= {f"{name}/{key}": v for key, v in experiment(strategies).items()}
    if options.addresses:
        (strategy,) = strategies.values()
        observed |= differing(strategy, options.index)
        replicas.meet(strategy)
    np.savez(options.output, **observed)


def interrupting(options: argparse.Namespace) -> list[Any]:
    """Callbacks that back up, and that kill one worker in the middle of the second epoch."""
    import keras

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if (self.epoch, batch) == (1, 7):
                os.kill(os.getpid(), signal.SIGKILL)

    if options.backup is None:
        return []
    backup = keras.callbacks.BackupAndRestore(options.backup, save_freq=5)
    return [backup, Kill()] if options.index == options.killed else [backup]


def train(
    scenario: Scenario, strategy: Any, callbacks: Sequence[Any] = (), keep: list[Any] | None = None
) -> Observed:
    """Returns the weights, the history and the evaluation of one training run."""
    import keras
    import tensorflow as tf

    import tfbn

    keras.utils.set_random_seed(1)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        model = scenario.model()
        loop = tfbn.TrainingLoop(model, strategy=strategy, **scenario.loop())
    if keep is not None:
        keep.append(loop)
    data = scenario.data()
    few = tf.nest.map_structure(lambda array: array[:EVALUATED], data)
    history = loop.fit(
        data,
        validation_data=few,
        epochs=scenario.epochs,
        batch_size=scenario.batch_size,
        seed=3,
        verbose=0,
        callbacks=list(callbacks),
        **scenario.fit,
    )
    results = loop.evaluate(few, batch_size=5, verbose=0)
    variables = [*model.variables, *loop.optimizer.variables]
    return {
        **{f"weight/{i}": v.numpy() for i, v in enumerate(variables)},
        "updates": loop.optimizer.iterations.numpy(),
        "scale": np.array(loop.optimizer.scale_loss(1.0)),
        **{f"history/{name}": np.array(values) for name, values in history.history.items()},
        **{f"evaluation/{name}": np.array(value) for name, value in results.items()},
    }


def one_replica(strategies: dict[int, Any]) -> Observed:
    """Trains without a strategy, and with strategies of one replica."""
    import keras
    import tensorflow as tf

    def dropping() -> Any:
        model = dense(synchronized=False)
        model.add(keras.layers.Dropout(0.2))
        return model

    scenario = Scenario("", dropping, lambda: labelled(29), classification)
    kinds = {
        "none": None,
        "one device": tf.distribute.OneDeviceStrategy("CPU:0"),
        "mirrored": tf.distribute.MirroredStrategy(["CPU:0"]),
    }
    return {
        f"{kind}/{name}": value
        for kind, strategy in kinds.items()
        for name, value in train(scenario, strategy).items()
    }


def unsynchronized(strategies: dict[int, Any]) -> Observed:
    """Records what each replica holds after each step, of layers that are not synchronized."""
    import keras

    seen: Observed = {}
    loops: list[Any] = []

    def look(batch: int, logs: Any) -> None:
        for i, weight in enumerate(loops[0].model.non_trainable_variables):
            values = np.stack([value.numpy() for value in weight.value.values])
            seen[f"moving/{batch}/{i} {weight.name}"] = values

    scenario = Scenario(
        "", lambda: dense(synchronized=False), lambda: labelled(33), classification, epochs=1
    )
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    train(scenario, strategies[2], [callback], loops)
    (step,) = (function for _, function in loops[0]._steps._compiled["_train"])
    kinds = [operation.type for operation in step.graph.get_operations()]
    return {**seen, "collectives": np.array(kinds.count("CollectiveReduceV2") / 2)}


def interrupted(strategies: dict[int, Any]) -> Observed:
    """Interrupts the scenario "accumulated" with Ctrl-C in mid-epoch, and resumes it from its backup."""
    import tempfile

    import keras

    def stop(batch: int, logs: Any) -> None:
        if batch == 7:
            raise KeyboardInterrupt

    (scenario,) = (scenario for scenario in SCENARIOS if scenario.id == "accumulated")
    with tempfile.TemporaryDirectory() as folder:
        backup = keras.callbacks.BackupAndRestore(
            folder, save_freq=4
        )  # due in mid-update, done after it
        ctrl_c = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
        try:
            train(scenario, strategies[2], [ctrl_c, backup])
        except KeyboardInterrupt:
            saved = len(list(Path(folder).iterdir()))
        return {"saved": np.array(saved), **train(scenario, strategies[2], [backup])}


def summed_again(strategies: dict[int, Any]) -> Observed:
    """Trains with an optimizer that sums the gradients over replicas itself."""
    from tfbn._support import keras_internals

    (scenario,) = (scenario for scenario in SCENARIOS if scenario.id == "heads")
    name, keras_internals._SUM_GRADIENTS = keras_internals._SUM_GRADIENTS, "_a_name_that_is_gone"
    try:
        return train(scenario, strategies[2])
    finally:
        keras_internals._SUM_GRADIENTS = name


def differing(strategy: Any, index: int) -> Observed:
    """Returns the error that workers with different data raise."""
    x, y = labelled(8)
    scenario = Scenario("", dense, lambda: (x + index, y), classification)
    try:
        train(scenario, strategy)
    except ValueError as error:
        return {"error": np.array(str(error))}
    return {}


def refused(strategies: dict[int, Any]) -> Observed:
    """Returns the errors and warnings about what two replicas cannot train."""
    import warnings

    import keras

    import tfbn

    def message(**arguments: Any) -> str:
        with strategies[2].scope(), warnings.catch_warnings():
            warnings.simplefilter("error")
            arguments = {"model": dense(), "optimizer": "sgd", "loss": "mse"} | {
                name: make() for name, make in arguments.items()
            }
            try:
                tfbn.TrainingLoop(strategy=strategies[2], **arguments)
            except (TypeError, ValueError, UserWarning) as error:
                return f"{type(error).__name__}: {error}"
            return "accepted"

    sgd = keras.optimizers.SGD
    stock = keras.layers.BatchNormalization
    with strategies[3].scope():
        elsewhere = dense()
    cases = {
        "xla": {"jit_compile": lambda: True},
        "accumulating": {"optimizer": lambda: sgd(gradient_accumulation_steps=2)},
        "overwriting": {"optimizer": lambda: sgd(use_ema=True, ema_overwrite_frequency=2)},
        "sum": {"loss": lambda: keras.losses.MeanSquaredError(reduction="sum")},
        "elsewhere": {"model": lambda: elsewhere},
        "stock": {"model": lambda: keras.Sequential([keras.Input((2,)), stock(name="bn")])},
        "stock synchronized": {
            "model": lambda: keras.Sequential([keras.Input((2,)), stock(synchronized=True)])
        },
        "automatic": {"jit_compile": lambda: "auto"},
    }
    return {name: np.array(message(**arguments)) for name, arguments in cases.items()}


def watched(strategies: dict[int, Any]) -> Observed:
    """Trains a layer whose statistics are right already, and one that is never told that it trains."""
    import keras

    import tfbn

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.right = tfbn.BatchNormalization(name="right", synchronized=True)
            self.forgotten = tfbn.BatchNormalization(name="forgotten")

        def call(self, x: Any, training: bool = False) -> Any:
            return self.forgotten(self.right(x, training=training), training=False)

    x = np.float32([[1, 2], [3, 6]] * 4)
    with strategies[2].scope():
        model = Model()
        model.right.build((None, 2))
        model.forgotten.build((None, 2))
        model.right.moving_mean.assign([2, 4])
        model.right.moving_variance.assign([1, 4])
        loop = tfbn.TrainingLoop(model, "sgd", "mse", strategy=strategies[2])
    try:
        loop.fit(x, x, verbose=0)
    except tfbn.StatisticsNotUpdatedError as error:
        return {"error": np.array(str(error)), "mean": model.right.moving_mean.numpy()}
    return {}


EXPERIMENTS: dict[str, Callable[[dict[int, Any]], Observed]] = {
    "one replica": one_replica,
    "unsynchronized": unsynchronized,
    "interrupted": interrupted,
    "refused": refused,
    "summed again": summed_again,
    "watched": watched,
}


# In the process of the tests


PROGRAM = "trained.py"


def worker_commands(folder: Path, workers: int, *arguments: object) -> list[list[str]]:
    """Returns one command per worker, which writes `INDEX.npz` to the folder."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(workers))
    shared = ["--addresses", addresses, *map(str, arguments)]
    return [[str(folder / f"{i}.npz"), *shared, "--index", str(i)] for i in range(workers)]


def under(seen: Observed, *path: object) -> Observed:
    """Returns what was observed under this path, without the path."""
    prefix = "/".join(map(str, path)) + "/"
    return {name.removeprefix(prefix): v for name, v in seen.items() if name.startswith(prefix)}


def run_workers(folder: Path, workers: int, *arguments: object) -> list[Observed]:
    """Returns what each worker observed."""
    folder.mkdir()
    replicas.run_processes(PROGRAM, worker_commands(folder, workers, *arguments))
    return [dict(np.load(folder / f"{index}.npz")) for index in range(workers)]


if __name__ == "__main__":
    main()
