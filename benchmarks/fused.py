"""Measures a step of fine-tuning with frozen statistics: Keras's layers, ours, fused ones, and none at all.

    python -m benchmarks.fused                      # about 10 minutes, on a machine that does nothing else
    python -m benchmarks.fused --memory             # only the memory, which does not depend on what else runs
    python -m benchmarks.fused ResNet50 --quick     # a few small steps

All weights train, with SGD and momentum, in graph mode. Times are taken in turns in one process; a ratio is the
median of those of all turns. The peak memory of each contender is taken in a process of its own.
"""

import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command_line, environment, memory
from benchmarks.results import save
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
NETWORKS = ("ResNet50", "MobileNetV2")
CONTENDERS = ("keras", "frozen", "fused", "none")
CLASSES = 1000
SECONDS = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.fused", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="of keras.applications")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--size", type=int, default=160, help="height and width of an image")
    parser.add_argument("--turns", type=int, default=9, help="how often each has its turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="do not measure times")
    parser.add_argument("--quick", action="store_true", help="batch 4, size 64, 2 turns")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write results")
    parser.add_argument("--peak", choices=CONTENDERS, help="of one contender, in this process")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.size, options.turns = 4, 64, 2
    if options.peak:
        print(json.dumps(peak(options.networks[0], options.peak, options)))
        return 0
    found = {}
    for network in options.networks or NETWORKS:
        found[network] = {"peak_mb": {name: _peak(network, name, options) for name in CONTENDERS}}
        if not options.memory:
            found[network] |= times(network, options)
        print(f"{network}\n{_table(found[network])}\n", flush=True)
    if options.output:
        run = {
            "suite": "fused",
            "date": datetime.date.today().isoformat(),
            "environment": environment.described(options.threads),
            "settings": {key: getattr(options, key) for key in ("batch", "size", "turns")},
            "results": found,
        }
        save(run, options.output)
    return 0


def step_of(network: str, contender: str, options: Any) -> Callable[[], Any]:
    """Returns a training step of a network on a batch that is in memory."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tfbn

    keras.utils.set_random_seed(0)
    shape = (options.size, options.size, 3)
    model = getattr(keras.applications, network)(
        weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None
    )
    if contender == "none":
        model = keras.models.clone_model(model, clone_function=_without_batch_norm)
    elif contender == "fused":
        model = tfbn.fuse(model)
    elif contender == "frozen":
        model = tfbn.convert(model)
        tfbn.freeze(model, affine=False)
    random = np.random.default_rng(0)
    images = tf.constant(random.uniform(-1, 1, (options.batch, *shape)), tf.float32)
    labels = tf.constant(random.integers(0, CLASSES, options.batch))
    # Nothing is to be learned from noise: every step is like the first.
    optimizer = keras.optimizers.SGD(0.0, momentum=0.9)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(images, training=contender != "keras")  # Keras's recipe: inference mode.
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            )
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return lambda: float(step())


def times(network: str, options: Any) -> dict[str, Any]:
    """Milliseconds of a step of each contender, and its ratio to the others."""
    import numpy as np
    import tensorflow as tf

    from benchmarks.statistics import measured, ratio

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    steps = {name: step_of(network, name, options) for name in CONTENDERS}
    seconds = measured(steps, options.turns)
    return {
        "ms": {name: 1e3 * float(np.median(values)) for name, values in seconds.items()},
        "time_ratios": {name: ratio(seconds, "fused", name) for name in CONTENDERS},
    }


def peak(network: str, contender: str, options: Any) -> float | None:
    """Megabytes that a training step holds at most, with the model and the optimizer's state."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.random.normal([]).numpy()  # TensorFlow itself starts up with the first operation.
    before = memory.resident()
    most = memory.peak(step_of(network, contender, options))
    return None if most is None or before is None else most - before


def _peak(network: str, contender: str, options: Any) -> float | None:
    """The peak of a contender in a process of its own."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("batch", "size", "threads")]
    command = [sys.executable, "-m", "benchmarks.fused", network, "--peak", contender, *sizes]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _without_batch_norm(layer: Any) -> Any:
    import keras

    class Nothing(keras.layers.Layer):
        def call(self, x: Any, mask: Any = None) -> Any:  # The graph passes a mask of None.
            return x

    if isinstance(layer, keras.layers.BatchNormalization):
        return Nothing(name=layer.name)
    return type(layer).from_config(layer.get_config())


def section(run: dict[str, Any]) -> str:
    """The tables of a run on the page of numbers."""
    e, settings = run["environment"], run["settings"]
    versions = ", ".join(f"{n} {e['versions'][n]}" for n in ("tensorflow", "keras"))
    text = (
        f"A training step on {settings['batch']} images of {settings['size']}×{settings['size']}, all weights "
        f"training with SGD and momentum; {e['processor']}, {e['threads']} threads; {versions}; {run['date']}. "
        f"Times are medians of {settings['turns']} turns, ratios are medians of ratios turn by turn. `keras`: "
        "`model(x, training=False)`; `frozen`: `tfbn.convert` and `tfbn.freeze`; `fused`: `tfbn.fuse`; `none`: the "
        "network without batch normalization. The bars: at most 1.03 times the time and 1.05 times the memory of "
        "`none`, and 0.85 times both of `keras`."
    )
    return "\n\n".join([text, *(f"{n}:\n\n{_table(found)}" for n, found in run["results"].items())])


def _table(found: dict[str, Any]) -> str:
    """Times and peaks, and how many times as much a fused step takes; bars: 1.03 and 1.05 of none, 0.85 of keras."""
    peaks = found["peak_mb"]
    header, rows = ["", "peak MB", "fused / it"], []
    for name in CONTENDERS:
        known = peaks[name] is not None
        row = (
            [name, f"{peaks[name]:.0f}", f"{peaks['fused'] / peaks[name]:.3f}"]
            if known
            else [name, "", ""]
        )
        if "ms" in found:
            row += [f"{found['ms'][name]:.0f}", f"{found['time_ratios'][name]:.3f}"]
        rows.append(row)
    return table(header + (["ms", "fused / it"] if "ms" in found else []), rows)


if __name__ == "__main__":
    raise SystemExit(main())
