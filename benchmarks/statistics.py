"""Measures what maintaining the moving statistics costs: recalibration, diagnosis, and the check of every batch.

    python -m benchmarks.statistics               # two networks and the check: some minutes
    python -m benchmarks.statistics ResNet50      # only this one; the others keep their results

Networks run in processes of their own, and so does each way of which the peak memory is measured. Writes JSON,
and Markdown beside it.
"""

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import tfbn
from benchmarks import command_line, environment, memory, models, results
from benchmarks.tables import table
from tfbn._layer import moving_average
from tfbn._moments.moments import Moments
from tfbn._support.reports import count

NETWORKS = {"MobileNetV2": 32, "ResNet50": 64}
"""The networks, with the width and height of the images."""
IMAGES, BATCH, CLASSES = 1437, 64, 10
PASS, POPULATION, DIAGNOSE = 1.5, 2, 3
"""How many times as long each may take: a pass as an evaluation, the others as `upstream="batch"`."""
PASSES = 5
"""Over how many times the data a pass is measured: of two times it would be lost in the noise of what is done once."""
PEAKS: dict[str, Callable[[keras.Model, tf.data.Dataset], Any]] = {
    "evaluate": lambda model, data: model.evaluate(data, verbose=0),
    "batch": lambda model, data: tfbn.recalibrate(model, data, upstream="batch"),
    "memory": lambda model, data: tfbn.recalibrate(model, data, cache="memory"),
    "disk": lambda model, data: tfbn.recalibrate(model, data, cache="disk"),
    # Slow, and what it holds at once does not grow with the data.
    "none": lambda model, data: tfbn.recalibrate(model, data.take(3), cache="none"),
}
"""Of what the peak memory is measured."""
UPDATES = 20
"""How often the averages are updated in a turn: a single update is too short to be timed."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.statistics", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {list(NETWORKS)}")
    parser.add_argument("--turns", type=int, default=5, help="how often each has its turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/statistics.json"))
    parser.add_argument("--here", action="store_true", help="one network, in this process, as JSON")
    parser.add_argument("--peak", choices=list(PEAKS), help="with --here: only its peak memory")
    options = parser.parse_args(arguments)
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    if options.here:
        (name,) = options.networks
        here = peak(name, options.peak) if options.peak else network(name, options.turns)
        print(json.dumps(here))
        return 0
    found = results.by_network(options.output)
    for name in options.networks or list(NETWORKS):
        found[name] = in_a_process(name, "--turns", options.turns, "--threads", options.threads)
        found[name]["peaks"] = {way: in_a_process(name, "--peak", way) for way in PEAKS}
        run = {
            "suite": "statistics",
            "date": datetime.date.today().isoformat(),
            "environment": environment.described(options.threads),
            "images": IMAGES,
            "batch": BATCH,
            "results": [found[name] for name in sorted(found)],
        }
        results.save(run, options.output)
        text = section(results.load(options.output))
        options.output.with_suffix(".md").write_text(f"# Recalibration and diagnosis\n\n{text}\n")
        print(text, flush=True)
    if not options.networks:
        model = models.built(tfbn.BatchNormalization, keras, "ResNet20", "float32")[0]
        print(check(model, tf.random.normal((BATCH, 32, 32, 3), seed=0), 3 * options.turns))
    return 0


def in_a_process(name: str, *arguments: Any) -> Any:
    command = [sys.executable, "-m", "benchmarks.statistics", name, "--here", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def network(name: str, turns: int) -> dict[str, Any]:
    """Times what it costs to maintain the statistics of a network."""
    model, data = prepared(name)
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    return {
        "network": name,
        "size": NETWORKS[name],
        "layers": len(norms),
        "turns": turns,
        "seconds": recalibration(model, data, turns),
    }


def peak(name: str, way: str) -> float | None:
    """Returns the peak megabytes of the process, the model and the data included."""
    model, data = prepared(name)
    return memory.peak(lambda: PEAKS[way](model, data))


def prepared(name: str) -> tuple[keras.Model, tf.data.Dataset]:
    """Returns a network of `keras.applications`, and random images."""
    size = NETWORKS[name]
    random = np.random.default_rng(0)
    images = random.normal(size=(IMAGES, size, size, 3)).astype("float32")
    labels = random.integers(0, CLASSES, IMAGES)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=CLASSES, classifier_activation=None
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model, data


def recalibration(model: keras.Model, data: tf.data.Dataset, turns: int) -> dict[str, float]:
    """CPU seconds of evaluations, recalibrations and a diagnosis, each after the first evaluation.

    What `recalibrate` does once, such as tracing, it also does once for the data several times over: the
    difference is passes.
    """
    longer = data.repeat(PASSES)
    runs: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: model.evaluate(data, verbose=0),
        "evaluate, longer": lambda: model.evaluate(longer, verbose=0),
        "batch": lambda: tfbn.recalibrate(model, data, upstream="batch"),
        "batch, longer": lambda: tfbn.recalibrate(model, longer, upstream="batch"),
        "population": lambda: tfbn.recalibrate(model, data),
        "population, longer": lambda: tfbn.recalibrate(model, longer),
        "diagnose": lambda: tfbn.diagnose(model, data),
    }
    runs["evaluate"]()
    seconds = measured(runs, turns, clock=time.process_time, warm_up=1)
    found = {name: float(np.median(values)) for name, values in seconds.items()}
    for name in ("evaluate", "batch", "population"):
        several = np.subtract(seconds[f"{name}, longer"], seconds[name])
        found[f"{name}, a pass"] = float(np.median(several)) / (PASSES - 1)
    return found


def section(run: dict[str, Any]) -> str:
    """The table of a run on the page of numbers."""
    e = run["environment"]
    rows = []
    for r in run["results"]:
        s = r["seconds"]
        batch, exact = (
            s[f"{way}, a pass"] / s["evaluate, a pass"] for way in ("batch", "population")
        )
        rows.append(
            [
                f"{r['network']}, {r['size']}×{r['size']}, {r['layers']} layers; {count(r['turns'], 'turn')}",
                *(f"{s[name]:.2f}" for name in ("evaluate", "batch", "population", "diagnose")),
                f"{batch:.2f} (≤ {PASS})",
                f"{exact:.2f}",
                f"{s['population'] / s['batch']:.2f} (≤ {POPULATION})",
                f"{s['diagnose'] / s['batch']:.2f} (≤ {DIAGNOSE})",
            ]
        )
    peak_head = ["`evaluate`", '`upstream="batch"`', *(f'`cache="{c}"`' for c in list(PEAKS)[2:])]
    peaks = [
        [r["network"], *(f"{megabytes:,.0f}" for megabytes in r["peaks"].values())]
        for r in run["results"]
    ]
    head = ["", "`evaluate`", '`upstream="batch"`', "default (exact)", "`diagnose`"]
    head += [
        "a pass with batch / evaluate",
        "an exact pass / evaluate",
        "exact / batch",
        "diagnose / batch",
    ]
    versions = ", ".join(f"{n} {e['versions'][n]}" for n in ("tensorflow", "keras"))
    return (
        f"CPU seconds for {run['images']} images in batches of {run['batch']}, tracing included (`evaluate`: after "
        f"it); {e['processor']}, {e['threads']} threads; {versions}; {run['date']}. Medians of the turns. "
        f"A pass: the difference to {PASSES} times the data, divided by {PASSES - 1}. In brackets: what a run "
        "must reach.\n\n" + table(head, rows) + "\n\n"
        "Peak megabytes of a process that does nothing else, TensorFlow, the network and the images included. "
        '`cache="none"` had three batches; it keeps nothing between them.\n\n'
        + table(["", *peak_head], peaks)
    )


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


def measured(
    runs: dict[str, Callable[[], Any]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Returns the seconds of each run in each turn. The first in one turn is the last in the next."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_up, turns):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            begin = clock()
            runs[name]()
            if turn >= 0:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Returns the median over the turns of the ratios of two runs."""
    return float(np.median(np.divide(seconds[one], seconds[other])))


if __name__ == "__main__":
    raise SystemExit(main())
