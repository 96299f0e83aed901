"""Trains with `tfbn.TrainingLoop` on several replicas, in separate processes, and records the results.

    python tests/harness/trained.py OUT.npz --devices 4                    # virtual devices of one process
    python tests/harness/trained.py OUT.npz --addresses A:1,B:2 --index 0  # one of several workers

The processes train and the tests compare. Every scenario is also trained with `strategy=None`, in the same
process, which uses the same kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import replicas
from examples.clusters import free_ports
from scenarios import SCENARIOS, Scenario, classification, dense, labelled

Observed = replicas.Observed
EVALUATED = 29  # How many examples are evaluated.


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
