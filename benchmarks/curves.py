r"""Measures how the cost of a layer grows: with values, layers, and processes. Draws the curves.

    python -m benchmarks.curves                          # about 3 minutes
    python -m benchmarks.curves --processes 2 --turns 3 --largest 14 --depths 1 2

One process measures training steps of stacks of layers, with tfbn's and Keras's layers in turns. Then several
processes on this machine add up tensors with TensorFlow's collectives. Two of their times give the latency and
bandwidth of the model of `benchmarks.scaling`; what the model then says of a ResNet-50 is compared with what its
53 all-reduces took.
"""

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command_line, environment, results, scaling

KINDS = ("keras", "tfbn")
CHANNELS = (16, 64, 256, 1024)
SMALL_SHAPE = (8, 4, 4, 64)
IN_A_ROW = 5
"""How many all-reduces run one after the other: starting a step has its own cost."""
SIZES = (1, 65536, 1048576)
RESNET50 = {
    "one for each layer": [2 * channels + 1 for channels in scaling.RESNET50],
    "one for all layers": [sum(2 * channels + 1 for channels in scaling.RESNET50)],
}
"""The numbers in each all-reduce of a training step, as in `scaling.seconds`."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.curves", __doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--largest", type=int, default=22, help="binary logarithm of the values")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 53])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--measure", choices=["layers", "processes"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        found = (
            measured_layers(options)
            if options.measure == "layers"
            else measured_all_reduces(options)
        )
        print(json.dumps(found))
        return 0
    with environment.variables(environment.of_workers(options.threads, keep_memory=True)):
        found = {
            "date": datetime.date.today().isoformat(),
            "environment": environment.described(options.threads),
            "settings": {"turns": options.turns, "processes": options.processes},
            **answer(started("layers", options)),
            "all_reduces": in_processes(options),
        }
    path = options.output / "curves.json"
    results.save(found, path)
    found = results.load(path)
    path.with_suffix(".md").write_text(document(found))
    from benchmarks import curves_picture

    curves_picture.draw(found, path.with_suffix(".png"))
    print(document(found))
    return 0


def started(what: str, options: argparse.Namespace, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.curves", "--measure", what]
    for name in ("processes", "turns", "largest", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--depths", *map(str, options.depths)]
    return subprocess.Popen(
        command,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def answer(process: subprocess.Popen) -> Any:
    """Waits for a process and returns the JSON of its last line."""
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"A measuring process ended with exit code {process.returncode}.")
    return json.loads(output.splitlines()[-1])


def in_processes(options: argparse.Namespace) -> Any:
    """Runs the workers of a cluster on the loopback, and returns what the first one measured."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(options.processes)]
    cluster = {"worker": [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]}
    for reserved in sockets:
        reserved.close()
    tasks = [{"type": "worker", "index": index} for index in range(options.processes)]
    workers = [
        started("processes", options, TF_CONFIG=json.dumps({"cluster": cluster, "task": task}))
        for task in tasks
    ]
    try:
        return next(iter([answer(worker) for worker in workers]))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


# In the processes that measure


def measured_layers(options: argparse.Namespace) -> dict[str, Any]:
    """Returns milliseconds a layer by values and channels, and milliseconds a step by layers."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    by_values, by_layers = [], []
    for channels in CHANNELS:
        for logarithm in range(10, options.largest + 1, 2):
            rows = 2**logarithm // channels
            if rows > 1:
                times = in_turns({k: step(k, (rows, channels), 4) for k in KINDS}, options.turns)
                ms = {kind: time / 4 for kind, time in times.items()}
                by_values.append({"channels": channels, "values": 2**logarithm, **ms})
    for depth in options.depths:
        times = in_turns({k: step(k, SMALL_SHAPE, depth) for k in KINDS}, options.turns)
        by_layers.append({"layers": depth, **times})
    return {"by_values": by_values, "by_layers": by_layers}


def step(kind: str, shape: Sequence[int], depth: int) -> Callable[[], Any]:
    """Returns a training step of a stack of layers, as a function."""
    import keras
    import tensorflow as tf

    import tfbn

    layer_class = {"tfbn": tfbn, "keras": keras.layers}[kind].BatchNormalization
    layers = [layer_class() for _ in range(depth)]
    for layer in layers:
        layer.build(shape)
    train = tf.function(scaling.training_step(layers), autograph=False)
    x = tf.random.stateless_normal(shape, (0, 0))
    return lambda: train(x)[-1].numpy()


def in_turns(steps: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Returns the median milliseconds of each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for place in range(turns):
        for name in np.roll(list(steps), -place).tolist():
            steps[name]()  # It fills the caches.
            start = time.perf_counter()
            repeats = 3
            for _ in range(repeats):
                steps[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / repeats)
    return {name: float(np.median(found)) for name, found in times.items()}


def measured_all_reduces(options: argparse.Namespace) -> dict[str, Any]:
    """Returns milliseconds of an all-reduce by its numbers, and of those of a ResNet-50, in one of the processes."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def summed(sizes: Sequence[int]) -> Callable[[], Any]:
        def run() -> Any:
            total = tf.zeros([])
            context = tf.distribute.get_replica_context()
            for size in sizes:  # Each one waits for the last.
                (first, *_) = tf.unstack(
                    context.all_reduce(tf.distribute.ReduceOp.SUM, tf.fill([size], total))[:1]
                )
                total = first
            return total

        function = tf.function(lambda: strategy.run(run), autograph=False)
        return lambda: function().numpy()

    steps = {str(size): summed([size] * IN_A_ROW) for size in SIZES}
    steps |= {name: summed(sizes) for name, sizes in RESNET50.items()}
    times = in_turns(steps, max(2, options.turns // 3))
    return {
        "by_size": {str(size): times[str(size)] / IN_A_ROW for size in SIZES},
        "resnet50": {name: times[name] for name in RESNET50},
    }


# What is read from the measurements


def price_of_a_call(run: dict[str, Any], kind: str, channels: int) -> tuple[float, float]:
    """Fits milliseconds = price + values · rate, with the same weight for each relative error."""
    points = [p for p in run["by_values"] if p["channels"] == channels]
    values, ms = (np.array([p[key] for p in points]) for key in ("values", kind))
    rate, price = np.polyfit(values, ms, 1, w=1 / ms)
    return float(price), float(rate)


def latency_and_bandwidth(run: dict[str, Any]) -> tuple[float, float]:
    """The α and β for which the model gives the times of the smallest and the largest all-reduce."""
    replicas, times = run["settings"]["processes"], run["all_reduces"]["by_size"]
    smallest, largest = (1e-3 * times[str(size)] for size in (SIZES[0], SIZES[-1]))
    latency = smallest / scaling.all_reduce(0, replicas, 1, np.inf)
    rates = np.geomspace(1e6, 1e12, 2000)
    wrong = [abs(scaling.all_reduce(4 * SIZES[-1], replicas, latency, b) - largest) for b in rates]
    return latency, float(rates[int(np.argmin(wrong))])


def document(run: dict[str, Any]) -> str:
    e, s = run["environment"], run["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    latency, bandwidth = latency_and_bandwidth(run)
    most = max(point["values"] for point in run["by_values"])
    prices = [
        "| channels | Keras: ms | tfbn: ms | Keras: ns a value | tfbn: ns a value | tfbn: equal at |"
    ]
    prices.append("|---" * 6 + "|")
    for channels in CHANNELS:
        (keras, keras_rate), (ours, rate) = (price_of_a_call(run, k, channels) for k in KINDS)
        costs = f"{keras:.2f} | {ours:.2f} | {1e6 * keras_rate:.2f} | {1e6 * rate:.2f}"
        prices.append(f"| {channels} | {costs} | {ours / rate:,.0f} values |")
    layers = ["| layers | Keras: ms | tfbn: ms |", "|---" * 3 + "|"]
    layers += [f"| {p['layers']} | {p['keras']:.2f} | {p['tfbn']:.2f} |" for p in run["by_layers"]]
    checks = ["| a ResNet-50's statistics | by the model: ms | measured: ms |", "|---" * 3 + "|"]
    for name, sizes in RESNET50.items():
        modelled = [scaling.all_reduce(4 * n, s["processes"], latency, bandwidth) for n in sizes]
        measured = run["all_reduces"]["resnet50"][name]
        checks.append(f"| all-reduces: {name} | {1e3 * sum(modelled):.1f} | {measured:.1f} |")
    return (
        "\n\n".join(
            [
                "# How the cost grows",
                "![Milliseconds by values, by layers and by replicas](curves.png)",
                f"{run['date']}; {e['processor']}, {e['cores']} cores; {versions}. Medians of {s['turns']} turns. "
                "`python -m benchmarks.curves` measures this and draws it.",
                "## Values and channels",
                "A training step of a layer, forward and backward, costs a price for each call and a time for each "
                f"value: the line `price + values · rate`, fitted to 1,024 to {most:,} values. Where the two are "
                "equal, the price of the calls ends and memory begins.",
                "\n".join(prices),
                "## Layers",
                f"A training step of a stack of small layers, {'×'.join(map(str, SMALL_SHAPE))} values each. Almost "
                "all of it is the price of the calls.",
                "\n".join(layers),
                "## Replicas",
                f"{s['processes']} processes on this machine. The smallest and the largest all-reduce give the model "
                f"of `benchmarks.scaling` a latency of {1e6 * latency:.0f} µs and "
                f"{bandwidth / 1e9:.2g} GB/s. With these it predicts:",
                "\n".join(checks),
                *shared_cores(s["processes"], e["cores"]),
                "The picture shows the model for up to 256 replicas, with the latency and the bandwidth that "
                "`benchmarks.scaling` assumes.",
            ]
        )
        + "\n"
    )


def shared_cores(processes: int, cores: int) -> list[str]:
    """What to say where the processes cannot all run at once."""
    if processes <= cores:
        return []
    return [
        f"The {processes} processes share {cores} cores, which the model does not know: they also wait for each "
        "other's turn. On machines of their own they would not."
    ]


if __name__ == "__main__":
    sys.exit(main())
