"""Measures what maintaining the moving statistics costs: `tfbn.recalibrate`, and the check of every batch.

    python -m benchmarks.statistics                  # ResNet-20: a minute or two
    python -m benchmarks.statistics --batch 128 --turns 20

Contenders take turns in the same process; a ratio is the median over all turns.
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
"""Recalibrating on this many times as much data must not take more memory."""
UPDATES = 20
"""How often a turn updates the averages: a single update is too short to measure."""
NORMS = {"keras": keras.layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.statistics", __doc__)
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches in a pass")
    parser.add_argument("--turns", type=int, default=15, help="turns per contender")
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
    """Compares a pass of each kind with a pass of inference, and measures the one-time cost.

    Recalibrating on the data repeated twice takes one more pass, and traces the model equally often.
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
            f'upstream="{upstream}": a pass takes {times:.2f} times as long as an inference pass, plus '
            f"{fixed:.2f} s once"
        )
    return lines


def peaks(model: keras.Model, data: tf.data.Dataset) -> str:
    """Measures the peak memory of recalibrating on little and on much data."""

    def held(times: int) -> str:
        repeated = data.repeat(times)
        peak = memory.peak(lambda: tfbn.recalibrate(model, repeated, upstream="batch"))
        return "an unknown amount" if peak is None else f"{peak:.0f} MB"

    return f"peak memory {held(1)}; on {MORE} times as much data {held(MORE)}"


def check(model: keras.Model, images: tf.Tensor, turns: int) -> str:
    """Measures what checking the moments of each batch adds to a training step.

    The step's own time varies by more than that, so this times the update of all layers, with and without the check.
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

    runs: dict[str, Callable[[], Any]] = {"checked": updates(), "unchecked": updates()}
    runs["checked"]()
    with mock.patch.object(moving_average, "can_update", return_value=True):
        runs["unchecked"]()  # Tracing it now leaves the check out for good.
    seconds = measured(runs | {"step": tf.function(step, autograph=False)}, 4 * turns)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    cost = (medians["checked"] - medians["unchecked"]) / UPDATES
    return (
        f"checking the moments takes {1e6 * cost / len(layers):.1f} µs a layer, "
        f"{100 * cost / medians['step']:.2f} % of a training step (at most 2)"
    )


def measured(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Returns the seconds of each run in each turn. The order alternates between turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, turns):  # Two warm-up turns.
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
