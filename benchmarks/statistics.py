"""Measures what care for the moving statistics costs: a pass of `tfbn.recalibrate`, and the check of every batch.

    python -m benchmarks.statistics                  # ResNet-20: a minute or two
    python -m benchmarks.statistics --batch 128 --turns 20

Whoever is compared runs in the same process and in turns; a ratio is the median of those of all turns.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import tfbn
from benchmarks import command_line, memory, models
from tfbn._layer import moving_average
from tfbn._moments.moments import Moments

MORE = 20
"""How many times as much data must not take more memory."""
UPDATES = 20
"""How often the averages are moved in a turn: once takes too short a time to be measured."""
NORMS = {"keras": keras.layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.statistics", __doc__)
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches in a pass")
    parser.add_argument("--turns", type=int, default=15, help="how often each has its turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    images = np.random.default_rng(0).normal(size=(options.batch * options.batches, 32, 32, 3))
    data = tf.data.Dataset.from_tensor_slices(images.astype("float32"))
    data = data.batch(options.batch).prefetch(2)
    for name, norm in NORMS.items():
        model = models.built(norm, keras, "ResNet20", "float32")[0]
        for line in [*recalibration(model, data, options.turns), peaks(model, data)]:
            print(f"{name}: {line}", flush=True)
    print(f"tfbn: {check(model, next(iter(data)), options.turns)}")
    return 0


def recalibration(model: keras.Model, data: tf.data.Dataset, turns: int) -> list[str]:
    """A pass of each kind against one that only runs the model in inference mode, and what is done once.

    Recalibrating on the data twice over takes one pass more, and traces the model as often.
    """
    infer = tf.function(lambda x: model(x, training=False), autograph=False)

    def inference() -> None:
        for batch in data:
            infer(batch)

    def recalibrate(upstream: str, times: int) -> Callable[[], Any]:
        return lambda: tfbn.recalibrate(model, data.repeat(times), upstream=upstream)

    lines = []
    for upstream in ("batch", "population"):
        runs = {
            "inference": inference,
            "once": recalibrate(upstream, 1),
            "twice": recalibrate(upstream, 2),
        }
        seconds = {name: np.array(values) for name, values in measured(runs, turns).items()}
        one_pass = seconds["twice"] - seconds["once"]
        times = float(np.median(one_pass / seconds["inference"]))
        fixed = float(np.median(seconds["once"] - one_pass))
        lines.append(
            f'upstream="{upstream}": a pass takes {times:.2f} of an inference pass, and what is done once '
            f"{fixed:.2f} s"
        )
    return lines


def peaks(model: keras.Model, data: tf.data.Dataset) -> str:
    """What the process holds at most while it recalibrates on little and on much data."""

    def held(times: int) -> str:
        repeated = data.repeat(times)
        peak = memory.peak(lambda: tfbn.recalibrate(model, repeated, upstream="batch"))
        return "what is not known here" if peak is None else f"{peak:.0f} MB"

    return f"it holds at most {held(1)}, and on {MORE} times as much data {held(MORE)}"


def check(model: keras.Model, images: tf.Tensor, turns: int) -> str:
    """What the look at the moments of each batch adds to a training step.

    The step's own times scatter by more: measured is what moves the averages of all layers, with and without.
    """
    layers = [layer for layer in model.layers if isinstance(layer, tfbn.BatchNormalization)]

    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(images, training=True)))
        return tape.gradient(loss, model.trainable_variables)

    def update() -> None:
        for layer in layers:
            layer.update_statistics(Moments(tf.constant(1e3), 2 * layer.beta, 2 * layer.gamma))

    def updates() -> Callable[[], None]:
        function = tf.function(update, autograph=False)
        return lambda: [function() for _ in range(UPDATES)][-1]

    runs: dict[str, Callable[[], Any]] = {"looking": updates(), "blind": updates()}
    runs["looking"]()
    with mock.patch.object(moving_average, "can_update", return_value=True):
        runs["blind"]()  # Traced now, it is blind ever after.
    seconds = measured(runs | {"step": tf.function(step, autograph=False)}, 4 * turns)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    cost = (medians["looking"] - medians["blind"]) / UPDATES
    return (
        f"the look at the moments takes {1e6 * cost / len(layers):.1f} µs a layer, "
        f"{100 * cost / medians['step']:.2f} % of a training step (at most 2)"
    )


def measured(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each run in each turn. Who is first in one turn is last in the next."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, turns):  # Two to warm up.
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            runs[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return float(np.median(np.divide(seconds[one], seconds[other])))


if __name__ == "__main__":
    raise SystemExit(main())
