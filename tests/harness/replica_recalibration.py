"""Recalibrates and watches models made under a tf.distribute strategy, and compares with NumPy.

Two virtual devices have to be there before TensorFlow starts: a process of its own.
"""

import gc
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from replicas import started


def main() -> None:
    """Writes down how each law failed: nothing where it holds."""
    strategy, failures = started(2)[2], dict.fromkeys(LAWS, "")
    for name, law in LAWS.items():
        try:
            law(strategy)
        except Exception:
            failures[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(failures))


def statistics_are_those_of_all_data(strategy: Any) -> None:
    import keras

    import tfbn

    kinds = keras.layers.BatchNormalization, tfbn.BatchNormalization
    for norm, synchronized in itertools.product(kinds, (True, False)):
        with strategy.scope():
            model = keras.Sequential(
                [
                    keras.Input((2,)),
                    norm(synchronized=synchronized),
                    keras.layers.Dense(3, activation="relu", kernel_initializer="ones"),
                    norm(),
                ]
            )
        for upstream in ("population", "batch"):
            check(model, synchronized, upstream)


def check(model, synchronized: bool, upstream: str) -> None:
    import tfbn

    x = values(23, 2)
    # The last batch has one example: none for one of the replicas.
    result = tfbn.recalibrate(model, x, batch_size=11, upstream=upstream)
    assert (result.batches, result.examples) == (3, 23), result
    assert [layer.values for layer in result.layers] == [23, 23], result
    first, second = model.layers[0], model.layers[2]
    for variable in getattr(first.moving_mean.value, "values", [first.moving_mean.value]):
        np.testing.assert_allclose(variable.numpy(), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(first.moving_variance, x.var(0), rtol=1e-5)
    # What the first layer normalizes together: everything, each batch, or its share of it.
    together = [[0, 23], [0, 11, 22, 23], [0, 5, 11, 16, 22, 23]]
    ends = together[0 if upstream == "population" else 1 if synchronized else 2]
    parts = [x[a:b] for a, b in itertools.pairwise(ends)]
    inside = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-3) @ np.ones((2, 3)) for p in parts]
    seen = np.maximum(np.concatenate(inside), 0)
    np.testing.assert_allclose(second.moving_mean, seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(second.moving_variance, seen.var(0), rtol=1e-4)


def parts_of_every_kind_are_shared_out(strategy: Any) -> None:
    """What has no examples goes to each replica as it is, wherever it stands in the batch."""
    import keras
    import tensorflow as tf

    import tfbn

    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), tfbn.BatchNormalization()])
    x = values(23, 2)

    def batches() -> Any:
        for part in (x[:11], x[11:22], x[22:]):
            sparse = tf.sparse.from_dense(part)
            yield {"factor": tf.constant(2.0), "nothing": None, "sparse": sparse, "x": part}

    def forward(model: Any, batch: Any) -> Any:
        assert batch["nothing"] is None
        more = tf.reshape(tf.sparse.to_dense(batch["sparse"]), tf.shape(batch["x"]))
        return model(batch["factor"] * batch["x"] + more)

    (change,) = tfbn.recalibrate(model, batches, forward=forward).layers
    assert change.values == 23, change
    np.testing.assert_allclose(model.layers[0].moving_mean, 3 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.layers[0].moving_variance, 9 * x.var(0), rtol=1e-5)


def graphs() -> int:
    """How many graphs there are."""
    import tensorflow as tf

    gc.collect()
    # Their types: some objects elsewhere warn when they are asked for their class.
    return sum(issubclass(type(thing), tf.Graph) for thing in gc.get_objects())


def no_graph_outlives_it(strategy: Any) -> None:
    import keras

    import tfbn

    wide = 600  # for the fused kernel
    with strategy.scope():
        model = keras.Sequential([keras.Input((wide,)), tfbn.BatchNormalization()])
    # The functions that run the kernel are kept: all layers share them.
    tfbn.recalibrate(model, values(5, wide), upstream="batch")
    for tool, upstream in itertools.product(
        (tfbn.recalibrate, tfbn.diagnose), ("population", "batch")
    ):
        before = graphs()
        tool(model, values(5, wide), upstream=upstream)
        assert graphs() == before, (tool, upstream)


def a_monitor_records_what_the_replicas_average(strategy: Any) -> None:

    x = values(12, 3)
    halves = x.astype("float64").reshape(2, 2, 3, 3)  # batches, replicas, examples, channels
    mean, variance = (part.mean(1)[0] for part in (halves.mean(2), halves.var(2)))
    shift = np.sqrt(np.mean(mean**2 / (variance + 1e-3)))
    for loop in ("fit", "TrainingLoop"):
        np.testing.assert_allclose(recorded(strategy, loop, x), [shift], rtol=1e-4)


def recorded(strategy: Any, loop: str, x: np.ndarray) -> list[float]:
    """The distance that a monitor recorded before the second of two batches."""
    import keras

    import tfbn

    with strategy.scope():
        norm = tfbn.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((3,)), norm])
        optimizer = keras.optimizers.SGD(0.0)
    seen: list[float] = []
    monitor = tfbn.StatisticsMonitor(1)
    look = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.extend(
            one.mean_shift for one in monitor.layers
        )
    )
    options = {"batch_size": 6, "shuffle": False, "verbose": 0, "callbacks": [monitor, look]}
    if loop == "fit":
        with strategy.scope():
            model.compile(optimizer, "mse")
        model.fit(x, x, **options)
    else:
        trainer = tfbn.TrainingLoop(model, optimizer, "mse", strategy=strategy)
        trainer.fit((x, x), **options)
    return seen


def values(number: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).normal(4.0, 2.0, (number, channels)).astype("float32")


LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        no_graph_outlives_it,  # first: graphs of the others would go while it counts
        statistics_are_those_of_all_data,
        parts_of_every_kind_are_shared_out,
        a_monitor_records_what_the_replicas_average,
    )
}

if __name__ == "__main__":
    main()
