"""Measures what `tfbn.StatisticsMonitor` costs, as a share of training without it.

    python -m benchmarks.monitor                          # ResNet50, MobileNetV2, ResNet20 and a tiny network
    python -m benchmarks.monitor ResNet20 --steps 400 --interval 50

It times the callback's own methods within `keras.Model.fit`, and everything else. Most of the cost is reading
weights: per layer, not per example. So the shorter a step, the larger the share.
"""

import functools
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import command_line

NETWORKS = {"ResNet50": 16, "MobileNetV2": 32, "ResNet20": 128, "tiny": 32}
"""The batch size of each network."""
HOOKS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_test_begin",
    "on_epoch_end",
    "on_train_end",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line.parser("benchmarks.monitor", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--steps", type=int, default=300, help="after 100 that warm up")
    parser.add_argument("--interval", type=int, default=100, help="that of the monitor")
    parser.add_argument("--log", action="store_true", help="write for TensorBoard and as JSON, too")
    options = parser.parse_args(arguments)
    for name in options.networks or NETWORKS:
        print(line(name, *measured(name, options.steps, options.interval, options.log)), flush=True)


def line(name: str, step: float, observation: float, share: float) -> str:
    """What was measured, for people."""
    return (
        f"{name}: a step takes {1e3 * step:.1f} ms, a record {1e3 * observation:.1f} ms: "
        f"{100 * share:.2f} % of the training"
    )


def measured(
    name: str, steps: int, interval: int, log: bool = False, warm_up: int = 100
) -> tuple[float, float, float]:
    """Trains a network.

    Returns:
        Seconds per step without the monitor, seconds per record, and the share of the monitor.
    """
    import keras
    import numpy as np

    import tfbn

    model = network(name)
    random = np.random.default_rng(0)
    x = random.normal(size=(NETWORKS[name], *model.input_shape[1:])).astype("float32")
    y = random.integers(0, 10, len(x))

    def batches(number: int) -> Any:
        for _ in range(number):
            yield x, y

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=False)
    model.fit(batches(warm_up), steps_per_epoch=warm_up, shuffle=False, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        files = {"log_dir": folder, "path": f"{folder}/records.jsonl"} if log else {}
        monitor: Any = tfbn.StatisticsMonitor(interval, **files)
        inside, records = timed(monitor)
        begin = time.perf_counter()
        model.fit(
            batches(steps), steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[monitor]
        )
        whole = time.perf_counter() - begin
    rest = whole - inside[0]
    return rest / steps, inside[0] / max(records[0], 1), inside[0] / rest


def timed(monitor: Any) -> tuple[list[float], list[int]]:
    """Sums the seconds in the methods of a monitor, and counts its records."""
    seconds, records = [0.0], [0]

    def timing(method: Any, *arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        before = monitor.layers
        try:
            return method(*arguments, **options)
        finally:
            seconds[0] += time.perf_counter() - begin
            records[0] += monitor.layers is not before

    for hook in HOOKS:
        setattr(monitor, hook, functools.partial(timing, getattr(monitor, hook)))
    return seconds, records


def network(name: str) -> Any:
    """An untrained network for ten classes or more."""
    import keras

    from benchmarks import models

    if name != "tiny":
        return models.built(keras.layers.BatchNormalization, keras, name, "float32")[0]
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(32),
            layers.BatchNormalization(),
            layers.Dense(10),
        ]
    )


if __name__ == "__main__":
    main()
