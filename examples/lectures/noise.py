"""The noise of a mini-batch.

L13: the mean and variance of a mini-batch are noisy; a larger mini-batch reduces the noise.

Places one example in many random mini-batches, and measures the spread of its ẑ, the normalized input of a unit.
The error of a mean of m independent values falls as m^(−1/2), and to first order so do those of σ and ẑ, whatever
the data. The mini-batches of an epoch repeat no example, so their noise falls faster, to 0 for the whole training
set.
"""

from collections.abc import Sequence

import numpy as np

import tfbn
from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands, number
from examples.lectures.setting import Setting
from examples.models import Hidden

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
HOLLOW = {"markersize": 7, "markerfacecolor": "none"}


def run(setting: Setting) -> Result:
    networks = Networks(setting, Hidden(activation="sigmoid"))
    networks.begin(learning_rate=0.3)
    networks.train(setting.pick(500, 5))
    last_hidden = networks.kernels()[-2]
    (z,) = networks.probe([last_hidden])(setting.train.images[:5000])  # (seeds, examples, units)
    draws = setting.pick(400, 100)
    independent, of_an_epoch = (
        [
            [spread(z[seed], size, draws, again, np.random.default_rng(seed)) for size in SIZES]
            for seed in range(setting.seeds)
        ]
        for again in (True, False)
    )
    slopes = np.array([slope(SIZES, spreads) for spreads in independent])
    claim = Claim(
        "L13",
        "The statistics are noisy, and less so with a larger mini-batch",
        "deviation of the slope of log spread of ẑ over log m from −1/2, relative to 1/2",
        100 * np.abs(slopes + 0.5) / 0.5,
        unit="%",
        at_most=10,
    )
    medians = bands(independent)[1]
    seen = (
        f"From mini-batches of {SIZES[0]} examples to those of {SIZES[-1]}, the spread of one example's ẑ falls from "
        f"{medians[0]:.2f} to {medians[-1]:.3f}; the slope of the line through all sizes on log axes is "
        f"{number(np.median(slopes))}. If no example is drawn twice, as in an epoch, mini-batches of "
        f"{SIZES[-1]} of {z.shape[1]} examples give a spread of {bands(of_an_epoch)[1][-1]:.3f}."
    )
    numbers = {"sizes": SIZES, "independent": independent, "of an epoch": of_an_epoch}
    return Result("The noise of a mini-batch", [claim], seen, numbers, setting.to_dict())


def spread(
    z: np.ndarray, size: int, draws: int, again: bool, rng: np.random.Generator
) -> np.floating:
    """Measures the spread of the first example's ẑ over random mini-batches that contain it.

    Args:
        z: The inputs of a layer, of shape (examples, units).
        size: The size of the mini-batches.
        draws: The number of mini-batches.
        again: Whether to draw with replacement, which makes the examples independent.
        rng: The generator that draws them.

    Returns:
        The standard deviation over the mini-batches, averaged over the units.
    """
    others = [1 + rng.choice(len(z) - 1, size - 1, replace=again) for _ in range(draws)]
    rows = np.insert(others, 0, 0, axis=1)
    normalize = tfbn.BatchNormalization(center=False, scale=False, virtual_batch_size=size)
    z_hat = normalize(z[rows.ravel()], training=True).numpy().reshape(draws, size, -1)
    return z_hat[:, 0].std(axis=0).mean()


def slope(sizes: Sequence[int], spreads: Sequence[float]) -> np.floating:
    """Returns the slope of a straight line fitted on log axes."""
    return np.polyfit(np.log(sizes), np.log(spreads), 1)[0]


def draw(result: Result) -> style.Figure:
    figure = style.figure()
    axes = figure.subplots()
    sizes = np.array(result.numbers["sizes"])
    # A line of slope −1/2 through the average of the medians.
    level = np.log(bands(result.numbers["independent"])[1] * np.sqrt(sizes)).mean()
    axes.plot(sizes, np.exp(level) / np.sqrt(sizes), color=style.BLACK, label="slope −1/2")
    for key, label, look in (
        ("independent", "independent examples", style.WITH),
        ("of an epoch", "no example twice", style.WITHOUT | HOLLOW),
    ):
        style.band(axes, sizes, result.numbers[key], **look | {"linestyle": "", "label": label})
    axes.loglog()
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.set_yticks(ticks := [0.05, 0.1, 0.2, 0.5], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    x, y = "examples in the mini-batch, m", "spread of ẑ (standard deviations of z)"
    style.label(axes, x, y, "One example in random mini-batches")
    return figure
