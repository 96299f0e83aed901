"""The bias that cancels.

L5: a bias b before batch norm cancels out, because the mean contains it. Its gradient is zero; leave it out, since
β does its job.

Trains networks with a bias before the batch norm of every hidden layer, starting from random b, and records b and
β; and networks without batch norm, to compare. The gradient of b is zero up to rounding: it is a sum of terms that
cancel, each with the 7 digits of float32. Gradient descent takes steps of that size. Adam divides a gradient by
its own magnitude, so rounding errors cause steps too, though smaller ones.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import tfbn
from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result, number
from examples.lectures.setting import Setting

RATES = {"sgd": 0.3, "adam": 0.003}
NAMES = {"sgd": "gradient descent", "adam": "Adam"}
HIDDEN = {
    "with": lambda a, linear, width: keras.activations.sigmoid(
        tfbn.BatchNormalization()(linear(width)(a))
    ),
    "without": lambda a, linear, width: keras.activations.sigmoid(linear(width)(a)),
}
# Relative to β: 60 terms cancel, each accurate to 6e-8, and about 20 times as large as β's because of 1/σ.
ROUNDING = 1e-4


def run(setting: Setting) -> Result:
    at = setting.pick([1, 10, 100, 1000], [1, 5])
    found = {
        name: {kind: train(setting, kind, name, at) for kind in ("with", "without")}
        for name in RATES
    }
    gradient = found["sgd"]["with"]["gradient"]
    claims = [
        Claim(
            "L5",
            "A bias before batch norm has no gradient",
            "gradient of b ÷ gradient of β, maximum over training",
            (gradient["b"] / gradient["beta"]).max(axis=1),
            at_most=ROUNDING,
        )
    ]
    seen = []
    for name, networks in found.items():
        b, beta, plain = (
            networks[kind]["moved"][variable][:, -1]
            for kind, variable in (("with", "b"), ("with", "beta"), ("without", "b"))
        )
        claims.append(
            Claim(
                "L5",
                f"Training does not change it: {NAMES[name]}",
                f"change of b after {at[-1]} steps ÷ change of β",
                b / beta,
                at_most=ROUNDING,
            )
        )
        seen.append(
            f"After {at[-1]} steps of {NAMES[name]}, the median network's β has changed by {np.median(beta):.2g} "
            f"and its b by {number(np.median(b))}; without batch norm, b has changed by {np.median(plain):.2g}."
        )
    numbers = {"steps": at, "found": found}
    return Result("The bias that cancels", claims, " ".join(seen), numbers, setting.to_dict())


def train(setting: Setting, kind: str, optimizer: str, at: list[int]) -> dict[str, Any]:
    """Returns the RMS of the gradients of b and β, and of their changes: (seeds, records) each."""
    networks = Networks(setting, HIDDEN[kind], optimizer=optimizer)
    networks.begin(RATES[optimizer])
    hidden, rng = networks.kernels()[:-1], np.random.default_rng(0)
    for layer in hidden:
        layer.bias.assign(rng.normal(size=layer.bias.shape))
    watched = {"b": [layer.bias for layer in hidden]}
    if kind == "with":
        watched["beta"] = [layer.beta for layer in networks.normalizations()]
    start = {name: [v.numpy() for v in variables] for name, variables in watched.items()}
    found = {key: {name: [] for name in watched} for key in ("gradient", "moved")}

    def size(parts: Sequence[Any]) -> np.ndarray:
        values = [np.reshape(part, (networks.number, -1)) for part in parts]
        return np.sqrt(np.square(np.concatenate(values, axis=1)).mean(axis=1))

    def record(step: int) -> None:
        rows = np.random.default_rng(step).choice(len(setting.train.labels), 60, replace=False)
        for name, variables in watched.items():
            moves = [v - old for v, old in zip(variables, start[name], strict=True)]
            found["gradient"][name].append(size(networks.gradients(variables, rows)))
            found["moved"][name].append(size(moves))

    networks.train(at[-1], at=at, call=record)
    return {k: {n: np.stack(v, axis=1) for n, v in one.items()} for k, one in found.items()}


def draw(result: Result) -> style.Figure:
    figure = style.figure(3.8)
    steps, found = result.numbers["steps"], result.numbers["found"]
    lines = (
        ("without", "b", style.WITHOUT | {"label": "b without batch norm"}),
        ("with", "beta", {"color": style.GREEN, "linestyle": ":", "marker": "^", "label": "β"}),
        ("with", "b", style.WITH | {"label": "b before batch norm"}),
    )
    panels = (("sgd", "gradient"), ("sgd", "moved"), ("adam", "moved"))
    for axes, (name, key) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for kind, variable, look in lines:
            style.band(axes, steps, found[name][kind][key][variable], **look)
        axes.loglog()
        what = "Gradients," if key == "gradient" else "Moved by"
        style.label(axes, "training steps", "root mean square", f"{what} {NAMES[name]}")
        axes.label_outer()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
