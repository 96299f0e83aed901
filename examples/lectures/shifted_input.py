"""A shifted input.

L12: a classifier trained on black cats fails on coloured cats, because the distribution of its input has shifted.

`examples.domain_shift` trains a network with batch norm on white digits on black, and tests it on other colours:
with its training statistics, and with statistics of the new images (`tfbn.recalibrate`), without their labels. It
always uses the digits that come with scikit-learn.
"""

import numpy as np

from examples import domain_shift
from examples.lectures import style
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Setting

HOME, *AWAY = domain_shift.DOMAINS


def run(setting: Setting) -> Result:
    epochs = setting.pick(10, 1)
    outcomes = [domain_shift.run(epochs, seed)[0] for seed in range(setting.seeds)]
    # (seeds, domains)
    fixed = np.array([[100 * domain.before for domain in one] for one in outcomes])
    renewed = np.array([[100 * domain.after for domain in one] for one in outcomes])
    fall = fixed[:, :1] - fixed
    undone = 100 * (renewed - fixed) / np.maximum(fall, 1)
    claims = [
        Claim(
            "L12",
            "A network fails when the distribution of its input has shifted",
            f"test accuracy on {HOME} minus that on other colours, mean of {len(AWAY)}",
            fall[:, 1:].mean(axis=1),
            unit="% points",
            above=0,
        )
    ]
    claims += [
        Claim(
            "L12",
            f"Statistics of the new images restore the accuracy: {domain}",
            "share of the lost accuracy that they restore",
            undone[:, index],
            unit="%",
            above=50,
        )
        for index, domain in enumerate(AWAY, 1)
    ]
    before, after = bands(fixed)[1], bands(renewed)[1]
    seen = (
        f"The median test accuracy is {before[0]:.1f} % for {HOME} digits. With the training statistics, it is "
        + listed(before)
        + ". With statistics of the new images, it is "
        + listed(after)
        + "."
    )
    numbers = {"domains": [HOME, *AWAY], "fixed": fixed, "renewed": renewed}
    return Result("A shifted input", claims, seen, numbers, setting.to_dict())


def listed(accuracy: np.ndarray) -> str:
    return ", ".join(f"{a:.1f} % {d}" for a, d in zip(accuracy[1:], AWAY, strict=True))


def draw(result: Result) -> style.Figure:
    figure = style.figure(3.2)
    axes = figure.subplots()
    places = np.arange(len(result.numbers["domains"]))
    for key, label, look, offset in (
        ("fixed", "statistics of the training", style.WITHOUT, -0.2),
        ("renewed", "statistics of the new images", style.WITH, 0.2),
    ):
        low, median, high = bands(result.numbers[key])
        errors = [median - low, high - median]
        hatch = "//" if key == "fixed" else ""
        bars = axes.bar(
            places + offset, median, 0.38, yerr=errors, capsize=3, color=look["color"], label=label,
            hatch=hatch, edgecolor="white",
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.axhline(10, color=style.BLACK, linewidth=0.8, linestyle=":", label="guessing")
    axes.set_xticks(places, result.numbers["domains"])
    axes.set_ylim(0, 112)
    axes.legend(loc="upper right")
    style.label(axes, "colours of the digits (ink on paper)", "test accuracy (%)")
    return figure
