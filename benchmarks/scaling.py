r"""Measures the cost of statistics across replicas: step time and collectives by number of replicas.

    python -m benchmarks.scaling                         # 1 to 4 virtual CPU devices: a minute or two
    python -m benchmarks.scaling --replicas 1 2 --turns 3 --depth 2 --shape 8 4 4 8

Runs a stack of layers, forward and backward, each replica with its own batch: tfbn's and Keras's layers,
synchronized and not, in turns in one process per number of replicas. Virtual devices share the cores of one
machine, so their times show the cost of the collectives there, not the speed of a cluster. `seconds` models
that from the latency and bandwidth of your network.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command_line, environment, results
from tfbn._moments.replicas import FEW

KINDS = ["tfbn", "tfbn synchronized", "keras", "keras synchronized"]
RESNET50 = [64] + [
    channels
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512))
    for channels in [width, width, 4 * width] * blocks + [4 * width]
]
"""The channels of its 53 layers."""
RESNET50_WEIGHTS = 25_557_032
PLANNED = {
    "GPUs, 200 Gbit/s": (10e-6, 20e9),
    "CPUs, 10 Gbit/s": (50e-6, 1.25e9),
}
"""Latency of a message in seconds, and bandwidth in bytes a second. Assumed, not measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.scaling", __doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        default=[32, 28, 28, 64],
        help="the shape of a replica's batch",
    )
    parser.add_argument("--depth", type=int, default=4, help="layers in the stack")
    parser.add_argument("--turns", type=int, default=15, help="turns per contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(options)))
        return 0
    variables = environment.of_workers(options.threads, keep_memory=True)
    with environment.variables(variables):
        found = {
            "date": datetime.date.today().isoformat(),
            "environment": environment.described(options.threads),
            "settings": {name: getattr(options, name) for name in ("shape", "depth", "turns")},
            "results": [in_a_process(options, replicas) for replicas in options.replicas],
        }
    results.save(found, options.output / "scaling.json")
    found = results.load(options.output / "scaling.json")
    (options.output / "scaling.md").write_text(document(found))
    print(table(found))
    return 0


def in_a_process(options: argparse.Namespace, replicas: int) -> dict[str, Any]:
    """Runs in a new process, since TensorFlow's virtual devices can be set only once."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--measure", "--replicas", str(replicas)]
    for name in ("depth", "turns", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--shape", *map(str, options.shape)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    import tensorflow as tf

    (replicas,) = options.replicas
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    x = tf.random.stateless_normal(options.shape, (0, 0))
    steps = {kind: step(strategy, kind, options.shape, options.depth, x) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.turns):
        for kind in np.roll(KINDS, -turn):
            for again in range(2):
                start = time.perf_counter()
                steps[kind].run()
                if again:  # The first step of a turn fills the caches.
                    times[kind].append(1e3 * (time.perf_counter() - start))
    return {
        "replicas": replicas,
        "contenders": {
            kind: {
                "collectives": steps[kind].collectives,
                **dict(
                    zip(("q1", "ms", "q3"), np.percentile(times[kind], [25, 50, 75]), strict=True)
                ),
            }
            for kind in KINDS
        },
    }


class step:
    """Runs a training step of a stack on all replicas, and counts the collectives per replica."""

    def __init__(self, strategy: Any, kind: str, shape: Sequence[int], depth: int, x: Any):
        import keras
        import tensorflow as tf

        import tfbn

        layer_class = {"tfbn": tfbn, "keras": keras.layers}[kind.split()[0]].BatchNormalization
        with strategy.scope():
            layers = [layer_class(synchronized="synchronized" in kind) for _ in range(depth)]
            for layer in layers:
                layer.build(shape)
        train = training_step(layers)
        function = tf.function(lambda x: strategy.run(train, (x,)), autograph=False)
        operations = function.get_concrete_function(x).graph.get_operations()
        total = sum(operation.type.startswith("Collective") for operation in operations)
        self.collectives = total // strategy.num_replicas_in_sync
        self.run = lambda: tf.nest.map_structure(
            lambda value: [part.numpy() for part in strategy.experimental_local_results(value)],
            function(x)[-1],
        )
        self.run()


# The model of costs


def training_step(layers: Sequence[Any]) -> Callable[[Any], Any]:
    """Returns a function that runs built layers one after the other, and computes all gradients."""
    import tensorflow as tf

    variables = [variable for layer in layers for variable in layer.trainable_variables]

    def train(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y, training=True)
        return tape.gradient(y, [x, *[v.value for v in variables]], output_gradients=x)

    return train


def all_reduce(size: float, replicas: int, latency: float, bandwidth: float) -> float:
    """Models the seconds of an all-reduce: the faster of a tree and a ring."""
    if replicas == 1:
        return 0.0
    sent = 2 * size * (replicas - 1) / replicas / bandwidth
    tree = 2 * math.ceil(math.log2(replicas)) * (latency + size / bandwidth)
    return min(2 * (replicas - 1) * latency + sent, tree)


def seconds(
    kind: str, channels: Sequence[int], replicas: int, latency: float, bandwidth: float
) -> float:
    """Models the seconds that the statistics of a model add to a training step if not overlapped with computation.

    Ours, a layer with C channels: apart, one all-reduce of 2C + 1 numbers (in `TrainingLoop` one for all
    layers); synchronized, forward one of a row of 3C + 1 numbers for each replica (of more than 16 two, of C + 1
    and 2C), backward one of 2C. Keras's synchronized layer makes three forward and two backward, of C each.
    """

    def together(c: int) -> list[int]:
        return [replicas * (3 * c + 1)] if replicas <= FEW else [c + 1, 2 * c]

    packages = {
        "tfbn": [2 * c + 1 for c in channels],
        "tfbn in TrainingLoop": [sum(2 * c + 1 for c in channels)],
        "tfbn synchronized": [n for c in channels for n in (*together(c), 2 * c)],
        "keras": [],
        "keras synchronized": [c for c in channels for _ in range(5)],
        "gradients": [RESNET50_WEIGHTS],
    }[kind]
    return sum(all_reduce(4 * n, replicas, latency, bandwidth) for n in packages)


# What is written


def document(run: dict[str, Any]) -> str:
    e, s = run["environment"], run["settings"]
    shape = "×".join(map(str, s["shape"]))
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    return (
        "\n\n".join(
            [
                "# Batch normalization on many replicas",
                f"{run['date']}; {e['processor']}, {e['cores']} cores; {versions}.",
                f"## {s['depth']} layers on {shape} values a replica, forward and backward",
                "Virtual CPU devices of one machine: they share its cores, so that n replicas have n times the work. "
                "Milliseconds a step, median (quartiles), and collectives a step that a replica takes part in.",
                table(run),
                "## What a network adds: a model",
                "An all-reduce of m bytes over R replicas takes the less of a ring, 2(R − 1)α + 2m(R − 1)/(Rβ), and a "
                "tree, 2⌈log₂ R⌉(α + m/β), with the latency α of a message and the bandwidth β. The bytes are those of "
                "`benchmarks/scaling.py`; α and β are assumed, not measured. In a TrainingLoop one all-reduce serves "
                "the statistics of all layers; the gradients are the model's own, for comparison. Milliseconds a step "
                "for a ResNet-50, 53 layers with 26,560 channels, if nothing hides them behind computation:",
                model_table(),
            ]
        )
        + "\n"
    )


def table(run: dict[str, Any]) -> str:
    rows = ["| replicas | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for result in run["results"]:
        cells = [
            f"{c['ms']:.1f} ({c['q1']:.1f}–{c['q3']:.1f}), {c['collectives']}"
            for c in (result["contenders"][kind] for kind in KINDS)
        ]
        rows.append(f"| {result['replicas']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def model_table() -> str:
    kinds = ["tfbn", "tfbn in TrainingLoop", "tfbn synchronized", "keras synchronized", "gradients"]
    rows = [
        "| network | α | β | replicas | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for network, (latency, bandwidth) in PLANNED.items():
        for replicas in (8, 64, 256):
            times = [1e3 * seconds(k, RESNET50, replicas, latency, bandwidth) for k in kinds]
            cells = [network, f"{latency * 1e6:.0f} µs", f"{bandwidth / 1e9:g} GB/s", str(replicas)]
            rows.append("| " + " | ".join([*cells, *(f"{t:.3g}" for t in times)]) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
