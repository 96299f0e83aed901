"""The noise of a mini-batch.

L13: the mean and variance of a mini-batch are noisy; a larger mini-batch makes the noise smaller.

One example is put into many random mini-batches, and its ẑ, the normalized input of a unit, scatters. A mean of
m independent values has an error that falls as m^(−1/2), and in first order so have σ and ẑ, whatever the data.
The mini-batches of an epoch hold no example twice: their noise falls faster, to 0 at the whole training set.
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
        "Statistics are noisy, and less so with a larger mini-batch",
        "how far the slope of log spread of ẑ over log m is from −1/2, of 1/2",
        100 * np.abs(slopes + 0.5) / 0.5,
        unit="%",
        at_most=10,
    )
    medians = bands(independent)[1]
    seen = (
        f"From mini-batches of {SIZES[0]} examples to those of {SIZES[-1]}, the ẑ of one example scatters by "
        f"{medians[0]:.2f} to {medians[-1]:.3f}, and the slope of the line through all sizes on log axes is "
        f"{number(np.median(slopes))}. Drawn as an epoch draws them, no example twice, the mini-batches of "
        f"{SIZES[-1]}, of {z.shape[1]} examples, scatter it by {bands(of_an_epoch)[1][-1]:.3f}."
    )
    numbers = {"sizes": SIZES, "independent": independent, "of an epoch": of_an_epoch}
    return Result("The noise of a mini-batch", [claim], seen, numbers, setting.to_dict())


def spread(
    z: np.ndarray, size: int, draws: int, again: bool, rng: np.random.Generator
) -> np.floating:
    """How far the first example's ẑ scatters over random mini-batches with it.

    Args:
        z: What a layer gets, (examples, units).
        size: Of a mini-batch.
        draws: How many mini-batches.
        again: Whether an example may be drawn again, which makes all independent.
        rng: Draws them.

    Returns:
        The standard deviation over the mini-batches, the mean of all units.
    """
    others = [1 + rng.choice(len(z) - 1, size - 1, replace=again) for _ in range(draws)]
    rows = np.insert(others, 0, 0, axis=1)
    normalize = tfbn.BatchNormalization(center=False, scale=False, virtual_batch_size=size)
    z_hat = normalize(z[rows.ravel()], training=True).numpy().reshape(draws, size, -1)
    return z_hat[:, 0].std(axis=0).mean()


def slope(sizes: Sequence[int], spreads: Sequence[float]) -> np.floating:
    """Of the straight line through them on log axes."""
    return np.polyfit(np.log(sizes), np.log(spreads), 1)[0]


def draw(result: Result) -> style.Figure:
    figure = style.figure()
    axes = figure.subplots()
    sizes = np.array(result.numbers["sizes"])
    # Of slope −1/2, as high as the medians are on average.
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
