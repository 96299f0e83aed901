"""The original experiment.

Ioffe and Szegedy (2015, section 4.1): 3 hidden layers of 100 sigmoid units, small Gaussian weights, batches of
60, plain gradient descent. The paper does not state its learning rate, so both networks are trained at several
rates, and each is shown at the rate at which it reaches 90 % first.

L9: more of the rates work. L10: training takes fewer steps to a given accuracy. L12: the input of a unit in the
last hidden layer drifts less; the drift is the standard deviation of the unit's median input over training, divided
by the mean distance between the outer percentiles. L14: training works with batch norm in every hidden layer.
"""

from typing import Any

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands, first_step, number, ratio
from examples.lectures.setting import Setting
from examples.models import Hidden

RATES = (0.1, 0.3, 1.0, 3.0)
GOAL = 0.9
PERCENTILES = (15, 50, 85)
CLAIMS = {
    "L9": (
        "More learning rates work",
        f"share of {len(RATES)} rates that reach 90 %, with − without",
    ),
    "L10": ("Training takes fewer steps", "steps to 90 % at the best rate, without ÷ with"),
    "L12": ("A later layer's input moves less", "drift of a unit's median input, without ÷ with"),
    "L14": ("Batch norm works in every hidden layer", "test accuracy after training W, γ and β"),
}


def run(setting: Setting) -> Result:
    steps = setting.pick(3000, 60)
    spaced = np.concatenate([np.geomspace(1, steps, 40), np.linspace(1, steps, 40)])
    at = np.unique(spaced.round().astype(int)).tolist()
    normal, plain = (train(setting, norm, at) for norm in ("tfbn", "none"))
    found = {  # the value for each seed, its unit, and the predicted lower bound
        "L9": (100 * (normal["working"] - plain["working"]), "% points", 0),
        "L10": (ratio(plain["to_goal"], normal["to_goal"]), "", 1),
        "L12": (plain["stray"] / normal["stray"], "", 1),
        "L14": (100 * normal["accuracy"][:, -1], "%", 100 * GOAL),
    }
    claims = [Claim(lecture, *CLAIMS[lecture], *found[lecture]) for lecture in CLAIMS]
    seen = " ".join(
        f"{name} batch norm, at learning rate {of['rate']:g}, the median network reaches 90 % test accuracy after "
        f"{number(bands(of['to_goal'])[1])} steps and {100 * np.median(of['accuracy'][:, -1]):.1f} % after {steps}, "
        "and the median input of a unit in its last hidden layer drifts by "
        f"{np.median(of['stray']):.2f} times the distance between the outer percentiles."
        for name, of in (("With", normal), ("Without", plain))
    )
    numbers = {"steps": at, "with": normal, "without": plain}
    return Result("The original experiment", claims, seen, numbers, setting.to_dict())


def train(setting: Setting, norm: str, at: list[int]) -> dict[str, Any]:
    """Trains networks of one kind at every rate. Returns the measurements at the best rate."""
    networks = Networks(setting, Hidden(norm=norm, activation="sigmoid"), (100, 100, 100))
    # The inputs of the last hidden layer's sigmoids: BN(W a), or W a + b.
    last = networks.normalizations()[-1] if norm == "tfbn" else networks.kernels()[2]
    look = networks.probe([last])

    def record(step: int) -> None:
        accuracy.append(networks.accuracy())
        inputs.append(np.percentile(look(setting.test.images)[0], PERCENTILES, axis=1))

    runs, rates = {}, setting.pick(RATES, RATES[2:])
    for rate in rates:
        accuracy, inputs = [], []
        networks.begin(learning_rate=rate)
        networks.train(at[-1], at=at, call=record)
        runs[rate] = np.stack(accuracy, axis=1), np.stack(inputs, axis=-1)
    to_goal = {rate: first_step(at, accuracy, GOAL) for rate, (accuracy, _) in runs.items()}
    best = min(rates, key=lambda rate: bands(to_goal[rate])[1])
    accuracy, inputs = runs[best]  # (seeds, records) and (percentiles, seeds, units, records)
    low, middle, high = inputs
    time = np.gradient(at)  # The records are denser at first, but every step counts the same.
    centre = np.average(middle, axis=-1, weights=time)[..., np.newaxis]
    strays = np.sqrt(np.average((middle - centre) ** 2, axis=-1, weights=time))
    return {
        "rate": best,
        "accuracy": accuracy,
        "to_goal": to_goal[best],
        "working": np.isfinite(list(to_goal.values())).mean(0),
        "stray": np.median(strays / np.average(high - low, axis=-1, weights=time), axis=-1),
        "unit": inputs[:, 0, 0],  # the first unit of the first seed
    }


def draw(result: Result) -> style.Figure:
    figure = style.figure(3.2)
    accuracy, *units = figure.subplots(1, 3)
    numbers, steps = result.numbers, result.numbers["steps"]
    everything = np.ravel([numbers[key]["unit"] for key in ("with", "without")])
    for key, look in (("without", style.WITHOUT), ("with", style.WITH)):
        curves = 100 * np.array(numbers[key]["accuracy"])
        style.band(accuracy, steps, curves, **look | {"marker": "", "label": key})
        axes = units[key == "with"]
        for values, percent in zip(numbers[key]["unit"], PERCENTILES, strict=True):
            axes.plot(steps, values, "-" if percent == 50 else ":", color=look["color"])
            axes.annotate(f" {percent} %", (steps[-1], values[-1]), va="center")
        title = f"({'bc'[key == 'with']}) {key} batch norm, rate {numbers[key]['rate']:g}"
        style.label(axes, "training steps", "input of one sigmoid", title)
        axes.set_xlim(0, 1.2 * steps[-1])
        axes.set_ylim(1.1 * min(everything), 1.1 * max(everything))
    accuracy.set_xscale("log")
    accuracy.legend(loc="upper left", fontsize="small", handlelength=1.5)
    style.label(accuracy, "training steps", "test accuracy (%)", "(a) with and without batch norm")
    return figure
