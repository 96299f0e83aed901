"""Covariate shift inside.

L12: when earlier weights change, the input distribution of a later layer shifts less with batch norm.

At several points in training, all weights before the last hidden layer take a step along the negative gradient
of a mini-batch, while the others stay fixed. The shift is the change of the last hidden layer's inputs over the
training set. It is measured for the training step, and for a step of 1 % of the norm of these weights, since
gradients with and without batch norm differ in norm. The shift of a unit is the Wasserstein distance between its
old and new inputs, in old standard deviations. Then the step is undone.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, bands
from examples.lectures.setting import Setting
from examples.models import Hidden

RATE = 1.0
STEPS = {"own": "the training step", "equal": "a step of 1 % of the weights' norm"}


def run(setting: Setting) -> Result:
    at = setting.pick([0, 10, 30, 100, 300, 1000], [0, 5])
    normal, plain = (train(setting, norm, at) for norm in ("tfbn", "none"))
    claims = [
        Claim(
            "L12",
            "When earlier weights change, a later layer's input shifts less",
            f"how far {text} shifts it, without ÷ with, geometric mean over training",
            np.exp(np.log(plain[kind] / normal[kind]).mean(axis=1)),
            unit="×",
            above=1,
        )
        for kind, text in STEPS.items()
    ]
    seen = " ".join(
        f"{name} batch norm, the training step shifts the input of the median network's last hidden "
        f"layer by {ends(of['own'])} standard deviations and a step of 1 % by {ends(of['equal'])}; after {at[-1]} "
        f"steps, its test accuracy is {np.median(of['accuracy']):.1f} %."
        for name, of in (("With", normal), ("Without", plain))
    )
    numbers = {"steps": at, "with": normal, "without": plain}
    return Result("Covariate shift inside", claims, seen, numbers, setting.to_dict())


def train(setting: Setting, norm: str, at: list[int]) -> dict[str, np.ndarray]:
    """Trains networks of one kind. Returns the shifts by either step, (seeds, records), and the final accuracy."""
    networks = Networks(setting, Hidden(norm=norm, activation="sigmoid"))
    records = []
    networks.begin(RATE)
    networks.train(at[-1], at=at, call=lambda step: records.append(moves(networks, step)))
    moved = {kind: np.stack([record[kind] for record in records], axis=1) for kind in STEPS}
    return moved | {"accuracy": 100 * networks.accuracy()}


def moves(networks: Networks, step: int) -> dict[str, np.ndarray]:
    """Measures how far either step of the earlier weights shifts the last hidden layer's input: (networks,)."""
    layers, train = networks.model.layers, networks.setting.train
    last_hidden = layers.index(networks.kernels()[-2])
    early = [v for layer in layers[:last_hidden] for v in layer.trainable_variables]
    look = networks.probe([layers[last_hidden - 1]])
    rows = np.random.default_rng(step).choice(len(train.labels), 60, replace=False)
    gradients = networks.gradients(early, rows)
    lengths = length([np.reshape(v, (networks.number, -1)) for v in early]), length(gradients)
    rates = {"own": RATE, "equal": 0.01 * lengths[0] / lengths[1]}
    saved = networks.model.get_weights()
    (old,) = look(train.images[:2000], training=True)  # (networks, examples, units)
    moved = {}
    for kind, rate in rates.items():
        for variable, gradient in zip(early, gradients, strict=True):
            variable.assign_sub(np.reshape(gradient * np.reshape(rate, (-1, 1)), variable.shape))
        (new,) = look(train.images[:2000], training=True)
        networks.model.set_weights(saved)
        distance = np.abs(np.sort(new, axis=1) - np.sort(old, axis=1)).mean(axis=1)
        moved[kind] = np.median(distance / old.std(axis=1), axis=-1)
    return moved


def length(parts: list[np.ndarray]) -> np.ndarray:
    """Returns the norm over all parts of each network: (networks, values) each → (networks,)."""
    return np.linalg.norm(np.concatenate(parts, axis=1), axis=1)


def ends(moved: np.ndarray) -> str:
    medians = bands(moved)[1]
    return f"{medians.min():.2g} to {medians.max():.2g}"


def draw(result: Result) -> style.Figure:
    figure = style.figure()
    steps = result.numbers["steps"]
    for axes, (kind, text) in zip(figure.subplots(1, 2, sharey=True), STEPS.items(), strict=True):
        for key, look in (("without", style.WITHOUT), ("with", style.WITH)):
            style.band(axes, steps, result.numbers[key][kind], **look)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.set_yscale("log")
        y = "moved by (standard deviations)"
        style.label(axes, "training steps before it", y, f"By {text}")
        axes.label_outer()
    axes.legend()
    return figure
