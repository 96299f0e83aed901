"""Before or after the activation.

L4: batch norm sits between z and the activation, or after the activation: a debate; before is the default.

Networks with it before, after, and nowhere learn at several learning rates, with sigmoids and with ReLUs; each
is shown at the rate that gives the highest median accuracy at the end.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Setting
from examples.models import Hidden

RATES = (0.1, 0.3, 1.0, 3.0)
ACTIVATIONS = ("sigmoid", "relu")
PLACES = {
    "before": {"placement": "before"},
    "after": {"placement": "after"},
    "without": {"norm": "none"},
}


def run(setting: Setting) -> Result:
    at = setting.pick([1, 3, 10, 30, 60, 100, 200, 300, 600, 1000], [1, 5])
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
        claims += [
            Claim(
                "L4",
                f"{place.capitalize()} the activation, batch norm serves: {activation}",
                f"test accuracy after {at[-1]} steps, batch norm {place} minus without",
                end[place] - end["without"],
                unit="% points",
                above=0,
            )
            for place in ("before", "after")
        ]
        claims.append(
            Claim(
                "L4",
                f"Before is the better default: {activation}",
                f"test accuracy after {at[-1]} steps, before minus after",
                end["before"] - end["after"],
                unit="% points",
                above=0,
            )
        )
        ends = ", ".join(
            f"{np.median(end[p]):.1f} % {p} (at rate {one[p]['rate']:g})" for p in PLACES
        )
        seen.append(
            f"With {activation} units the median network reads, after {at[-1]} steps, {ends}."
        )
    numbers = {"steps": at, "found": found}
    return Result(
        "Before or after the activation", claims, " ".join(seen), numbers, setting.to_dict()
    )


def train(setting: Setting, hidden: Hidden, at: list[int]) -> dict[str, object]:
    """Accuracies of one kind of network at its best rate, in %: (seeds, moments)."""
    networks = Networks(setting, hidden)
    runs = {}
    for rate in setting.pick(RATES, RATES[:1]):
        accuracy: list[np.ndarray] = []
        networks.begin(rate)
        networks.train(at[-1], at=at, call=lambda step, to=accuracy: to.append(networks.accuracy()))
        runs[rate] = 100 * np.stack(accuracy, axis=1)
    best = max(runs, key=lambda rate: bands(runs[rate])[1][-1])
    return {"rate": best, "accuracy": runs[best]}


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
            axes, "training steps", "test accuracy (%)", f"{activation}, each at its best rate"
        )
        axes.label_outer()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
