"""What γ and β can do, and what they learn.

L2: with γ = √(σ² + ε) and β = μ, the layer is the identity: it can undo the normalization if that helps.
L3: γ and β give each hidden unit the mean and spread that suit its activation, so that a sigmoid is not confined
to its linear region; after training, γ and β differ from 1 and 0.

After training, sets γ and β of each layer to the values of L2, and compares its outputs with its inputs. Between −1
and 1, a sigmoid is within 0.02 of its tangent at 0; the share of inputs outside is counted before and after training.
"""

import numpy as np

from examples.lectures import style
from examples.lectures.networks import Networks
from examples.lectures.result import Claim, Result
from examples.lectures.setting import Setting
from examples.models import Hidden

LINEAR = 1.0
ROUNDING = (
    1e-5  # relative to the largest input: float32 has 7 digits, and a sum of 2,000 values fewer
)


def run(setting: Setting) -> Result:
    networks = Networks(setting, Hidden(activation="sigmoid"))
    networks.begin(learning_rate=0.3)
    before = beyond(networks)
    steps = setting.pick(3000, 20)
    networks.train(steps)
    after = beyond(networks)
    layers = networks.normalizations()
    gamma, beta = (
        np.stack([np.reshape(w, (networks.number, -1)) for w in weights], axis=1)
        for weights in ([x.gamma for x in layers], [x.beta for x in layers])
    )  # (seeds, layers, units)
    error = error_of_identity(networks)
    claims = [
        Claim(
            "L2",
            "With γ = √(σ² + ε) and β = μ, the layer is the identity",
            "largest difference between output and input ÷ largest input, over all layers",
            error,
            at_most=ROUNDING,
        ),
        Claim(
            "L3",
            "After training, γ differs from 1 by more than 0.1",
            f"root mean square of γ − 1 after {steps} steps",
            np.sqrt(np.square(gamma - 1).mean(axis=(1, 2))),
            above=0.1,
        ),
        Claim(
            "L3",
            "After training, β differs from 0 by more than 0.1",
            f"root mean square of β after {steps} steps",
            np.sqrt(np.square(beta).mean(axis=(1, 2))),
            above=0.1,
        ),
        Claim(
            "L3",
            "Sigmoids are not confined to their linear region",
            f"share of their inputs beyond ±{LINEAR:g} after training minus before, over all layers",
            (after - before).mean(axis=1),
            unit="% points",
            above=0,
        ),
    ]
    seen = (
        f"In the median network, the standard deviation of γ over the units is, from the first layer to the last, "
        f"{listed(gamma.std(-1))}, and that of β {listed(beta.std(-1))}. Of the sigmoids' inputs, "
        f"{listed(before, 0)} % lie beyond ±{LINEAR:g} before training, and {listed(after, 0)} % after it."
    )
    numbers = {"gamma": gamma, "beta": beta, "before": before, "after": after, "error": error}
    return Result("What γ and β learn", claims, seen, numbers, setting.to_dict())


def beyond(networks: Networks) -> np.ndarray:
    """Returns the share of the sigmoids' inputs outside their linear region, in %: (seeds, layers)."""
    inputs = networks.probe(networks.normalizations())(networks.setting.train.images[:2000], True)
    return np.stack([100 * (np.abs(z) > LINEAR).mean(axis=(1, 2)) for z in inputs], axis=1)


def error_of_identity(networks: Networks) -> np.ndarray:
    """Sets γ and β to undo the normalization. Returns the largest relative error over all layers: (seeds,)."""
    images = networks.setting.train.images[:2000]
    inputs = networks.probe(networks.kernels()[:-1])(images, True)
    errors = []
    for layer, z in zip(networks.normalizations(), inputs, strict=True):
        features = z.transpose(1, 0, 2).reshape(len(images), -1)
        layer.gamma.assign(np.sqrt(features.var(axis=0) + layer.epsilon))
        layer.beta.assign(features.mean(axis=0))
        difference = np.abs(networks.each(layer(features, training=True)) - z)
        errors.append(difference.max(axis=(1, 2)) / np.abs(z).max(axis=(1, 2)))
    return np.max(errors, axis=0)


def listed(values: np.ndarray, digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in np.median(values, axis=0))


def draw(result: Result) -> style.Figure:
    figure = style.figure()
    gamma, beta = (np.array(result.numbers[name])[0] for name in ("gamma", "beta"))
    places = figure.subplots(1, len(gamma), sharex=True, sharey=True)
    for index, axes in enumerate(places):
        axes.scatter(gamma[index], beta[index], s=14, color=style.BLUE, label="after training")
        axes.plot(
            1, 0, "+", color=style.VERMILION, markersize=13, markeredgewidth=2.5, label="before"
        )
        low, high = (np.median(np.array(result.numbers[k])[:, index]) for k in ("before", "after"))
        title = f"Hidden layer {index + 1}: inputs beyond ±{LINEAR:g}\n{low:.0f} % before, {high:.0f} % after"
        style.label(axes, "γ (spread given to a unit)", "β (mean given to a unit)", title)
        axes.label_outer()
    axes.legend()
    return figure
