"""Depth.

Trains networks of 2 to 50 hidden layers of 50 units with Adam: sigmoids with small Gaussian weights as in the
original experiment, and ReLUs with He initialization, which was designed for deep networks without batch norm.
All are trained at three learning rates, and shown at the best rate for their kind and depth.

L10: very deep networks become trainable, and training takes fewer steps to a given accuracy.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands, first_step, number, ratio
from examples.lectures.setting import Setting
from examples.models import Hidden

DEPTHS = (2, 5, 10, 20, 50)
RATES = (0.001, 0.003, 0.01)
GOAL = 0.9
GAINS = {"sigmoid": 1.0, "ReLU": np.sqrt(2)}
NORMS = {"with": "tfbn", "without": "none"}


def run(setting: Setting) -> Result:
    depths, steps = setting.pick(DEPTHS, (2,)), setting.pick(200, 60)
    to_goal = {
        activation: {
            kind: np.stack([fastest(setting, activation, norm, d, steps) for d in depths], axis=-1)
            for kind, norm in NORMS.items()
        }
        for activation in GAINS
    }
    claims, seen = [], []
    for activation, found in to_goal.items():
        deepest = {k: np.where(np.isfinite(f), depths, 0).max(axis=-1) for k, f in found.items()}
        faster = ratio(found["without"], found["with"])
        claims.append(
            Claim(
                "L10",
                f"Deeper {activation} networks become trainable",
                f"hidden layers of the deepest network that reaches 90 % in {steps} steps, with minus without",
                deepest["with"] - deepest["without"],
                above=0,
            )
        )
        claims += [
            Claim(
                "L10",
                f"{activation} networks of {depth} hidden layers take fewer steps",
                "steps to 90 %, without ÷ with (1 if neither reaches it)",
                faster[:, index],
                above=1,
            )
            for index, depth in enumerate(depths)
        ]
        counts = {kind: ", ".join(map(number, bands(f)[1])) for kind, f in found.items()}
        seen.append(
            f"With {', '.join(map(str, depths))} hidden layers of {activation} units, the median network reaches "
            f"90 % test accuracy after {counts['with']} steps with batch norm and after "
            f"{counts['without']} without (∞: not within {steps} steps)."
        )
    numbers = {"depths": depths, "steps": steps, "to_goal": to_goal}
    return Result("Depth", claims, " ".join(seen), numbers, setting.to_dict())


def fastest(setting: Setting, activation: str, norm: str, depth: int, steps: int) -> np.ndarray:
    """Returns the steps to the goal at the best rate: (seeds,)."""
    networks = Networks(
        setting, Hidden(norm=norm, activation=activation.lower()), [50] * depth, "adam"
    )
    at = np.unique(np.geomspace(5, steps, 30).round().astype(int)).tolist()

    def record(step: int) -> bool:
        accuracy.append(networks.accuracy())
        return bool(np.all(np.max(accuracy, axis=0) >= GOAL))

    found = []
    for rate in setting.pick(RATES, RATES[-1:]):
        accuracy = []
        networks.begin(learning_rate=rate, gain=GAINS[activation])
        networks.train(steps, at=at, call=record)
        found.append(first_step(at[: len(accuracy)], np.stack(accuracy, axis=-1), GOAL))
    return min(found, key=np.median)


def draw(result: Result) -> style.Figure:
    numbers = result.numbers
    depths, never = numbers["depths"], 2 * numbers["steps"]
    ticks = [step for step in (10, 20, 50, 100, 200, 500) if step <= numbers["steps"]]
    figure = style.figure(3.4)
    for axes, activation in zip(figure.subplots(1, 2, sharey=True), GAINS, strict=True):
        for kind, look in (("with", style.WITH), ("without", style.WITHOUT)):
            found = np.minimum(numbers["to_goal"][activation][kind], never)
            style.band(axes, depths, found, **look)
        axes.axhline(numbers["steps"], color=style.BLACK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(depths, depths)
        axes.set_yticks([*ticks, never], [*ticks, f"over {numbers['steps']}"])
        axes.minorticks_off()
        style.label(axes, "hidden layers", "training steps to 90 %", f"{activation} units")
    axes.legend()
    return figure
