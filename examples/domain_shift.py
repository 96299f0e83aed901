"""A classifier trained on black cats sees coloured cats: what recalibration can mend, and what it cannot.

    python -m examples.domain_shift

A small network learns white digits on black. On the same digits in other colours it fails: the
inputs of every layer have moved away from the moving statistics. `tfbn.recalibrate` replaces these by the
statistics of the new images. It needs no labels and changes no weights.

From a few images, the new statistics are a rough estimate. With `prior=N`, those of the training count as N
images more. The example shows the accuracy against the number of images, with and without a prior. Here a prior
changes little: a single image gives a channel of the first layer 64 values, and most of the accuracy.

It mends what a shift and a scale per channel can mend: less contrast, other colours. It cannot mend swapped
ink and paper, which change the sign of every edge.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
SHOWN = 6  # images of each domain in the picture
FEW = "coloured"  # the domain of which only a few images are used
PRIOR = 2


class Outcome(NamedTuple):
    """The network's accuracies in one domain, from 0 to 1."""

    domain: str
    before: float
    after: float
    mean_shift: float
    """How far the first layer's mean moved, in standard deviations."""


class Few(NamedTuple):
    """The network's mean accuracies after it was recalibrated on a few images, from 0 to 1."""

    images: int
    replaced: float
    """With the statistics of these images."""
    averaged: float
    """With those and the training's, by `prior=PRIOR`."""


def white_on_black(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The digits as the network learns them, (number, 8, 8, 1) → (number, 8, 8, 3)."""
    return np.repeat(digits, 3, axis=-1)


def black_on_white(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Inverted."""
    return 1 - white_on_black(digits, rng)


def faded(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey on lighter grey: a fifth of the contrast."""
    return 0.4 + 0.2 * white_on_black(digits, rng)


def blue_on_yellow(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blue ink on yellow paper."""
    ink, paper = np.array([0.1, 0.2, 0.7]), np.array([0.95, 0.85, 0.3])
    return paper + (ink - paper) * digits


def coloured(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright ink on dark paper, with different colours in each image."""
    size = (len(digits), 1, 1, 3)
    ink, paper = rng.uniform(0.5, 1.0, size), rng.uniform(0.0, 0.4, size)
    return paper + (ink - paper) * digits


DOMAINS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "white on black": white_on_black,
    "faded": faded,
    "coloured": coloured,
    "blue on yellow": blue_on_yellow,
    "black on white": black_on_white,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. An error that the user can fix prints a message without a traceback."""
    from examples.quiet import quiet

    parser = argparse.ArgumentParser(prog="domain_shift", description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="default: 10")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--few",
        type=int,
        nargs="+",
        default=[1, 2, 4, 16, 64],
        metavar="N",
        help="numbers of images to recalibrate on (default: 1 2 4 16 64)",
    )
    parser.add_argument(
        "--draws", type=int, default=5, help="how often to draw so many (default: 5)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "saved_models" / "domain_shift.png",
        metavar="FILE",
        help="the picture (default: saved_models/domain_shift.png)",
    )
    options = parser.parse_args(arguments)
    quiet()
    try:
        outcomes, images, few = run(options.epochs, options.seed, options.few, options.draws)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        plot(outcomes, images, few, options.output)
    except (ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
    print(table(outcomes))
    print(f"\n{few_table(few, outcomes)}")
    print(f"\nPicture: {options.output}")


def run(
    epochs: int, seed: int, numbers: Sequence[int] = (), draws: int = 1
) -> tuple[list[Outcome], dict[str, np.ndarray], list[Few]]:
    """Trains on white digits on black, and tests the network in the other domains.

    Returns:
        The outcome in each domain, a few test images of each, and the accuracies for each number of images.
    """
    import keras

    import tfbn
    from examples import datasets, models

    data = datasets.load("digits")
    (digits, labels), (test_digits, test_labels) = (
        next(iter(part.batch(len(part)).as_numpy_iterator())) for part in (data.train, data.test)
    )
    keras.utils.set_random_seed(seed)
    model = models.cnn((8, 8, 3), data.classes, models.Hidden())
    model.compile(
        keras.optimizers.Adam(0.003),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rng = np.random.default_rng(seed)
    model.fit(white_on_black(digits, rng), labels, batch_size=64, epochs=epochs, verbose=0)
    trained = model.get_weights()

    outcomes, shown, few = [], {}, []
    for name, paint in DOMAINS.items():
        images, test_images = (paint(d, rng).astype("float32") for d in (digits, test_digits))
        model.set_weights(trained)
        before = model.evaluate(test_images, test_labels, verbose=0)[1]
        result = tfbn.recalibrate(model, images, batch_size=256)  # no labels
        after = model.evaluate(test_images, test_labels, verbose=0)[1]
        outcomes.append(Outcome(name, before, after, result.layers[0].mean_shift))
        shown[name] = test_images[:: len(test_images) // SHOWN][:SHOWN]
        for number in numbers if name == FEW else ():
            found = []
            for _ in range(draws):
                sample = images[rng.choice(len(images), number, replace=False)]
                for prior in (0, PRIOR):
                    model.set_weights(trained)
                    tfbn.recalibrate(model, sample, batch_size=256, prior=prior)
                    found.append(model.evaluate(test_images, test_labels, verbose=0)[1])
            few.append(Few(number, float(np.mean(found[::2])), float(np.mean(found[1::2]))))
    return outcomes, shown, few


def table(outcomes: Sequence[Outcome]) -> str:
    """Formats the outcomes as a table."""
    lines = [f"{'test digits':<16}{'accuracy':>10}{'recalibrated':>15}{'first mean moved by':>22}"]
    for domain, before, after, shift in outcomes:
        lines.append(f"{domain:<16}{before:>10.1%}{after:>15.1%}{shift:>20.2f} σ")
    return "\n".join(lines)


def few_table(few: Sequence[Few], outcomes: Sequence[Outcome]) -> str:
    """Formats the accuracies by the number of images."""
    before = [f"{o.before:.1%}" for o in outcomes if o.domain == FEW]
    lines = [f"{FEW}, on a few images ({', '.join(before)} before)"]
    lines.append(f"{'images':<16}{'prior=0':>10}{f'prior={PRIOR}':>15}")
    lines += [f"{f.images:<16}{f.replaced:>10.1%}{f.averaged:>15.1%}" for f in few]
    return "\n".join(lines)


def plot(
    outcomes: Sequence[Outcome], images: dict[str, np.ndarray], few: Sequence[Few], path: Path
) -> None:
    """Draws one row per domain: some images, and the accuracies before and after; and below, those by number."""
    from examples.extras import from_extra

    with from_extra("plots"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.1 * len(outcomes) + 3.8), dpi=120, layout="constrained")
    figure.suptitle("Trained on white digits on black; recalibrated on new images without labels")
    heights = [1.1] * len(outcomes) + [3]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[1.2, 1], height_ratios=heights)
    for row, outcome in enumerate(outcomes):
        strip = figure.add_subplot(grid[row, 0])
        strip.imshow(np.concatenate(list(images[outcome.domain]), axis=1).clip(0, 1))
        strip.set_xticks([])
        strip.set_yticks([])
        strip.set_ylabel(outcome.domain, rotation=0, ha="right", va="center")
        bars = figure.add_subplot(grid[row, 1])
        values = [100 * outcome.before, 100 * outcome.after]
        drawn = bars.barh(["before", "after"], values, color=["#D55E00", "#0072B2"])
        bars.bar_label(drawn, fmt="%.0f %%", padding=3)
        bars.set_xlim(0, 118)
        bars.set_xticks([])
        bars.invert_yaxis()
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    lines = figure.add_subplot(grid[-1, :])
    numbers = [f.images for f in few]
    lines.plot(numbers, [100 * f.replaced for f in few], "o-", color="#0072B2", label="prior=0")
    averaged = [100 * f.averaged for f in few]
    lines.plot(numbers, averaged, "s-", color="#009E73", label=f"prior={PRIOR}")
    for outcome in outcomes:
        if outcome.domain == FEW:
            lines.axhline(100 * outcome.before, color="#D55E00", ls="--", label="before")
    lines.set_xscale("log", base=2)
    lines.set_xticks(numbers, [str(n) for n in numbers])
    lines.set_xlabel("images to recalibrate on")
    lines.set_ylabel("accuracy, %")
    lines.set_title(f"{FEW}, recalibrated on a few images", fontsize="medium")
    lines.legend()
    lines.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
