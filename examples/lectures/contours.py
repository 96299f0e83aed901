"""Rounder contours.

Looks at the loss around the current weights, before and during training: 3 hidden layers of 50 tanh units,
gradient descent, the loss of 500 images with their own batch statistics, as in training. The largest eigenvalue of
the Hessian comes from power iteration, which differentiates the layer's gradient.

L11: contours become rounder, so gradient descent takes larger steps. In a round bowl all eigenvalues are equal,
and a single step of the right length along the gradient removes all of the loss.
"""

import numpy as np

import tfbn
from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, number
from examples.lectures.setting import Setting
from examples.lectures.surface import Surface, length, unit
from examples.models import Hidden

LENGTHS = np.geomspace(1e-3, 3, 40)  # of a step, relative to the norm of all weights
CLAIMS = {
    "elongation": ("Contours are rounder", "largest eigenvalue ÷ RMS of all, without ÷ with"),
    "largest": ("Contours are wider", "largest eigenvalue of the Hessian, without ÷ with"),
    "left": (
        "The best step removes more of the loss",
        "loss left after the best step, without ÷ with",
    ),
    "length": ("Gradient descent takes larger steps", "length of the best step, with ÷ without"),
}


def run(setting: Setting) -> Result:
    at, early = setting.pick(([0, 10, 30, 100, 300, 1000], 100), ([0, 5], 5))
    normal, plain = (train(setting, norm, at) for norm in ("tfbn", "none"))
    ratios = {name: plain[name] / normal[name] for name in CLAIMS}
    ratios["length"] = 1 / ratios["length"]
    claims = [
        Claim("L11", f"{claim} {when}", measured, ratios[name][:, index], above=1)
        for index, when in ((0, "before training"), (at.index(early), f"after {early} steps"))
        for name, (claim, measured) in CLAIMS.items()
    ]
    seen = " ".join(
        f"{name} batch norm, {at[-1]} steps take the Hessian's largest eigenvalue in the median network from "
        f"{ends(of['largest'])}, and its ratio to the root mean square (RMS) of all from {ends(of['elongation'])}; "
        f"the share of the loss that the best step along the gradient leaves goes from {ends(100 * of['left'])} %."
        for name, of in (("With", normal), ("Without", plain))
    )
    curves = [np.median(of["random"][:, at.index(early)], axis=0) for of in (normal, plain)]
    far = [np.append(LENGTHS, np.inf)[np.append(c > 1.5, True).argmax()] for c in curves]
    seen += (
        f" In a random direction, the loss after {early} steps is 50 % higher at a distance of {number(far[0])} times "
        f"the weights' norm with batch norm, and at {number(far[1])} times without."
    )
    numbers = {"steps": at, "lengths": LENGTHS, "with": normal, "without": plain}
    return Result("Rounder contours", claims, seen, numbers, setting.to_dict())


def ends(values: np.ndarray) -> str:
    first, *_, last = np.median(values, axis=0)
    return f"{first:.3g} to {last:.3g}"


def train(setting: Setting, norm: str, at: list[int]) -> dict[str, np.ndarray]:
    """Returns measurements of the loss surface while networks of one kind train: (seeds, records, ...)."""
    networks = Networks(setting, Hidden(norm=norm, activation="tanh"), (50, 50, 50))
    surface = Surface(networks, examples=500)
    records: list[dict[str, np.ndarray]] = []

    def record(step: int) -> None:
        with tfbn.pause_statistics(networks.model):
            records.append(survey(surface))

    networks.begin(learning_rate=0.1)
    networks.train(at[-1], at=at, call=record)
    return {name: np.stack([r[name] for r in records], axis=1) for name in records[0]}


def survey(surface: Surface) -> dict[str, np.ndarray]:
    """Measures the loss surface around the current weights: (networks, ...)."""
    here, loss = surface.place(), surface.loss().numpy()
    largest, rms = surface.eigenvalues(iterations=30, draws=10)
    downhill = -unit(surface.gradient())
    along = {}
    for name, way in (("downhill", downhill), ("random", surface.random(seed=0))):
        losses = []
        for far in LENGTHS:
            surface.move(here + way * length(here) * far)
            losses.append(surface.loss())
        along[name] = np.stack(losses, axis=-1) / loss[:, np.newaxis]
    surface.move(here)
    left, best = along["downhill"].min(axis=-1), LENGTHS[along["downhill"].argmin(axis=-1)]
    return along | {"largest": largest, "elongation": largest / rms, "left": left, "length": best}


def draw(result: Result) -> style.Figure:
    numbers = result.numbers
    figure = style.figure(3.4)
    downhill, random, elongation = figure.subplots(1, 3)
    moment = numbers["steps"].index(100) if 100 in numbers["steps"] else -1
    for key, look in (("with", style.WITH), ("without", style.WITHOUT)):
        found = {name: np.array(values) for name, values in numbers[key].items()}
        for axes, way in ((downhill, "downhill"), (random, "random")):
            values = 100 * found[way][:, moment]
            style.band(axes, numbers["lengths"], values, **look | {"marker": ""})
        style.band(elongation, numbers["steps"], found["elongation"], **look)
    for axes, title in ((downhill, "(a) down the gradient"), (random, "(b) in a random direction")):
        axes.set_xscale("log")
        axes.set_ylim(50, 150)
        here = f"loss ÷ loss after {numbers['steps'][moment]} steps (%)"
        style.label(axes, "length of step ÷ length of weights", here, title)
    elongation.set_xscale("symlog", linthresh=10)
    elongation.set_ylim(bottom=0)
    downhill.legend(loc="lower right")
    style.label(
        elongation,
        "training steps",
        "largest eigenvalue ÷ RMS of all",
        "(c) elongation of the contours",
    )
    return figure
