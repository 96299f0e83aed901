"""Trains with `tfbn.TrainingLoop` on several replicas, in processes of their own, and writes down what came out.

    python tests/harness/trained.py OUT.npz --devices 4                    # virtual devices of one process
    python tests/harness/trained.py OUT.npz --addresses A:1,B:2 --index 0  # one of several workers

The processes train and the tests judge: nothing in here compares. Every scenario is trained with
`strategy=None` too, in the same process, which takes the same kernels.
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
from examples.train_workers import free_ports

Observed = replicas.Observed


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A training: what is made in the scope of the strategy, and what is then done with it."""

    id: str
    model: Callable[[], Any]
    data: Callable[[], Any]
    loop: Callable[[], dict[str, Any]]
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 8
    epochs: int = 2
    replicas: tuple[int, ...] = (2, 3, 4)


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
            keras.layers.Dense(4, use_bias=False),
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


def labelled(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    return rng.normal(2, 3, (number, 4)).astype("float32"), rng.integers(0, 3, number)


def sequences(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of different lengths, and some are empty."""
    rng = np.random.default_rng(number)
    x = rng.normal(2, 3, (number, 6, 2)).astype("float32")
    x *= (np.arange(6) < rng.integers(0, 7, number)[:, None])[..., None]
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


def regression(**kwargs: Any) -> dict[str, Any]:
    import keras

    return {"optimizer": keras.optimizers.SGD(0.02), "loss": "mse", "metrics": ["mae"]} | kwargs


SCENARIOS = [
    Scenario("even", dense, lambda: labelled(48), clipped, replicas=(2,)),
    # 50 steps, of batches of 8 and a last one of 1.
    Scenario("uneven", dense, lambda: labelled(193), classification, replicas=(2, 4)),
    Scenario("masked", masked, lambda: sequences(33), regression, replicas=(4,)),
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
        replicas=(2,),
    ),
    Scenario(
        "accumulated",
        dense,
        lambda: labelled(77),
        lambda: classification(accumulation_steps=3),
        {"class_weight": {0: 0.5, 2: 3.0}},
        replicas=(3,),
    ),
    Scenario("overflowing", halves, overflowing, scaled, {"shuffle": False}, replicas=(2,)),
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
        here = {n: s for n, s in strategies.items() if n in scenario.replicas}
        alone = {1: None} if here and options.index == 0 and not options.backup else {}
        for number, strategy in {**alone, **here}.items():
            callbacks = interrupting(options) if strategy is not None else []
            seen = train(scenario, strategy, callbacks)
            observed |= {f"{scenario.id}/{number}/{name}": value for name, value in seen.items()}
    for name, experiment in EXPERIMENTS.items() if options.devices > 1 else ():
        observed |= {f"{name}/{key}": v for key, v in experiment(strategies).items()}
    if options.addresses:
        (strategy,) = strategies.values()
        observed |= differing(strategy, options.index)
        replicas.meet(strategy)
    np.savez(options.output, **observed)


def interrupting(options: argparse.Namespace) -> list[Any]:
    """Callbacks that back up, and kill the worker that is to be killed, in the middle of the second epoch."""
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
    """Weights, history and evaluation of one training."""
    import keras

    import tfbn

    keras.utils.set_random_seed(1)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        model = scenario.model()
        loop = tfbn.TrainingLoop(model, strategy=strategy, **scenario.loop())
    if keep is not None:
        keep.append(loop)
    history = loop.fit(
        scenario.data(),
        validation_data=scenario.data(),
        epochs=scenario.epochs,
        batch_size=scenario.batch_size,
        seed=3,
        verbose=0,
        callbacks=list(callbacks),
        **scenario.fit,
    )
    results = loop.evaluate(scenario.data(), batch_size=5, verbose=0)
    variables = [*model.variables, *loop.optimizer.variables]
    return {
        **{f"weight/{i}": v.numpy() for i, v in enumerate(variables)},
        "updates": loop.optimizer.iterations.numpy(),
        "scale": np.array(loop.optimizer.scale_loss(1.0)),
        **{f"history/{name}": np.array(values) for name, values in history.history.items()},
        **{f"evaluation/{name}": np.array(value) for name, value in results.items()},
    }


def one_replica(strategies: dict[int, Any]) -> Observed:
    """Without a strategy, and with strategies that have one replica."""
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


def apart(strategies: dict[int, Any]) -> Observed:
    """What each replica holds after each step, of layers that are not synchronized."""
    import keras

    seen: Observed = {}
    for number in (2, 4):
        strategy = strategies[number]
        keep: list[Any] = []

        def look(batch: int, logs: Any, number: int = number, keep: list[Any] = keep) -> None:
            for i, weight in enumerate(keep[0].model.non_trainable_variables):
                values = np.stack([value.numpy() for value in weight.value.values])
                seen[f"moving/{number}/{batch}/{i} {weight.name}"] = values

        scenario = Scenario(
            "", lambda: dense(synchronized=False), lambda: labelled(33), classification, epochs=1
        )
        train(scenario, strategy, [keras.callbacks.LambdaCallback(on_train_batch_end=look)], keep)
        (step,) = (function for _, function in keep[0]._steps._compiled["_train"])
        kinds = [operation.type for operation in step.graph.get_operations()]
        seen[f"collectives/{number}"] = np.array(kinds.count("CollectiveReduceV2") / number)
    return seen


def interrupted(strategies: dict[int, Any]) -> Observed:
    """A training of two replicas that Ctrl-C ends in the middle, and what goes on from its backup."""
    import tempfile

    import keras

    def stop(batch: int, logs: Any) -> None:
        if batch == 5:
            raise KeyboardInterrupt

    scenario = Scenario(
        "", dense, lambda: labelled(61), lambda: classification(accumulation_steps=2)
    )
    observed = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, callbacks in (
            ("undisturbed", []),
            ("interrupted", [keras.callbacks.LambdaCallback(on_train_batch_end=stop)]),
            ("restarted", []),
        ):
            backup = keras.callbacks.BackupAndRestore(folder, save_freq=3)
            own = callbacks if name == "undisturbed" else [*callbacks, backup]
            try:
                seen = train(scenario, strategies[2], own)
                observed |= {f"{name}/{key}": value for key, value in seen.items()}
            except KeyboardInterrupt:
                continue
    return observed


def summed_again(strategies: dict[int, Any]) -> Observed:
    """A training with optimizers that cannot be kept from summing gradients."""
    from tfbn._support import keras_internals

    (scenario,) = (scenario for scenario in SCENARIOS if scenario.id == "heads")
    name, keras_internals._SUM_GRADIENTS = keras_internals._SUM_GRADIENTS, "_a_name_that_is_gone"
    try:
        return train(scenario, strategies[2])
    finally:
        keras_internals._SUM_GRADIENTS = name


def differing(strategy: Any, index: int) -> Observed:
    """What workers are told whose data differ."""
    x, y = labelled(8)
    scenario = Scenario("", dense, lambda: (x + index, y), classification)
    try:
        train(scenario, strategy)
    except ValueError as error:
        return {"error": np.array(str(error))}
    return {}


def refused(strategies: dict[int, Any]) -> Observed:
    """The errors and warnings of what cannot be trained on two replicas."""
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


EXPERIMENTS: dict[str, Callable[[dict[int, Any]], Observed]] = {
    "one replica": one_replica,
    "apart": apart,
    "interrupted": interrupted,
    "refused": refused,
    "summed again": summed_again,
}


# In the process of the tests


PROGRAM = "trained.py"


def worker_commands(folder: Path, workers: int, *arguments: object) -> list[list[str]]:
    """One command for each worker, which writes `INDEX.npz` in the folder."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(workers))
    shared = ["--addresses", addresses, *map(str, arguments)]
    return [[str(folder / f"{i}.npz"), *shared, "--index", str(i)] for i in range(workers)]


def under(seen: Observed, *path: object) -> Observed:
    """What was seen under this path, without it."""
    prefix = "/".join(map(str, path)) + "/"
    return {name.removeprefix(prefix): v for name, v in seen.items() if name.startswith(prefix)}


def run_workers(folder: Path, workers: int, *arguments: object) -> list[Observed]:
    """What each worker has seen."""
    folder.mkdir()
    replicas.run_processes(PROGRAM, worker_commands(folder, workers, *arguments))
    return [dict(np.load(folder / f"{index}.npz")) for index in range(workers)]


if __name__ == "__main__":
    main()
