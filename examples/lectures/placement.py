"""Before or after the activation.

L4: whether to place batch norm before or after the activation is debated; before is the default.

Trains networks with batch norm before the activation, after it, and without, at several learning rates, with
sigmoids and with ReLUs. Each is shown at the rate with the highest final median accuracy; its number of steps is
that of its fastest rate.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands, first_step, number, ratio
from examples.lectures.setting import Setting
from examples.models import Hidden

GOAL = 95  # %
RATES = (0.1, 0.3, 1.0, 3.0)
ACTIVATIONS = {"sigmoid": "sigmoid units", "relu": "ReLU"}
PLACES = {
    "before": {"placement": "before"},
    "after": {"placement": "after"},
    "without": {"norm": "none"},
}


def run(setting: Setting) -> Result:
    at = setting.pick(np.unique(np.geomspace(1, 1000, 22).round().astype(int)).tolist(), [1, 5])
    found = {
        activation: {
            place: train(setting, Hidden(activation=activation, **kind), at)
            for place, kind in PLACES.items()
        }
        for activation in ACTIVATIONS
    }
    claims, seen = [], []
    for activation, one in found.items():
        end = {place: one[place]["accuracy"][:, -1] for place in PLACES}
        steps = {place: one[place]["to_goal"] for place in PLACES}
        accuracy = f"test accuracy after {at[-1]} steps"
        serves, better = "Either placement works", "Before is the better default"
        table = [
            (serves, f"{accuracy}, before minus without", end["before"] - end["without"]),
            (serves, f"{accuracy}, after minus without", end["after"] - end["without"]),
            (better, f"{accuracy}, before minus after", end["before"] - end["after"]),
            (better, f"steps to {GOAL} %, after ÷ before", ratio(steps["after"], steps["before"])),
        ]
        for claim, measured, values in table:
            unit, above = ("×", 1) if "÷" in measured else ("% points", 0)
            claims.append(
                Claim("L4", claim, f"{ACTIVATIONS[activation]}: {measured}", values, unit, above)
            )
        ends = [f"{np.median(end[place]):.1f} %" for place in PLACES]
        goals = [number(bands(steps[place])[1]) for place in PLACES]
        seen.append(
            f"With {ACTIVATIONS[activation]}, the median test accuracy after {at[-1]} steps is {ends[0]} with batch "
            f"norm before the activation, {ends[1]} with batch norm after it, and {ends[2]} without; reaching "
            f"{GOAL} % takes {goals[0]}, {goals[1]} and {goals[2]} steps."
        )
    numbers = {"steps": at, "found": found}
    return Result(
        "Before or after the activation", claims, " ".join(seen), numbers, setting.to_dict()
    )


def train(setting: Setting, hidden: Hidden, at: list[int]) -> dict[str, object]:
    """Trains one kind of network. Returns the accuracies in % at its best rate, and the steps at its fastest rate."""
    networks = Networks(setting, hidden)
    runs = {}
    for rate in setting.pick(RATES, RATES[:1]):
        accuracy: list[np.ndarray] = []
        networks.begin(rate)
        networks.train(at[-1], at=at, call=lambda step, to=accuracy: to.append(networks.accuracy()))
        runs[rate] = 100 * np.stack(accuracy, axis=1)
    best = max(runs, key=lambda rate: bands(runs[rate])[1][-1])
    to_goal = [first_step(at, accuracy, GOAL) for accuracy in runs.values()]
    fastest = min(to_goal, key=lambda steps: bands(steps)[1])
    return {"rate": best, "accuracy": runs[best], "to_goal": fastest}


def draw(result: Result) -> style.Figure:
    figure = style.figure(3.8)
    after = {"color": style.GREEN, "linestyle": ":", "marker": "^"}
    looks = {"without": style.WITHOUT, "after": after, "before": style.WITH}
    for axes, activation in zip(figure.subplots(1, 2, sharey=True), ACTIVATIONS, strict=True):
        for place, look in looks.items():
            label = "without" if place == "without" else f"batch norm {place} the activation"
            values = result.numbers["found"][activation][place]["accuracy"]
            style.band(axes, result.numbers["steps"], values, **look | {"label": label})
        axes.set_xscale("log")
        style.label(
            axes,
            "training steps",
            "test accuracy (%)",
            f"{ACTIVATIONS[activation]}, each at its best rate",
        )
        axes.label_outer()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
