"""Fine-tunes a network on little data, in five ways to treat its batch normalization layers.

    python -m examples.fine_tune

A small network learns the digits 0 to 4. Then it learns to tell 5 to 9 apart from 20 images, in batches of two:

- everything: all weights train, and the moving statistics follow the batches of two.
- inference mode: Keras's recipe, ``base(x, training=False)``. In a Functional model, `fit` overrides it (keras#20285).
- freeze: `tfbn.freeze(base, affine=False)` keeps the moving statistics.
- fuse: `tfbn.fuse(base)` does the same, with each batch normalization as part of the convolution before it.
- recalibrate, fuse: first `tfbn.recalibrate(base, x, prior=N)`.

Prints and draws the accuracy on all other images of 5 to 9, over several seeds, and the time and the peak memory of a
training step. `python -m benchmarks.fused` measures time and memory of large networks.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
PER_CLASS = 4
STEP_SHAPE = (32, 32, 32, 1)
"""The batch whose training step is timed: with two digits, a step is all overhead."""
MEMORY_SHAPE = (256, 32, 32, 1)
"""The batch whose peak memory is measured: activations outweigh all else."""


class Outcome(NamedTuple):
    """What one way gives."""

    way: str
    accuracies: list[float]
    """One for each seed, from 0 to 1."""
    milliseconds: float
    """The median time of a training step on a batch of `STEP_SHAPE`."""
    megabytes: float
    """What training steps on a batch of `MEMORY_SHAPE` add to the peak memory of a process."""


def everything(base: Any, x: np.ndarray) -> tuple[Any, dict[str, bool]]:
    return base, {}


def inference_mode(base: Any, x: np.ndarray) -> tuple[Any, dict[str, bool]]:
    return base, {"training": False}


def freeze(base: Any, x: np.ndarray) -> tuple[Any, dict[str, bool]]:
    import tfbn

    base = tfbn.convert(base)
    tfbn.freeze(base, affine=False)
    return base, {}


def fuse(base: Any, x: np.ndarray) -> tuple[Any, dict[str, bool]]:
    import tfbn

    return tfbn.fuse(base), {}


def recalibrate_and_fuse(base: Any, x: np.ndarray) -> tuple[Any, dict[str, bool]]:
    import tfbn

    tfbn.recalibrate(base, x, prior=len(x))
    return tfbn.fuse(base), {}


WAYS: dict[str, Callable[[Any, np.ndarray], tuple[Any, dict[str, bool]]]] = {
    "everything": everything,
    "inference mode": inference_mode,
    "freeze": freeze,
    "fuse": fuse,
    "recalibrate, fuse": recalibrate_and_fuse,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. An error that the user can fix prints a message without a traceback."""
    from examples.quiet import quiet

    parser = argparse.ArgumentParser(prog="fine_tune", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--epochs", type=int, default=15, help="of fine-tuning (default: 15)")
    parser.add_argument("--steps", type=int, default=30, help="to time (default: 30)")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "saved_models" / "fine_tune.png",
        metavar="FILE",
        help="the picture (default: saved_models/fine_tune.png)",
    )
    options = parser.parse_args(arguments)
    quiet()
    try:
        outcomes = run(options.seeds, options.epochs, options.steps)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        plot(outcomes, options.output)
    except (ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
    print(table(outcomes))
    print(f"\n{conclusion(outcomes)}\n\nPicture: {options.output}")


def run(seeds: int, epochs: int, steps: int) -> list[Outcome]:
    """Trains a network on 0 to 4, and fine-tunes it in each way."""
    import keras

    from examples import datasets

    data = datasets.load("digits")
    whole = data.train.concatenate(data.test).batch(2000)
    images, labels = next(iter(whole.as_numpy_iterator()))
    old = labels < 5
    keras.utils.set_random_seed(0)
    pretrained = backbone()
    model = compiled(keras.Sequential([pretrained, keras.layers.Dense(5)]), 3e-3)
    model.fit(images[old], labels[old], epochs=8, verbose=0)

    def fine_tuned(name: str, seed: int) -> float:
        order = np.random.default_rng(seed).permutation(np.flatnonzero(~old))
        few = [i for digit in range(5, 10) for i in order[labels[order] == digit][:PER_CLASS]]
        rest = np.setdiff1d(order, few)
        keras.utils.set_random_seed(seed)
        base, arguments = WAYS[name](copied(pretrained), images[few])
        x = keras.Input(images.shape[1:])
        model = compiled(keras.Model(x, keras.layers.Dense(5)(base(x, **arguments))), 1e-3)
        model.fit(images[few], labels[few] - 5, batch_size=2, epochs=epochs, verbose=0)
        return model.evaluate(images[rest], labels[rest] - 5, batch_size=512, verbose=0)[1]

    times = step_times(pretrained, images[:20], steps)
    peaks = step_peaks()
    return [
        Outcome(name, [fine_tuned(name, seed) for seed in range(seeds)], times[name], peaks[name])
        for name in WAYS
    ]


def backbone() -> Any:
    """Four convolutions with batch normalization, for images of any size."""
    import keras

    layers: list[Any] = [keras.Input((None, None, 1))]
    for width, strides in ((32, 1), (32, 1), (64, 2), (64, 1)):
        layers += [
            keras.layers.Conv2D(width, 3, strides, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name="backbone")


def copied(base: Any) -> Any:
    import keras

    new = keras.models.clone_model(base)
    new.set_weights(base.get_weights())
    return new


def compiled(model: Any, rate: float) -> Any:
    import keras

    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def step_of(name: str, pretrained: Any, x: np.ndarray, shape: Sequence[int]) -> Callable[[], Any]:
    """Traces a training step of the base in one way, on a batch of this shape."""
    import tensorflow as tf

    batch = tf.random.normal(shape)
    base, arguments = WAYS[name](copied(pretrained), x)
    training = arguments.get("training", True)  # What the recipe is meant to do.

    @tf.function(autograph=False)
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(base(batch, training=training))
        return tape.gradient(loss, base.trainable_variables)

    # TensorFlow would take the five ways for one function that is traced again and again.
    return step.get_concrete_function()


def step_times(pretrained: Any, x: np.ndarray, steps: int) -> dict[str, float]:
    """The median milliseconds of a training step of the base in each way, in turns."""
    functions = {name: step_of(name, pretrained, x, STEP_SHAPE) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(steps + 2):
        for name, step in functions.items():
            begin = time.perf_counter()
            step()[0].numpy()
            if turn >= 2:  # The first ones trace and warm up.
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def step_peaks() -> dict[str, float]:
    """The megabytes that training steps take in each way, each in a new process."""
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for name in WAYS:
        with spawn.Pool(1) as process:
            peaks[name] = process.apply(step_peak, (name, MEMORY_SHAPE))
    return peaks


def step_peak(name: str, shape: Sequence[int]) -> float:
    """The megabytes that training steps add to the peak memory of this process. Needs Linux's /proc."""
    step = step_of(name, backbone(), np.zeros(shape, "float32")[:8], shape)
    before = _peak()
    for _ in range(3):
        step()[0].numpy()
    return _peak() - before


def _peak() -> float:
    """The most megabytes that this process has held at once. `resource` would count its parent's, too."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(line) / 1024


def table(outcomes: Sequence[Outcome]) -> str:
    """Formats the outcomes as a table."""
    lines = [f"{'':<19}{'accuracy':>9}{'worst':>8}{'best':>8}{'ms a step':>11}{'peak MB':>9}"]
    for way, found, milliseconds, megabytes in outcomes:
        mean = statistics.mean(found)
        lines.append(
            f"{way:<19}{mean:>9.1%}{min(found):>8.1%}{max(found):>8.1%}{milliseconds:>11.1f}{megabytes:>9.0f}"
        )
    return "\n".join(lines)


def conclusion(outcomes: Sequence[Outcome]) -> str:
    """Says what the figures say."""
    found = {outcome.way: outcome for outcome in outcomes}
    fused, frozen, free = found["fuse"], found["freeze"], found["everything"]
    pairs = zip(fused.accuracies, free.accuracies, strict=True)
    wins = sum(one > other for one, other in pairs)
    lines = [
        f"With frozen statistics, {wins} of {len(fused.accuracies)} seeds end better than with those of small batches.",
        f"A fused step takes {fused.milliseconds / frozen.milliseconds:.2f} times as long as a frozen one, and "
        f"{fused.megabytes / frozen.megabytes:.2f} times the memory.",
    ]
    adapted = found.get("recalibrate, fuse")
    if adapted and statistics.mean(adapted.accuracies) < statistics.mean(fused.accuracies):
        lines.append(
            "Recalibrating first does not pay here: the images look like those of the pretraining."
        )
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draws the accuracies of all seeds, and the time of a step."""
    from examples.extras import from_extra

    with from_extra("plots"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    figure.suptitle("Trained on the digits 0 to 4; fine-tuned on 20 images of 5 to 9")
    points, bars = figure.subplots(1, 2, sharey=True)
    names = [outcome.way for outcome in outcomes]
    for row, outcome in enumerate(outcomes):
        values = [100 * value for value in outcome.accuracies]
        points.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.5)
        points.plot(statistics.mean(values), row, "|", color="#D55E00", ms=18, mew=3)
    points.set_yticks(range(len(names)), names)
    points.set_xlabel("accuracy on 5 to 9, %: seeds and their mean")
    points.invert_yaxis()
    drawn = bars.barh(range(len(names)), [o.milliseconds for o in outcomes], color="#009E73")
    bars.bar_label(drawn, fmt="%.0f", padding=3)
    bars.set_xlabel("a training step, ms")
    for axes in (points, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
